"""Converts models and adapters between formats.

    python scripts/convert.py --from=smollm2-135m --to=FOLDER             # a Hugging Face folder
    python scripts/convert.py --from=FOLDER --to=model.gguf --kind=Q8_0   # a GGUF file
    python scripts/convert.py --from=FOLDER --to=NEW --quantize=nf4       # for bitsandbytes, 4 bits
    python scripts/convert.py --from=FOUR_BITS --to=NEW --quantize=none   # its floats
    python scripts/convert.py --from=FOLDER --adapter=ADAPTER --merge --to=MERGED
    python scripts/convert.py --from=FOLDER --adapter=ADAPTER --to=SERVED --profile=vllm

`--from` is what `lora_jax.interop.load` takes: a folder, a .gguf file, a name. `--adapter` is a
folder that PEFT's save_pretrained, or this project, wrote. `--quantize` does so leaf by leaf while
the model is loaded; with `--merge`, after it. A base in 4 bits is merged into, or becomes a GGUF
file, only where `--quantize` states the format of the result: the same 4 bits, others, or floats.
Nothing is overwritten, and an option without an effect is an error.
"""

import contextlib
import dataclasses
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

import jax
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

import lora_jax as lora
from lora_jax.interop import (
    Digest,
    ModelForward,
    Pretrained,
    digest_of,
    load,
    peft,
    quantized,
    save_gguf,
    save_huggingface,
)
from lora_jax.interop.huggingface_files import open_tensors
from lora_jax.interop.pretrained import locate
from lora_jax.interop.read_json import read_json
from lora_jax.quant import Quantized
from lora_jax.weights import is_weight

_FROM = flags.DEFINE_string("from", None, "The model: a folder, a .gguf file, or a name.")
_TO = flags.DEFINE_string("to", None, "A new folder, or a new .gguf file.")
_ADAPTER = flags.DEFINE_string("adapter", None, "The folder of an adapter of this model.")
_MERGE = flags.DEFINE_bool("merge", False, "Write the model with the adapter merged into it.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of a folder.")
_KIND = flags.DEFINE_enum("kind", "F16", ["F16", "Q8_0"], "Of a GGUF file.")
_QUANTIZE = flags.DEFINE_enum(
    "quantize", None, ["nf4", "fp4", "none"], "The linears of a folder; none: floats of 4 bits."
)
_CHECK_BASE = flags.DEFINE_bool("check_base", True, "Hold an adapter to its base's fingerprint.")
_PROFILE = flags.DEFINE_enum("profile", "peft", ["peft", "vllm"], "Of an adapter.")

_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".whl", ".zip")


def convert() -> dict[str, str]:
    """Converts, and returns the lines of the table."""
    check_options()
    target = Path(_TO.value).expanduser()
    check_target(target)
    check_formats(source_is_packed())
    if _ADAPTER.value is not None:
        check_adapter(Path(_ADAPTER.value))
    model = load_model()
    held = formats(model)
    said = {"model": f"{model.name}, {parameters(model):,} parameters", "read from": model.source}
    if _ADAPTER.value is None:
        return said | write_model(as_asked(model, held), target)
    names = peft.model_names(model.config)
    delta = load_adapter(model, names)
    said["adapter"] = str(lora.describe(model.params, delta)).splitlines()[-1]
    if _MERGE.value:
        digest = digest_of(ModelForward(model.config), model.params, delta)
        # Of the base's own format, what was not adapted keeps its bits.
        params = lora.merge(model.params, delta, requantize=held == {_QUANTIZE.value})
        model = as_asked(dataclasses.replace(model, params=params), held)
        return said | {"merged": merged_into(held)} | write_model(model, target, digest)
    peft.save_adapter(
        target,
        delta,
        model.params,
        names,
        base_name=_FROM.value,
        num_kv_heads=model.config.num_kv_heads,
        profile=_PROFILE.value,
    )
    return said | {"written": f"{target}, an adapter for {_PROFILE.value}"}


def check_options() -> None:
    """Raises ValueError where options contradict each other, or one would do nothing."""
    if not _FROM.value or not _TO.value:
        raise ValueError("--from and --to are both needed; --help has examples.")
    if _ADAPTER.value == "":
        raise ValueError("--adapter is empty; expected the folder of an adapter.")
    has_adapter, is_gguf = _ADAPTER.value is not None, _to_gguf()
    writes_adapter = has_adapter and not _MERGE.value
    if _MERGE.value and not has_adapter:
        raise ValueError("--merge needs an --adapter.")
    if writes_adapter and is_gguf:
        raise ValueError(
            f"--to={_TO.value} is a GGUF file, and an adapter is written as a folder: add --merge "
            "for the merged model, or name a folder."
        )
    if writes_adapter and _QUANTIZE.value:
        raise ValueError("--quantize is of a model, and without --merge an adapter is written.")
    if is_gguf and _QUANTIZE.value in ("nf4", "fp4"):
        raise ValueError(
            f"--quantize={_QUANTIZE.value} needs a --to that is a model's Hugging Face folder; a "
            "GGUF file has --kind=Q8_0."
        )
    useless = {
        "kind": (not is_gguf, "is of a GGUF file, which --to does not name"),
        "dtype": (is_gguf or writes_adapter, "is of a model's folder, which --to does not name"),
        "profile": (not writes_adapter, "is of an adapter that is written, without --merge"),
        "check_base": (not has_adapter, "is of an --adapter"),
    }
    for name, (is_useless, reason) in useless.items():
        if is_useless and flags.FLAGS[name].present:
            raise ValueError(f"--{name} {reason}: leave it out.")


