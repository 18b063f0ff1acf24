"""Every way in which users' adapters fell silent, planted, and what `verify` says of it."""

import dataclasses
import importlib.util
import json

import cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_checkpoints
from absl import flags
from safetensors import safe_open
from safetensors.numpy import save_file

import lora_jax as lora
from lora_jax.interop import (
    Digest,
    Forward,
    ModelForward,
    check_digest,
    digest_of,
    load,
    observed,
    peft,
    read_digest,
    save_gguf,
    save_huggingface,
    stored_formats,
    verify,
)
from lora_jax.interop.digest import KEY
from lora_jax.interop.verify.merged import merged_weights
from lora_jax.interop.verify.norms import measured_bytes, update_norms
from lora_jax.models import llama

CONFIG, PARAMS, TOKENS = cases.llama_case()
NAMES, FORWARD = peft.model_names(CONFIG), ModelForward(CONFIG)
LAYER = "base_model.model.model.layers.1."


def delta_of(method=None, *, params=PARAMS, size=0.05, seed=0, **kwargs):
    kwargs = kwargs or {"targets": "qv"}
    return cases.llama_delta(params, method or lora.LoRA(rank=2), size=size, seed=seed, **kwargs)


def exported(folder, delta, params=PARAMS, names=NAMES, **kwargs):
    peft.save_adapter(folder, delta, params, names, **kwargs)
    return folder


def edited(folder, *, config=None, tensors=None, metadata=None):
    """Changes a saved adapter's files in place, and keeps the rest."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    file = folder / "adapter_model.safetensors"
    with safe_open(file, framework="numpy") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        kept = opened.metadata()
    file.unlink()
    save_file((tensors or dict)(found), file, metadata=(metadata or dict)(kept))
    return folder


def said(folder, params=PARAMS, names=NAMES, **kwargs):
    """The report's errors and warnings, or the refusal: nothing goes through in silence."""
    try:
        report = verify(folder, params, names, forms=(), **kwargs)
    except ValueError as error:
        return f"error: {error}"
    return "\n".join(f"{finding.level}: {finding.text}" for finding in report.findings)


def changed(delta, path, change):
    """A delta with `change` applied to one node."""
    *parents, last = path.split("/")
    copied = jax.tree.map(lambda leaf: leaf, delta)
    node = copied
    for part in parents:
        node = node[part]
    node[last] = change(node[last])
    return copied


def as_bfloat16(params):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("verify") / "a", delta_of())


def test_a_sound_adapter(folder):
    report = verify(folder, PARAMS, NAMES)
    assert report.ok and not report.findings and report.digest == "agrees"
    assert report.tensors == report.matched == 12
    assert (report.reached, report.matrices) == (6, 21)
    assert report.not_adapted[0] == "embed" and "layers/mlp/up_proj" in report.not_adapted
    assert report.max_change > 0.01 and report.kl_change > 0
    assert [form.name for form in report.forms] == ["merged in float32", "exported and read back"]
    assert all(form.of_effect < 1e-3 for form in report.forms)
    for target in report.targets:
        node = delta_of()["layers"]["attn"][target.path[-6:]]
        update = node.scale[:, None, None] * jnp.matmul(node.a, node.b)
        weight = PARAMS["layers"]["attn"][target.path[-6:]]
        norms = [np.linalg.norm(u) / np.linalg.norm(w) for u, w in zip(update, weight, strict=True)]
        np.testing.assert_allclose(target.relative, norms, rtol=1e-5)
    assert "layers/attn/q_proj  LoRANode" in str(report) and "nothing wrong" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_an_adapter_that_does_nothing(tmp_path):
    _, fresh = lora.lora_transform(PARAMS, lora.LoRA(rank=2), targets="qv", key=jax.random.key(0))
    text = said(exported(tmp_path / "a", fresh))
    assert "error: the adapter does nothing: with it and without it" in text
    assert "error: layers/attn/v_proj does nothing: its update is zero" in text


def test_targets_and_layers_that_do_nothing(tmp_path):
    one = changed(delta_of(), "layers/attn/v_proj", lambda n: n.replace(b=n.b * 0))
    text = said(exported(tmp_path / "a", one))
    assert text == "error: layers/attn/v_proj does nothing: its update is zero" + (
        "\nwarning: the adapter reaches" if "reaches" in text else ""
    )
    kept = jnp.asarray([1.0, 0.0, 1.0])[:, None, None]
    layer = changed(delta_of(), "layers/attn/v_proj", lambda n: n.replace(b=n.b * kept))
    text = said(exported(tmp_path / "b", layer))
    assert "warning: layers/attn/v_proj does nothing in layer(s) 1 of 3" in text


