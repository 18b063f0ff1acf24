"""Checks that an adapter reaches its targets, changes the model, and computes the same everywhere.

    python scripts/verify.py ADAPTER --base=smollm2-135m
    python scripts/verify.py ADAPTER --base=FOLDER --probe="Name a pub by the river."
    python scripts/verify.py ADAPTER --base=FOLDER --against=MERGED,SERVED,logits.json
    python scripts/verify.py MERGED          # a merged model with a digest

`--base` is what `lora_jax.interop.load` takes. `--against` names other copies of the adapter:
a merged model, another folder of the adapter (such as the one that a server reads), or a digest as
JSON. Where PEFT is installed, it loads the adapter as well. Ends with 1 where there is an error.
"""

import dataclasses
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from lora_jax import dequantize
from lora_jax.interop import (
    Digest,
    ModelForward,
    Pretrained,
    check_digest,
    load,
    observed,
    peft,
    quantized,
    read_digest,
    save_huggingface,
    stored_formats,
    verify,
)
from lora_jax.quant import FORMATS

_BASE = flags.DEFINE_string("base", None, "The adapter's base: a folder, a .gguf file, or a name.")
_PROBE = flags.DEFINE_string("probe", None, "A text to compare logits on.")
_AGAINST = flags.DEFINE_list("against", [], "Merged models, adapters or digests from elsewhere.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of the base.")
_QUANTIZE = flags.DEFINE_enum("quantize", None, list(FORMATS), "The base's linears.")
_PEFT = flags.DEFINE_bool("peft", True, "Compare with PEFT where it is installed.")
_JSON = flags.DEFINE_string("json", None, "A file to write the report to.")


def check(adapter: Path) -> tuple[str, bool]:
    """The report as text, and whether nothing is wrong."""
    if _BASE.value is None:
        return check_merged(adapter)
    place = {"place": quantized(_QUANTIZE.value)} if _QUANTIZE.value else {}
    model = load(_BASE.value, dtype=jnp.dtype(_DTYPE.value), **place)
    forward = ModelForward(model.config)
    probe = None if _PROBE.value is None else model.tokenizer.encode(_PROBE.value)
    digest = read_digest(adapter)
    report = verify(
        adapter,
        model.params,
        peft.model_names(model.config),
        probe=probe,
        against={name: elsewhere(name, forward, digest) for name in _AGAINST.value},
        peers=peers(adapter, model),
    )
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    return str(report), report.ok


def check_merged(folder: Path) -> tuple[str, bool]:
    """Checks a merged model against its digest."""
    if not (folder / "config.json").is_file() and folder.suffix != ".gguf":
        raise ValueError(f"{folder} is no merged model's folder; an adapter needs its --base.")
    digest = read_digest(folder)
    if digest is None:
        return f"{folder} carries no digest: give --base and the adapter that was merged.", True
    model = load(folder, dtype=jnp.dtype(_DTYPE.value))
    forward, stored = ModelForward(model.config), stored_formats(model.source)
    wrong = check_digest(digest, forward, model.params, weights=stored)
    return f"{folder}: {wrong or 'computes what it was exported with'}", wrong is None


def elsewhere(name: str, forward: ModelForward, digest: Digest | None) -> Digest:
    """The digest of another copy of the adapter."""
    path = Path(name)
    if path.suffix == ".json":
        return Digest.from_json(path.read_text(encoding="utf-8"), name)
    if (path / "adapter_config.json").is_file():
        if (found := read_digest(path)) is None:
            raise ValueError(f"{name} carries no digest: verify it by itself, with --base.")
        return found
    if digest is None:
        raise ValueError(
            f"{name} can be held to an adapter that carries a digest. This one has none: write it "
            "again, scripts/convert.py --adapter=... --to=NEW."
        )
    model = load(name, dtype=jnp.dtype(_DTYPE.value))
    if model.config.vocab_size < forward.vocab_size:
        raise ValueError(f"{name} has another vocabulary than the base.")
    forward, stored = ModelForward(model.config), stored_formats(model.source)
    return observed(forward, model.params, digest, weights=stored)


def peers(adapter: Path, model: Pretrained) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """PEFT, where it is installed and not switched off."""
    installed = all(map(importlib.util.find_spec, ("torch", "transformers", "peft")))
    if not (_PEFT.value and installed):
        return {}
    return {"PEFT": lambda tokens: peft_logits(adapter, model, tokens)}


def peft_logits(adapter: Path, model: Pretrained, tokens: np.ndarray) -> np.ndarray:
    """PEFT's logits of the adapter on this base, in float32."""
    import peft as theirs
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        plain = dataclasses.replace(model, params=dequantize(model.params))
        save_huggingface(Path(folder) / "base", plain, dtype=jnp.float32)
        base = transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder) / "base", dtype=torch.float32
        )
    adapted = theirs.PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        logits = adapted(torch.from_numpy(tokens.astype(np.int64))).logits
    return logits.float().numpy()


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if len(argv) != 2:
        sys.exit("verify: expected one folder, and flags that start with --; --help has examples.")
    try:
        text, ok = check(Path(argv[1]))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"verify: {error}")
    print(text)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    app.run(main)
