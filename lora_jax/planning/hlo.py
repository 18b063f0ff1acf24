"""Reading a compiled program: which instructions run on a device, and how often.

XLA's own cost analysis counts the body of a loop once. Here every computation counts as often as
its callers run it, and a loop's body as often as the loop turns.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{[^{}]*?(?:S\((\d+)\))?\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ASSIGNED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([\w\-]+)\(")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|branch_computations)=\{?(%[^,}]+(?:, ?%[^,}]+)*)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of one device. Memory space 0 is the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype) or int((re.search(r"\d+", self.dtype) or ["32"])[0])
        return -(-math.prod(self.dims) * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: its results, its operands and its attributes.

    `literal` is the value of a constant, and the number of a parameter.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    @property
    def called(self) -> dict[str, list[str]]:
        """The computations that it runs, by role."""
        return {
            role: [name.strip().lstrip("%") for name in names.split(",")]
            for role, names in _CALLED.findall(self.attributes)
        }


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a compiled program by name; `entry` names the one that runs."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    devices: int

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """How often a step runs each computation. Of a conditional's branches, each counts."""
        counts: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            counts[name] = counts.get(name, 0) + times
            for instruction in self.computations.get(name, {}).values():
                turns = self._trips(instruction) if instruction.opcode == "while" else 1
                for called in instruction.called.values():
                    for each in called:
                        visit(each, times * turns)

        visit(self.entry, 1)
        return counts

    def running(self) -> Iterator[tuple[str, Instruction, int]]:
        """Each instruction with its computation and how often it runs."""
        for name, times in self.counts.items():
            for instruction in self.computations.get(name, {}).values():
                yield name, instruction, times

    def _trips(self, loop: Instruction) -> int:
        """As XLA states it, or the bound that the condition compares with; 1 where neither is."""
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        condition = self.computations[loop.called["condition"][0]].values()
        bounds = [
            int(each.literal)
            for each in condition
            if each.opcode == "constant" and each.shapes[0].dtype in ("s32", "u32", "s64")
        ]
        return bounds[0] if len(bounds) == 1 else 1


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`."""
    devices = re.search(r"num_partitions=(\d+)", text)
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = header[2]
            computations[current] = {}
            entry = current if header[1] else entry
        elif assigned := _ASSIGNED.match(line):
            instruction = _instruction(assigned, line)
            computations[current][instruction.name] = instruction
    return Module(computations, entry, int(devices[1]) if devices else 1)


def _instruction(assigned: re.Match, line: str) -> Instruction:
    end = _closing(line, assigned.end()) if line[assigned.end()] == "(" else None
    end = line.index(" ", assigned.end()) if end is None else end
    shapes = tuple(
        Shape(dtype, tuple(int(d) for d in dims.split(",") if d), int(space or 0))
        for dtype, dims, space in _SHAPE.findall(line[assigned.end() : end])
    )
    opcode = _OPCODE.match(line, end)
    assert opcode, line
    close = _closing(line, opcode.end() - 1)
    operands = re.findall(r"%([\w.\-]+)", line[opcode.end() : close])
    literal = line[opcode.end() : close - 1] if opcode[1] in ("constant", "parameter") else ""
    return Instruction(
        name=assigned[2],
        opcode=opcode[1],
        shapes=shapes,
        operands=tuple(operands),
        literal=literal,
        attributes=line[close:],
        is_root=bool(assigned[1]),
    )


def _closing(line: str, start: int) -> int:
    """Just behind the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(line)):
        depth += (line[place] == "(") - (line[place] == ")")
        if depth == 0:
            return place + 1
    raise AssertionError(line)
