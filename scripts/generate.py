"""Text of a model, with an adapter or several, as it is made.

    python scripts/generate.py --adapter=ADAPTER "Name a pub by the river."
    python scripts/generate.py --adapter=ADAPTER --chat                  # ctrl-d ends
    python scripts/generate.py --adapter=base,ONE,OTHER "Who are you?"   # side by side
    python scripts/generate.py --base=FOLDER --temperature=0.7 < prompt.txt

The base is the one that the adapter names, unless `--base` gives it: what `lora_jax.interop.load`
takes. `base` among the adapters is the base alone. A prompt goes through the model's chat template
where it has one; `--raw` continues the text as it is.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import lora_jax as lora
from lora_jax import data, paths
from lora_jax.interop import Pretrained, load, peft, quantized
from lora_jax.interop.peft.folder import read_config
from lora_jax.models.generate import NONE, check_sampling, stream
from lora_jax.quant import FORMATS
from lora_jax.serving.text_stream import TextStream
from lora_jax.transform import Delta, delta_nodes

_ADAPTER = flags.DEFINE_multi_string("adapter", [], "Folders, or base; several by commas.")
_BASE = flags.DEFINE_string("base", None, "The model: a folder, a .gguf file, or a name.")
_CHAT = flags.DEFINE_bool("chat", False, "Talk, line by line.")
_RAW = flags.DEFINE_bool("raw", False, "Without the model's chat template.")
_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Of an answer.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Samples from the likeliest tokens of this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of the base.")
_QUANTIZE = flags.DEFINE_enum("quantize", None, list(FORMATS), "The base's linears.")
_CHECK_BASE = flags.DEFINE_bool("check_base", True, "Hold an adapter to its base's fingerprint.")

PLAIN = "base"  # among adapters: none
WIDTH = 64  # of prompts, in multiples: other lengths need no other program
Messages = list[dict[str, str]]


def base_of(names: Sequence[str]) -> str:
    """The one base of all adapters, unless the command line gives it."""
    if _BASE.value is not None:
        return _BASE.value
    folders = [name for name in names if name != PLAIN]
    if not folders:
        raise ValueError("expected --adapter=FOLDER, or --base for a model alone.")
    stated = {name: read_config(Path(name)).get("base_model_name_or_path") for name in folders}
    first = stated[folders[0]]
    if not first or any(base != first for base in stated.values()):
        told = ", ".join(f"{name} names {base!r}" for name, base in stated.items())
        raise ValueError(f"no base that all adapters name: {told}. Give it by --base.")
    return first


def loaded(names: Sequence[str]) -> Pretrained:
    source = base_of(names)
    place = {"place": quantized(_QUANTIZE.value)} if _QUANTIZE.value else {}
    try:
        return load(source, dtype=jnp.dtype(_DTYPE.value), **place)
    except FileNotFoundError as error:
        if _BASE.value is not None:
            raise
        raise FileNotFoundError(
            f"the base that the adapter names: {error} Or give its folder by --base."
        ) from None


def adapters(model: Pretrained, names: Sequence[str]) -> dict[str, Delta]:
    """The deltas by name; `base` is one that adapts nothing."""
    module_names = peft.model_names(model.config)
    return {
        name: {}
        if name == PLAIN
        else without_dropout(
            peft.load_adapter(name, model.params, module_names, check_base=_CHECK_BASE.value)
        )
        for name in names
    }


def without_dropout(delta: Delta) -> Delta:
    """Adapters that differ in what training dropped answer in one batch."""
    nodes: dict[str, Any] = delta_nodes(delta)
    return paths.nest(
        {
            path: replace(node, dropout=0.0) if hasattr(node, "dropout") else node
            for path, node in nodes.items()
        }
    )


def batches(model: Pretrained, deltas: Mapping[str, Delta]) -> Iterator[tuple[list[str], Any]]:
    """Adapters with the weights under which they answer together: all, where they stack."""
    if len(deltas) > 1:
        with contextlib.suppress(ValueError):  # methods or settings that no stack has: in turn
            stacked = lora.stack(list(deltas.values()))
            ids = jnp.arange(len(deltas))
            weights = lora.bind(model.params, stacked, adapter_ids=ids)
            yield list(deltas), weights
            return
    for name, delta in deltas.items():
        yield [name], lora.bind(model.params, delta)


def tokens_of(model: Pretrained, messages: Messages) -> list[int]:
    tokenizer = model.tokenizer
    if _RAW.value or tokenizer.chat_template is None:
        text = "\n".join(message["content"] for message in messages)
    else:
        text = data.render_messages(messages, tokenizer, add_generation_prompt=True)
    if not (tokens := tokenizer.encode(text)):
        raise ValueError("the prompt is empty.")
    return tokens


def pieces(model: Pretrained, weights: Any, rows: int, prompt: list[int]) -> Iterator[list[str]]:
    """What each row says next, as soon as it is certain; no character is cut."""
    width = -(-len(prompt) // WIDTH) * WIDTH
    width = max(min(width, model.config.context_length - _TOKENS.value), len(prompt))
    eos_id = model.tokenizer.eos_id
    prompts = np.full((rows, width), eos_id, np.int32)
    prompts[:, : len(prompt)] = prompt
    texts = [TextStream(model.tokenizer, ()) for _ in range(rows)]
    ended = [False] * rows
    for column in stream(
        weights,
        jnp.asarray(prompts),
        jnp.full(rows, len(prompt), jnp.int32),
        model.config,
        max_new_tokens=_TOKENS.value,
        eos_id=eos_id,
        key=jax.random.key(_SEED.value),
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
    ):
        if NONE in column:
            raise ValueError("the logits are not numbers: scripts/verify.py says where.")
        ended = [end or token == eos_id for end, token in zip(ended, column, strict=True)]
        yield [
            "" if end else text.push(int(token))
            for text, end, token in zip(texts, ended, column, strict=True)
        ]
    yield [text.flush() for text in texts]


def say(text: str) -> None:
    print(text, end="", flush=True)


def answer(model: Pretrained, deltas: Mapping[str, Delta], messages: Messages) -> str:
    """Prints what each adapter answers, the first as it is made; returns that."""
    prompt = tokens_of(model, messages)
    first: str | None = None
    for names, weights in batches(model, deltas):
        answers = [""] * len(names)
        if len(deltas) > 1:
            say(f"== {names[0]}\n")
        for new in pieces(model, weights, len(names), prompt):
            say(new[0])
            answers = [text + more for text, more in zip(answers, new, strict=True)]
        say("\n")
        for name, text in zip(names[1:], answers[1:], strict=True):
            say(f"\n== {name}\n{text}\n")
        first = answers[0] if first is None else first
    return first or ""


def talk(model: Pretrained, deltas: Mapping[str, Delta]) -> None:
    """A conversation, which every answer is given the whole of."""
    messages: Messages = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            messages.append({"role": "user", "content": line})
            text = answer(model, deltas, messages)
            messages.append({"role": "assistant", "content": text})


def run(arguments: Sequence[str]) -> None:
    names = [name for value in _ADAPTER.value for name in value.split(",") if name]
    if len(set(names)) < len(names):
        raise ValueError("an adapter is given twice.")
    check_sampling(_TEMPERATURE.value, _TOP_P.value)
    if len(arguments) > 1:
        raise ValueError("expected one prompt, in quotes, and flags that start with --.")
    if _CHAT.value and (arguments or len(names) > 1 or _RAW.value):
        raise ValueError("--chat talks with one adapter, by its template: leave out the rest.")
    if not _CHAT.value:
        prompt = arguments[0] if arguments else sys.stdin.read().rstrip("\n")
        if not prompt.strip():
            raise ValueError("the prompt is empty: give one, in quotes or on standard input.")
    model = loaded(names)
    if _CHAT.value and model.tokenizer.chat_template is None:
        raise ValueError(f"{model.name} has no chat template, without which --chat cannot talk.")
    deltas = adapters(model, names or [PLAIN])
    if _CHAT.value:
        talk(model, deltas)
    else:
        answer(model, deltas, [{"role": "user", "content": prompt}])


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    try:
        run(argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"generate: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    app.run(main)
