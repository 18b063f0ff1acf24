"""Records what transformers computes, for tests that run without it.

    python scripts/record_golden_llama.py      # needs requirements-parity.txt; about 90 seconds

Writes into tests/golden/:
  llama_logits.npz      float32 logits of the small random Llamas of tests/interop/small_llamas.py,
                        and the fifty tokens that greedy decoding adds to a prompt
  smollm2_logits.npz    of the default model, read from its GGUF: logits at some positions, and the
                        fifty tokens that greedy decoding adds to a prompt
  smollm2_tokens.json   token ids of many strings by the default model's tokenizer

The version of transformers is in each file.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "interop")]

import small_llamas

from lora_jax.interop.fetch import fetch, model_cache

GOLDEN = ROOT / "tests" / "golden"
SENTENCE = (
    "Low-rank adaptation freezes the pretrained weights and trains two small matrices; "
    "in 2021 it cut 175,255.8M parameters to 4.7M."
)
PROMPT = (
    "<|im_start|>user\nTell me a story about a lighthouse keeper and her cat.<|im_end|>\n"
    "<|im_start|>assistant\n"
)
STRINGS = [
    "", " ", "  ", "\n", "\n\n\n", "\t", " \n \t ", "a", "Hello", "Hello, world!", " Hello world",
    "It's what they're saying, I've heard; we'll see. DON'T!", "0", "42", "2024-11-21",
    "3.14159265", "1,234,567", "x = 10  +   5", "  7 spaces\n    8", "half ½ and ² and ৪২",
    "naïve café Ångström", "Straße", "Привет, мир", "你好，世界", "こんにちは",
    "مرحبا", "🙂👍🏽🏳️‍🌈",
    "def f(x):\n    return x**2  # square\n", "name[The Eagle], food[French], area[riverside]",
    "https://example.org/a?b=1&c=%20", "<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>",
    "text<|endoftext|>more", "<|im_end", "<repo_name>x<file_sep>y", "e\u0301 vs \u00e9",
    "\u00a0no-break\u2003em", "A" * 70, "antidisestablishmentarianism", "snake_case camelCase",
    "\r\nwindows\r\n", "\x00\x07 control", "don’t “quote” — dash…", "100% of $5.00 @ #1 ^~`|\\",
]  # fmt: skip


def record_small() -> None:
    logits = {"transformers": np.array(transformers.__version__)}
    for name, values in small_llamas.VARIANTS.items():
        config = transformers.AutoConfig.for_model(**values)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        weights = {k: torch.from_numpy(v) for k, v in small_llamas.draw_weights(values).items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        model.tie_weights()
        with torch.no_grad():
            logits[name] = model(torch.from_numpy(small_llamas.TOKENS)).logits.numpy()
            logits[f"{name}/greedy"] = model.generate(
                torch.from_numpy(small_llamas.PROMPT),
                max_new_tokens=small_llamas.GREEDY,
                do_sample=False,
                eos_token_id=None,
            ).numpy()
    np.savez_compressed(GOLDEN / "llama_logits.npz", **logits)


def record_smollm2(path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    record_tokens(tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokens = tokenizer(SENTENCE, return_tensors="pt").input_ids
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        logits = model(tokens).logits[0].numpy()
        generated = model.generate(**prompt, max_new_tokens=50, do_sample=False)
    generated = generated[0, prompt.input_ids.shape[1] :].numpy()
    assert len(generated) == 50, "the prompt's answer is too short"
    top = np.argsort(-logits[-1])[:64]
    positions = np.array([0, 1, 5, 11, 17, len(logits) - 1])
    np.savez_compressed(
        GOLDEN / "smollm2_logits.npz",
        transformers=np.array(transformers.__version__),
        tokens=tokens[0].numpy(),
        largest=np.abs(logits).max(),
        top_ids=top,
        top_logits=logits[-1, top],
        positions=positions,
        ids=np.arange(0, logits.shape[1], 96),
        logits=logits[positions][:, ::96],
        prompt=prompt.input_ids[0].numpy(),
        generated=generated,
    )


def record_tokens(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """The ids under the model's true pre-tokenizer, which splits digits first.

    transformers takes every GPT-2-like GGUF for GPT-2 itself and leaves the splitting out; the
    strings where that shows are listed apart.
    """
    plain = [tokenizer(text).input_ids for text in STRINGS]
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), core.pre_tokenizer]
    )
    split = [tokenizer(text).input_ids for text in STRINGS]
    record = {
        "transformers": transformers.__version__,
        "strings": [{"text": t, "ids": ids} for t, ids in zip(STRINGS, split, strict=True)],
        "differ_without_digit_splitting": [
            text for text, a, b in zip(STRINGS, plain, split, strict=True) if a != b
        ],
    }
    (GOLDEN / "smollm2_tokens.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    record_small()
    record_smollm2(fetch(model_cache()))
