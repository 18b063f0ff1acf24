"""`scripts/generate.py`: what it prints is what the model says."""

import io
import re
import sys

import cases
import jax
import jax.numpy as jnp
import pytest
from absl import flags

import lora_jax as lora
from lora_jax import data, models
from lora_jax.interop import Pretrained, load, peft, save_huggingface
from lora_jax.models.generate import generate

SCRIPT = "generate.py"
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base with adapters of several ranks, scales and methods."""
    folder = tmp_path_factory.mktemp("generate")
    shape = models.SHAPES["tiny"]
    params = jax.jit(lambda key: models.init(shape, key=key))(jax.random.key(0))
    model = Pretrained(params=params, config=shape, tokenizer=data.byte_tokenizer(),
                       name="tiny", source="random")  # fmt: skip
    save_huggingface(folder / "model", model)
    methods = {"one": lora.LoRA(rank=2), "two": lora.LoRA(rank=4, alpha=4.0, dropout=0.1),
               "dora": lora.DoRA(rank=2)}  # fmt: skip
    for name, method in methods.items():
        delta = cases.llama_delta(params, method, size=0.3)
        base = "elsewhere" if name == "dora" else str(folder / "model")
        peft.save_adapter(folder / name, delta, params, peft.model_names(shape), base_name=base)
    return folder


@pytest.fixture
def say(script, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def run(*arguments, stdin="", tokens=NEW):
        for name in ("adapter", "base", "chat", "raw", "temperature", "top_p", "seed"):
            flags.FLAGS[name].unparse()
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        rest = flags.FLAGS(["generate", *arguments, f"--max_new_tokens={tokens}"])
        script.run(rest[1:])
        return capsys.readouterr().out

    return run


def answer(folder, name, prompt, **how):
    model = load(folder / "model")
    names = peft.model_names(model.config)
    delta = {} if name is None else peft.load_adapter(folder / name, model.params, names)
    tokens = model.tokenizer.encode(prompt)

    @jax.jit
    def found(weights, prompts, lengths):
        settings = {"max_new_tokens": NEW, "eos_id": model.tokenizer.eos_id, **how}
        return generate(weights, prompts, lengths, model.config, **settings)

    weights = lora.bind(model.params, delta)
    made = found(weights, jnp.array([tokens]), jnp.array([len(tokens)]))
    return model.tokenizer.decode(made[0].tolist(), skip_special_tokens=True)


def test_adapters_side_by_side_say_what_each_says_alone(say, folder):
    """In one batch, of two ranks, scales and dropouts, and the base; nothing is cut."""
    prompt = data.render_messages(
        [{"role": "user", "content": "hé?"}], data.byte_tokenizer(), add_generation_prompt=True
    )
    alone = {name: answer(folder, None if name == "base" else name, prompt)
             for name in ("one", "base", "two")}  # fmt: skip
    assert len(set(alone.values())) == 3
    assert say("--adapter=one,base", "--adapter=two", "hé?") == (
        f"== one\n{alone['one']}\n\n== base\n{alone['base']}\n\n== two\n{alone['two']}\n"
    )
    assert say("--adapter=one", stdin="hé?\n") == alone["one"] + "\n"
    raw = answer(folder, "one", "hé?", key=jax.random.key(4), temperature=0.8, top_p=0.9)
    sampled = ("--temperature=0.8", "--top_p=0.9", "--seed=4", "--raw")
    assert say("--adapter=one", *sampled, "hé?") == raw + "\n"


def test_adapters_that_do_not_stack_answer_in_turn(say, folder):
    together = say("--adapter=one,dora", "--base=model", "--raw", "a")
    one, dora = (answer(folder, name, "a") for name in ("one", "dora"))
    assert together == f"== one\n{one}\n== dora\n{dora}\n"


def test_a_conversation_is_kept(say, script, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "pieces", lambda model, weights, rows, prompt: iter([["yes"]]))
    monkeypatch.setattr(
        script, "tokens_of", lambda model, messages: seen.append([*messages]) or [1]
    )
    assert say("--adapter=one", "--chat", stdin="a\n\nb\n") == "yes\nyes\n"
    said = [[(m["role"], m["content"]) for m in messages] for messages in seen]
    assert (
        said[1] == [("user", "a"), ("assistant", "yes"), ("user", "b")] and said[0] == said[1][:1]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "expected --adapter=FOLDER, or --base"),
        (["--adapter=base", "a"], "expected --adapter=FOLDER, or --base"),
        (["--adapter=one,one", "a"], "given twice"),
        (["--adapter=one,dora", "a"], "dora names 'elsewhere'.*Give it by --base"),
        (["--adapter=dora", "a"], "the base that the adapter names: 'elsewhere' is no model.*--b"),
        (["--adapter=none", "a"], "none has no adapter_config.json"),
        (["--adapter=one", " "], "the prompt is empty"),
        (["--adapter=one"], "the prompt is empty"),
        (["--adapter=one", "a", "b"], "expected one prompt"),
        (["--adapter=one", "--chat", "a"], "--chat talks with one adapter"),
        (["--adapter=one,two", "--chat"], "--chat talks with one adapter"),
        (["--adapter=one", "--temperature=-1", "a"], "temperature=-1.0: expected"),
        (["--adapter=one", "--top_p=2", "a"], "top_p=2.0: expected"),
        (["--adapter=one", "a" * 1500], "exceed the model's context of 1024"),
    ],
)  # fmt: skip
def test_wrong_input_gets_one_sentence(say, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        say(*arguments)
    assert re.search(message, str(error.value)), error.value
