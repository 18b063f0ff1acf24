"""The protocol of a method, which `lora_transform` calls to make nodes."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax

from lora_jax.layouts import Layout
from lora_jax.nodes import DeltaNode, Extra
from lora_jax.products import AnyWeight

Shape = tuple[int, ...]
_COUNT = "expected an integer of at least 1."


class MisfitError(ValueError):
    """A weight is too small for a method, or of a layout that it does not take. A preset passes
    over such weights; of a target that names them it is an error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Hyperparameters of one way to adapt a weight.

    A new method is one file: a frozen dataclass of hyperparameters whose `init_layer` makes a node,
    and the node. Nothing else in the library changes.

    Attributes:
      has_nodes: whether it adapts weights; False where it has `extras` only.
      needs_matrix: whether it adapts only leaves of two axes or more.
    """

    has_nodes: ClassVar[bool] = True
    needs_matrix: ClassVar[bool] = True

    def accepts(self, path: str, weight: AnyWeight, layout: Layout | None) -> bool:
        """Whether the leaf at `path` is one that this method can adapt; `layout` is None for one
        that is no matrix."""
        del path, weight
        return not self.needs_matrix or layout is not None

    def _named(self, field: str) -> str:
        return f"{type(self).__name__}({field}={getattr(self, field)!r})"

    def _require(self, field: str, fits: Any, expected: str) -> None:
        """Raises ValueError, naming the field and its value, unless it fits."""
        if not fits:
            raise ValueError(f"{self._named(field)}: {expected}")

    def _require_count(self, field: str, expected: str = _COUNT) -> None:
        value = getattr(self, field)
        self._require(field, isinstance(value, int) and value >= 1, expected)

    def _require_rate(self, field: str) -> None:
        self._require(field, 0 <= getattr(self, field) < 1, "expected a rate in [0, 1).")

    def _require_one_of(self, field: str, known: Iterable[str]) -> None:
        expected = f"expected one of {', '.join(known)}."
        self._require(field, getattr(self, field) in known, expected)

    def _require_sides(self, rank: int, d_in: Shape, d_out: Shape) -> None:
        """Raises ValueError where `rank` exceeds the smaller side of a matrix."""
        sides, name = (math.prod(d_in), math.prod(d_out)), type(self).__name__
        if rank > min(sides):
            raise MisfitError(
                f"{name}(rank={rank}) exceeds the smaller side of a {sides[0]} x {sides[1]} "
                f"matrix. Give that target a smaller rank, {{target: {name}(rank=...)}}, or use "
                "Full."
            )

    def in_groups(self, groups: int) -> "Method":
        """The method of each of the groups of a grouped convolution, which share its rank.

        Raises:
          MisfitError: where there is none.
        """
        if groups > 1 and hasattr(self, "rank"):
            raise MisfitError(
                f"{type(self).__name__} has no form for a convolution of {groups} groups. Give "
                "that target LoRA, or leave it out (None)."
            )
        return self

    @property
    def reads_values(self) -> bool:
        """Whether the initial node depends on the weight's values; of an abstract weight it is then
        abstract itself."""
        return False

    def init_layer(self, d_in: Shape, d_out: Shape, layout: Layout, key: jax.Array) -> DeltaNode:
        """The initial node of one layer, which leaves its output unchanged.

        Args:
          d_in, d_out: the contracted and the output axes of the layer's weight.
          layout: of the weight.
          key: a typed key.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither init_layer nor init_node.")

    def init_node(
        self, path: str, weight: AnyWeight, *, layout: Layout, key: jax.Array
    ) -> DeltaNode | None:
        """The initial node for `weight`: that of each stacked layer. Overridden by a method whose
        init reads more than the weight's shape.

        Args:
          path: of the weight.
          weight: the frozen weight, possibly abstract, `[stack..., contracted..., output...]`.
          layout: its layout.
          key: one typed key for each stacked layer, `[stack...]`.
        """
        del path
        if not self.has_nodes:
            return None
        stack, d_in, d_out = layout.split(weight.shape)
        return over_layers(lambda key: self.init_layer(d_in, d_out, layout, key), stack)(key)

    def extras(
        self, weights: Mapping[str, AnyWeight], *, layouts: Mapping[str, Layout], key: jax.Array
    ) -> dict[str, Extra]:
        """Further entries `{path: Extra}` of the delta: what the nodes of this method share, or
        parameters that a model reads by itself.

        Args:
          weights: `{path: weight}` of all that this method was targeted at.
          layouts: their layouts, and maybe those of others, by path.
          key: the key that `lora_transform` was given.
        """
        del weights, layouts, key
        return {}


def of_values(method: Method, make: Callable[[Any], Any], weights: Any) -> Any:
    """`make(weights)`; its shapes, where the method reads values and the weights are abstract."""
    leaves = jax.tree.leaves(weights)
    is_abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    if method.reads_values and is_abstract:
        return jax.eval_shape(make, weights)
    return make(weights)


def over_layers(init: Callable[..., Any], stack: tuple[int, ...]) -> Callable[..., Any]:
    """`init(key, ...)` of one layer as a function of arguments with `stack` axes in front."""
    for _ in stack:
        init = jax.vmap(init)
    return init
