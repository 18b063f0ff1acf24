"""How many adapters and requests a machine holds beside each other, by compiled steps."""

import dataclasses
import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from experiments.harness.budget import OF_A_GPU, amount, versions
from experiments.harness.progress import console
from experiments.harness.serving_ahead import Held, Load, Sizes, compile_engine, sizes
from lora_jax.planning.chips import Machine, machine
from lora_jax.tables import aligned

FEW = 8  # requests: an engine's default
MOST_ENGINES = 5  # compiled until the number of requests is found; a minute each
COPIED = (
    "A step makes nearly as much as all pages take, as one does that copies them. They stay in "
    "place on one device, and in mode tensor over devices whose number divides num_kv_heads."
)


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What stands in memory, and what comes on top of it by two compiled engines.

    Attributes:
      sizes: of weights, an adapter and a request.
      held: the engine of the most requests that fit.
      other: one of as many adapters and another number of requests; `held` itself where that
        number was asked for.
    """

    sizes: Sizes
    held: Held
    other: Held

    def needed(self, adapters: int, requests: int) -> float:
        """Bytes of a device: exact at both engines, on a straight line through them elsewhere, for
        what a step makes grows with its rows and not with the bank."""
        rows = self.other.requests - self.held.requests
        here, there = self._on_top(self.held), self._on_top(self.other)
        slope = (there - here) / rows if rows else here / self.held.requests
        on_top = here + slope * (requests - self.held.requests)
        return self.sizes.standing(adapters, requests) + max(0.0, on_top)

    def _on_top(self, held: Held) -> float:
        return held.needed - self.sizes.standing(held.adapters, held.requests)

    def most_requests(self, adapters: int, memory: float) -> int:
        """How many requests fit beside so many adapters."""
        # Bytes grow with requests, so no more fit than by what stands alone.
        low, high = 0, _most_standing(self.sizes, adapters, memory)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.needed(adapters, middle) <= memory
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def conduct(
    config: ConfigDict,
    topologies: Sequence[str],
    load: Load,
    adapters: Sequence[int],
    requests: int | None,
) -> None:
    """Prints what a machine holds.

    Args:
      config: the model, its base's format and how it is placed on devices.
      topologies: the name of one machine.
      load: of what kind adapters and requests are.
      adapters: how many are resident, a line of the table each.
      requests: how many run at once; None for as many as fit.

    Raises:
      ValueError: for what cannot be compiled, and where none of `adapters` fits, with that many
        requests or with one: by how much.
    """
    if len(topologies) != 1:
        raise ValueError(f"--topology={','.join(topologies)}: name one, with --serve.")
    adapters = sorted({*adapters})
    if not adapters or adapters[0] < 1 or (requests is not None and requests < 1):
        raise ValueError(
            f"--adapters={','.join(map(str, adapters))} and --requests={requests}: expected at "
            "least 1 of each."
        )
    where = machine(topologies[0])
    found = measure(config, where, load, adapters[0], requests)
    console.print(f"{report(config, where, load, found, adapters, requests)}\n", markup=False)
    console.print(versions(), markup=False)
    _require(found.sizes, found.needed(adapters[0], requests or 1), adapters[0], requests, where)


def measure(
    config: ConfigDict, where: Machine, load: Load, adapters: int, requests: int | None
) -> Capacity:
    """Compiles an engine of few requests and of as many as fit beside so many adapters; or one
    of the number given.

    Raises:
      ValueError: where what stands in memory is too much already.
    """
    memory, each = where.chip.memory, sizes(config, where, load)
    _require(each, each.standing(adapters, requests or 1), adapters, requests, where)

    def compiled(count: int) -> Held:
        said = f"compiling an engine of {_both(adapters, count)} for {where.name}"
        console.print(said, style="dim", markup=False)
        return compile_engine(config, where, load, adapters=adapters, requests=count)

    if requests is not None or memory is None:
        held = compiled(requests or FEW)
        return Capacity(each, held, held)
    before = last = compiled(min(FEW, _most_standing(each, adapters, memory)))
    engines = {last.requests: last}
    while len(engines) < MOST_ENGINES:
        count = Capacity(each, last, before).most_requests(adapters, memory)
        if count == 0 or count in engines:
            break
        before, last = last, compiled(count)
        engines[count] = last
    if len(engines) == 1 and last.requests > 1:
        engines[1] = compiled(1)  # a line takes two
    fitting = [count for count, held in engines.items() if held.needed <= memory]
    held = engines.pop(max(fitting, default=min(engines)))
    nearest = min(engines, key=lambda count: abs(count - held.requests), default=held.requests)
    return Capacity(each, held, engines.get(nearest, held))


def _most_standing(each: Sizes, adapters: int, memory: float) -> int:
    return max(0, int(memory - each.standing(adapters, 0)) // each.request)


def _require(
    each: Sizes, needed: float, adapters: int, requests: int | None, where: Machine
) -> None:
    memory = where.chip.memory
    if memory is None or needed <= memory:
        return
    raise ValueError(
        f"{_both(adapters, requests or 1)} do not fit {where.name}: "
        f"{amount(needed - memory)} too much on each device, which has {amount(memory)}. Weights "
        f"take {amount(each.weights)}, an adapter {amount(each.adapter)}, a request "
        f"{amount(each.request)}. --config.base.quantize=nf4 makes the base smaller, "
        "--config.parallel.mode=tensor splits all of it over devices, --adapters and --requests "
        "make fewer of them."
    )


def _both(adapters: int, requests: int) -> str:
    return f"{_counted(adapters, 'adapter')} and {_counted(requests, 'request')}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"


def report(
    config: ConfigDict,
    where: Machine,
    load: Load,
    found: Capacity,
    adapters: Sequence[int],
    requests: int | None,
) -> str:
    """The tables: of the memory of one device, and of adapters against requests."""
    base = config.model.dtype if config.base.quantize == "none" else config.base.quantize
    head = (
        f"{config.name} on {where.name}: {config.model.shape}, base {base}, mode "
        f"{config.parallel.mode}; adapters of rank {load.rank} on {load.targets}, requests of "
        f"{load.length} tokens"
    )
    parts = [head, memory_table(where, found), trade_table(where, found, adapters, requests)]
    equal = found.sizes.request / found.sizes.adapter
    parts.append(
        f"A request takes {amount(found.sizes.request)} of a device, an adapter "
        f"{amount(found.sizes.adapter)}: one request, {equal:,.1f} adapters."
    )
    parts.append("Adapters beyond those resident wait in the host's memory.")
    if config.parallel.mode != "single" and len(where.devices) > 1:
        parts[-1] += " The numbers of both are for all devices together."
    if (found.held.temporary or 0) > found.held.requests * found.sizes.request / 2:
        parts.append(COPIED)
    if where.chip.platform == "cuda" and found.held.needed > 0.75 * (where.chip.memory or math.inf):
        parts.append(OF_A_GPU)
    return "\n\n".join(parts)


def memory_table(where: Machine, found: Capacity) -> str:
    """Bytes of one device in the largest engine that was compiled; GB are 10^9 bytes."""
    held, each = found.held, found.sizes
    rows = [
        ("memory of a device", ""),
        ("weights", amount(each.weights)),
        (f"bank of {_counted(held.adapters, 'adapter')}", amount(held.adapters * each.adapter)),
        (f"pages of {_counted(held.requests, 'request')}", amount(held.requests * each.request)),
    ]
    if held.temporary is not None:
        rows.append(("temporaries of the largest step", amount(held.temporary)))
        rows.append(("padding and a step's batch", amount(held.padding)))
    if held.code:  # which compilers for CPUs and GPUs do not count
        rows.append((f"{held.programs} programs, at most", amount(held.code)))
    rows += [("all of it", amount(held.needed))]
    if where.chip.memory is not None:
        rows += [
            ("the device has", amount(where.chip.memory)),
            ("left", amount(where.chip.memory - held.needed)),
        ]
    return aligned(rows)


def trade_table(
    where: Machine, found: Capacity, adapters: Sequence[int], requests: int | None
) -> str:
    """What adapters in the bank leave to requests."""
    memory, each = where.chip.memory, found.sizes
    rows: list[tuple[str, ...]] = [("adapters resident", "bank", "requests", "pages", "left")]
    for count in adapters:
        fitting = found.held.requests
        is_compiled = count == found.held.adapters and found.held.needed <= (memory or math.inf)
        if requests is None and memory is not None and not is_compiled:
            fitting = min(fitting, found.most_requests(count, memory))
        pages = amount(fitting * each.request)
        left = _left(memory, found.needed(count, max(1, fitting)))
        rows.append((str(count), amount(count * each.adapter), str(fitting), pages, left))
    return aligned(rows)


def _left(memory: float | None, needed: float) -> str:
    if memory is None:
        return "no limit known"
    return amount(memory - needed) if needed <= memory else f"lacks {amount(needed - memory)}"
