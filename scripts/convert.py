"""Models and adapters between the formats of their worlds.

    python scripts/convert.py --from=smollm2-135m --to=FOLDER             # a Hugging Face folder
    python scripts/convert.py --from=FOLDER --to=model.gguf --kind=Q8_0   # a GGUF file
    python scripts/convert.py --from=FOLDER --to=NEW --quantize=nf4       # for bitsandbytes, 4 bits
    python scripts/convert.py --from=FOLDER --adapter=ADAPTER --merge --to=MERGED
    python scripts/convert.py --from=FOLDER --adapter=ADAPTER --to=SERVED --profile=vllm

`--from` is what `lora_jax.interop.load` takes: a folder, a .gguf file, a name. `--adapter` is a
folder that PEFT's save_pretrained, or this project, wrote. `--quantize` does so leaf by leaf while
the model is loaded; with `--merge`, after it. What exists is never overwritten.
"""

import dataclasses
import math
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
    LlamaForward,
    Pretrained,
    digest_of,
    load,
    peft,
    quantized,
    save_gguf,
    save_huggingface,
)
from lora_jax.quant import Blockwise
from lora_jax.weights import is_weight

_FROM = flags.DEFINE_string("from", None, "The model: a folder, a .gguf file, or a name.")
_TO = flags.DEFINE_string("to", None, "A new folder, or a new .gguf file.")
_ADAPTER = flags.DEFINE_string("adapter", None, "The folder of an adapter of this model.")
_MERGE = flags.DEFINE_bool("merge", False, "Write the model with the adapter merged into it.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of a folder.")
_KIND = flags.DEFINE_enum("kind", "F16", ["F16", "Q8_0"], "Of a GGUF file.")
_QUANTIZE = flags.DEFINE_enum("quantize", None, ["nf4", "fp4"], "The linears of a folder.")
_CHECK_BASE = flags.DEFINE_bool("check_base", True, "Hold an adapter to its base's fingerprint.")
_PROFILE = flags.DEFINE_enum("profile", "peft", ["peft", "vllm"], "Of an adapter.")


def convert() -> dict[str, str]:
    """What was done, for the table."""
    if _FROM.value is None or _TO.value is None:
        raise ValueError("--from and --to are both needed; --help has examples.")
    if _MERGE.value and _ADAPTER.value is None:
        raise ValueError("--merge needs an --adapter.")
    if _QUANTIZE.value and (_TO.value.endswith(".gguf") or (_ADAPTER.value and not _MERGE.value)):
        raise ValueError("--quantize needs a --to that is a model's Hugging Face folder.")
    target = Path(_TO.value)
    if target.exists():
        raise FileExistsError(f"{target} exists: choose another --to.")
    model = load_model()
    said = {"model": f"{model.name}, {parameters(model):,} parameters", "read from": model.source}
    if _ADAPTER.value is None:
        return said | write_model(model, target)
    names = peft.llama_names(model.config)
    delta = peft.load_adapter(_ADAPTER.value, model.params, names, check_base=_CHECK_BASE.value)
    said["adapter"] = str(lora.describe(model.params, delta)).splitlines()[-1]
    if _MERGE.value:
        digest = digest_of(LlamaForward(model.config), model.params, delta)
        params = lora.merge(model.params, delta)
        if _QUANTIZE.value:
            params = lora.quantize(lora.dequantize(params), _QUANTIZE.value)
        model = dataclasses.replace(model, params=params)
        return said | {"merged": "yes"} | write_model(model, target, digest)
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


def load_model() -> Pretrained:
    if _QUANTIZE.value is None or _MERGE.value:
        return load(_FROM.value)
    model = load(_FROM.value, place=quantized(_QUANTIZE.value))
    if (held := formats(model)) != {_QUANTIZE.value}:
        raise ValueError(
            f"{model.source} is in {', '.join(sorted(held))} already; leave --quantize out."
        )
    return model


def write_model(model: Pretrained, target: Path, digest: Digest | None = None) -> dict[str, str]:
    if target.suffix == ".gguf":
        save_gguf(target, model, kind=_KIND.value, digest=digest)
        return {"written": f"{target}, {_KIND.value}, {target.stat().st_size / 1e6:,.1f} MB"}
    save_huggingface(target, model, dtype=_DTYPE.value, digest=digest)
    size = sum(file.stat().st_size for file in target.iterdir())
    kind = "".join(f", {format} of bitsandbytes" for format in sorted(formats(model)))
    return {"written": f"{target}, a Hugging Face folder{kind}, {size / 1e6:,.1f} MB"}


def parameters(model: Pretrained) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves(model))


def formats(model: Pretrained) -> set[str]:
    return {leaf.format for leaf in leaves(model) if isinstance(leaf, Blockwise)}


def leaves(model: Pretrained) -> list:
    return jax.tree.leaves(model.params, is_leaf=is_weight)


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        sys.exit(f"convert: unexpected argument {argv[1]!r}; flags start with --.")
    try:
        said = convert()
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        sys.exit(f"convert: {error}")
    table = Table(show_header=False, box=None)
    for name, value in said.items():
        table.add_row(name, value)
    Console().print(table)


if __name__ == "__main__":
    app.run(main)
