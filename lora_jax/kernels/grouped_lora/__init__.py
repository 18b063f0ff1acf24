"""`y += (x @ a) @ b` with other pages of ranks for every segment of tokens, in both directions.

`reference.py` is the definition, `gathering.py` the implementation in XLA, `mosaic_gpu.py` (Hopper)
and `mosaic_tpu.py` are the kernels. All of them cost what tokens and the pages of their segments
cost, not the bank; `lax.ragged_dot`, with a group for every page, is dense over all pages on CUDA.

Which is right when: no accelerator has timed them yet (`scripts/bench_kernels.py` would). What is
known is what compilers show for machines that were not there, `tests/kernels/test_grouped_lora_aot`
(jax 0.12.0.1, bfloat16, d_in = d_out = 4096). For an H100, bytes that a program holds beside its
arguments:

| tokens | segments | pages of each | XLA | Hopper kernel |
|---|---|---|---|---|
| 8 | 8 | 2 | 320 B | 0.5 MB |
| 32 | 32 | 8 | 16.8 MB | 2.3 MB |
| 2048 | 8 | 2 | 26.9 MB | 20.5 MB |

In the first case XLA reads pages where they are, in 4 programs; in the others it first copies them,
or tokens, beside each other. So gathering should be right for few tokens of low ranks, and the
kernel for more. A TPU's kernel holds less than 1 MB there, and is taken wherever it has tiles.
"""

import importlib
from functools import partial
from types import ModuleType
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from lora_jax import context_mesh
from lora_jax.kernels.grouped_lora import gathering
from lora_jax.kernels.nf4_matmul import HOPPER

Implementation = Literal["xla", "mosaic_gpu", "mosaic_tpu"]
PLATFORM: dict[Implementation, str] = {"mosaic_gpu": "cuda", "mosaic_tpu": "tpu"}
# The Hopper kernel is taken by name alone until it has run on one: the interpreter has one thread
# where the GPU has a warpgroup, and knows nothing of how its operands lie in shared memory.
BY_DEFAULT: tuple[Implementation, ...] = ("mosaic_tpu",)


