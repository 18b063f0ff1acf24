"""The steps of an engine over a config's model, compiled for a machine that need not be there."""

import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.harness import devices, setup
from experiments.harness.ahead import device_bytes, lacking, mesh_on
from experiments.harness.plan import abstract_params
from lora_jax import parallel, serving
from lora_jax.planning.chips import Machine
from lora_jax.serving import paged_cache, sampling, shapes, steps
from lora_jax.serving.scheduler import Limits
from lora_jax.serving.shapes import Shape
from lora_jax.weights import PyTree

RANKS_OF_PAGE = 8  # a bank's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What an engine serves.

    Attributes:
      rank, targets: of each adapter, which is LoRA.
      length: tokens of a request, prompt and answer.
      page_size, chunk, readers: of the engine, whose defaults these are.
    """

    rank: int = 16
    targets: str = "all-linear"
    length: int = 2048
    page_size: int = 16
    chunk: int = 64
    readers: int = 4

    def __post_init__(self):
        for name, least in (("rank", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}.")

    @property
    def pages_of_adapter(self) -> int:
        return -(-self.rank // RANKS_OF_PAGE)

    @property
    def pages_of_request(self) -> int:
        """Of keys and values; nothing reads the last token of an answer."""
        return -(-(self.length - 1) // self.page_size)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of one device that stand in memory: of the weights, of an adapter's place in the bank
    and of a request's pages."""

    weights: int
    adapter: int
    request: int

    def standing(self, adapters: int, requests: int) -> int:
        return self.weights + adapters * self.adapter + requests * self.request


@dataclasses.dataclass(frozen=True)
class Held:
    """What an engine takes of one device, in bytes.

    Attributes:
      adapters, requests: that it holds.
      programs: how many it compiles.
      needed: all of it.
      temporary: what its largest step makes; None where the compiler says no more than that it all
        does not fit.
      code: of all programs, each counted as large as the widest of its sort.
      padding: what layouts add to weights, bank and pages, and a step's batch.
    """

    adapters: int
    requests: int
    programs: int
    needed: float
    temporary: int | None = None
    code: int = 0
    padding: int = 0


@dataclasses.dataclass(frozen=True)
class Served:
    """An engine of abstract arrays.

    Attributes:
      mesh: what they are placed on.
      arrays: base, bank, pages of keys and values.
      pool: binds the bank.
      shapes: of every step that the engine compiles.
    """

    mesh: Mesh
    arrays: tuple[PyTree, PyTree, PyTree]
    pool: serving.Pool
    shapes: Sequence[Shape]


def abstract_engine(
    config: ConfigDict, machine: Machine, load: Load, *, adapters: int, requests: int
) -> Served:
    """The engine with places for so many adapters, and rows and pages for so many requests.

    Raises:
      ValueError: for what no engine is made of.
    """
    model = setup.shape_of(config)
    if load.length > model.context_length:
        raise ValueError(
            f"requests of {load.length} tokens exceed the {model.context_length} that "
            f"{config.model.shape} reads: choose a smaller --length."
        )
    if config.parallel.mode == "pmap":
        raise ValueError(
            "config.parallel.mode='pmap': an engine runs on one mesh; plan for one device by "
            "--config.parallel.mode=single, or choose tensor, fsdp or fsdp+tensor."
        )
    mesh, base = mesh_on(config, machine), abstract_params(config)
    limits = Limits(
        rows=requests,
        readers=min(load.readers, requests),
        chunk=load.chunk,
        page_size=load.page_size,
        pages=requests * load.pages_of_request,
        max_waiting=1,
    )

    def bank_and_pages():
        bank = serving.make_bank(
            base,
            pages=adapters * load.pages_of_adapter,
            slots=adapters,
            targets=load.targets,
            page_size=RANKS_OF_PAGE,
            widest=load.rank,
        )
        dtype = base["embed"].dtype
        return bank, paged_cache.init_pages(model, limits.pages, load.page_size, dtype)

    bank, pages = jax.eval_shape(bank_and_pages)
    specs = parallel.match_specs(base, devices.rules(config))
    shardings = (
        parallel.base_shardings(mesh, base, specs),
        serving.shardings(mesh, bank, specs),
        jax.tree.map(lambda _: paged_cache.sharding(mesh, model), pages),
    )
    pool = serving.Pool(base, bank)
    return Served(
        mesh=mesh,
        arrays=jax.tree.map(_placed, (base, bank, pages), shardings),
        pool=pool,
        shapes=shapes.all_shapes(limits, load.length, pool.widths),
    )


