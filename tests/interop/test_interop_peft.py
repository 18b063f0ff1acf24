"""Adapters of PEFT, without PEFT: our files come back bit for bit, and wrong ones are refused."""

import functools
import json

import cases
import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.interop import peft
from lora_jax.interop.peft import files
from lora_jax.models import llama

CONFIG, PARAMS, TOKENS = cases.llama_case()
NAMES = peft.model_names(CONFIG)
METHODS = {
    "lora": lora.LoRA(rank=3, alpha=5, dropout=0.1),
    "rslora": lora.LoRA(rank=3, scaling="rslora"),
    "layer ranks": lora.LoRA(rank=(3, 0, 1)),
    "pattern": {"q_proj": lora.LoRA(rank=2), "mlp": lora.LoRA(rank=4, alpha=3),
                "lm_head": lora.LoRA(rank=1)},
    "embedding": {"embed": lora.LoRA(rank=2), "v_proj": lora.LoRA(rank=2)},
    "dora": lora.DoRA(rank=3, alpha=5),
    "ia3": {"k_proj|v_proj": lora.IA3(), "down_proj": lora.IA3(scales="input")},
    "vera": lora.VeRA(rank=4),
    "adalora": lora.AdaLoRA(total_steps=10, rank=4, target_rank=2),
}  # fmt: skip
PROMPTS = {"prompt": (lora.Prompt(length=3), "embed"), "prefix": (lora.Prefix(length=3), "k_proj")}


def delta_of(method, **kwargs):
    return cases.llama_delta(PARAMS, method, **kwargs)


def save(folder, delta, **kwargs):
    peft.save_adapter(folder, delta, PARAMS, NAMES, num_kv_heads=CONFIG.num_kv_heads, **kwargs)
    return folder


def edited(folder, *, config=None, tensors=None):
    """Changes a saved adapter's files in place."""
    path = folder / "adapter_config.json"
    if config:
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors:
        file = folder / "adapter_model.safetensors"
        found = tensors(load_file(file))
        file.unlink()
        save_file(found, file)


@pytest.mark.sampled
@pytest.mark.parametrize("name", METHODS)
def test_ours_comes_back_bit_for_bit(name, tmp_path):
    delta = delta_of(METHODS[name])
    if name == "layer ranks":  # drawn anew, padding included, which training never touches
        node = delta["layers"]["attn"]["q_proj"]
        kept = np.arange(3) < np.array([[[3]], [[0]], [[1]]])
        node = node.replace(a=node.a * np.float32(kept), b=node.b * np.float32(kept).mT)
        delta = {"layers": {"attn": {"q_proj": node}}}
    back = peft.load_adapter(save(tmp_path / "a", delta), PARAMS, NAMES)
    if name == "adalora":  # its statistics are not part of an adapter
        delta, back = (
            jax.tree.map(
                lambda n: (n.a, n.e, n.b, n.scale, n.method),
                d,
                is_leaf=lambda n: hasattr(n, "sensitivity"),
            )
            for d in (delta, back)
        )
    chex.assert_trees_all_equal(back, delta)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_come_back_bit_for_bit(name, tmp_path):
    method, targets = PROMPTS[name]
    delta = delta_of(method, targets=targets)
    chex.assert_trees_all_equal(peft.load_adapter(save(tmp_path, delta), PARAMS, NAMES), delta)


def test_an_encoded_prefix_is_written_out(tmp_path):
    delta = delta_of(lora.Prefix(length=3, hidden=5), targets="k_proj")
    back = peft.load_adapter(save(tmp_path, delta), PARAMS, NAMES)
    expected = delta["layers"]["attn"]["prefix"].bound()
    cases.assert_close(back["layers"]["attn"]["prefix"], expected)


def test_whole_weights_travel_as_modules_to_save(tmp_path):
    delta = delta_of({"q_proj": lora.LoRA(rank=2), "lm_head": lora.Full(), "norm": lora.Full()})
    folder = save(tmp_path / "a", delta)
    saved = json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
    assert "lm_head" in saved and "model.norm" in saved
    back = peft.load_adapter(folder, PARAMS, NAMES)
    logits = [llama.forward(lora.bind(PARAMS, d), TOKENS, CONFIG) for d in (back, delta)]
    cases.assert_close(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["q_bias", "q_bias|k_bias"])
