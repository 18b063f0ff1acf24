"""AdaLoRA: a budget of singular values, spent where it matters (Zhang et al. 2023,
arXiv:2303.10512)."""

import dataclasses
import math
from typing import Any, Self, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax.layouts import Layout
from lora_jax.methods.base import Additive, AnyWeight, DeltaNode, Method, require_shape
from lora_jax.methods.branches import drop, widen
from lora_jax.weights import PyTree, linear

FACTORS = ("a", "e", "b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """`y = x @ w + scale * x @ a @ diag(e) @ b`, `scale = alpha / (rank + 1e-5)`, `e = 0` at first.

    `a` and `b` are held near orthogonal by `orthogonality`, a term of the loss, so that `e` are
    singular values. After each step `allocate_budget` zeroes those of least importance, until
    `target_rank` of them are left for each matrix on average. `train_step` calls both.

    Attributes:
      total_steps: how many steps training takes; the schedule of the budget follows from it.
      rank: of the factors, at the start.
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
        if self.total_steps is None:
            raise ValueError(
                "AdaLoRA needs total_steps, how many steps training takes: its budget falls on a "
                "schedule over all of them."
            )
        if self.warmup < 0 or self.final < 0 or self.warmup >= self.total_steps - self.final:
            raise ValueError(
                f"AdaLoRA(total_steps={self.total_steps}, warmup={self.warmup}, "
                f"final={self.final}) leaves no step to allocate in: warmup + final must be less "
                "than total_steps."
            )
        if not 1 <= self.target_rank <= self.rank:
            raise ValueError(
                f"AdaLoRA(target_rank={self.target_rank}, rank={self.rank}): the target must be "
                "at least 1 and at most the rank."
            )
        if self.penalty < 0 or self.interval < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"AdaLoRA(penalty={self.penalty}, interval={self.interval}, dropout={self.dropout})"
                ": expected a penalty of at least 0, an interval of at least 1, a rate in [0, 1)."
            )

    def fresh(self, weight: AnyWeight, *, layout: Layout, key: jax.Array) -> "Triplets":
        stack, d_in, d_out = layout.split(weight.shape)
        if self.rank > min(math.prod(d_in), math.prod(d_out)):
            raise ValueError(
                f"AdaLoRA(rank={self.rank}) exceeds the smaller side of a {math.prod(d_in)} x "
                f"{math.prod(d_out)} matrix. Give that target a smaller rank."
            )

        def draw(layer_key):
            keys = jax.random.split(layer_key)
            a = jax.random.normal(keys[0], (*d_in, self.rank), jnp.float32)
            return 0.02 * a, 0.02 * jax.random.normal(keys[1], (self.rank, *d_out), jnp.float32)

        for _ in stack:
            draw = jax.vmap(draw)
        a, b = draw(key)
        e = jnp.zeros((*stack, self.rank), jnp.float32)
        return Triplets(
            a=a,
            e=e,
            b=b,
            scale=jnp.full(stack, self.alpha / (self.rank + 1e-5), jnp.float32),
            mask=jnp.ones_like(e),
            sensitivity={"a": jnp.zeros_like(a), "e": e, "b": jnp.zeros_like(b)},
            uncertainty={"a": jnp.zeros_like(a), "e": e, "b": jnp.zeros_like(b)},
            method=self,
            layout=layout,
        )


@flax.struct.dataclass
class Triplets(Additive):
    """`scale * a @ diag(e) @ b`, all float32, and what tells which of its triplets matter.

    Attributes:
      a: `[stack..., contracted..., r]`.
      e: `[stack..., r]`, the singular values.
      b: `[stack..., r, output...]`.
      scale: `[stack...]`.
      mask: `[stack..., r]`, 0 where the last allocation zeroed `e`.
      sensitivity: of a, e and b: the running mean of `|value * gradient|`.
      uncertainty: likewise, of its distance from that mean.
      method: the schedule.
      layout: the weight's axes.
    """

    a: jax.Array
    e: jax.Array
    b: jax.Array
    scale: jax.Array
    mask: jax.Array
    sensitivity: dict[str, jax.Array]
    uncertainty: dict[str, jax.Array]
    method: AdaLoRA = flax.struct.field(pytree_node=False)
    layout: Layout = flax.struct.field(pytree_node=False, default=Layout())

    @property
    def rank(self) -> int:
        return self.e.shape[-1]

    @property
    def stack_ndim(self) -> int:
        return jnp.ndim(self.scale)

    def linear(self, x: jax.Array, base: AnyWeight, dropout_key: jax.Array | None) -> jax.Array:
        x_drop = x if dropout_key is None else drop(x, self.method.dropout, dropout_key)
        inner = linear(x_drop, self.a.astype(x.dtype))
        inner = inner * jnp.broadcast_to((self.e * self.scale).astype(x.dtype), inner.shape)
        return linear(x, base) + widen(inner, self.b.astype(x.dtype))

    def update(self, shape: tuple[int, ...]) -> jax.Array:
        node = self.as_matrix()
        with jax.default_matmul_precision("highest"):
            product = jnp.matmul(node.a * node.e[..., None, :], node.b)
        return self.layout.from_matrix(product * self.scale[..., None, None], shape)

    def as_matrix(self) -> "Triplets":
        stack = self.e.shape[:-1]
        flat = {"a": (*stack, -1, self.rank), "e": self.e.shape, "b": (*stack, self.rank, -1)}

        def reshaped(values: dict[str, jax.Array]) -> dict[str, Any]:
            return {name: values[name].reshape(flat[name]) for name in FACTORS}

        return dataclasses.replace(
            self,
            **reshaped({name: getattr(self, name) for name in FACTORS}),
            sensitivity=reshaped(self.sensitivity),
            uncertainty=reshaped(self.uncertainty),
            layout=Layout(),
        )

    def placement(self, spec: PartitionSpec) -> "Triplets":
        stack, d_in, d_out = self.layout.split(tuple(spec))
        parts: Any = self._partitioned(PartitionSpec(*stack))
        factors: Any = {
            "a": PartitionSpec(*stack, *d_in, None),
            "e": PartitionSpec(*stack),
            "b": PartitionSpec(*stack, None, *d_out),
        }
        return dataclasses.replace(parts, **factors, sensitivity=factors, uncertainty=factors)

    def trainable(self) -> Self:
        frozen = jax.tree.map(lambda _: False, self)
        return dataclasses.replace(cast(Any, frozen), a=True, e=True, b=True)

    def check(self, path: str, base: AnyWeight) -> None:
        stack = self.stack_ndim
        sides = self.a.shape[stack:-1], self.b.shape[stack + 1 :]
        require_shape(path, self.layout.joined(self.e.shape[:-1], *sides), base)