def test_targets_that_reach_7_percent(tmp_path):
    config, params, _ = cases.llama_case(num_layers=14)
    names = peft.model_names(config)
    ranks = (0,) * 13 + (2,)
    delta = delta_of(lora.LoRA(rank=ranks), params=params, targets="q_proj")
    text = said(exported(tmp_path / "a", delta, params, names), params, names)
    assert "layers/attn/q_proj: 1 of 14 layers are adapted (7 %)" in text
    assert "the adapter reaches 1 of the base's 98 linear matrices (1 %)" in text


NAMED = {
    "experts": ({"target_modules": ["q_proj", "v_proj", "experts"]}, "experts"),
    "experts by a pattern": ({"target_modules": r".*\.(experts|gate_up)\.\d"}, "experts"),
    "layers": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj"),
    "more by a pattern": ({"target_modules": r".*\.(q|v|o)_proj"}, "o_proj"),
    "the head": ({"modules_to_save": ["lm_head"]}, "lm_head"),
    "the table": ({"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", NAMED)
def test_what_is_named_and_stays_frozen(name, tmp_path):
    config, expected = NAMED[name]
    text = said(edited(exported(tmp_path / "a", delta_of()), config=config))
    assert "error: " in text and (expected in text or "which its config does not adapt" in text)


def test_named_layers_alone_are_asked_for(tmp_path):
    delta = delta_of(lora.LoRA(rank=(2, 0, 2)), targets="q_proj")
    config = {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}
    text = said(edited(exported(tmp_path / "a", delta), config=config))
    assert "error" not in text and "q_proj: 2 of 3 layers" in text


def without(part):
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


CHANGED = {
    "a layer": {"tensors": without("layers.1.self_attn.q_proj")},
    "a target": {"tensors": without("v_proj")},
    "a head": {"tensors": without("lm_head")},
    "a table": {"tensors": without("embed_tokens")},
    "a scale": {"config": {"lora_alpha": 32}},
    "rslora": {"config": {"use_rslora": True}},
    "values": {"tensors": lambda t: {k: v + np.float32(0.02) for k, v in t.items()}},
    "half of it in 4 bits": {"tensors": lambda t: {k: np.round(v * 8) / 8 for k, v in t.items()}},
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", CHANGED)
def test_files_that_are_not_what_was_exported(name, tmp_path):
    method = {"q_proj|v_proj": lora.LoRA(rank=2), "embed|lm_head": lora.LoRA(rank=1)}
    whole = exported(tmp_path / "a", cases.llama_delta(PARAMS, method, size=0.03))
    text = said(edited(whole, **CHANGED[name]))
    assert "error: " in text
    if name in ("a scale", "rslora"):
        assert "the adapter moves the logits" in text and "another scale" in text


@pytest.mark.slow
def test_served_without_effect_or_another_version(folder, tmp_path):
    digest, merged = read_digest(folder), lora.merge(PARAMS, delta_of())
    older = exported(tmp_path / "older", delta_of(seed=3))
    nearly = exported(
        tmp_path / "nearly", jax.tree.map(lambda x: x * np.float32(1 + 1e-5), delta_of())
    )
    text = said(
        folder,
        against={
            "good": observed(FORWARD, merged, digest),
            "itself": digest,
            "base": observed(FORWARD, PARAMS, digest),
            "older": read_digest(older),
            "older, merged": observed(FORWARD, lora.merge(PARAMS, delta_of(seed=3)), digest),
            "merged twice": observed(FORWARD, lora.merge(merged, delta_of()), digest),
            "nearly": read_digest(nearly),
        },
    ).splitlines()
    assert not any("good" in line or "itself" in line for line in text)
    assert any("error: base: the adapter has no effect here" in line for line in text)
    assert any("error: older: the logits are off by" in line for line in text)
    assert any("error: older holds another version of the adapter" in line for line in text)
    assert any("error: older, merged: the logits are off by" in line for line in text)
    assert any("error: merged twice: the adapter moves the logits" in line for line in text)
    assert any("warning: nearly holds another version of the adapter" in line for line in text)


def test_merged_weights_that_were_tied_again(tmp_path):
    delta = delta_of(targets="lm_head")
    folder = exported(tmp_path / "a", delta)
    merged = lora.merge(PARAMS, delta)
    tied = {**merged, "lm_head": merged["embed"].T}
    text = said(folder, against={"tied": observed(FORWARD, tied, read_digest(folder))})
    assert "error: tied: the logits are off by" in text
    assert check_digest(read_digest(folder), FORWARD, merged) is None
    assert "off by" in check_digest(read_digest(folder), FORWARD, tied)


@pytest.mark.slow
def test_merging_that_loses_the_update(tmp_path):
    """Into bfloat16, whose steps are larger than the update, and back into four bits."""
    base = as_bfloat16(PARAMS)
    report = verify(delta_of(params=base, size=0.003), base, NAMES)
    forms = {form.name: form for form in report.forms}
    assert forms["merged in float32"].of_effect < 1e-2
    assert forms["merged in bfloat16"].of_effect > 0.3 and forms["merged in bfloat16"].kl > 0
    assert any("merged in bfloat16: the logits are off by" in f.text for f in report.findings)
    large = verify(delta_of(params=base, size=0.3), base, NAMES, forms=("merged",))
    assert large.ok and large.forms[1].of_effect < 0.1

    four = lora.quantize(PARAMS, "nf4", block_size=8)
    report = verify(delta_of(params=four), four, NAMES)
    forms = {form.name: form.of_effect for form in report.forms}
    assert forms["merged in float32"] < 1e-3 and forms["exported and read back"] == 0
    assert forms["merged in nf4"] > 0.3 and report.weights == "float32+nf4"
    requantized = lora.merge(four, delta_of(params=four), requantize=True)
    logits = [llama.forward(w, TOKENS, CONFIG) for w in
              (requantized, merged_weights(FORWARD, four, delta_of(params=four), wide=False,
                                           requantized=True))]  # fmt: skip
    cases.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_merged_exports_carry_the_digest(tmp_path):
    source = small_checkpoints.write_huggingface(tmp_path / "m", *small_checkpoints.small("qwen2"))
    model = load(source)
    delta = cases.llama_delta(model.params, lora.LoRA(rank=2), size=0.05, targets="qv")
    forward = ModelForward(model.config)
    digest = digest_of(forward, model.params, delta)
    merged = dataclasses.replace(model, params=lora.merge(model.params, delta))
    save_huggingface(tmp_path / "good", merged, digest=digest, shard_bytes=50_000)
    save_huggingface(tmp_path / "half", merged, digest=digest, dtype=jnp.bfloat16)
    save_huggingface(tmp_path / "lost", model, digest=digest)
    save_gguf(tmp_path / "m.gguf", merged, digest=digest)
    wrong = {}
    for name in ("good", "half", "lost", "m.gguf"):
        path, found = tmp_path / name, read_digest(tmp_path / name)
        assert found == digest
        wrong[name] = check_digest(found, forward, load(path).params, weights=stored_formats(path))
    assert "no effect here" in wrong.pop("lost") and set(wrong.values()) == {None}
    assert stored_formats(tmp_path / "half") == "bfloat16" and read_digest(source) is None


@pytest.mark.slow
def test_other_dtypes_agree_and_other_bases_do_not(folder):
    other = {**PARAMS, "norm": PARAMS["norm"] * 2}
    with pytest.raises(ValueError, match="was made for another base"):
        verify(folder, other, NAMES)
    assert "the digest disagrees: another base" in said(folder, other, check_base=False)
    another = jax.tree.map(lambda leaf: leaf[..., ::-1], PARAMS)
    for base in (as_bfloat16(PARAMS), lora.quantize(PARAMS, "nf4", block_size=8)):
        assert said(folder, base) == ""
    for base in (as_bfloat16(another), lora.quantize(another, "nf4", block_size=8)):
        with pytest.raises(ValueError, match="made for another base: without the adapter, logits"):
            verify(folder, base, NAMES, forms=())


def test_without_a_digest(folder, tmp_path):
    """As version 0.1.0 wrote it."""
    old = edited(exported(tmp_path / "a", delta_of()),
                 metadata=lambda m: {k: v for k, v in m.items() if k != KEY})  # fmt: skip
    report = verify(old, PARAMS, NAMES, forms=())
    assert report.ok and report.digest == "none: it was exported without one"
    shapes = jax.eval_shape(lambda: PARAMS)
    assert read_digest(exported(tmp_path / "b", delta_of(), shapes)) is None
    with pytest.raises(ValueError, match="needs the base's weights, not shapes alone"):
        verify(folder, shapes, NAMES)


def test_a_tied_base(tmp_path):
    config, params, _ = cases.llama_case(tie_embeddings=True)
    names = peft.model_names(config)
    delta = delta_of(params=params)
    assert said(exported(tmp_path / "a", delta, params, names), params, names) == ""
    both = verify(delta_of(params=params, targets="embed"), params, names, forms=("merged",))
    assert both.ok and both.forms[0].of_effect < 1e-3


class Net(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(20, 8)(tokens)
        x = x + nn.MultiHeadDotProductAttention(2)(x)
        return nn.Dense(20)(x)


@pytest.mark.mixed_dtypes
def test_a_model_of_another_framework(tmp_path):
    tokens = jnp.arange(6).reshape(1, 6)
    params = Net().init(jax.random.key(0), tokens)
    layouts = lora.infer_layouts(Net().apply, params, tokens)
    _, delta = lora.lora_transform(
        params, lora.LoRA(rank=2), key=jax.random.key(1), layouts=layouts
    )
    delta = cases.moved(delta, size=0.1)
    names = {
        f"params/MultiHeadDotProductAttention_0/{part}/kernel": f"model.attn.{part}"
        for part in ("query", "key", "value", "out")
    }
    names["params/Dense_0/kernel"] = "model.mlp"
    forward = Forward(apply=lora.adapt(Net().apply), vocab_size=20)
    delta = {"params": {k: v for k, v in delta["params"].items() if k in str(names)}}
    folder = exported(tmp_path / "a", delta, params, names, layouts=layouts, forward=forward)
    report = verify(folder, params, names, forward=forward, layouts=layouts)
    assert report.ok and report.digest == "agrees" and report.matched == report.tensors == 10
    assert all(form.of_effect < 1e-3 for form in report.forms)
    with pytest.raises(ValueError, match="give names=model_names.config. for our Llama, or forw"):
        verify(folder, params, names)


def test_other_programs_are_held_to_it(folder):
    def peer(size):
        weights = lora.bind(PARAMS, jax.tree.map(lambda x: x * np.float32(size), delta_of()))
        return lambda tokens: np.asarray(llama.forward(weights, jnp.asarray(tokens), CONFIG))

    report = verify(folder, PARAMS, NAMES, forms=(), probe=[1, 2, 3],
                    peers={"PEFT": peer(1), "vLLM": peer(0.5)})  # fmt: skip
    assert report.probe_tokens == 3 and report.forms[0].of_effect < 1e-3
    (found,) = report.findings
    assert found.text.startswith("vLLM: the logits are off by")


def test_it_streams():
    """Beside the trees it is given, it holds a few layers' matrices and no merged copy."""
    config = cases.tiny_llama(
        num_layers=24, hidden_size=64, intermediate_size=192, vocab_size=64, num_heads=4
    )
    params = jax.eval_shape(lambda: llama.init(config, key=jax.random.key(0)))
    delta = jax.eval_shape(
        lambda p: lora.lora_transform(p, lora.LoRA(rank=2), key=jax.random.key(0))[1], params
    )
    layers = params["layers"]
    merged = sum(leaf.size * 4 for leaf in jax.tree.leaves((layers["attn"], layers["mlp"])))
    assert measured_bytes(params, delta) < merged / 24

    def temporaries(weights):
        tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
        program = jax.jit(lambda w, t: llama.forward(w, t, config)).lower(weights, tokens)
        return program.compile().memory_analysis().temp_size_in_bytes

    forward = ModelForward(config)
    lazily = jax.eval_shape(lambda p, d: merged_weights(forward, p, d, wide=True), params, delta)
    assert temporaries(lazily) < merged / 12
    assert temporaries(lazily) < 2 * temporaries(jax.eval_shape(lora.bind, params, delta))


def test_norms_of_what_is_not_additive():
    """Every method that merges: the norm is that of merged less base."""
    for method in (lora.DoRA(rank=2), lora.IA3(), lora.VeRA(rank=4), lora.Full()):
        delta = cases.llama_delta(PARAMS, method, targets="v_proj")
        ((path, (update, weight)),) = update_norms(PARAMS, delta).items()
        base = PARAMS["layers"]["attn"]["v_proj"]
        found = lora.merge(PARAMS, delta)["layers"]["attn"]["v_proj"] - base
        assert path == "layers/attn/v_proj"
        np.testing.assert_allclose(update, np.linalg.norm(found, axis=(1, 2)), rtol=1e-3)
        np.testing.assert_allclose(weight, np.linalg.norm(base, axis=(1, 2)), rtol=1e-5)


WRONG = {
    "no folder": ({"adapter": "nowhere"}, "nowhere has no adapter_config.json"),
    "a long probe": ({"probe": range(65)}, "the probe has 65 tokens, and this model reads from 1"),
    "no probe": ({"probe": []}, "the probe has 0 tokens"),
    "other tokens": ({"probe": [3, 32]}, "tokens go from 3 to 32, and the base's vocabulary is of"),
    "a form": ({"forms": ("onnx",)}, "forms has onnx; expected some of merged, read back"),
    "no names": ({"names": None}, "give names=model_names"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name, folder):
    changes, message = WRONG[name]
    arguments = {"adapter": folder, "params": PARAMS, "names": NAMES} | changes
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        verify(**arguments)


def test_a_prompt_leaves_less_room():
    delta = delta_of(lora.Prompt(length=60), targets="embed")
    assert verify(delta, PARAMS, NAMES, forms=()).probe_tokens == 4
    with pytest.raises(ValueError, match="reads from 1 to 4"):
        verify(delta, PARAMS, NAMES, probe=range(5))


def test_an_adapter_of_another_model(folder):
    config, params, _ = cases.llama_case(num_layers=2)
    with pytest.raises(ValueError, match=r"no module of this model.*Of its 12 tensors 8 have a pl"):
        verify(folder, params, peft.model_names(config))


DAMAGED = [
    "", "[]", "{}", '{"version":2}', "[" * 9000,
    lambda d: d | {"tokens": []}, lambda d: d | {"positions": [99] * 4},
    lambda d: d | {"ids": [[1]]}, lambda d: d | {"logits": [[None] * 8] * 4},
    lambda d: d | {"more": 1}, lambda d: d | {"tokens": "abc"}, lambda d: d | {"weights": 3},
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_digests(damage, folder):
    text = read_digest(folder).to_json()
    assert Digest.from_json(text) == read_digest(folder) and len(text) < 2500
    bad = damage(json.loads(text)) if callable(damage) else damage
    with pytest.raises(ValueError, match="x is not a digest of lora_jax"):
        Digest.from_json(bad if isinstance(bad, str) else json.dumps(bad), "x")


SCRIPT = "verify.py"


def run(script, adapter, **arguments):
    for name in ("base", "probe", "against", "dtype", "quantize", "peft", "json"):
        flags.FLAGS[name].unparse()
    flags.FLAGS(["verify", *(f"--{name}={value}" for name, value in arguments.items())])
    return script.check(adapter)


@pytest.mark.slow
@pytest.mark.mixed_dtypes
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_script(script, tmp_path):
    """PEFT takes part where it is installed."""
    source = small_checkpoints.write_huggingface(tmp_path / "m", *small_checkpoints.small("llama2"))
    model = load(source)
    delta = cases.llama_delta(model.params, lora.LoRA(rank=2), size=0.05, targets="qv")
    names = peft.model_names(model.config)
    adapter = exported(tmp_path / "a", delta, model.params, names)
    merged = dataclasses.replace(model, params=lora.merge(model.params, delta))
    save_huggingface(tmp_path / "merged", merged, digest=read_digest(adapter))
    (tmp_path / "served.json").write_text(read_digest(adapter).to_json())
    against = f"{tmp_path}/merged,{tmp_path}/served.json,{adapter},{source}"
    text, ok = run(script, adapter, base=source, probe="ab01", against=against,
                   json=tmp_path / "report.json")  # fmt: skip
    assert not ok and text.count("error:") == 1 and f"error: {source}: the adapter has no" in text
    assert ("PEFT  " in text) == bool(importlib.util.find_spec("peft"))
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["probe_tokens"] == len(model.tokenizer.encode("ab01")) and not written["ok"]
    assert run(script, tmp_path / "merged") == (
        f"{tmp_path}/merged: computes what it was exported with", True,
    )  # fmt: skip
    assert "carries no digest" in run(script, source)[0]
    with pytest.raises(ValueError, match="no merged model's folder; an adapter needs its --base"):
        run(script, adapter)
