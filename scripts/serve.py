"""A base and any number of its adapters over OpenAI's API.

    python scripts/serve.py --adapters=DIR --port=8000
    python scripts/serve.py --adapters=DIR --model=FOLDER --api-key=KEY --host=0.0.0.0

`--model` is what `lora_jax.interop.load` takes. Each folder in DIR that holds an
adapter_config.json is an adapter, which requests choose by their `model`: the folder's name, or the
base's own name for the base alone. A folder that cannot be served is reported and left out.
POST /v1/load_lora_adapter {"lora_name", "lora_path"} and /v1/unload_lora_adapter {"lora_name"}
change them while the server runs. What was loaded so is written to DIR/loaded_adapters.json, and is
there after a restart until it is unloaded; without --adapters it is not. A folder in DIR that was
unloaded is served again by the next start.

    python scripts/serve.py --adapters=DIR --parallel=tensor

splits every product over all devices, as `config.parallel.mode` does in training; the number of
devices must divide what it splits.
SIGTERM ends the server when its requests have ended, at the latest after --grace seconds.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

from lora_jax.serving.api.catalog import Catalog, Store, folders
from lora_jax.serving.api.driver import Driver, Engine
from lora_jax.serving.api.generation import Service
from lora_jax.serving.api.limits import Limits
from lora_jax.serving.api.loaded_file import LoadedFile
from lora_jax.serving.api.served_model import ServedModel
from lora_jax.serving.api.server import Server, check_exposure, listen, serve

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from lora_jax.interop import Pretrained
    from lora_jax.serving.placement import Placement


class Parts(NamedTuple):
    """What serves: made from the arguments."""

    model: ServedModel
    engine: Engine
    store: Store
    warm_up: Callable[[], Any] = lambda: None


Make = Callable[[argparse.Namespace, Mapping[str, Path]], Parts]


def parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    made = argparse.ArgumentParser(
        prog="serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--adapters", type=Path, metavar="DIR", help="A folder of adapters' folders.")
    add("--model", default="smollm2-135m", help="The base: a folder, a .gguf file, or a name.")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--quantize", choices=["nf4", "fp4"], help="The base's linears.")
    add("--parallel", default="single", metavar="MODE", help="single, or tensor: all devices.")
    add("--host", default="127.0.0.1", help="Others than loopback need a key.")
    add("--port", type=_from(0, 65535), default=8000, help="0 takes a free one.")
    add("--api-key", "--api_key", help="Asked for by every path but /health.")
    add("--rows", type=_from(1), default=8, help="Requests that run at once.")
    add("--slots", type=_from(1), default=32, help="Adapters on the device at once.")
    add("--max-rank", "--max_rank", type=_from(1), default=16, help="At least; or DIR's highest.")
    add("--page-size", "--page_size", type=_from(1), default=16, help="Tokens a page of the cache.")
    add("--pages", type=_from(2), default=512, help="Of the cache.")
    add("--max-length", "--max_length", type=_from(2), default=2048, help="Of prompt and answer.")
    add("--chunk", type=_from(1), default=64, help="Tokens of a prompt that a step reads.")
    add("--max-waiting", "--max_waiting", type=_from(1), default=256, help="Then 429.")
    add("--max-tokens", "--max_tokens", type=_from(1), help="Of one answer; else the context.")
    add("--max-body", "--max_body", type=_from(1), default=1 << 20, help="Bytes; then 413.")
    add("--timeout", type=_from(1), default=600, help="Seconds for one request; then 504.")
    add("--grace", type=_from(0), default=30, help="Seconds for what runs when the server ends.")
    return made


def _from(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or len(text) > 10 or not low <= int(text) <= high:
            message = f"{text[:40]!r}, expected an integer from {low} to {high}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return read


def run(arguments: argparse.Namespace, make: Make) -> int:
    """Serves until a signal; the process's exit status."""
    check_exposure(arguments.host, arguments.api_key)
    if arguments.adapters is not None and not arguments.adapters.is_dir():
        raise ValueError(f"--adapters={arguments.adapters} is no folder.")
    listen(arguments.host, arguments.port).close()  # before what takes long
    loaded = arguments.adapters and LoadedFile(arguments.adapters)
    adapters = {} if loaded is None else at_start(arguments.adapters, loaded)
    parts = make(arguments, adapters)
    catalog = Catalog(parts.model.name, parts.store, loaded)
    take_in(catalog, adapters)
    say("compiling every step that a request may need; the next start reads most of them")
    parts.warm_up()
    driver = Driver(parts.engine, on_failure=lambda: server.fail())
    limits = Limits(
        body_bytes=arguments.max_body,
        seconds=arguments.timeout,
        max_tokens=arguments.max_tokens,
        choices=min(Limits.choices, arguments.max_waiting),
    )
    service = Service(
        driver=driver,
        model=parts.model,
        catalog=catalog,
        limits=limits,
        api_key=arguments.api_key,
    )
    server = Server(service, grace=arguments.grace)
    listening = listen(arguments.host, arguments.port)
    driver.start()
    url = f"http://{arguments.host}:{listening.getsockname()[1]}/v1"
    say(f"{parts.model.name} and {len(catalog)} adapters at {url}")
    serve(server, listening)
    driver.stop()
    return 1 if driver.failed else 0


