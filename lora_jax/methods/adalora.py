"""AdaLoRA: a budget of singular values over all matrices (Zhang et al. 2023,
arXiv:2303.10512)."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.layouts import Layout
from lora_jax.methods.method import Method, Shape
from lora_jax.nodes import Additive, DeltaNode
from lora_jax.products import Product
from lora_jax.schema import leaf, nested, static
from lora_jax.weights import PyTree

FACTORS = ("a", "e", "b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """`y = x @ w + scale * x @ a @ diag(e) @ b`, `scale = alpha / (rank + 1e-5)`; init `e = 0`.

    `a` and `b` are held near orthogonal by `orthogonality`, a term of the loss, so that `e` are
    singular values. After each step `allocate_budget` zeroes those of least importance, until
    `target_rank` of them are left for each matrix on average. `train_step` does both.

    Attributes:
      total_steps: how many steps training takes; the schedule of the budget follows from it.
      rank: of the factors, at init.
      target_rank: on average over all matrices, at the end.
      alpha: the numerator of the scale.
      warmup: steps before the budget begins to fall (`tinit` in PEFT).
      final: steps at the end with the budget and the mask fixed (`tfinal`).
      interval: steps between two allocations (`deltaT`).
      beta1: decay of the averaged sensitivity.
      beta2: decay of the averaged uncertainty.
      penalty: the weight of the orthogonality term.
      dropout: as in `LoRA`.

    Raises:
      ValueError: without `total_steps`, or for a schedule that leaves no step to allocate in, a
        target rank above the rank, a penalty below zero.
    """

    total_steps: int | None = None
    rank: int = 12
    target_rank: int = 8
    alpha: float = 8.0
    warmup: int = 0
    final: int = 0
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    penalty: float = 0.5
    dropout: float = 0.0

    def __post_init__(self):
        steps = "it needs total_steps, how many steps training takes: its budget falls over them."
        self._require("total_steps", self.total_steps is not None, steps)
        self._require(
            "warmup",
            self.warmup >= 0 and self.final >= 0 and self.warmup < self.last,
            f"with final={self.final} it leaves no step to allocate in: warmup + final must be "
            f"less than total_steps, {self.total_steps}.",
        )
        target = f"expected at least 1 and at most the rank, {self.rank}."
        self._require("target_rank", 1 <= self.target_rank <= self.rank, target)
        self._require("penalty", self.penalty >= 0, "expected a penalty of at least 0.")
        self._require("interval", self.interval >= 1, "expected an interval of at least 1.")
        self._require_rate("dropout")

    @property
    def last(self) -> int:
        """The step of the last allocation."""
        return cast(int, self.total_steps) - self.final

    def init_layer(self, d_in: Shape, d_out: Shape, layout: Layout, key: jax.Array) -> DeltaNode:
        self._require_sides(self.rank, d_in, d_out)
        keys = jax.random.split(key)
        a = 0.02 * jax.random.normal(keys[0], (*d_in, self.rank), jnp.float32)
        b = 0.02 * jax.random.normal(keys[1], (self.rank, *d_out), jnp.float32)
        e = jnp.zeros(self.rank, jnp.float32)
        zeros = Statistics(a=jnp.zeros_like(a), e=e, b=jnp.zeros_like(b))
        return AdaLoRANode(
            a=a,
            e=e,
            b=b,
            scale=jnp.float32(self.alpha / (self.rank + 1e-5)),
            mask=jnp.ones_like(e),
            sensitivity=zeros,
            uncertainty=zeros,
            method=self,
            dropout=self.dropout,
            layout=layout,
        )


@flax.struct.dataclass
class Statistics:
    """A number for each entry of a, e and b."""

    a: jax.Array = leaf("stack in rank")
    e: jax.Array = leaf("stack rank")
    b: jax.Array = leaf("stack rank out")


@flax.struct.dataclass
class AdaLoRANode(Additive):
    """`scale * a @ diag(e) @ b`, all float32, and the importance of its triplets.

    Attributes:
      e: the singular values.
      mask: 0 where the last allocation zeroed `e`.
      sensitivity: of a, e and b: the running mean of `|value * gradient|`.
      uncertainty: likewise, of its distance from that mean.
      method: the schedule.
    """

    own_axes = ("rank",)
    part_axes = ("in", "out")
    takes_experts = True
    statistics = ("mask", "sensitivity", "uncertainty")

    a: jax.Array = leaf("stack in rank")
    e: jax.Array = leaf("stack rank")
    b: jax.Array = leaf("stack rank out")
    scale: jax.Array = leaf("stack", trained=False)
    mask: jax.Array = leaf("stack rank", trained=False)
    sensitivity: Statistics = nested(trained=False)
    uncertainty: Statistics = nested(trained=False)
    method: AdaLoRA = static()
    dropout: float = static(0.0)
    layout: Layout = static(Layout())

    def branch(self, x: Any, product: Product) -> jax.Array:
        h = product.narrow(x, self.a)
        h = h * jnp.broadcast_to((self.e * self.scale).astype(h.dtype), h.shape)
        return product.widen(h, self.b)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        values = (self.e * self.scale).astype(jnp.float32)
        return self.a.astype(jnp.float32) * values[None], self.b.astype(jnp.float32)

    @classmethod
    def penalty(cls, nodes: Sequence["AdaLoRANode"]) -> jax.Array:
        total = jnp.float32(0)
        for method, indices in _by_method(nodes).items():
            distances = [d for i in indices for d in _distances(nodes[i].as_matrix())]
            total += method.penalty * jnp.concatenate(distances).mean()
        return total

    @classmethod
    def after_update(
        cls, nodes: Sequence["AdaLoRANode"], gradients: Sequence["AdaLoRANode"], step: jax.Array
    ) -> list["AdaLoRANode"]:
        moved = [_observed(*pair, step) for pair in zip(nodes, gradients, strict=True)]
        for method, indices in _by_method(nodes).items():
            allocated = _allocated(method, [moved[i] for i in indices], step)
            for i, node in zip(indices, allocated, strict=True):
                moved[i] = node
        return moved


def orthogonality(delta: PyTree) -> jax.Array:
    """`penalty * mean ||a^T a - I||_F` over the factors a and b^T of all AdaLoRA matrices (equation
    4 of the paper, unsquared and averaged as PEFT has it).

    Args:
      delta: of any methods; for a stack, `vmap` over its deltas.

    Returns:
      A float32 scalar, summed over the `AdaLoRA` values in use; 0 where there are none.
    """
    nodes = jax.tree.leaves(delta, is_leaf=_is_node)
    return AdaLoRANode.penalty([node for node in nodes if isinstance(node, AdaLoRANode)])


def allocate_budget(delta: PyTree, gradients: PyTree, step: jax.Array) -> PyTree:
    """The delta with its AdaLoRA statistics updated, and the least important `e` zeroed.

    A pure function of arrays, to be called inside the jitted step after the optimizer: no rank is
    a shape, and nothing is compiled again as ranks fall. The importance of a triplet is that of
    its `e` plus the mean over its column of `a` and its row of `b`, where a value's importance is
    its averaged `|value * gradient|` times that average's uncertainty (section 3.2 of the paper);
    values are those after the update, as in PEFT. The budget falls by a cubic schedule (section
    3.3), over all matrices of one method together.

    Args:
      delta: after the optimizer's update. Nodes of other methods are returned as they are.
      gradients: of the loss with respect to the delta before it.
      step: an integer scalar, the number of updates made, from 1 to `total_steps`.

    Returns:
      The delta, of the same structure and shapes.

    Raises:
      ValueError: where the gradients are not of the delta's structure.
    """
    nodes, treedef = jax.tree.flatten(delta, is_leaf=_is_node)
    slopes = cast(Any, treedef).flatten_up_to(gradients)
    ours = [i for i, node in enumerate(nodes) if isinstance(node, AdaLoRANode)]
    moved = AdaLoRANode.after_update([nodes[i] for i in ours], [slopes[i] for i in ours], step)
    for i, node in zip(ours, moved, strict=True):
        nodes[i] = node
    return jax.tree.unflatten(treedef, nodes)


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, DeltaNode)


def _by_method(nodes: Sequence[AdaLoRANode]) -> dict[AdaLoRA, list[int]]:
    """The indices of the nodes that share a budget, by their method."""
    groups: dict[AdaLoRA, list[int]] = {}
    for i, node in enumerate(nodes):
        groups.setdefault(node.method, []).append(i)
    return groups


def _distances(node: AdaLoRANode) -> Iterator[jax.Array]:
    """How far a and b^T of each stacked layer are from orthogonal, `[layers]` each."""
    for factor in (jnp.swapaxes(node.a, -1, -2), node.b):
        with jax.default_matmul_precision("highest"):
            gram = jnp.matmul(factor, jnp.swapaxes(factor, -1, -2))
        identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
        square = jnp.sum((gram - identity) ** 2, axis=(-2, -1))
        yield jnp.sqrt(jnp.maximum(square, 1e-30)).reshape(-1)


def _observed(node: AdaLoRANode, gradient: AdaLoRANode, step: jax.Array) -> AdaLoRANode:
    method = node.method
    counts = step < method.last
    sensitivity, uncertainty = {}, {}
    for name in FACTORS:
        now = jnp.abs(getattr(node, name) * getattr(gradient, name))
        old = getattr(node.sensitivity, name), getattr(node.uncertainty, name)
        mean = method.beta1 * old[0] + (1 - method.beta1) * now
        deviation = method.beta2 * old[1] + (1 - method.beta2) * jnp.abs(now - mean)
        sensitivity[name] = jnp.where(counts, mean, old[0])
        uncertainty[name] = jnp.where(counts, deviation, old[1])
    return dataclasses.replace(
        node, sensitivity=Statistics(**sensitivity), uncertainty=Statistics(**uncertainty)
    )


def _allocated(method: AdaLoRA, nodes: list[AdaLoRANode], step: jax.Array) -> list[AdaLoRANode]:
    scores = [_scores(node.as_matrix()) for node in nodes]
    ordered = jnp.sort(jnp.concatenate([score.reshape(-1) for score in scores]))
    budgets, allocates = _schedule(method, matrices=ordered.size // method.rank)
    now, last = jnp.minimum(step, method.last), method.last
    dropped = ordered.size - jnp.asarray(budgets)[now]
    threshold = jnp.where(dropped > 0, ordered[jnp.maximum(dropped - 1, 0)], -1.0)
    chosen = jnp.asarray(allocates)[now] & (step <= last)

    def masked(node, score):
        mask = jnp.where(chosen, (score > threshold).astype(jnp.float32), node.mask)
        e = jnp.where(chosen | (step > last), node.e * mask, node.e)
        return dataclasses.replace(node, e=e, mask=mask)

    return [masked(node, score) for node, score in zip(nodes, scores, strict=True)]


def _scores(node: AdaLoRANode) -> jax.Array:
    """The importance of each triplet, `[stack..., r]`."""
    entries = jax.tree.map(jnp.multiply, node.sensitivity, node.uncertainty)
    return entries.e + (entries.a.mean(-2) + entries.b.mean(-1))


def _schedule(method: AdaLoRA, matrices: int) -> tuple[np.ndarray, np.ndarray]:
    """By step up to the last allocation: the budget, and whether it is allocated."""
    full, target = method.rank * matrices, method.target_rank * matrices
    last = method.last
    steps = np.arange(last + 1)
    left = 1 - (steps - method.warmup) / (last - method.warmup)
    budgets = ((full - target) * np.minimum(left, 1) ** 3 + target).astype(np.int32)
    allocates = (steps > method.warmup) & (steps % method.interval == 0)
    allocates[last] = True
    return budgets, allocates