def orthogonality(delta: PyTree) -> jax.Array:
    """`penalty * mean ||a^T a - I||_F` over the factors a and b^T of all AdaLoRA matrices (equation
    4 of the paper, unsquared and averaged as PEFT has it).

    Args:
      delta: of any methods; of a stack, `vmap` over its members.

    Returns:
      A float32 scalar, summed over the `AdaLoRA` values in use; 0 where there are none.
    """
    total = jnp.float32(0)
    for method, nodes in _by_method(delta).items():
        distances = []
        for node in (n.as_matrix() for n in nodes):
            for factor in (jnp.swapaxes(node.a, -1, -2), node.b):
                with jax.default_matmul_precision("highest"):
                    gram = jnp.matmul(factor, jnp.swapaxes(factor, -1, -2))
                square = jnp.sum((gram - _identity(gram)) ** 2, axis=(-2, -1))
                distances.append(jnp.sqrt(jnp.maximum(square, 1e-30)).reshape(-1))
        total += method.penalty * jnp.concatenate(distances).mean()
    return total


def allocate_budget(delta: PyTree, gradients: PyTree, step: jax.Array) -> PyTree:
    """The delta with its AdaLoRA statistics moved, and the least important `e` zeroed.

    A pure function of arrays, to be called inside the jitted step behind the optimizer: no rank is
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
    for method, members in _by_method(delta).items():
        index = [i for i, node in enumerate(nodes) if any(node is member for member in members)]
        moved = [_observed(nodes[i], slopes[i], step) for i in index]
        for i, node in zip(index, _allocated(method, moved, step), strict=True):
            nodes[i] = node
    return jax.tree.unflatten(treedef, nodes)


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, DeltaNode)


def _by_method(delta: PyTree) -> dict[AdaLoRA, list[Triplets]]:
    groups: dict[AdaLoRA, list[Triplets]] = {}
    for node in jax.tree.leaves(delta, is_leaf=_is_node):
        if isinstance(node, Triplets):
            groups.setdefault(node.method, []).append(node)
    return groups


def _identity(gram: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)


def _observed(node: Triplets, gradient: Triplets, step: jax.Array) -> Triplets:
    method = node.method
    counts = step < cast(int, method.total_steps) - method.final
    sensitivity, uncertainty = {}, {}
    for name in FACTORS:
        now = jnp.abs(getattr(node, name) * getattr(gradient, name))
        old = node.sensitivity[name], node.uncertainty[name]
        mean = method.beta1 * old[0] + (1 - method.beta1) * now
        spread = method.beta2 * old[1] + (1 - method.beta2) * jnp.abs(now - mean)
        sensitivity[name] = jnp.where(counts, mean, old[0])
        uncertainty[name] = jnp.where(counts, spread, old[1])
    return dataclasses.replace(node, sensitivity=sensitivity, uncertainty=uncertainty)


def _allocated(method: AdaLoRA, nodes: list[Triplets], step: jax.Array) -> list[Triplets]:
    scores = [_scores(node.as_matrix()) for node in nodes]
    ordered = jnp.sort(jnp.concatenate([score.reshape(-1) for score in scores]))
    budgets, allocates = _schedule(method, matrices=ordered.size // method.rank)
    last = cast(int, method.total_steps) - method.final
    now = jnp.minimum(step, last)
    dropped = ordered.size - jnp.asarray(budgets)[now]
    threshold = jnp.where(dropped > 0, ordered[jnp.maximum(dropped - 1, 0)], -1.0)
    chosen = jnp.asarray(allocates)[now] & (step <= last)

    def masked(node, score):
        mask = jnp.where(chosen, (score > threshold).astype(jnp.float32), node.mask)
        e = jnp.where(chosen | (step > last), node.e * mask, node.e)
        return dataclasses.replace(node, e=e, mask=mask)

    return [masked(node, score) for node, score in zip(nodes, scores, strict=True)]


def _scores(node: Triplets) -> jax.Array:
    """The importance of each triplet, `[stack..., r]`."""
    entries = {name: node.sensitivity[name] * node.uncertainty[name] for name in FACTORS}
    return entries["e"] + (entries["a"].mean(-2) + entries["b"].mean(-1))


def _schedule(method: AdaLoRA, matrices: int) -> tuple[np.ndarray, np.ndarray]:
    """By step up to the last allocation: the budget, and whether it is allocated."""
    full, target = method.rank * matrices, method.target_rank * matrices
    last = cast(int, method.total_steps) - method.final
    steps = np.arange(last + 1)
    left = 1 - (steps - method.warmup) / (last - method.warmup)
    budgets = ((full - target) * np.minimum(left, 1) ** 3 + target).astype(np.int32)
    allocates = (steps > method.warmup) & (steps % method.interval == 0)
    allocates[last] = True
    return budgets, allocates