def at_start(parent: Path, loaded: LoadedFile) -> dict[str, Path]:
    """The folders in `parent`, and what a server loaded while it ran, which comes first."""
    found, again = folders(parent), loaded.read()
    for name in found.keys() & again.keys():
        if found[name].absolute() != again[name]:
            say(f"left out: {found[name]}: {loaded.path} has another folder of this name")
    return found | again


def take_in(catalog: Catalog, adapters: Mapping[str, Path]) -> None:
    """Every adapter that can be served; the others are reported."""
    for name, folder in adapters.items():
        try:
            catalog.take_in(name, folder)
        except (OSError, ValueError) as error:
            say(f"left out: {name}: {error}")


def say(line: str) -> None:
    print(f"serve: {line}", flush=True)


def parts_of(arguments: argparse.Namespace, adapters: Mapping[str, Path]) -> Parts:
    """The model, and an engine over a pool with room for adapters such as these."""
    import jax

    from lora_jax.data.sources import default_cache_dir
    from lora_jax.serving.engine import Engine as RealEngine
    from lora_jax.serving.peft_store import PeftStore, make_pool
    from lora_jax.serving.placement import mesh_of

    mesh = mesh_of(arguments.parallel)
    jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    model, placement = placed(arguments, mesh)
    store = PeftStore(model)
    pool = make_pool(
        model.params,
        store.read_ahead(adapters.values()),
        rows=arguments.rows,
        slots=arguments.slots,
        max_rank=arguments.max_rank,
        placement=placement,
    )
    store.put_into(pool)
    engine = RealEngine(
        model,
        pool,
        rows=arguments.rows,
        page_size=arguments.page_size,
        pages=arguments.pages,
        chunk=arguments.chunk,
        max_length=arguments.max_length,
        max_waiting=arguments.max_waiting,
        mesh=mesh,
    )
    served = ServedModel(
        name=model.name,
        tokenizer=model.tokenizer,
        context_length=engine.max_length,
        vocab_size=model.config.vocab_size,
    )
    return Parts(served, engine, store, engine.warm_up)


def placed(
    arguments: argparse.Namespace, mesh: "Mesh | None"
) -> tuple["Pretrained", "Placement | None"]:
    """The model on the devices of a mesh, and where that is."""
    import jax.numpy as jnp

    from lora_jax.interop import load, on_device, quantized, shapes_alone
    from lora_jax.serving.placement import Placement

    dtype = jnp.dtype(arguments.dtype)
    if mesh is None:
        place = quantized(arguments.quantize) if arguments.quantize else on_device
        return load(arguments.model, dtype=dtype, place=place), None
    family = load(arguments.model, dtype=dtype, place=shapes_alone).config.family
    placement = Placement(mesh, family.sharding)
    model = load(arguments.model, dtype=dtype, place=placement.place(arguments.quantize))
    return dataclasses.replace(model, params=placement.params(model.params)), placement


def main(argv: list[str], make: Make = parts_of) -> int:
    try:
        return run(parser().parse_args(argv), make)
    except (ValueError, OSError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
