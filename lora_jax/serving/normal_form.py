"""The normal form of a delta node, which a server computes at one target:

    y = post * ((pre * x) @ W + (pre * x) @ a.T @ b)

Factors are rank first, with all scales in `b`. Everything is computed once, on the host, and is
frozen: DoRA's norms are constants of the adapter.

| method | a, b | post | pre |
|---|---|---|---|
| LoRA, rsLoRA, AdaLoRA, VeRA, LoHa | its own | | |
| PiSSA, OLoRA | twice the rank: the difference from their init | | |
| DoRA | its own | magnitude over norm | |
| IA3 | | its vector | its vector, of inputs |
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.methods import (
    AdaLoRANode,
    DeltaNode,
    DoRANode,
    Extra,
    FullNode,
    IA3BiasNode,
    IA3InputNode,
    IA3Node,
    LoHaNode,
    LowRank,
    VeRANode,
)
from lora_jax.products import AnyWeight, Matmul
from lora_jax.transform import Delta, delta_nodes
from lora_jax.weights import PyTree, Shared, as_matrix, is_weight


@dataclasses.dataclass(frozen=True)
class NormalForm:
    """One target's part of an adapter: float32, on the host, as the matrix of the target.

    Attributes:
      a, b: `[stack..., r, d_in]` and `[stack..., r, d_out]`; None where there is no branch.
      pre, post: `[stack..., d_in]` and `[stack..., d_out]`; None for ones.
    """

    a: np.ndarray | None = None
    b: np.ndarray | None = None
    pre: np.ndarray | None = None
    post: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[-2]


def normal_form(base: PyTree, delta: Delta) -> dict[str, NormalForm]:
    """The normal form of an adapter at each target.

    Raises:
      ValueError: for a path that the base lacks or has in another shape, and for a method without a
        normal form.
    """
    nodes = delta_nodes(delta)
    flat = paths.flatten(base, is_leaf=is_weight)
    forms = {}
    for path, node in nodes.items():
        if isinstance(node, Extra) and not node.in_weights:
            continue  # shared by nodes, and read where they are resolved
        with paths.naming(path):
            if isinstance(node, Extra):
                form_of(node, None)  # raises
            if path not in flat:
                raise ValueError(
                    "the adapter was made for another base: this one has no such weight; the "
                    f"nearest paths are {', '.join(paths.nearest(path, flat))}."
                )
            node.check("the adapter", flat[path])
            weight = flat[path]
            node = node.resolve(weight, nodes)
            forms[path] = form_of(node.as_matrix(), weight, layout=node.layout)
    return forms


@functools.singledispatch
def form_of(node: DeltaNode, weight: AnyWeight | None, *, layout: Any = None) -> NormalForm:
    """The normal form of a resolved node, as a matrix's; `weight` is the one that it adapts.

    Register the node of a method of your own: `@form_of.register`.
    """
    del weight, layout
    raise ValueError(
        f"{type(node).__name__} has no served form, which is low-rank factors and scales of inputs "
        "or outputs: serve the adapter alone, bound or merged."
    )


@form_of.register
def _(node: FullNode, weight, *, layout=None) -> NormalForm:
    del node, weight, layout
    raise ValueError("a Full delta is as large as its weight: merge it, and serve the merged base.")


@form_of.register
def _(node: LowRank, weight, *, layout=None) -> NormalForm:
    del weight, layout
    a, b = (np.asarray(leaf, np.float32) for leaf in (node.a, node.b))
    scale = np.asarray(node.scale, np.float32)[..., None, None]
    b = b * scale
    if node.a0 is not None:
        a = np.concatenate([a, np.asarray(node.a0, np.float32)], axis=-1)
        b = np.concatenate([b, -scale * np.asarray(node.b0, np.float32)], axis=-2)
    return NormalForm(np.swapaxes(a, -1, -2), b)


@form_of.register
def _(node: DoRANode, weight, *, layout=None) -> NormalForm:
    factors = form_of.dispatch(LowRank)(node, weight)
    return dataclasses.replace(factors, post=np.asarray(_dora_post(node, weight, layout)))


@functools.partial(jax.jit, static_argnums=2)
def _dora_post(node: DoRANode, weight: AnyWeight, layout) -> jax.Array:
    """`m / ||V||` of every stacked layer."""

    def one(node, matrix):
        return node.factor(Matmul().left(node.a.astype(matrix.dtype), matrix))

    for _ in range(node.stack_ndim):
        one = jax.vmap(one)
    return one(node, as_matrix(weight, layout)).astype(jnp.float32)


@form_of.register
def _(node: AdaLoRANode, weight, *, layout=None) -> NormalForm:
    del weight, layout
    scale = np.asarray(node.e * node.scale[..., None], np.float32)
    return NormalForm(
        np.swapaxes(np.asarray(node.a, np.float32), -1, -2),
        np.asarray(node.b, np.float32) * scale[..., None],
    )


@form_of.register
def _(node: VeRANode, weight, *, layout=None) -> NormalForm:
    del weight, layout
    pair = cast(Shared, node.pair).value
    lambda_d, lambda_b = (np.asarray(leaf, np.float32) for leaf in (node.lambda_d, node.lambda_b))
    a, b = np.asarray(pair.a, np.float32).T, np.asarray(pair.b, np.float32)
    return NormalForm(lambda_d[..., None] * a, b * lambda_b[..., None, :])


@form_of.register
def _(node: LoHaNode, weight, *, layout=None) -> NormalForm:
    del weight, layout
    a1, b1, a2, b2 = (np.asarray(x, np.float32) for x in (node.a1, node.b1, node.a2, node.b2))
    scale = np.asarray(node.scale, np.float32)[..., None, None]
    a = (a1[..., :, None] * a2[..., None, :]).reshape(*a1.shape[:-1], -1)
    b = b1[..., :, None, :] * b2[..., None, :, :]
    b = b.reshape(*b1.shape[:-2], -1, b1.shape[-1]) * scale
    return NormalForm(np.swapaxes(a, -1, -2), b)


@form_of.register
def _(node: IA3Node, weight, *, layout=None) -> NormalForm:
    del weight, layout
    active = np.asarray(node.active)[..., None]
    vector = np.where(active == 0, 1, np.asarray(node.l, np.float32)).astype(np.float32)
    return NormalForm(pre=vector) if isinstance(node, IA3InputNode) else NormalForm(post=vector)


@form_of.register
def _(node: IA3BiasNode, weight, *, layout=None) -> NormalForm:
    del node, weight, layout
    raise ValueError(
        "IA3 over a layer with a bias scales that bias too, which all rows read: serve the adapter "
        "alone, bound or merged."
    )