def test_trained_biases_travel(rule, tmp_path):
    config, params, _ = cases.llama_case(qkv_bias=True)
    names = peft.model_names(config)
    delta = cases.llama_delta(params, {"q_proj": lora.LoRA(rank=2), rule: lora.Full()})
    peft.save_adapter(tmp_path / "a", delta, params, names)
    stated = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["bias"]
    assert stated == ("lora_only" if rule == "q_bias" else "all")
    cases.assert_close(peft.load_adapter(tmp_path / "a", params, names), delta)


def test_patterns_state_what_differs(tmp_path):
    folder = save(tmp_path / "a", delta_of(METHODS["pattern"]))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 3
    assert config["rank_pattern"]["lm_head"] == 1 and config["alpha_pattern"]["lm_head"] == 16
    assert set(config["target_modules"]) == {
        "q_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
    }  # fmt: skip


def test_a_model_with_names_of_its_own(tmp_path):
    """Kernels by heads and layers in a list: any JAX model can ship to PEFT's world."""
    params = {"blocks": [{"q": cases.normal(i, 6, 2, 3)} for i in range(2)]}
    names = {f"blocks/{i}/q": f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    layouts = dict.fromkeys(names, lora.Layout(contracted=(-3,), output=(-2, -1)))
    _, delta = lora.lora_transform(
        params, lora.LoRA(rank=2), targets="q", key=jax.random.key(0), layouts=layouts
    )
    delta = cases.moved(delta)
    peft.save_adapter(tmp_path / "a", delta, params, names, layouts=layouts)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    assert tensors[name].shape == (6, 2)
    back = peft.load_adapter(tmp_path / "a", params, names, layouts=layouts)
    chex.assert_trees_all_equal(
        back, {"blocks": {str(i): delta["blocks"][str(i)] for i in range(2)}}
    )


@pytest.mark.slow
def test_what_vllm_serves(tmp_path):
    folder = save(tmp_path / "a", delta_of(METHODS["pattern"]), profile="vllm")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    back = peft.load_adapter(folder, PARAMS, NAMES)
    same = [lora.merge(PARAMS, d) for d in (back, delta_of(METHODS["pattern"]))]
    cases.assert_close(*same)


REFUSED_BY_VLLM = {
    "dora": (METHODS["dora"], "not DoRANode on layers/attn/k_proj|not DoRANode"),
    "ia3": (METHODS["ia3"], "not IA3"),
    "full": ({"q_proj": lora.LoRA(rank=1), "lm_head": lora.Full()}, "not lm_head"),
}


@pytest.mark.parametrize("name", REFUSED_BY_VLLM)
def test_what_vllm_does_not_serve(name, tmp_path):
    method, message = REFUSED_BY_VLLM[name]
    with pytest.raises(ValueError, match=f"vLLM serves LoRA alone, and ({message})"):
        save(tmp_path / "a", delta_of(method), profile="vllm")
    assert not (tmp_path / "a").exists()


def test_what_has_no_form(tmp_path):
    mixed = delta_of({"q_proj": lora.LoRA(rank=1), "k_proj": lora.IA3()})
    with pytest.raises(ValueError, match=r"one method, this delta has .*IA3 \(.*LORA \("):
        save(tmp_path / "a", mixed)
    both = delta_of({"q_proj": lora.LoRA(rank=1), "k_proj": lora.DoRA(rank=1)})
    with pytest.raises(ValueError, match="use_dora holds for a whole adapter"):
        save(tmp_path / "a", both)
    with pytest.raises(ValueError, match="layers/attn/q_proj.*: no PyTorch module is named"):
        peft.save_adapter(tmp_path / "a", delta_of(METHODS["lora"]), PARAMS, {})
    with pytest.raises(ValueError, match="profile='tgi': expected"):
        save(tmp_path / "a", delta_of(METHODS["lora"]), profile="tgi")


def test_the_card_says_what_it_is(tmp_path):
    delta = delta_of(METHODS["pattern"])
    card = peft.model_card(
        PARAMS, delta, base_name="org/tiny", data="E2E", command="python x.py", validation_loss=1.5
    )
    save(tmp_path, delta, card=card)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nbase_model: org/tiny\nlibrary_name: peft\n")
    for part in (
        "data: E2E",
        "python x.py",
        "validation loss: 1.5",
        "LoRANode",
        "trainable params",
    ):
        assert part in text


@pytest.mark.slow
def test_another_base_of_the_same_form_is_refused(tmp_path):
    folder = save(tmp_path / "a", delta_of(METHODS["lora"], targets="q_proj"))
    other = {**PARAMS, "norm": PARAMS["norm"] * 2}
    with pytest.raises(ValueError, match="was made for another base: its fingerprint is"):
        peft.load_adapter(folder, other, NAMES)
    peft.load_adapter(folder, other, NAMES, check_base=False)
    in_bf16 = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), PARAMS)
    in_four_bits = lora.quantize(PARAMS, "nf4", block_size=8)
    for base in (in_bf16, in_four_bits, jax.eval_shape(lambda: PARAMS)):
        chex.assert_trees_all_equal(
            peft.load_adapter(folder, base, NAMES), peft.load_adapter(folder, PARAMS, NAMES)
        )


