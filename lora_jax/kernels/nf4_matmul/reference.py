"""NF4 matmul in plain XLA: the definition, and the implementation where there is no kernel.

Dimension key: M rows, K = d_in, N = d_out, H = K / 2 bytes, B = blocks along K.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.kernels.lookup import look_up

# NormalFloat 4: quantiles of a normal distribution (QLoRA, Dettmers et al. 2023, appendix E).
CODEBOOK = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def dequantize(codes_HN: jax.Array, absmax_BN: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`W[k, n] = CODEBOOK[code[k, n]] * absmax[k // block, n]`, a float32 product rounded once.

    Args:
      codes_HN: uint8 `[K / 2, N]`; the high half of byte `i` is the code of row `2 i`, the low half
        that of row `2 i + 1`.
      absmax_BN: float32 `[K / block, N]`.
      dtype: of the result.

    Returns:
      The dense weight `[K, N]`.
    """
    blocks, N = absmax_BN.shape
    nibbles = jnp.stack([codes_HN >> 4, codes_HN & 15], axis=1)
    values = look_up(CODEBOOK, nibbles)
    scaled = values.reshape(blocks, -1, N) * absmax_BN[:, None, :]
    return scaled.reshape(-1, N).astype(dtype)


def matmul(
    x: jax.Array, codes_HN: jax.Array, absmax_BN: jax.Array, *, transpose: bool = False
) -> jax.Array:
    """`x [..., K] @ W`, or `x [..., N] @ W.T`: accumulated in float32, returned in `x`'s dtype.

    In bfloat16 the decoded weight is rounded to bfloat16, once; in float32 nothing is rounded to a
    shorter format on any platform.
    """
    W_KN = dequantize(codes_HN, absmax_BN, x.dtype)
    contracted = ((x.ndim - 1,), (1 if transpose else 0,))
    return jax.lax.dot_general(
        x,
        W_KN,
        (contracted, ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    ).astype(x.dtype)
