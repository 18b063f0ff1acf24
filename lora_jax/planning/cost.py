"""The work of a compiled step on one device: bytes of memory, bytes between devices, and
floating-point operations."""

import dataclasses
import math
import re
from typing import Any

from lora_jax.planning.hlo import Instruction, Module

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Instructions that name bytes, or whose computations are counted themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update",
    "async-done", "iota", "domain",
}  # fmt: skip
_NAMES = {"AllocateBuffer", "Sharding", "AsyncCollectiveStart", "AsyncCollectiveDone"}
_SLICES = ("slice", "dynamic-slice", "gather")
_THROUGH = ("bitcast", "copy", "fusion", "reshape", "transpose", "convert")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over groups of one size, of one step and one device.

    Attributes:
      kind: as XLA names it.
      group: how many devices take part in each.
      count: how many there are.
      bytes: of the full arrays that they gather, sum or pass on.
      sent: what leaves the device: `bytes * (n - 1) / n`, twice that for an all-reduce (Thakur et
        al. 2005, "Optimization of collective communication operations in MPICH").
    """

    kind: str
    group: int
    count: int
    bytes: int
    sent: int


def collectives(module: Module) -> list[Collective]:
    """The program's collectives, those that send the most first.

    A collective that XLA splits, so as to overlap it, appears in several computations
    under one channel, and counts where it runs most often.
    """
    found: dict[str, tuple[int, str, int, int]] = {}
    for computation, instruction, times in module.running():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _KINDS:
            continue
        group = _group(instruction, module.devices)
        size = _full_bytes(instruction, kind, group)
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind = "reduce-scatter"
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        key = channel[0] if channel else f"{computation}/{instruction.name}"
        found[key] = max(found.get(key, (0, "", 0, 0)), (times, kind, group, size))
    totals: dict[tuple[str, int], list[int]] = {}
    for times, kind, group, size in found.values():
        total = totals.setdefault((kind, group), [0, 0])
        total[0] += times
        total[1] += times * size
    rows = [
        Collective(kind, group, count, size, _sent(kind, group, size))
        for (kind, group), (count, size) in totals.items()
    ]
    return sorted(rows, key=lambda row: -row.sent)


def _full_bytes(instruction: Instruction, kind: str, group: int) -> int:
    """The bytes of the full arrays that are gathered, summed or passed on."""
    sizes = [shape.bytes for shape in instruction.shapes]
    started = instruction.opcode.endswith("-start")
    if started and kind in ("all-gather", "collective-permute", "collective-broadcast"):
        return max(sizes)  # beside its result it returns its operand and flags
    return sum(sizes) * (group if kind == "reduce-scatter" else 1)


def _sent(kind: str, group: int, size: int) -> int:
    if kind in ("collective-permute", "collective-broadcast"):
        return size
    return (2 if kind == "all-reduce" else 1) * size * (group - 1) // group


def _group(instruction: Instruction, devices: int) -> int:
    """The size of its groups of devices, which XLA writes in three ways."""
    text = instruction.attributes
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(iota[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return listed[1].count(",") + 1
    return devices


def traffic(module: Module) -> int:
    """Bytes that one step reads from and writes to a device's main memory: the operands and the
    results of each instruction, without what the compiler keeps on the chip."""
    inside = _fused(module)
    return sum(
        times * _moved(module, computation, instruction)
        for computation, instruction, times in module.running()
        if computation not in inside
    )


def _fused(module: Module) -> set[str]:
    """The computations whose values never reach memory: of fusions, reductions and the like."""
    return {
        name
        for body in module.computations.values()
        for instruction in body.values()
        for role, names in instruction.called.items()
        if role == "to_apply" or (role == "calls" and instruction.opcode == "fusion")
        for name in names
    }


def _moved(module: Module, computation: str, instruction: Instruction) -> int:
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    if target and target[1] in _NAMES:
        return 0
    body = module.computations[computation]
    fused = instruction.called.get("calls", [""])[0] if instruction.opcode == "fusion" else ""
    read = sum(
        _read(module, body, instruction, place, fused) for place in range(len(instruction.operands))
    )
    shapes = instruction.shapes
    if instruction.opcode.endswith("-start"):  # returns its operand, too
        shapes = shapes[:1] if instruction.opcode == "copy-start" else shapes[1:2]
    written = _updated(module, body, instruction, fused)
    return read + (_in_memory(shapes) if written is None else written)


def _in_memory(shapes: Any) -> int:
    return sum(shape.bytes for shape in shapes if shape.space == 0)


def _read(module: Module, body: dict, user: Instruction, place: int, fused: str) -> int:
    """What `user` reads of its operand: all, or as much as it slices."""
    source = body.get(user.operands[place])
    if source is None or _in_memory(source.shapes) == 0:
        return 0
    size = _in_memory(source.shapes)
    if user.opcode in _SLICES and place == 0:
        return min(size, _in_memory(user.shapes))
    if user.opcode == "dynamic-update-slice" and place == 0:
        return 0
    return min(size, _read_inside(module, fused, place, size)) if fused else size


def _read_inside(module: Module, fused: str, place: int, size: int) -> int:
    body = module.computations[fused]
    start = next(
        name
        for name, each in body.items()
        if each.opcode == "parameter" and each.literal == str(place)
    )
    total, names = 0, {start}
    for each in body.values():
        for at, operand in enumerate(each.operands):
            if operand not in names:
                continue
            if each.opcode in _SLICES and at == 0:
                total += sum(shape.bytes for shape in each.shapes)
            elif each.opcode in _THROUGH and len(each.operands) == 1 and not each.is_root:
                names.add(each.name)
            elif each.opcode == "fusion":
                total += _read_inside(module, each.called["calls"][0], at, size)
            elif not (each.opcode == "dynamic-update-slice" and at == 0):
                return size
    return total


def _updated(module: Module, body: dict, instruction: Instruction, fused: str) -> int | None:
    """What an update in place writes; None where all of the result is written."""
    root, inner = instruction, body
    if fused:
        inner = module.computations[fused]
        root = next(each for each in inner.values() if each.is_root)
        while root.opcode == "bitcast":
            root = inner[root.operands[0]]
    if root.opcode != "dynamic-update-slice":
        return None
    return sum(shape.bytes for shape in inner[root.operands[1]].shapes)


def flops(jaxpr: Any) -> int:
    """Floating-point operations of the products in a traced program, over all devices.

    Counted before XLA sees it: `2 m k n` for a product, as often as scans repeat it, recomputation
    included, and not where nothing reads them; of a conditional's branches the larger. A Pallas
    kernel counts by its own estimate, or by what each step of its grid multiplies. Other
    operations are not counted.

    Args:
      jaxpr: of `jax.jit(f).trace(...).jaxpr`.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total, used = 0, {id(out) for out in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(id(out) in used for out in equation.outvars):
            total += _flops_of(equation)
            used |= {id(each) for each in equation.invars}
    return total


def _flops_of(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        contracted = params["dimension_numbers"][0][0]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    inner = [flops(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    if name == "pallas_call" and params["cost_estimate"] is not None:
        return params["cost_estimate"].flops
    return sum(inner) * _repeats(name, params)


def _repeats(name: str, params: Any) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [jaxpr for each in value for jaxpr in _jaxprs(each)]
    inner = getattr(value, "jaxpr", value)
    return [inner] if hasattr(inner, "eqns") else []