def test_it_never_overwrites(tmp_path):
    delta = delta_of(METHODS["lora"])
    save(tmp_path, delta)
    with pytest.raises(FileExistsError, match="holds an adapter already"):
        save(tmp_path, delta)


P = "base_model.model.model.layers.0.self_attn.q_proj"
WRONG = {
    "unknown module": (
        {"tensors": lambda t: t | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight":
                                   np.ones((3, 16), np.float32)}},
        "layers.9.self_attn.q_proj.lora_A.weight' belongs to no module of this model; the nearest",
    ),
    "lost B": ({"tensors": lambda t: {k: v for k, v in t.items() if k != f"{P}.lora_B.weight"}},
               r"lacks model.layers.0.self_attn.q_proj.lora_B.weight"),
    "another width": ({"tensors": lambda t: t | {f"{P}.lora_A.weight": np.zeros((3, 17), "f")}},
                      r"q_proj has A \(3, 17\) and B \(16, 3\), expected \(3, 16\)"),
    "no matrix": ({"tensors": lambda t: t | {f"{P}.lora_A.weight": np.ones(3, np.float32)}},
                  r"q_proj.lora_A.weight has shape \(3,\), expected \('r', 'r'\)"),
    "a bias in B": ({"tensors": lambda t: t | {f"{P}.lora_B.bias": np.ones(16, np.float32)}},
                    "q_proj has lora_B.bias, which an adapter of this type has no place for"),
    "other prefix": ({"tensors": lambda t: {k[5:]: v for k, v in t.items()}},
                     "does not begin with 'base_model.model.'"),
    "rank": ({"config": {"r": 4}}, "q_proj has rank 3, its config says 4"),
    "method": ({"config": {"peft_type": "LOKR"}}, "peft_type 'LOKR' is not supported; supported: "),
    "option": ({"config": {"layer_replication": [[0, 2]]}}, "layer_replication=.* not supported"),
    "moved base": ({"config": {"init_lora_weights": "pissa_niter_4"}},
                   "init_lora_weights='pissa_niter_4' has moved a part of the base"),
}  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused(name, tmp_path):
    folder = save(tmp_path, delta_of(METHODS["lora"], targets="q_proj"))
    changes, message = WRONG[name]
    edited(folder, **changes)
    with pytest.raises(ValueError, match=message):
        peft.load_adapter(folder, PARAMS, NAMES)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json"):
        peft.load_adapter(tmp_path, PARAMS, NAMES)
    folder = save(tmp_path / "a", delta_of(METHODS["lora"], targets="q_proj"))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        peft.load_adapter(folder, PARAMS, NAMES)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"Pickles \(.bin\) are not read"):
        peft.load_adapter(folder, PARAMS, NAMES)


@pytest.mark.slow
def test_shapes_alone_serve_but_for_dora(tmp_path):
    shapes = jax.eval_shape(lambda: PARAMS)
    delta = delta_of(METHODS["lora"])
    back = peft.load_adapter(save(tmp_path / "a", delta), shapes, NAMES)
    chex.assert_trees_all_equal(back, delta)
    save(tmp_path / "b", delta_of(METHODS["dora"]))
    with pytest.raises(ValueError, match="DoRA needs the base's weights, found their shape alone"):
        peft.load_adapter(tmp_path / "b", shapes, NAMES)


