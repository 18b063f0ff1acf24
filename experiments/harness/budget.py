"""Whether a training step fits a machine, what bounds its speed, and what would make it fit."""

import copy
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.harness.ahead import WAITING, Compiled, abstract_step, compile_step, sizes
from experiments.harness.progress import console
from lora_jax.planning.chips import Chip, Machine, chip_count, machine, shapes_of
from lora_jax.tables import aligned

GB = 1e9
OF_A_GPU = "JAX takes 75 % of a GPU; set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 for more."
UNITS = {"GB": GB, "MB": 1e6, "kB": 1e3, "B": 1}


def conduct(config: ConfigDict, topologies: Sequence[str], search: str | None) -> None:
    """Prints a plan, or the result of a search and its plan.

    Raises:
      ValueError: for what cannot be compiled, and for a step that does not fit: by how much, and
        what each knob would save.
    """
    if search == "topology":
        where, step = smallest_machine(config, topologies)
    else:
        if len(topologies) != 1:
            raise ValueError(f"--topology={','.join(topologies)}: name one, or --search=topology.")
        where = machine(topologies[0])
        if search == "batch":
            config = largest_config(config, where)
        step = compile_step(config, where)
    console.print(f"{report(config, where, step)}\n\n{versions()}", markup=False)
    if not fits(step, where.chip):
        raise ValueError(f"{verdict(where.chip, step)}\n\n{savings(config, where, step)}")


def versions() -> str:
    """Of the compilers that are installed."""
    names = ("jax", "libtpu", "jax-cuda13-plugin")
    installed = {each.name for each in importlib.metadata.distributions()}
    found = [f"{name} {importlib.metadata.version(name)}" for name in names if name in installed]
    return f"Compiled with {', '.join(found)}; nothing was run."


def fits(step: Compiled, chip: Chip) -> bool:
    """Whether the step's bytes are no more than the chip's; always, where those are not known."""
    return chip.memory is None or (step.temporary is not None and step.needed <= chip.memory)


def report(config: ConfigDict, machine: Machine, step: Compiled) -> str:
    """The tables of one plan."""
    shape = f"{config.data.batch_size} x {config.data.seq_len} tokens"
    head = (
        f"{config.name} on {machine.name}: {config.model.shape}, base {_base(config)}, mode "
        f"{config.parallel.mode}, remat {config.model.remat}, {shape} in {config.train.accumulate} "
        f"part{'s' * (config.train.accumulate > 1)}, {step.devices} of "
        f"{len(machine.devices)} devices"
    )
    parts = [head, memory_table(machine.chip, step)]
    if step.temporary is not None:
        parts += [*_exchanged(step), speed_table(machine.chip, step)]
    return "\n\n".join([*parts, verdict(machine.chip, step)])


def memory_table(chip: Chip, step: Compiled) -> str:
    """Bytes of one device by what they are for; GB are 10^9 bytes."""
    known = {name: size for name, size in step.sizes.items() if size or name != WAITING}
    if step.temporary is not None:
        known |= {"activations and temporaries": step.temporary, "the program": step.code}
        known["padding"] = max(0, round(step.needed) - sum(known.values()))
    rows = [("memory of a device", ""), *((name, amount(size)) for name, size in known.items())]
    rows += [("all of it", amount(step.needed))]
    rows += [] if chip.memory is None else [("the device has", amount(chip.memory))]
    return aligned([*rows, ("beside it, in the host's memory", amount(step.host))])


def amount(size: float) -> str:
    """Bytes as a person reads them."""
    unit, scale = next((u, n) for u, n in UNITS.items() if abs(size) >= n / 10 or n == 1)
    return f"{size / scale:,.2f} {unit}" if scale > 1 else f"{size:.0f} {unit}"


def _exchanged(step: Compiled) -> list[str]:
    if not step.collectives:
        return []
    rows: list[tuple[str, ...]] = [("exchanged", "by devices", "times", "arrays", "sent")]
    rows += [
        (each.kind, str(each.group), str(each.count), amount(each.bytes), amount(each.sent))
        for each in step.collectives
    ]
    return [aligned(rows)]


def seconds(chip: Chip, step: Compiled) -> dict[str, tuple[float, float | None]]:
    """By what bounds a step: its amount, and the least time that the chip takes for it."""
    sent = sum(each.sent for each in step.collectives)
    amounts = {
        "products": (step.flops, chip.flops),
        "main memory": (step.traffic, chip.bandwidth),
        "links": (sent, chip.links),
    }
    return {
        name: (amount, None if rate is None else amount / rate)
        for name, (amount, rate) in amounts.items()
    }


def speed_table(chip: Chip, step: Compiled) -> str:
    """The least time of a step by what bounds it."""
    rows: list[tuple[str, ...]] = [("a step of a device", "", "takes at least")]
    times = seconds(chip, step)
    for name, (size, least) in times.items():
        what = f"{size / 1e12:,.3f} TFLOP" if name == "products" else amount(size)
        rows.append((name, what, "" if least is None else f"{least * 1e3:,.1f} ms"))
    known = [least for _, least in times.values() if least is not None]
    if not known:
        return f"{aligned(rows)}\n\nNo peak figures are known of it, and so no bound of its speed."
    rate = step.tokens / max(known)
    return (
        f"{aligned(rows)}\n\nAt most {rate:,.0f} tokens/s, {rate / step.devices:,.0f} a device: a "
        "bound by the chip's peak figures, not a measurement."
    )


