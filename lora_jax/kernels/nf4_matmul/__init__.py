"""`x @ W` for a frozen NF4 weight, from its packed bytes, in both directions.

`reference.py` is the definition; `mosaic_gpu.py` (Hopper) and `mosaic_tpu.py` are the kernels.
"""

import importlib
import re
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from lora_jax import context_mesh
from lora_jax.kernels.nf4_matmul import reference

Implementation = Literal["xla", "mosaic_gpu", "mosaic_tpu"]
PLATFORM: dict[Implementation, str] = {"mosaic_gpu": "cuda", "mosaic_tpu": "tpu"}
# The Hopper kernel is taken by name alone until it has run on one: the interpreter has neither its
# shuffle nor wgmma's operand in registers, and no GPU has been at hand.
BY_DEFAULT: tuple[Implementation, ...] = ("mosaic_tpu",)
HOPPER = re.compile(r"\bG?H(100|200|800|20)\b")


def nf4_matmul(
    x: jax.Array,
    codes: jax.Array,
    absmax: jax.Array,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """`y = x @ W` with `W[k, n] = CODEBOOK[code[k, n]] * absmax[k // block, n]`.

    The product is accumulated in float32. In bfloat16 the decoded weight is rounded once, as QLoRA
    does (Dettmers et al. 2023, equation 5). The gradient is `dx = dy @ W.T`, decoded from the same
    bytes: nothing of the size of `W` is kept for the backward pass. `codes` and `absmax` are frozen
    and get no gradient.

    Args:
      x: bfloat16 or float32 `[..., d_in]`.
      codes: uint8 `[d_in / 2, d_out]`; byte `i` holds the code of row `2 i` in its high half and
        that of row `2 i + 1` in its low half.
      absmax: float32 `[d_in / block, d_out]`.
      implementation: None takes the TPU kernel where it takes the shapes, and XLA elsewhere; the
        Hopper kernel is taken by name alone, until it has been measured. A name takes that one or
        raises. The device is that of `jax.sharding.use_abstract_mesh`, for a program compiled ahead
        of time, or the default one.
        Kernels are not partitioned automatically: None takes them on a single device and inside
        `shard_map(..., check_vma=False)` or `pmap`, and XLA under automatic partitioning.

    Returns:
      `[..., d_out]` in the dtype of `x`.

    Raises:
      ValueError: for shapes or dtypes that do not fit, and for an implementation given by name that
        the platform, the shape or the dtype does not allow.
    """
    _check(x, codes, absmax)
    if implementation is not None and (lack := _lack(implementation, x, codes, absmax)):
        raise ValueError(
            f"nf4_matmul: {implementation!r} {lack}. Leave `implementation` out, or ask for 'xla'."
        )
    return _contract(implementation, False, x, codes, absmax)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(
    implementation: Implementation | None,
    transpose: bool,
    x: jax.Array,
    codes: jax.Array,
    absmax: jax.Array,
) -> jax.Array:
    """`x @ W`, or `x @ W.T`: each is the other's gradient."""
    runs = {name: partial(_run, name, transpose) for name in get_args(Implementation)}
    if implementation is not None:
        return runs[implementation](x, codes, absmax)
    kernels = {
        platform: runs[name]
        for name, platform in PLATFORM.items()
        if name in BY_DEFAULT and context_mesh.is_unsharded() and not _lack(name, x, codes, absmax)
    }
    if not kernels:
        return runs["xla"](x, codes, absmax)
    # The same trace may still be lowered for another platform, a host's CPU for one.
    return jax.lax.platform_dependent(x, codes, absmax, default=runs["xla"], **kernels)


def _forward(implementation, transpose, x, codes, absmax):
    return _contract(implementation, transpose, x, codes, absmax), (codes, absmax)


def _backward(implementation, transpose, residuals, dy):
    return _contract(implementation, not transpose, dy, *residuals), None, None


_contract.defvjp(_forward, _backward)


def _run(implementation, transpose, x, codes, absmax):
    if implementation == "xla":
        return reference.matmul(x, codes, absmax, transpose=transpose)
    kernel = partial(_backend(implementation).matmul, transpose=transpose)
    if implementation == "mosaic_tpu":
        kernel = partial(kernel, device_kind=context_mesh.device().device_kind)
    return over_rows(kernel, x, codes, absmax)


def _backend(implementation: Implementation) -> ModuleType:
    """The module of a kernel, imported where it is needed: its compiler takes half a second."""
    return importlib.import_module(f"{__name__}.{implementation}")


def over_rows(
    kernel: Callable[..., jax.Array], x: jax.Array, codes: jax.Array, absmax: jax.Array
) -> jax.Array:
    """Runs a kernel of `x [M, d]`: leading axes of `x`, and those of a vmap, are more rows."""

    @jax.custom_batching.custom_vmap
    def rows(x, codes, absmax):
        y = kernel(x.reshape(-1, x.shape[-1]), codes, absmax)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @rows.def_vmap
    def batched(size, batched, *args):
        if not any(batched[1:]):
            return rows(*args), True

        def each(i):
            at = partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
            return rows(*(at(a) if b else a for a, b in zip(args, batched, strict=True)))

        return jax.lax.map(each, jnp.arange(size)), True

    return rows(x, codes, absmax)


def _lack(implementation, x, codes, absmax) -> str | None:
    """What keeps an implementation from taking these arguments here; None where nothing does."""
    if implementation not in get_args(Implementation):
        return f"is not one of {', '.join(get_args(Implementation))}"
    if implementation == "xla":
        return None
    device = context_mesh.device()
    if implementation == "mosaic_gpu" and not HOPPER.search(device.device_kind):
        return f"needs a Hopper GPU, and this program is for a {device.device_kind}"
    if implementation == "mosaic_tpu" and device.platform != "tpu":
        return f"needs a TPU, and this program is for a {device.device_kind}"
    M, K, N = x.size // x.shape[-1], 2 * codes.shape[0], codes.shape[1]
    block = K // absmax.shape[0]
    fits = (
        _backend("mosaic_gpu").fits(K, N, block)
        if implementation == "mosaic_gpu"
        else _backend("mosaic_tpu").tiles(M, K, N, block, device.device_kind)
    )
    if M and N and fits:
        return None
    return f"has no tiles for {M} rows, d_in = {K} and d_out = {N} in blocks of {block}"


def _check(x: jax.Array, codes: jax.Array, absmax: jax.Array) -> None:
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"nf4_matmul: x is {x.dtype}; cast it to bfloat16 or float32.")
    if codes.dtype != jnp.uint8 or absmax.dtype != jnp.float32:
        raise ValueError(
            f"nf4_matmul: codes are {codes.dtype} and absmax is {absmax.dtype}; packed codes are "
            "uint8 and absmax float32."
        )
    if codes.ndim != 2 or absmax.ndim != 2 or codes.shape[1] != absmax.shape[1]:
        raise ValueError(
            f"nf4_matmul: codes {codes.shape} and absmax {absmax.shape} are not "
            "[d_in / 2, d_out] and [d_in / block, d_out]; slice stacked layers first, or vmap."
        )
    d_in, blocks = 2 * codes.shape[0], absmax.shape[0]
    if x.ndim == 0 or x.shape[-1] != d_in:
        raise ValueError(f"nf4_matmul: x {x.shape} does not end in d_in = {d_in}.")
    if blocks == 0 or d_in % blocks or (d_in // blocks) % 2:
        raise ValueError(
            f"nf4_matmul: {blocks} rows of absmax do not divide d_in = {d_in} into equal blocks "
            "of an even size."
        )