def check_target(target: Path) -> None:
    """Raises ValueError or OSError where nothing can be written at `target`."""
    if target.suffix.lower() in _FILES:
        raise ValueError(
            f"--to={target} looks like a {target.suffix} file; expected a folder, or a .gguf file."
        )
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists: choose another --to.")
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{target} cannot be written: {above} is no folder that may be changed.")


def check_adapter(folder: Path) -> None:
    """Raises ValueError or FileNotFoundError where `folder` holds no adapter that can be used."""
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"--adapter={folder} is no adapter: expected a folder with adapter_config.json and "
            "adapter_model.safetensors."
        )
    method = read_json(folder / "adapter_config.json").get("peft_type")
    beside = [name for codec in peft.CODECS if not codec.in_layers for name in codec.types]
    if _MERGE.value and method in beside:
        raise ValueError(
            f"{folder} is of {method}, which no weight can take up: leave --merge out, and serve "
            "model and adapter side by side."
        )


def check_formats(is_packed: bool) -> None:
    """Raises ValueError where a base in 4 bits, or in floats, does not fit --quantize."""
    if not is_packed and _QUANTIZE.value == "none":
        raise ValueError(f"{_FROM.value} is in floats already; leave --quantize out.")
    if not is_packed or _QUANTIZE.value == "none":
        return
    floats = "--quantize=none writes floats"
    if _to_gguf():
        raise ValueError(f"{_FROM.value} is in 4 bits, of a format that GGUF has not: {floats}.")
    if _MERGE.value and _QUANTIZE.value is None:
        raise ValueError(
            f"{_FROM.value} is in 4 bits, and a merged weight is not: --quantize=nf4 or "
            f"--quantize=fp4 rounds it to 4 bits again, {floats}."
        )
    if not _MERGE.value and _QUANTIZE.value is not None:
        raise ValueError(f"{_FROM.value} is in 4 bits already; leave --quantize out, or {floats}.")


def source_is_packed() -> bool:
    """Whether the model's files hold weights in 4 bits, by the names of their tensors."""
    path = locate(_FROM.value)
    if not path.is_dir():
        return False
    with contextlib.ExitStack() as stack:
        return any(".quant_state." in name for name in open_tensors(path, stack))


def load_model() -> Pretrained:
    if _QUANTIZE.value in (None, "none") or _MERGE.value:
        return load(_FROM.value)
    return load(_FROM.value, place=quantized(_QUANTIZE.value))


def load_adapter(model: Pretrained, names: dict[str, str]) -> dict:
    folder, check_base = _ADAPTER.value, _CHECK_BASE.value
    try:
        return peft.load_adapter(folder, model.params, names, check_base=check_base)
    except ValueError as error:
        raise ValueError(str(error).replace("check_base=False", "--nocheck_base")) from None


def as_asked(model: Pretrained, held: set[str]) -> Pretrained:
    """The model in the format that --quantize names."""
    params = model.params
    if _QUANTIZE.value == "none":
        params = lora.dequantize(params)
    elif _MERGE.value and _QUANTIZE.value and held != {_QUANTIZE.value}:
        params = lora.quantize(lora.dequantize(params), _QUANTIZE.value)
    return dataclasses.replace(model, params=params)


def merged_into(held: set[str]) -> str:
    base = "a base in " + (", ".join(sorted(held)) or "floats")
    if _QUANTIZE.value in (None, "none"):
        return f"into {base}; the result is in floats" if held else f"into {base}"
    return f"into {base}; the result is rounded to {_QUANTIZE.value}"


def write_model(model: Pretrained, target: Path, digest: Digest | None = None) -> dict[str, str]:
    if _to_gguf():
        save_gguf(target, model, kind=_KIND.value, digest=digest)
        return {"written": f"{target}, {_KIND.value}, {target.stat().st_size / 1e6:,.1f} MB"}
    save_huggingface(target, model, dtype=_DTYPE.value, digest=digest)
    size = sum(file.stat().st_size for file in target.iterdir())
    packed = "".join(f", {format} of bitsandbytes" for format in sorted(formats(model)))
    return {"written": f"{target}, a Hugging Face folder{packed}, {size / 1e6:,.1f} MB"}


def parameters(model: Pretrained) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves(model))


def formats(model: Pretrained) -> set[str]:
    return {leaf.format for leaf in leaves(model) if isinstance(leaf, Quantized)}


def leaves(model: Pretrained) -> list:
    return jax.tree.leaves(model.params, is_leaf=is_weight)


def _to_gguf() -> bool:
    return _TO.value.lower().endswith(".gguf")


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        sys.exit(f"convert: unexpected argument {argv[1]!r}; flags start with --.")
    try:
        said = convert()
    except (ValueError, OSError) as error:
        sys.exit(f"convert: {error}")
    table = Table(show_header=False, box=None)
    for name, value in said.items():
        table.add_row(name, value)
    Console().print(table)


if __name__ == "__main__":
    app.run(main)
