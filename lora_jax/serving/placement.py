"""A served base and its bank on the devices of a mesh, sharded as training shards them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from lora_jax import parallel, paths
from lora_jax.interop import Place, sharded
from lora_jax.parallel.sharded import Sharded
from lora_jax.quant import quantizer
from lora_jax.quant.quantized import Quantized
from lora_jax.serving.bank import Bank, shardings
from lora_jax.weights import PyTree, is_weight

_REFUSED = {
    "fsdp": "each device would gather every weight for each token. Choose tensor.",
    "fsdp+tensor": "each device would gather weights for each token. Choose tensor.",
    "pmap": (
        "it splits a batch's rows, which share one cache of keys and values here. Choose tensor, "
        "or start a server on each device."
    ),
}


def mesh_of(mode: str) -> Mesh | None:
    """The mesh of all devices in a mode of training's, as `config.parallel.mode` names it: "tensor"
    splits every product, "single" takes one device; None where there is only that one.

    Raises:
      ValueError: for a mode that an engine does not run in, with the reason.
    """
    if mode == "tensor":
        return parallel.mesh_of(mode)
    if mode != "single":
        reason = _REFUSED.get(mode, "choose single or tensor.")
        raise ValueError(f"an engine does not run in mode {mode!r}: {reason}")
    # Of several devices: kernels, which are not partitioned, must know that they are on one.
    return parallel.make_mesh({}, jax.devices()[:1]) if jax.device_count() > 1 else None


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and the sharding rules of a model's family."""

    mesh: Mesh
    rules: parallel.Rules

    def place(self, format: str | None = None) -> Place:
        """Places each leaf that a loader reads, quantised where a format is given."""

        def sharding(path: str, leaf: Any) -> Any:
            spec = parallel.spec_of(path, leaf, self.rules)
            return parallel.leaf_sharding(self.mesh, path, leaf, spec)

        place = sharded(sharding)
        if format is None:
            return place
        return parallel.quantized_in_parts(sharding, quantizer(format), place)

    def params(self, params: PyTree) -> PyTree:
        """The params on the mesh; those that are there already are returned as they are.

        Raises:
          ValueError: naming the path, for an axis that the mesh does not divide.
        """
        specs = parallel.match_specs(params, self.rules)
        return jax.device_put(params, parallel.base_shardings(self.mesh, params, specs))

    def bank(self, make: Callable[[], Bank], params: PyTree) -> Bank:
        """The bank that `make` returns for these params, made where it is placed."""
        specs = parallel.match_specs(params, self.rules)
        where = shardings(self.mesh, jax.eval_shape(make), specs)
        return jax.jit(make, out_shardings=where)()


def by_device(base: PyTree, rules: parallel.Rules) -> PyTree:
    """The base in a step over the mesh of the context: its quantised weights multiply device by
    device, as training's do, which kernels need. The base itself where there is no such mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return base
    flat = paths.flatten(base, is_leaf=is_weight)
    for path, leaf in flat.items():
        if isinstance(leaf, Quantized):
            flat[path] = Sharded(leaf, parallel.spec_of(path, leaf, rules))
    return jax.tree.unflatten(jax.tree.structure(base, is_leaf=is_weight), flat.values())
