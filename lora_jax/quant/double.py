"""Double quantisation: the absmax of blocks, itself in 8 bits (Dettmers et al. 2023, section 3)."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.kernels.lookup import look_up
from lora_jax.quant import codebooks
from lora_jax.schema import leaf

NESTED_BLOCK = 256
_LANES = 8  # of the vectors that torch sums with on a CPU


@flax.struct.dataclass
class DoubleQuantized:
    """`absmax = DYNAMIC8[codes] * scale + offset`.

    Nested blocks of 256 run through the matrix `[d_out, d_in / block]` of each layer row by row,
    the order of bitsandbytes, and the last of a layer may be shorter.

    Attributes:
      codes: uint8 `[stack..., d_in / block, d_out]`.
      scale: float32 `[stack..., nested blocks]`, the largest magnitude of each.
      offset: float32 `[stack...]`, the mean that was subtracted first.
    """

    codes: jax.Array = leaf("stack in out", trained=False)
    scale: jax.Array = leaf("stack nested", trained=False)
    offset: jax.Array = leaf("stack", trained=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def decode(self) -> jax.Array:
        """float32 `[stack..., d_in / block, d_out]`."""
        *stack, blocks, d_out = self.codes.shape
        scale = jnp.repeat(self.scale, NESTED_BLOCK, axis=-1)[..., : blocks * d_out]
        scale = jnp.swapaxes(scale.reshape(*stack, d_out, blocks), -1, -2)
        product = look_up(codebooks.DYNAMIC8, self.codes) * scale
        # No product exceeds its scale. Saying so keeps XLA from rounding product and sum as one.
        return jnp.minimum(product, scale) + self.offset[..., None, None]


def double_quantize(absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """The `codes`, `scale` and `offset` of one layer's absmax `[d_in / block, d_out]`, as
    bitsandbytes' CPU build computes them."""
    flat = absmax.T.reshape(-1)
    with np.errstate(over="ignore"):
        offset = torch_mean(flat)
    if not np.isfinite(offset):
        raise ValueError("the sum of its absmax exceeds float32: give double_quant=False.")
    blocks = np.pad(flat - offset, (0, -flat.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    scale = np.abs(blocks).max(axis=1)
    with np.errstate(all="ignore"):  # the reciprocal of a denormal scale is infinite
        scaled = np.clip(blocks * (np.float32(1) / scale)[:, None], -1, 1)
    codes = np.where(scale[:, None] > 0, _looked_up(scaled), np.uint8(0))
    codes = codes.reshape(-1)[: flat.size].reshape(absmax.shape[::-1]).T
    return np.ascontiguousarray(codes), scale, offset


def decode_double(codes: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """What `DoubleQuantized.decode` computes for one layer, in numpy."""
    scales = np.repeat(scale, NESTED_BLOCK)[: codes.size].reshape(codes.shape[::-1]).T
    return codebooks.DYNAMIC8[codes] * scales + offset


def _lookup() -> np.ndarray:
    """The nearest code of each of 65,536 even steps from -1 to 1."""
    midpoints = (codebooks.DYNAMIC8[:-1] + codebooks.DYNAMIC8[1:]) / np.float32(2)
    steps = np.arange(1 << 16, dtype=np.float32) / np.float32(32767.5) - np.float32(1)
    return np.searchsorted(midpoints, steps).astype(np.uint8)


_LOOKUP = _lookup()


def _looked_up(scaled: np.ndarray) -> np.ndarray:
    """The code of the nearest step, which near a midpoint is not always the nearest code."""
    step = (scaled + np.float32(1)) * np.float32(32767.5) + np.float32(0.5)
    return _LOOKUP[np.nan_to_num(step).astype(np.int64)]


def torch_mean(values: np.ndarray) -> np.float32:
    """The mean of float32 values, added in the order in which torch adds them on one CPU thread.

    Lanes are summed apart, four vectors at a time, in a cascade: groups of rows, groups of their
    sums, and so on for four levels. Any order would do for the format; this one gives its bits.
    """
    lanes = _LANES if values.size >= _LANES else 1
    vectors = values[: values.size // lanes * lanes].reshape(-1, lanes)
    quads = len(vectors) // 4
    total = _cascade(vectors[: quads * 4].reshape(quads, 4, lanes))
    lane_sums = _in_order([total[0], *vectors[quads * 4 :], *total[1:]])
    rest = _in_order([*values[vectors.size :], *lane_sums])
    return np.float32(rest / np.float32(values.size))


def _cascade(rows: np.ndarray) -> np.ndarray:
    power = max(4, (max(len(rows), 1) - 1).bit_length() // 4)
    group, sums = 1 << power, []
    for _ in range(3):
        whole = len(rows) - len(rows) % group
        sums.append(np.add.reduce(rows[whole:], axis=0))
        rows = np.add.reduce(rows[:whole].reshape(-1, group, *rows.shape[1:]), axis=1)
    return _in_order([*sums, np.add.reduce(rows, axis=0)])


def _in_order(terms: list) -> np.ndarray:
    return np.add.accumulate(terms)[-1]
