"""Hyperparameters of a Llama-family model."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary frequencies (Llama 3 herd of models, section 3.4.2).

    Wavelengths longer than `original_context / low_freq_factor` are divided by `factor`, those
    shorter than `original_context / high_freq_factor` are kept, and in between the two blend.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a Llama 2, Llama 3.x, SmolLM2, Mistral, Qwen2 or Qwen3; a static argument of
    `jit`.

    `qkv_bias` adds biases to queries, keys and values (Qwen2), `qk_norm` an RMS norm over each
    head of queries and keys before they are rotated (Qwen3). Beyond `attention_window` positions
    the checkpoint's layers slide a window, which this model does not: longer rows are refused.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    attention_window: int | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads="
                f"{self.num_kv_heads}: every key/value head serves a whole group of query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs.")

    def check_length(self, positions: int) -> None:
        """Raises ValueError if a row of so many positions would need a sliding window."""
        if self.attention_window is not None and positions > self.attention_window:
            raise ValueError(
                f"a row of {positions} positions is longer than the model's attention window of "
                f"{self.attention_window}, beyond which its layers slide that window; that is not "
                "supported. Use shorter rows; where the weights know no window, remove "
                "sliding_window from the checkpoint's config."
            )