HOSTILE = {
    "r": ({"r": "3"}, "r is '3', expected a count"),
    "alpha": ({"lora_alpha": [1]}, r"lora_alpha is \[1\], expected a number"),
    "huge": ({"lora_alpha": 10**400}, "lora_alpha is 1000.*expected a number"),
    "broken pattern": ({"alpha_pattern": {"(": 1}}, "alpha_pattern: expected names of modules, or"),
    "pattern": ({"rank_pattern": [1]}, r"rank_pattern is \[1\], expected an object of numbers"),
    "lost": ({"r": None}, "its config lacks r or lora_alpha"),
    "type": ({"peft_type": ["LORA"]}, r"peft_type \['LORA'\] is not supported"),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_configs_are_refused(name, tmp_path):
    folder = save(tmp_path, delta_of(METHODS["lora"], targets="q_proj"))
    changes, message = HOSTILE[name]
    edited(folder, config=changes)
    with pytest.raises(ValueError, match=message):
        peft.load_adapter(folder, PARAMS, NAMES)


STARTS = {
    "untrained": (lora.LoRA(rank=2, init="pissa"), 0.0),
    "pissa": (lora.LoRA(rank=2, init="pissa_niter_2", alpha=5), 0.3),
    "olora": ({"q_proj": lora.LoRA(rank=3, init="olora"), "mlp": lora.LoRA(rank=1)}, 0.3),
    "layer ranks": (lora.LoRA(rank=(2, 0, 1), init="pissa"), 0.3),
}


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "profile"),
    [(name, "peft") for name in STARTS]
    + [pytest.param(n, "vllm", marks=() if n == "pissa" else pytest.mark.slow) for n in STARTS],
)
def test_what_began_with_a_part_of_the_weight_is_a_plain_adapter(name, profile, tmp_path):
    """Of the original base: what is read back gives the logits of the delta."""
    method, size = STARTS[name]
    targets = "all-linear" if isinstance(method, dict) else ("q_proj", "down_proj")
    base, delta = jax.jit(lambda p: lora.lora_transform(
        p, method, targets=targets, key=jax.random.key(0)))(PARAMS)  # fmt: skip
    if size:
        kept = jax.tree.map(lambda leaf: leaf != 0, delta) if name == "layer ranks" else None
        delta = cases.moved(delta, size=size)
        if kept is not None:
            delta = jax.tree.map(lambda leaf, k: leaf * k.astype(leaf.dtype), delta, kept)
    # An untrained one does nothing, which `verify` would say of it.
    write = save if size else functools.partial(files.save_adapter, params=PARAMS, names=NAMES)
    folder = tmp_path / "a"
    write(folder, delta, profile=profile)
    back = peft.load_adapter(folder, PARAMS, NAMES)
    ours, theirs, start = (llama.forward(lora.bind(PARAMS, d), TOKENS, CONFIG)
                           for d in (back, delta, {}))  # fmt: skip
    cases.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
    assert np.abs(ours - start).max() < 1e-4 if not size else np.abs(ours - start).max() > 1e-2
    if name == "pissa":
        four_bits = lora.quantize(PARAMS, "nf4", block_size=8)
        ours, theirs = (llama.forward(lora.bind(four_bits, d), TOKENS, CONFIG)
                        for d in (back, delta))  # fmt: skip
        cases.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
    if name == "layer ranks" and profile == "peft":
        tensors = load_file(folder / "adapter_model.safetensors")
        assert {value.shape[0] for key, value in tensors.items() if "lora_A" in key} == {4, 2}


def test_a_base_of_its_own_is_named_or_refused(tmp_path):
    base = lora.quantize(PARAMS, "nf4", block_size=8)
    _, fresh = lora.lora_transform(base, lora.LoRA(rank=2), targets=("q_proj", "o_proj"),
                                   key=jax.random.key(0))  # fmt: skip
    moved, delta = lora.loftq_start(PARAMS, base, fresh, iterations=2)
    for made in (delta, lora.as_plain_lora(delta), lora.combine([delta], [0.5])):
        for profile in ("peft", "vllm"):
            with pytest.raises(ValueError, match="layers/attn/.*belongs to the base that loftq_st"):
                save(tmp_path / "a", made, profile=profile)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="own_base=True, but the delta belongs to the original"):
        save(tmp_path / "a", fresh, own_base=True)
    peft.save_adapter(tmp_path / "a", delta, moved, NAMES, own_base=True, base_name="moved")
    back = peft.load_adapter(tmp_path / "a", moved, NAMES)
    chex.assert_trees_all_equal(back, delta)
    with pytest.raises(ValueError, match="was made for another base"):
        peft.load_adapter(tmp_path / "a", base, NAMES)
    with pytest.raises(ValueError, match="belongs to the base that loftq_start made"):
        peft.save_adapter(tmp_path / "b", back, moved, NAMES)
