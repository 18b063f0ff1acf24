"""LoHa as PEFT's files, without PEFT: what is saved comes back, and wrong files are refused."""

import json

import cases
import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.interop import peft, verify
from lora_jax.models import llama

CONFIG, PARAMS, TOKENS = cases.llama_case()
NAMES = peft.model_names(CONFIG)
Q = "base_model.model.model.layers.0.self_attn.q_proj"
METHODS = {
    "one": lora.LoHa(rank=3, alpha=5),
    "patterns": {"q_proj|up_proj": lora.LoHa(rank=2, alpha=3), "mlp": lora.LoHa(rank=4),
                 "lm_head": lora.LoHa(rank=1)},
    "beside whole weights": {"q_proj": lora.LoHa(rank=2), "norm": lora.Full()},
}  # fmt: skip


def save(folder, delta, **kwargs):
    peft.save_adapter(folder, delta, PARAMS, NAMES, **kwargs)
    return folder


def contents(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", METHODS)
def test_ours_comes_back(name, tmp_path):
    delta = cases.llama_delta(PARAMS, METHODS[name])
    back = peft.load_adapter(save(tmp_path, delta), PARAMS, NAMES)
    if name == "beside whole weights":  # which are saved as sums with the base
        cases.assert_close(back, delta)
    else:
        chex.assert_trees_all_equal(back, delta)
    config, tensors = contents(tmp_path)
    rank = config["rank_pattern"].get(r"model\.layers\.0\.self_attn\.q_proj", config["r"])
    assert config["peft_type"] == "LOHA" and tensors[f"{Q}.hada_w1_a"].shape == (16, rank)
    report = verify(tmp_path, PARAMS, NAMES)
    assert report.matched == report.tensors == len(tensors) and report.digest == "agrees"
    assert not [finding for finding in report.findings if finding.level == "error"]


def test_layers_of_other_ranks_and_without_it(tmp_path):
    """They are padded together, and leave each as it was; the sum is what the format states."""
    _, before = contents(save(tmp_path / "a", cases.llama_delta(PARAMS, {"q_proj": lora.LoHa(
        rank=3, alpha=6)})))  # fmt: skip
    rest = {key: value for key, value in before.items() if "layers.1." not in key}
    third = [f"{Q.replace('layers.0', 'layers.2')}.hada_w{i}" for i in (1, 2)]
    for w in third:
        rest |= {f"{w}_a": rest[f"{w}_a"][:, :2].copy(), f"{w}_b": rest[f"{w}_b"][:2].copy()}
    config = {
        "target_modules": ["layers.0.self_attn.q_proj", "layers.2.self_attn.q_proj"],
        "rank_pattern": {"layers.2.self_attn.q_proj": 2},
        "alpha_pattern": {r"layers\.2\..*": 5},
    }
    rewrite(tmp_path / "a", config, lambda _: rest)
    delta = peft.load_adapter(tmp_path / "a", PARAMS, NAMES)
    node = delta["layers"]["attn"]["q_proj"]
    np.testing.assert_array_equal(node.scale, [2, 0, 2.5])
    update = np.asarray(node.update(PARAMS["layers"]["attn"]["q_proj"].shape))
    w1, w2 = (rest[f"{w}_a"] @ rest[f"{w}_b"] for w in third)
    np.testing.assert_allclose(update[2], 2.5 * (w1 * w2).T, rtol=1e-5, atol=1e-7)
    assert not update[1].any()
    _, after = contents(save(tmp_path / "b", delta))
    assert after.keys() == rest.keys()
    for key in rest:
        np.testing.assert_array_equal(after[key], rest[key])
    chex.assert_trees_all_equal(peft.load_adapter(tmp_path / "b", PARAMS, NAMES), delta)


def test_a_model_with_names_of_its_own(tmp_path):
    """Kernels by heads, whose tensors are those of the matrix."""
    params = {"q": cases.normal(1, 6, 2, 3)}
    settings = {"layouts": {"q": lora.Layout(contracted=(-3,), output=(-2, -1))}}
    _, delta = lora.lora_transform(
        params, lora.LoHa(rank=2), targets="q", key=jax.random.key(0), **settings
    )
    delta = cases.moved(delta)
    peft.save_adapter(tmp_path, delta, params, {"q": "model.q"}, **settings)
    assert contents(tmp_path)[1]["base_model.model.model.q.hada_w2_b"].shape == (2, 6)
    back = peft.load_adapter(tmp_path, params, {"q": "model.q"}, **settings)
    chex.assert_trees_all_equal(back, delta)


def rewrite(folder, config, tensors):
    stated, found = contents(folder)
    (folder / "adapter_config.json").write_text(json.dumps(stated | config))
    (folder / "adapter_model.safetensors").unlink()
    save_file(tensors(found), folder / "adapter_model.safetensors")


WRONG = {
    "lost": ({}, lambda t: {k: v for k, v in t.items() if k != f"{Q}.hada_w2_b"},
             "lacks model.layers.0.self_attn.q_proj.hada_w2_b"),
    "a convolution": ({}, lambda t: t | {f"{Q}.hada_t1": np.ones((3, 3, 1, 1), np.float32)},
                      "q_proj has hada_t1, which an adapter of this type has no place for"),
    "another width": ({}, lambda t: t | {f"{Q}.hada_w1_b": np.ones((3, 17), np.float32)},
                      r"hada_w1_b has shape \(3, 17\), expected \(3, 16\). Is it an adapter of"),
    "a rank": ({"r": 2}, dict, r"has shape \(3, 16\), expected \(2, 16\)"),
    "rank 0": ({"rank_pattern": {"q_proj": 0}}, dict, "says rank 0 of model.layers.0.self_attn.q"),
    "no alpha": ({"alpha": None}, dict, "lacks r or alpha"),
    "a word": ({"alpha": "8"}, dict, "alpha is '8', expected a number"),
}  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused(name, tmp_path):
    config, tensors, message = WRONG[name]
    save(tmp_path, cases.llama_delta(PARAMS, {"q_proj": lora.LoHa(rank=3)}))
    rewrite(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=message):
        peft.load_adapter(tmp_path, PARAMS, NAMES)


REFUSED = {
    "a table": ({"embed": lora.LoHa(rank=2)}, {}, "PEFT has no LoHa of an embedding table"),
    "vLLM": ({"q_proj": lora.LoHa(rank=2)}, {"profile": "vllm"}, "LoRA alone, and not LOHA"),
    "two": ({"q_proj": lora.LoHa(rank=2), "k_proj": lora.LoRA(rank=2)}, {}, "LORA .*LOHA"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_form(name, tmp_path):
    method, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "a", cases.llama_delta(PARAMS, method), **options)


def test_logits_are_those_of_the_delta(tmp_path):
    delta = cases.llama_delta(PARAMS, METHODS["patterns"])
    back = peft.load_adapter(save(tmp_path, delta), jax.eval_shape(lambda: PARAMS), NAMES)
    ours, theirs = (llama.forward(lora.bind(PARAMS, d), TOKENS, CONFIG) for d in (back, delta))
    chex.assert_trees_all_equal(ours, theirs)