def sizes(config: ConfigDict, machine: Machine, load: Load) -> Sizes:
    """What adapters and requests take; nothing is compiled."""
    one = abstract_engine(config, machine, load, adapters=1, requests=1)
    return Sizes(*(device_bytes(array)[0] for array in one.arrays))


def compile_engine(
    config: ConfigDict, machine: Machine, load: Load, *, adapters: int, requests: int
) -> Held:
    """Compiles an engine's widest steps of abstract arrays: that which decodes, that which reads
    prompts, and the choice of tokens.

    Raises:
      ValueError: for what no engine is made of.
    """
    engine = abstract_engine(config, machine, load, adapters=adapters, requests=requests)
    rows = {shape.rows for shape in engine.shapes}
    held = Held(adapters, requests, programs=len(engine.shapes) + len(rows), needed=math.inf)
    decoding = [shape for shape in engine.shapes if shape.tokens == 1]
    reading = [shape for shape in engine.shapes if shape.tokens > 1]
    steps_of = [_reader(config, engine, load, max(each)) for each in (decoding, reading)]
    lowered = [_lowered(engine.mesh, machine, *step) for step in steps_of]
    logits = _placed(lowered[0].out_info[1], _whole(engine.mesh))
    lowered.append(_lowered(engine.mesh, machine, *_chooser(engine, logits)))
    try:
        with ThreadPoolExecutor() as pool:  # XLA compiles outside of Python's lock
            programs = [each.memory_analysis() for each in pool.map(_compile, lowered)]
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(held, needed=lacking(error))
    arguments = programs[0].argument_size_in_bytes
    temporary = max(
        each.temp_size_in_bytes + each.output_size_in_bytes - each.alias_size_in_bytes
        for each in programs
    )
    counts = len(decoding), len(reading), len(rows)
    code = sum(
        count * each.generated_code_size_in_bytes
        for count, each in zip(counts, programs, strict=True)
    )
    return dataclasses.replace(
        held,
        needed=arguments + temporary + code,
        temporary=temporary,
        code=code,
        padding=arguments - sum(device_bytes(array)[0] for array in engine.arrays),
    )


def _reader(config: ConfigDict, engine: Served, load: Load, shape: Shape) -> tuple[Any, ...]:
    """A jitted step for batches of a shape, and what it takes."""
    model, whole = setup.shape_of(config), _whole(engine.mesh)
    shardings = paged_cache.sharding(engine.mesh, model), whole
    step = steps.jitted(model, engine.pool.bind, load.length, shardings)
    batch = jax.tree.map(lambda leaf: _placed(leaf, whole), shapes.empty_batch(shape))
    return step, *engine.arrays, batch


def _chooser(engine: Served, logits: jax.ShapeDtypeStruct) -> tuple[Any, ...]:
    whole = _whole(engine.mesh)
    how = jax.tree.map(lambda leaf: _placed(leaf, whole), shapes.empty_sampling(logits.shape[0]))
    return jax.jit(sampling.choose_each, out_shardings=whole), logits, how


def _lowered(mesh: Mesh, machine: Machine, step: Any, *arguments: Any) -> Any:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return step.trace(*arguments).lower(lowering_platforms=(machine.chip.platform,))


def _compile(lowered: Any) -> Any:
    return lowered.compile()


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