def grouped_lora(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    pages: jax.Array,
    sizes: jax.Array | None = None,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """`y[n] = sum_j (x[n] @ a[pages[s, j]].T) @ b[pages[s, j]]` for token n of segment s.

    A page is r ranks of an adapter; both of its factors are stored rank first, so that the gradient
    of x is the same operation with the two exchanged. Pages that no segment names are not read.
    Products are summed in float32; in bfloat16 `x @ a.T` is rounded once on the way.

    Args:
      x: bfloat16 or float32 `[N, d_in]`, the tokens of segment 0 first.
      a: bfloat16 or float32 `[P, r, d_in]`.
      b: of the dtype of `a`, `[P, r, d_out]`.
      pages: integers `[S, w]`, the pages of each segment in any order; -1 is none. Indices of P and
        above are not checked: what such a segment gets is undefined.
      sizes: integers `[S]`, how many tokens each segment has; the rest of x, if any, gets zeros.
        None: N / S each, which needs no padding in XLA.
      implementation: None takes the TPU kernel where it has tiles, and XLA elsewhere: a block of
        one token where segments are short (decoding), longer ones for more. The Hopper kernel,
        which has bfloat16 only, is taken by name alone, until it has been measured. A name takes
        that one or raises. Kernels are not partitioned automatically: None takes them on a single
        device and inside `shard_map(..., check_vma=False)` or `pmap`.

    Returns:
      `[N, d_out]` in the dtype of `x`. Gradients flow to x, a and b; those of a and b are as large
      as a and b.

    Raises:
      ValueError: for shapes or dtypes that do not fit, and for an implementation given by name that
        the platform, the shape or the dtype does not allow.

    Source: Punica (Chen et al. 2023, arXiv:2310.18547) and S-LoRA (Sheng et al. 2023,
    arXiv:2311.03285, section 5), whose pages hold single ranks.
    """
    _check(x, a, b, pages, sizes)
    if implementation is not None and (lack := _lack(implementation, x, b, pages)):
        raise ValueError(
            f"grouped_lora: {implementation!r} {lack}. Leave `implementation` out, or ask for "
            "'xla'."
        )
    return _grouped(implementation, x, a, b, pages, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(
    implementation: Implementation | None,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    pages: jax.Array,
    sizes: jax.Array | None,
) -> jax.Array:
    runs = {name: partial(_run, name) for name in get_args(Implementation)}
    if implementation is not None:
        return runs[implementation](x, a, b, pages, sizes)
    kernels = {
        platform: runs[name]
        for name, platform in PLATFORM.items()
        if name in BY_DEFAULT and context_mesh.is_unsharded() and not _lack(name, x, b, pages)
    }
    if not kernels:
        return runs["xla"](x, a, b, pages, sizes)
    # The same trace may still be lowered for another platform, a host's CPU for one.
    return jax.lax.platform_dependent(x, a, b, pages, sizes, default=runs["xla"], **kernels)


def _forward(implementation, x, a, b, pages, sizes):
    return _grouped(implementation, x, a, b, pages, sizes), (x, a, b, pages, sizes)


def _backward(implementation, residuals, dy):
    x, a, b, pages, sizes = residuals
    dx = _grouped(implementation, dy, b, a, pages, sizes)
    da, db = gathering.factor_gradients(x, dy, a, b, pages, sizes)
    return dx, da, db, None, None


_grouped.defvjp(_forward, _backward)


def _run(implementation, x, a, b, pages, sizes):
    if implementation == "xla":
        return gathering.grouped(x, a, b, pages, sizes)
    if sizes is None:
        sizes = jnp.full(len(pages), len(x) // len(pages), jnp.int32)
    return in_turn(_backend(implementation).grouped)(x, a, b, pages, sizes)


def in_turn(kernel):
    """The kernel, whose scalars have no batch axis: under a vmap it runs for one after another."""
    return jax.custom_batching.sequential_vmap(kernel)


def _backend(implementation: Implementation) -> ModuleType:
    """The module of a kernel, imported where it is needed: its compiler takes half a second."""
    return importlib.import_module(f"{__name__}.{implementation}")


def _lack(implementation, x, b, pages) -> str | None:
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
    if implementation == "mosaic_gpu" and (x.dtype, b.dtype) != (jnp.bfloat16, jnp.bfloat16):
        return f"takes bfloat16, and x is {x.dtype} and the pages are {b.dtype}"
    (N, D), (P, r, O), (S, W) = x.shape, b.shape, pages.shape  # noqa: E741
    if 0 not in (N, P, r, S, W, D, O) and _fits(implementation, x, b, pages):
        return None
    return f"has no tiles for {N} tokens, d_in = {D} and d_out = {O} with {W} pages of {r} ranks"


def _fits(implementation, x, b, pages) -> bool:
    (N, D), (_, r, O), (S, W) = x.shape, b.shape, pages.shape  # noqa: E741
    if implementation == "mosaic_gpu":
        return _backend("mosaic_gpu").fits(r, W, D, O)
    of = partial(_backend("mosaic_tpu").tiles, R=W * r, x_bytes=x.dtype.itemsize)
    both_ways = (D, O), (O, D)
    return r % 8 == 0 and all(of(N, S, *d, page_bytes=b.dtype.itemsize) for d in both_ways)


def _check(x, a, b, pages, sizes) -> None:
    floats = (jnp.bfloat16, jnp.float32)
    if x.dtype not in floats or a.dtype not in floats or a.dtype != b.dtype:
        raise ValueError(
            f"grouped_lora: x is {x.dtype}, a {a.dtype} and b {b.dtype}: expected bfloat16 or "
            "float32, a and b alike."
        )
    if x.ndim != 2 or a.ndim != 3 or b.ndim != 3 or x.shape[1] != a.shape[2]:
        raise ValueError(
            f"grouped_lora: x {x.shape}, a {a.shape} and b {b.shape} are not [N, d_in], "
            "[P, r, d_in] and [P, r, d_out]."
        )
    if a.shape[:2] != b.shape[:2]:
        raise ValueError(
            f"grouped_lora: a {a.shape} and b {b.shape} differ in pages or in ranks of a page."
        )
    if pages.ndim != 2 or not jnp.issubdtype(pages.dtype, jnp.integer):
        raise ValueError(
            f"grouped_lora: pages are {pages.dtype} {pages.shape}, expected integers [S, w]."
        )
    if sizes is None:
        if not len(pages) or len(x) % len(pages):
            raise ValueError(
                f"grouped_lora: {len(x)} tokens are not {len(pages)} segments of one size: give "
                "their sizes."
            )
    elif sizes.shape != pages.shape[:1] or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(
            f"grouped_lora: sizes are {sizes.dtype} {sizes.shape}, expected integers, one for each "
            f"of {len(pages)} segments."
        )
