"""A quantised weight on a mesh, whose kernels see the plain arrays of one device."""

from collections.abc import Callable
from typing import Any, cast

import flax.struct
import jax
from jax.sharding import PartitionSpec

from lora_jax import context_mesh, paths
from lora_jax.context_mesh import FSDP, SEQUENCE
from lora_jax.layouts import Layout
from lora_jax.parallel.rules import Specs
from lora_jax.quant import frozen
from lora_jax.quant.quantized import Quantized
from lora_jax.weights import PyTree, Transposed, Weight, is_weight

LossSum = Callable[..., tuple[jax.Array, jax.Array]]


def over_mesh(loss_sum: LossSum, specs: Specs) -> LossSum:
    """`loss_sum(delta, base, ...)` for a base that is sharded over the mesh of the context by
    `specs`: its quantised weights apply themselves device by device, as `Sharded`."""

    def sharded_loss(delta: Any, base: PyTree, *rest: Any) -> tuple[jax.Array, jax.Array]:
        flat = paths.flatten(base, is_leaf=is_weight)
        for path, leaf in flat.items():
            if isinstance(leaf, Quantized):
                flat[path] = Sharded(leaf, specs[path])
        structure = jax.tree.structure(base, is_leaf=is_weight)
        return loss_sum(delta, jax.tree.unflatten(structure, flat.values()), *rest)

    return sharded_loss


@flax.struct.dataclass
class Sharded(Weight):
    """`x @ W` under a shard_map: what `fsdp` splits is gathered in its stored form, a fraction of
    the dense weight's bytes; each device multiplies with its own block of `tensor`, and where that
    splits the contracted axis the products are summed.

    Rows and positions of `x [B, T, ...]` are sharded over `fsdp` and `sequence`; an `x` of fewer
    axes, or of sizes that these do not divide, is replicated.

    Attributes:
      weight: the quantised weight.
      spec: the sharding spec of an array in its place, an entry for each axis.
    """

    weight: Quantized
    spec: PartitionSpec = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    @property
    def layout(self) -> Layout:
        return self.weight.layout

    @property
    def T(self) -> Weight:  # noqa: N802
        return Transposed(self)

    def linear(self, x: jax.Array) -> jax.Array:
        return frozen.matmul(x, self)

    def linear_transposed(self, x: jax.Array) -> jax.Array:
        return frozen.matmul_transposed(x, self)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self.weight.embed(tokens)

    def dense(self) -> jax.Array:
        return self.weight.dense()

    def dense_float32(self) -> jax.Array:
        return self.weight.dense_float32()

    def as_matrix(self, layout: Layout) -> "Sharded":
        weight = cast(Quantized, self.weight.as_matrix(layout))
        return Sharded(weight, self.weight.matrix_spec(self.spec))

    def matmul(self, x: jax.Array) -> jax.Array:
        return _applied(x, self, lambda x, weight: weight.linear(x), *self.spec[-2:])

    def matmul_transposed(self, x: jax.Array) -> jax.Array:
        return _applied(x, self, lambda x, weight: weight.linear_transposed(x), *self.spec[:-3:-1])


def _applied(x: jax.Array, w: Sharded, apply: Callable, contracted: Any, output: Any) -> jax.Array:
    """`apply(x, weight)` on each device, where the mesh splits `contracted` and `output`."""
    weight: Any = w.weight.singly()  # blocks of a doubly quantised absmax run through the matrix
    stored = weight.sharding_specs(PartitionSpec(*w.spec[-2:]))
    summed, kept = _without_fsdp(contracted), _without_fsdp(output)
    rows = _rows(x)

    def block(x, weight):
        y = apply(x, jax.tree.map(_gathered, weight, stored))
        return jax.lax.psum(y, summed) if summed else y

    return jax.shard_map(
        block,
        in_specs=(PartitionSpec(*rows, summed), stored),
        out_specs=PartitionSpec(*rows, kept),
        check_vma=False,
    )(x, weight)


def _rows(x: jax.Array) -> list[Any]:
    leading: list[Any] = [None] * (x.ndim - 1)
    if x.ndim > 2:
        for place, axis in enumerate((FSDP, SEQUENCE)):
            if x.shape[place] % context_mesh.size(axis) == 0:
                leading[place] = axis
    return leading


def _axes(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def _without_fsdp(entry: Any) -> tuple[str, ...] | None:
    return tuple(axis for axis in _axes(entry) if axis != FSDP) or None


def _gathered(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    for place, entry in enumerate(spec):
        if FSDP in _axes(entry):
            leaf = jax.lax.all_gather(leaf, FSDP, axis=place, tiled=True)
    return leaf
