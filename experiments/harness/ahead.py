"""The training step of a config, compiled for a machine that need not be there."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

import lora_jax as lora
from experiments.harness import devices, setup
from experiments.harness.arms import Arm, rank_arms, trained_together
from experiments.harness.losses import loss_of
from experiments.harness.plan import abstract_params
from experiments.harness.shared import optimizer, step_of
from lora_jax import parallel, training
from lora_jax.planning import cost, hlo
from lora_jax.planning.chips import Machine
from lora_jax.training.execution import AXIS, Execution
from lora_jax.training.losses.fields import Fields
from lora_jax.training.losses.loss import Loss
from lora_jax.training.sweep import alike, batched_step, resolve_mode, same_shapes
from lora_jax.weights import PyTree

WAITING = "waiting arms"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one step takes, in bytes and operations of one device.

    Attributes:
      sizes: bytes of what stands in memory for the whole run, by name.
      host: bytes in the memory of the device's host.
      devices: that run the step.
      tokens: that a step of all of them reads.
      needed: bytes in memory while the step runs.
      temporary: of these, activations, gradients and all else that the step makes; None where the
        compiler says no more than that it all does not fit.
      code: of these, the program's own.
      flops: of products, recomputation included.
      traffic: bytes to and from main memory.
      collectives: what is exchanged with other devices.
    """

    sizes: dict[str, int]
    host: int
    devices: int
    tokens: int
    needed: float
    temporary: int | None = None
    code: int = 0
    flops: float = 0.0
    traffic: int = 0
    collectives: tuple[cost.Collective, ...] = ()


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted step, the abstract arrays that it takes, and how many arms wait meanwhile."""

    mesh: Mesh
    function: Any
    arguments: tuple[Any, ...]
    waiting: int
    tokens: int


def compile_step(config: ConfigDict, machine: Machine) -> Compiled:
    """Compiles the step that a sweep of the config would run on the machine, of abstract arrays.

    Raises:
      ValueError: where the config or the machine does not allow for such a step.
    """
    step = abstract_step(config, machine)
    standing, host = sizes(step)
    jaxpr, program = lowered(step, machine.chip.platform)
    known = Compiled(
        sizes=standing,
        host=host,
        devices=step.mesh.size,
        tokens=step.tokens,
        needed=math.inf,
        flops=cost.flops(jaxpr) / step.mesh.size,
    )
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(known, needed=lacking(error) + standing[WAITING])
    memory, module = compiled.memory_analysis(), hlo.parse(compiled.as_text())
    temporary, code = memory.temp_size_in_bytes, memory.generated_code_size_in_bytes
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return dataclasses.replace(
        known,
        host=host + memory.host_temp_size_in_bytes,
        needed=memory.argument_size_in_bytes + made + temporary + code + standing[WAITING],
        temporary=temporary,
        code=code,
        traffic=cost.traffic(module),
        collectives=tuple(cost.collectives(module)),
    )


def abstract_step(config: ConfigDict, machine: Machine) -> Step:
    """The step as `experiments.harness.run` builds it, and its arguments by shape and place."""
    everyone, mesh = rank_arms(config), mesh_on(config, machine)
    arms = trained_together(everyone)[0]
    base = abstract_params(config)
    loss = loss_of(config, setup.shape_of(config), base)
    batch = loss.abstract_batch(config.data.batch_size, config.data.seq_len)
    execution = devices.execution(config, base, loss.fields, machine.devices)
    mode = config.sweep.mode
    if mode == "auto":
        mode = "in_turn" if machine.chip.platform == "cpu" else "batched"
    mode = resolve_mode(mode)
    devices.require_even_arms(config, everyone, mode)
    stacked = mode == "batched"
    state = _states(base, arms, optimizer(config, arms[0]), stacked)
    if AXIS in mesh.shape or mesh.size == 1:
        replicated = NamedSharding(mesh, PartitionSpec())
        shardings = jax.tree.map(lambda _: replicated, (state, base))
    else:
        specs = parallel.match_specs(base, devices.rules(config))
        shardings = (
            tuple(parallel.state_shardings(mesh, arm, specs) for arm in state)
            if isinstance(state, tuple)
            else parallel.state_shardings(mesh, state, specs, arms=stacked),
            parallel.base_shardings(mesh, base, specs),
        )
    arguments = (
        *jax.tree.map(_placed, (state, base), shardings),
        _placed_batch(batch, loss.fields, mesh),
        *[jax.ShapeDtypeStruct((len(arms),), jnp.bool_)] * stacked,
    )
    return Step(
        mesh=mesh,
        function=_function(config, loss, execution, arms[0], mode),
        arguments=arguments,
        waiting=0 if stacked else len(arms) - 1,
        tokens=max(x.size for x in batch.values()) * (len(arms) if stacked else 1),
    )


def mesh_on(config: ConfigDict, machine: Machine) -> Mesh:
    """What the step's arrays lie on; where the run has no mesh, one device or a row of them."""
    mode = config.parallel.mode
    mesh = devices.mesh_of(config, machine.devices)
    if mesh is not None:
        return mesh
    if mode == "single":
        return parallel.make_mesh({}, machine.devices[:1])
    return parallel.row_of(machine.devices)


