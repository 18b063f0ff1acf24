"""The norm of each update and of its weight, without a merged tree."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.adapted import Adapted
from lora_jax.interop.forward import in_float32
from lora_jax.parallel import hosts
from lora_jax.transform import Delta, bind, delta_nodes
from lora_jax.weights import PyTree, as_matrix, dense, is_weight, scan_layers


def update_norms(base: PyTree, delta: Delta) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`{path: (|update|, |weight|)}`, Frobenius norms, float32 `[layers]`.

    The merged weight of one layer is built at a time. Paths whose method cannot be merged, and
    prompts and prefixes, are left out.
    """
    pairs = _pairs(base, delta)
    with jax.default_matmul_precision("highest"):
        norms = hosts.gathered(_measured(pairs))
    return {path: tuple(np.sqrt(np.asarray(square))) for path, square in norms.items()}


def measured_bytes(base: PyTree, delta: Delta) -> int:
    """The bytes of temporaries that `update_norms` takes; base and delta may be abstract."""
    pairs = jax.eval_shape(_pairs, base, delta)
    analysis: Any = _measured.lower(pairs).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def _pairs(base: PyTree, delta: Delta) -> dict[str, tuple[Any, Any]]:
    """`{path: (adapted, frozen)}` of all that has a merged form."""
    params = in_float32(base)
    before = paths.flatten(params, is_leaf=is_weight)
    after = paths.flatten(bind(params, delta), is_leaf=is_weight)
    return {
        path: (after[path], before[path])
        for path in delta_nodes(delta)
        if path in before and _merges(after[path])
    }


def _merges(weight: Any) -> bool:
    try:
        jax.eval_shape(dense, weight)
    except ValueError:
        return False
    return True


@jax.jit
def _measured(pairs: Mapping[str, tuple[Any, Any]]) -> dict[str, jax.Array]:
    return {path: _squares(*pair) for path, pair in pairs.items()}


def _squares(after: Any, before: Any) -> jax.Array:
    """`[2, layers]`: the squared norms of the update and of the weight."""
    if isinstance(after, Adapted):
        after = as_matrix(after, after.layout)
        stack = after.ndim - 2
        return _each(stack, lambda w: _pair(dense(w), dense(w.base)), after)
    stack = max(0, after.ndim - 2)
    return _each(stack, lambda pair: _pair(*map(dense, pair)), (after, before))


def _each(stack: int, measure: Callable[[Any], jax.Array], weights: Any) -> jax.Array:
    """`measure` of each layer, `[2, layers]`."""
    if not stack:
        return measure(weights)[:, None]
    _, found = scan_layers(
        lambda carry, layer: (carry, _each(stack - 1, measure, layer)), jnp.zeros(()), weights
    )
    return jnp.moveaxis(found, 1, 0).reshape(2, -1)


def _pair(after: jax.Array, before: jax.Array) -> jax.Array:
    after, before = after.astype(jnp.float32), before.astype(jnp.float32)
    return jnp.stack([jnp.sum((after - before) ** 2), jnp.sum(before**2)])
