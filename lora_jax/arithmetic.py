"""Arithmetic on LoRA adapters: weighted sums, and an adapter from a fine-tuned model."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.data_inits import as_plain_lora
from lora_jax.layouts import Layout
from lora_jax.methods import LoRA, LoRANode, Method
from lora_jax.methods.decompositions import each_layer, truncated_svd
from lora_jax.targets import Targets
from lora_jax.transform import Delta, delta_nodes, lora_transform
from lora_jax.weights import PyTree, as_matrix, dense_float32, is_weight

How = Literal["cat", "svd", "ties", "dare", "dare_ties"]


def combine(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    how: How = "cat",
    rank: int | None = None,
    density: float | None = None,
    key: jax.Array | None = None,
) -> Delta:
    """One LoRA delta from several, by their updates `U_i = scale_i * a_i @ b_i`.

    Args:
      deltas: over one base; a path that one of them lacks counts as zero there. A delta that was
        initialised by PiSSA or OLoRA counts as its plain equivalent, of twice the rank.
      weights: a number `w_i` for each.
      how: "cat" is `sum_i w_i U_i`, exactly: factors are concatenated, so ranks add up (PEFT's
        "linear" mixes the factors instead, and gets cross terms). "svd" is the best approximation
        of that sum at `rank`. "ties" keeps the largest `density` of each U_i's entries, elects each
        entry's sign by their sum, and averages the `w_i U_i` that agree (Yadav et al. 2023,
        arXiv:2306.01708); "dare" keeps a random `density` of each, divided by it, and sums them
        (Yu et al. 2023, arXiv:2311.03099); "dare_ties" elects signs after that. These three build
        each update, one weight at a time, and return the best approximation at `rank`.
      rank: of the result, by default the largest of the deltas'; "cat" takes none.
      density: in (0, 1], for "ties", "dare" and "dare_ties".
      key: a typed key, for "dare" and "dare_ties".

    Raises:
      ValueError: for an argument that `how` needs and lacks, or does not take; for deltas of other
        methods.
    """
    _check(deltas, weights, how, rank, density, key)
    key = None if key is None else paths.one_key(key)
    nodes_of = [delta_nodes(as_plain_lora(delta)) for delta in deltas]
    combined = {}
    for path in dict.fromkeys(path for nodes in nodes_of for path in nodes):
        found = [(w, n[path]) for w, n in zip(weights, nodes_of, strict=True) if path in n]
        for _, node in found:
            if not isinstance(node, LoRANode):
                raise ValueError(f"{path}: only LoRA can be combined, not {type(node).__name__}.")
        nodes: list[Any] = [node for _, node in found]
        if len({node.own_base for node in nodes}) > 1:
            raise ValueError(
                f"{path}: some of the deltas belong to a base that loftq_start returned, others do "
                "not. Combine deltas of one base, or merge each into its own."
            )
        result = _concatenated(nodes, [w for w, _ in found])
        kept = rank or max(node.rank for node in nodes)
        if how == "svd":
            result = _cut(result, kept)
        elif how != "cat":
            scale = [w for w, _ in found]
            result = _sparse(nodes, scale, how, kept, density, key, path)
        combined[path] = result
    return paths.nest(combined)


def extract(
    base: PyTree,
    tuned: PyTree,
    method: LoRA | Mapping[str, Method | None],
    *,
    targets: Targets = "all-linear",
    layouts: Mapping[str, Layout | None] | None = None,
) -> Delta:
    """The LoRA delta nearest to what fine-tuning did to the targeted weights of `base`.

    `scale * a @ b` is the truncated singular value decomposition of `tuned - base`, the best
    approximation of that rank in the Frobenius norm (Eckart and Young 1936).

    Args:
      base, tuned: trees of one structure.
      method, targets, layouts: as for `lora_transform`.

    Raises:
      ValueError: for trees of other shapes, or methods other than LoRA.
    """
    _, initial = lora_transform(
        base, method, targets=targets, key=jax.random.key(0), layouts=layouts
    )
    before, after = (paths.flatten(tree, is_leaf=is_weight) for tree in (base, tuned))
    found = {}
    for path, node in delta_nodes(initial).items():
        if not isinstance(node, LoRANode):
            raise ValueError(f"{path}: only LoRA can be extracted, not {type(node).__name__}.")
        if path not in after or after[path].shape != before[path].shape:
            raise ValueError(f"{path}: the tuned tree has no weight of shape {before[path].shape}.")
        change = [
            dense_float32(as_matrix(weight, node.layout)) for weight in (after[path], before[path])
        ]
        a, b = _factors((change[0] - change[1]) / node.scale[..., None, None], node.rank)
        found[path] = dataclasses.replace(
            node, a=a.reshape(node.a.shape), b=b.reshape(node.b.shape), a0=None, b0=None
        )
    return paths.nest(found)


def _concatenated(nodes: Sequence[LoRANode], weights: Sequence[float]) -> LoRANode:
    first = nodes[0]
    a = jnp.concatenate([node.a for node in nodes], axis=-1)
    parts = [
        node.b
        * (weight * node.scale).reshape(node.scale.shape + (1,) * (node.b.ndim - node.stack_ndim))
        for node, weight in zip(nodes, weights, strict=True)
    ]
    b = jnp.concatenate(parts, axis=first.stack_ndim)
    return dataclasses.replace(first, a=a, b=b, scale=jnp.ones_like(first.scale))


def _cut(node: LoRANode, rank: int) -> LoRANode:
    """The best approximation at a smaller rank, without building the update."""
    matrix = node.as_matrix()
    if rank >= node.rank:
        return node
    q_in, r_in = each_layer(jnp.linalg.qr, matrix.a)
    q_out, r_out = each_layer(jnp.linalg.qr, jnp.swapaxes(matrix.b, -1, -2))
    with jax.default_matmul_precision("highest"):
        a, b = _factors(jnp.matmul(r_in, jnp.swapaxes(r_out, -1, -2)), rank)
        a, b = jnp.matmul(q_in, a), jnp.matmul(b, jnp.swapaxes(q_out, -1, -2))
    return _with_factors(node, a, b)


def _sparse(nodes, weights, how, rank, density, key, path) -> LoRANode:
    first, stack = nodes[0], nodes[0].scale.shape
    updates = []
    for i, node in enumerate(nodes):
        matrix = node.as_matrix()
        update = matrix.update((*stack, matrix.a.shape[-2], matrix.b.shape[-1]))
        if how == "ties":
            updates.append(_largest(update, density))
        else:
            keys = paths.keys_for(jax.random.fold_in(key, i), path, stack)
            updates.append(_random(update, density, keys))
    weighed = [weight * update for weight, update in zip(weights, updates, strict=True)]
    total = sum(weighed)
    if how != "dare":
        elected = jnp.where(sum(updates) >= 0, 1.0, -1.0)
        agree = [jnp.sign(update) == elected for update in updates]
        kept = [jnp.where(a, w, 0.0) for a, w in zip(agree, weighed, strict=True)]
        total = sum(kept) / jnp.maximum(sum(a.astype(jnp.float32) for a in agree), 1.0)
    return _with_factors(first, *_factors(total, rank))


def _largest(update: jax.Array, density: float) -> jax.Array:
    flat = update.reshape(*update.shape[:-2], -1)
    count = int(density * flat.shape[-1])
    _, places = jax.lax.top_k(jnp.abs(flat), count)
    kept = jnp.put_along_axis(jnp.zeros_like(flat), places, 1.0, axis=-1, inplace=False)
    return (flat * kept).reshape(update.shape)


def _random(update: jax.Array, density: float, keys: jax.Array) -> jax.Array:
    def draw(key):
        return jax.random.bernoulli(key, density, update.shape[-2:])

    for _ in keys.shape:
        draw = jax.vmap(draw)
    return jnp.where(draw(keys), update / density, 0.0)


def _factors(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """`a [..., d_in, r]` and `b [..., r, d_out]`, whose product is the best at that rank."""

    def split(matrix):
        u, s, vt = truncated_svd(matrix, rank)
        root = jnp.sqrt(s)
        return u * root[None], root[:, None] * vt

    return each_layer(split, matrix)


def _with_factors(node: LoRANode, a: jax.Array, b: jax.Array) -> LoRANode:
    stack, rank = node.scale.shape, a.shape[-1]
    d_in, d_out = node.a.shape[len(stack) : -1], node.b.shape[len(stack) + 1 :]
    return dataclasses.replace(
        node,
        a=a.reshape(*stack, *d_in, rank),
        b=b.reshape(*stack, rank, *d_out),
        scale=jnp.ones(stack, jnp.float32),
    )


def _check(deltas, weights, how, rank, density, key) -> None:
    if not deltas or len(deltas) != len(weights):
        raise ValueError(
            f"combine needs a weight for each delta: {len(deltas)} and {len(weights)}."
        )
    if how not in ("cat", "svd", "ties", "dare", "dare_ties"):
        raise ValueError(f"how={how!r}: expected cat, svd, ties, dare or dare_ties.")
    sparse, random = how not in ("cat", "svd"), how.startswith("dare")
    if sparse != (density is not None) or (sparse and not 0 < density <= 1):
        raise ValueError(f"how={how!r} with density={density}: ties and dare need one in (0, 1].")
    if random != (key is not None):
        raise ValueError(f"how={how!r} with key={key}: dare needs a key, the others take none.")
    if how == "cat" and rank is not None:
        raise ValueError("how='cat' adds the ranks up: use 'svd' for a rank of your own.")
    if any(not math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights={list(weights)}: expected finite numbers.")