def _function(config: ConfigDict, loss: Loss, execution: Execution, arm: Arm, mode: str) -> Any:
    """What a sweep compiles. Of arms in turn that differ in shape it is the gradients' program and
    the update's as one."""
    step = step_of(config, arm, loss, execution.axis_name)
    return batched_step(step, execution) if mode == "batched" else execution.step(step, False)


def _states(base: PyTree, arms: Sequence[Arm], tx: Any, stacked: bool) -> Any:
    """What a batched sweep carries, or the state of one arm in the shapes of all; each leaf with
    the memory it lies in."""

    def fresh(params, key):
        deltas = [
            lora.lora_transform(params, arm.method, targets=arm.targets, key=key)[1] for arm in arms
        ]
        if not stacked or alike(deltas):
            deltas = same_shapes(deltas)[:1]
        return tuple(training.init_state(d, tx, learning_rate=0.0, seed=0) for d in deltas)

    key = jax.eval_shape(lambda: jax.random.key(0))
    traced, states = jax.make_jaxpr(fresh, return_shape=True)(base, key)
    leading = (len(arms),) * (stacked and len(states) == 1)
    leaves = [
        _Leaf((*leading, *aval.shape), aval.dtype, aval.memory_space) for aval in traced.out_avals
    ]
    states = jax.tree.unflatten(jax.tree.structure(states), leaves)
    return states[0] if len(states) == 1 else states


@dataclasses.dataclass(frozen=True)
class _Leaf:
    shape: tuple[int, ...]
    dtype: Any
    memory_space: Any


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    if getattr(leaf, "memory_space", None) == jax.memory.Space.Host:
        sharding = sharding.with_memory_kind("pinned_host")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _placed_batch(batch: dict[str, Any], fields: Fields, mesh: Mesh) -> dict[str, Any]:
    if AXIS not in mesh.shape:
        parallel.require_divisible(mesh, batch, fields)
        return {
            name: _placed(x, parallel.batch_sharding(mesh, fields[name].axes))
            for name, x in batch.items()
        }
    split = NamedSharding(mesh, PartitionSpec(AXIS))

    def over_devices(x):
        rows = x.shape[0] // mesh.size
        return jax.ShapeDtypeStruct((mesh.size, rows, *x.shape[1:]), x.dtype, sharding=split)

    return jax.tree.map(over_devices, batch)


def lowered(step: Step, platform: str) -> tuple[Any, Any]:
    """The traced program and the lowered one."""
    function: Any = step.function
    if AXIS in step.mesh.shape:  # a pmap, which a jit lowers as it does all else
        function = jax.jit(function, donate_argnums=0)
    with jax.sharding.use_abstract_mesh(step.mesh.abstract_mesh):
        traced = function.trace(*step.arguments)
        return traced.jaxpr, traced.lower(lowering_platforms=(platform,))


def sizes(step: Step) -> tuple[dict[str, int], int]:
    """Bytes on one device by name, and those in its host's memory."""
    state, base, *rest = step.arguments
    arms = state if isinstance(state, tuple) else (state,)
    delta, optimizer = (
        device_bytes([getattr(arm, part) for arm in arms]) for part in ("delta", "opt_state")
    )
    found = {
        "weights": device_bytes(base)[0],
        "delta": delta[0],
        "optimizer": optimizer[0],
        "batch": device_bytes(rest)[0],
        WAITING: step.waiting * (delta[0] + optimizer[0]),
    }
    return found, (delta[1] + optimizer[1]) * (1 + step.waiting)


def device_bytes(tree: PyTree) -> tuple[int, int]:
    """Of the tree's parts on one device: in its own memory, and in its host's."""
    device = host = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        size = math.prod(shape) * leaf.dtype.itemsize
        on_host = leaf.sharding is not None and leaf.sharding.memory_kind == "pinned_host"
        device, host = device + size * (not on_host), host + size * on_host
    return device, host


def lacking(error: Exception) -> float:
    """The bytes that a program asks for that the compiler refuses for want of memory.

    Raises the error itself where it is another.
    """
    text = str(error)
    wanted = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of", text)
    if wanted is None:
        raise error
    amount, unit = wanted[1] or wanted[3], wanted[2] or wanted[4]
    return float(amount) * 1024 ** (1 + "KMGT".index(unit))
