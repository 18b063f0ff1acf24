"""Ranks for each weight, from the gradients or the activations of real batches."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.layouts import Layout
from lora_jax.methods import DeltaNode, LoRA, Method
from lora_jax.methods.decompositions import each_layer
from lora_jax.products import Product
from lora_jax.schema import leaf
from lora_jax.targets import Targets
from lora_jax.transform import bind, delta_nodes, lora_transform
from lora_jax.weights import PyTree


def allocate_ranks(
    importance: Mapping[str, Any], *, budget: int, method: LoRA | None = None
) -> dict[str, LoRA | None]:
    """Gives a budget of ranks to the most important components of all weights.

    Args:
      importance: `{path: [stack..., k]}`, the importance of each of a matrix's k leading
        components, from `gradient_importance` or `input_importance`. No rank exceeds its k.
      budget: the sum of all ranks, with each stacked layer counted. The first wins a tie.
      method: the source of all settings but the rank; `LoRA()` by default.

    Returns:
      A mapping for `lora_transform`: `LoRA(rank=...)` for each path, of one rank for each stacked
      layer, and None where nothing is spent. The scale of a layer follows from its own rank.

    Raises:
      ValueError: for a budget below 1 or above the number of components, or more than one stack
        axis.
    """
    scores = {path: np.asarray(values, np.float64) for path, values in importance.items()}
    everything = np.concatenate([values.reshape(-1) for values in scores.values()])
    if not 1 <= budget <= everything.size:
        raise ValueError(
            f"budget={budget}: expected at least 1 and at most {everything.size}, the number of "
            "components that the importance lists."
        )
    chosen = np.zeros(everything.size, bool)
    chosen[np.argsort(-everything, kind="stable")[:budget]] = True
    rules: dict[str, LoRA | None] = {}
    for path, values in scores.items():
        if values.ndim > 2:
            raise ValueError(
                f"{path}: importance has the shape {values.shape}: expected [k], or [layers, k] "
                "with one stack axis."
            )
        mine, chosen = chosen[: values.size], chosen[values.size :]
        counts = mine.reshape(values.shape).sum(-1)
        rank = int(counts) if counts.ndim == 0 else tuple(int(count) for count in counts)
        rules[path] = dataclasses.replace(method or LoRA(), rank=rank) if np.any(counts) else None
    return rules


def gradient_importance(gradients: PyTree, *, rank: int) -> dict[str, jax.Array]:
    """`{path: [stack..., k]}`: the squares of each gradient's k largest singular values, where k is
    `rank`, or the smaller side of a matrix that has fewer.

    They say how far a step of that rank in that matrix lowers the loss, to first order.

    Args:
      gradients: arrays `[stack..., d_in, d_out]`, of a loss with respect to the weights; a
        dictionary `{path: gradient}` or a tree of them. Every leaf is taken for matrices.
      rank: how many components of each matrix to consider.
    """
    values = functools.partial(jnp.linalg.svd, compute_uv=False)
    return {
        path: each_layer(values, leaf)[..., :rank] ** 2
        for path, leaf in paths.flatten(gradients).items()
    }


def input_importance(covariances: Mapping[str, jax.Array], *, rank: int) -> dict[str, jax.Array]:
    """`{path: [stack..., k]}`: the share of the inputs' variance along each of the k leading
    principal directions, by which EVA allocates ranks (section 3.2 of its paper).

    Args:
      covariances: `{path: [stack..., d_in, d_in]}`, from `input_covariances`.
      rank: how many directions of each matrix to consider; k is `rank`, or d_in where that is less.
    """
    spectra = {p: each_layer(jnp.linalg.eigvalsh, c)[..., ::-1] for p, c in covariances.items()}
    return {p: (s / s.sum(-1, keepdims=True))[..., :rank] for p, s in spectra.items()}


def input_covariances(
    loss: Callable[[PyTree], jax.Array], params: PyTree, *, targets: Targets = "all-linear"
) -> dict[str, jax.Array]:
    """`{path: [stack..., d_in, d_in]}`: the covariance of each targeted matrix's inputs.

    A pure function, to be jitted, and averaged over batches; it costs a forward and a backward
    pass. Each weight is bound to a probe whose gradient is, by its own rule, the sums over its
    inputs: they pass through scans, rematerialisation and `vmap` as any gradient does. All
    positions count, also those that the loss leaves out.

    Args:
      loss: of bound weights: any scalar that depends on every target, such as a batch's loss.
      params: the weights, in the matrices' default layout.
      targets: as in `lora_transform`.
    """
    base, probes = lora_transform(params, _Probe(), targets=targets, key=jax.random.key(0))
    found = jax.grad(lambda probes: loss(bind(base, probes)))(probes)
    return {p: _covariance(cast(_ProbeNode, node).sums) for p, node in delta_nodes(found).items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Probe(Method):
    def init_node(self, path: str, weight: Any, *, layout: Layout, key: jax.Array) -> "_ProbeNode":
        del path, key
        stack, (d_in,), _ = layout.split(weight.shape)
        return _ProbeNode(sums=jnp.zeros((*stack, d_in + 1, d_in + 1), jnp.float32))


@flax.struct.dataclass
class _ProbeNode(DeltaNode):
    """Sums over inputs of `[x, 1] [x, 1]^T`, `[stack..., d_in + 1, d_in + 1]`."""

    own_axes = ("moment",)
    unmerged = "a probe has no merged form."

    sums: jax.Array = leaf("stack moment moment")

    def pre(self, x: Any, product: Product) -> Any:
        return _probed(x, self.sums)


@jax.custom_vjp
def _probed(x: jax.Array, sums: jax.Array) -> jax.Array:
    del sums
    return x


def _probed_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    rows = jnp.concatenate([rows, jnp.ones((rows.shape[0], 1), jnp.float32)], axis=-1)
    with jax.default_matmul_precision("highest"):
        return dy, jnp.matmul(rows.T, rows)


_probed.defvjp(lambda x, sums: (x, x), _probed_backward)


def _covariance(sums: jax.Array) -> jax.Array:
    count = sums[..., -1:, -1:]
    mean = sums[..., :-1, -1:] / count
    return sums[..., :-1, :-1] / count - mean * jnp.swapaxes(mean, -1, -2)