def verdict(chip: Chip, step: Compiled) -> str:
    """Whether it fits, and by how much or how little."""
    if chip.memory is None:
        return "No limit of memory is known of this device."
    spare = chip.memory - step.needed
    if fits(step, chip):
        text = f"It fits, with {amount(spare)} to spare on each device."
        if chip.platform == "cuda" and step.needed > 0.75 * chip.memory:
            text += f" {OF_A_GPU}"
        return text
    return f"It does not fit: {amount(-spare)} too much on each device."


def knobs(config: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
    """Changes to a config that save memory: what to write, and the changed config."""
    settings = {
        "config.model.remat": "offload" if config.model.remat == "full" else "full",
        "config.train.optimizer_memory": "pinned_host",
    }
    if config.base.quantize == "none":
        settings["config.base.quantize"] = "nf4"
    if config.sweep.mode != "in_turn" and len(config.sweep.ranks) > 1:
        settings["config.sweep.mode"] = "in_turn"
    for name, value in settings.items():
        changed = _changed(config, **{name.removeprefix("config."): value})
        if changed.to_dict() != config.to_dict():
            yield f"--{name}={value}", changed
    parts = 2 * config.train.accumulate
    if config.data.batch_size % parts == 0:
        yield f"--config.train.accumulate={parts}", _changed(config, **{"train.accumulate": parts})
    if config.data.batch_size > 1:
        rows = config.data.batch_size // 2
        yield f"--config.data.batch_size={rows}", _changed(config, **{"data.batch_size": rows})


def _changed(config: ConfigDict, **settings: Any) -> ConfigDict:
    changed = copy.deepcopy(config)
    changed.update_from_flattened_dict(settings)
    return changed


def savings(config: ConfigDict, where: Machine, step: Compiled) -> str:
    """What each knob saves, by compiling the step with it; and the next larger machine."""
    rows: list[tuple[str, ...]] = [("what would save memory", "saves", "and then the step")]

    def tried(name: str, config: ConfigDict, where: Machine) -> None:
        console.print(f"trying {name}", style="dim", markup=False)
        try:
            other = compile_step(config, where)
        except ValueError as error:
            rows.append((name, "", str(error)))
            return
        lacks = amount(max(0, other.needed - (where.chip.memory or 0)))
        then = "fits" if fits(other, where.chip) else f"has {lacks} too much"
        rows.append((name, amount(step.needed - other.needed), then))

    for name, changed in knobs(config):
        tried(name, changed, where)
    if larger := _larger(where):
        tried(f"--topology={larger}", config, machine(larger))
    return aligned(rows, left=3)


def _larger(where: Machine) -> str | None:
    names = shapes_of(where.name.partition(":")[0])
    place = names.index(where.name) + 1
    return names[place] if place < len(names) else None


def smallest_machine(config: ConfigDict, kinds: Sequence[str]) -> tuple[Machine, Compiled]:
    """The machine of the fewest chips that takes the step, of all that are known of these kinds.

    Raises:
      ValueError: where none does.
    """
    names = sorted((name for kind in kinds for name in shapes_of(kind)), key=chip_count)
    for name in names:
        where = machine(name)
        try:
            standing = sum(sizes(abstract_step(config, where))[0].values())
            if where.chip.memory is not None and standing > where.chip.memory:
                raise ValueError(f"{amount(standing)} of weights and states on each device alone.")
            step = compile_step(config, where)
            if fits(step, where.chip):
                return where, step
            said = verdict(where.chip, step)
        except ValueError as error:
            said = str(error)
        console.print(f"{name}: {said}", markup=False)
    raise ValueError(f"{config.name} fits none of {', '.join(names)}.")


def largest_config(config: ConfigDict, where: Machine) -> ConfigDict:
    """The config with as many rows as fit the machine.

    Raises:
      ValueError: where not even the fewest rows fit, or any number would.
    """
    if where.chip.memory is None:
        raise ValueError(f"{where.name}: no limit of memory is known of it, so any batch fits.")
    unit = _fewest_rows(config, where)

    def with_rows(rows: int) -> ConfigDict:
        return _changed(config, **{"data.batch_size": rows})

    def fit(rows: int) -> bool:
        step = compile_step(with_rows(rows), where)
        console.print(f"{rows} rows: {verdict(where.chip, step)}", markup=False)
        return fits(step, where.chip)

    rows = largest_batch(fit, unit)
    if rows == 0:
        raise ValueError(f"{config.name} does not fit {where.name}, even with {unit} rows.")
    return with_rows(rows)


def _fewest_rows(config: ConfigDict, where: Machine) -> int:
    """One for each device that has rows of its own, in each part of a step."""
    settings = config.parallel
    if settings.mode in ("single", "tensor"):
        return config.train.accumulate
    shared = settings.tensor * settings.sequence * settings.arms
    return max(1, len(where.devices) // shared) * config.train.accumulate


def largest_batch(fit: Callable[[int], bool], unit: int, most: int = 2**14) -> int:
    """The largest multiple of `unit` rows for which `fit` holds, 0 for none: by doubling, and then
    by halving what is left."""
    low, high = 0, unit
    while high <= most and fit(high):
        low, high = high, 2 * high
    while high - low > unit:
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low


def _base(config: ConfigDict) -> str:
    return config.model.dtype if config.base.quantize == "none" else config.base.quantize
