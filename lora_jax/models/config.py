"""The shape of a decoder: what the config of every family has."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_jax.models.family import Family


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
class DecoderConfig:
    """The shape of a decoder; a static argument of `jit`. A family's own config adds its own
    fields, and names its `family`."""

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

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads="
                f"{self.num_kv_heads}: every key/value head serves a group of query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs.")

    @property
    def family(self) -> "Family":
        """The family, whose functions compute a model of this shape."""
        raise NotImplementedError

    @property
    def attention(self) -> "Attention":
        """How its layers attend."""
        return Attention()

    def check_length(self, positions: int) -> None:
        """Raises ValueError if the model cannot read a row of so many positions."""
        del positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """How a model's attention differs from a causal softmax of `q k^T / sqrt(H)`.

    Attributes:
      scale: of the scores; None is `1 / sqrt(H)`.
      cap: scores s become `cap * tanh(s / cap)`.
      windows: for each layer, how many keys a query sees, its own included; None sees all.
    """

    scale: float | None = None
    cap: float | None = None
    windows: tuple[int | None, ...] | None = None
