"""The shape of a decoder: what the config of every family has."""

import dataclasses
from typing import TYPE_CHECKING

from lora_jax.models.rope_scaling import LongRopeScaling, Scaling
from lora_jax.models.rope_scaling import RopeScaling as RopeScaling

if TYPE_CHECKING:
    from lora_jax.models.family import Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embeddings of base `theta` over the first `dims` dimensions of each head."""

    theta: float
    dims: int
    scaling: Scaling | None = None

    @property
    def amplitude(self) -> float:
        """By which rotated queries and keys are multiplied."""
        return 1.0 if self.scaling is None else self.scaling.amplitude


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder; a static argument of `jit`. A family's own config adds its own
    fields, and names its `family`. RoPE turns the first `rope_dims` dimensions of each head, None
    all of them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rope_theta: float = 10_000.0
    rope_scaling: Scaling | None = None
    rope_dims: int | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads="
                f"{self.num_kv_heads}: every key/value head serves a group of query heads."
            )
        dims = self.head_dim if self.rope_dims is None else self.rope_dims
        if dims % 2 or not 0 < dims <= self.head_dim:
            name = "head_dim" if self.rope_dims is None else "rope_dims"
            raise ValueError(
                f"{name}={dims} must be even: RoPE rotates pairs, up to {self.head_dim} dimensions."
            )
        windows = self.attention.windows
        if windows is not None and len(windows) != self.num_layers:
            raise ValueError(
                f"windows has {len(windows)} entries for {self.num_layers} layers, expected one a "
                "layer."
            )
        if isinstance(self.rope_scaling, LongRopeScaling):
            self.rope_scaling.check(dims)

    @property
    def family(self) -> "Family":
        """The family, whose functions compute a model of this shape."""
        raise NotImplementedError

    @property
    def rope(self) -> Rope:
        """The RoPE of its fields."""
        dims = self.head_dim if self.rope_dims is None else self.rope_dims
        return Rope(theta=self.rope_theta, dims=dims, scaling=self.rope_scaling)

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The RoPE of each layer; None where a layer has none."""
        return (self.rope,) * self.num_layers

    @property
    def attention(self) -> "Attention":
        """How its layers attend."""
        return Attention()


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
