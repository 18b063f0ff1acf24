"""What a file must hold, and what an adapter of PEFT means over tied tables and biases."""

import json
import re
import time

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.interop import peft
from lora_jax.interop.peft.patterns import matching
from lora_jax.models import llama

CONFIG, PARAMS, TOKENS = cases.llama_case(qkv_bias=True, tie_embeddings=True)
ATTN = PARAMS["layers"]["attn"]
PARAMS["layers"]["attn"] = ATTN | {
    f"{name}_bias": cases.normal(i, *ATTN[f"{name}_bias"].shape) for i, name in enumerate("qkv")
}
NAMES = peft.model_names(CONFIG)
OWN, OWN_CONFIG = llama.untie(PARAMS, CONFIG)
OWN_NAMES = peft.model_names(OWN_CONFIG)
Q = {"q_proj": lora.LoRA(rank=2)}
FILE = "adapter_model.safetensors"


def delta_of(method, params=PARAMS, **kwargs):
    return cases.llama_delta(params, method, **kwargs)


def save(folder, delta, params=PARAMS, names=NAMES):
    peft.save_adapter(folder, delta, params, names, num_kv_heads=CONFIG.num_kv_heads)
    return folder


def edited(folder, config=None, tensors=None):
    """Changes a saved adapter's files in place, as another program's."""
    path, file = folder / "adapter_config.json", folder / FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    found = load_file(file)
    file.unlink()
    save_file({k: np.ascontiguousarray(v) for k, v in (tensors or dict)(found).items()}, file)
    return folder


def forward(weights, config=CONFIG):
    return jax.jit(llama.forward, static_argnums=2)(weights, TOKENS, config)


def bound(folder, params=PARAMS, names=NAMES, config=CONFIG):
    return forward(lora.bind(params, peft.load_adapter(folder, params, names)), config)


def close(found, expected, rtol=1e-4):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-4 * np.abs(expected).max())


IA3 = {"q_proj|k_proj": lora.IA3(), "down_proj": lora.IA3(scales="input")}
WHOLE = {
    "lora": Q | {"norm": lora.Full(), "q_bias|k_bias": lora.Full(), "gate_proj": lora.Full()},
    "dora": {"q_proj|down_proj": lora.DoRA(rank=2), "v_proj": lora.Full()},
    "embedding": {"embed|k_proj": lora.LoRA(rank=2)},
    "table": Q | {"embed": lora.Full()},
    "ia3": IA3 | {"v_proj": lora.Full()},
    "vera": {"q_proj|v_proj": lora.VeRA(rank=4), "k_bias": lora.Full()},
    "adalora": {"q_proj|o_proj": lora.AdaLoRA(total_steps=9, rank=3, target_rank=2),
                "attn_norm": lora.Full()},
    "prefix": {"k_proj": lora.Prefix(length=3), "norm": lora.Full(), "v_bias": lora.Full()},
}  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("name", WHOLE)
def test_every_tensor_counts(name, tmp_path):
    """A file that lost any one of its tensors, gained one, or kept none, is refused."""
    delta = delta_of(WHOLE[name])
    delta = peft.scale_biases(delta, NAMES) if name == "ia3" else delta
    folder = save(tmp_path, delta)
    file = folder / FILE
    whole = load_file(file)
    for lost in whole:
        save_file({k: v for k, v in whole.items() if k != lost}, file)
        with pytest.raises(ValueError, match="incomplete|lacks|alone"):
            peft.load_adapter(folder, PARAMS, NAMES)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    for more in (
        f"{layer}.lora_C.weight",
        f"{layer}.weight.more",
        "base_model.model.model.rotary.weight",
        "base_model.model.lm_head.bias",
        "base_model.vera_C",
        "table",
    ):
        save_file(whole | {more: np.ones((2, 2), np.float32)}, file)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            peft.load_adapter(folder, PARAMS, NAMES)
    save_file({}, file)
    with pytest.raises(ValueError, match="holds no tensor"):
        peft.load_adapter(folder, PARAMS, NAMES)
    save_file(whole, file)
    back = peft.load_adapter(folder, PARAMS, NAMES)
    if name != "prefix":
        cases.assert_close(*(lora.merge(PARAMS, d) for d in (back, delta)))


STATED = {
    "a target": ({"target_modules": ["q_proj", "v_proj"]}, r"adapts model.layers.0.self_attn.v"),
    "another target": ({"target_modules": ["v_proj"]}, r"adapts model.layers.0.self_attn.v"),
    "a target too few": ({"target_modules": r".*\.0\..*q_proj"}, "tensors of model.layers.1.self"),
    "no targets": ({"target_modules": None}, "names no target_modules"),
    "one layer": ({"layers_to_transform": [1]}, "tensors of model.layers.0.self_attn.q_proj"),
    "a layer by name": ({"layers_to_transform": 1, "layers_pattern": "blocks"}, "q_proj, which"),
    "layers": ({"layers_to_transform": ["1"]}, "layers_to_transform is"),
    "excluded": ({"exclude_modules": ["q_proj"]}, "tensors of model.layers.0.self_attn.q_proj"),
    "a module": ({"modules_to_save": ["lm_head"]}, "lacks lm_head.weight"),
    "no module": ({"modules_to_save": ["score"]}, "names 'score', which is no module"),
    "norms": ({"modules_to_save": ["norm"]}, "lacks model.layers.0.input_layernorm.weight"),
    "names": ({"modules_to_save": "norm"}, "modules_to_save is 'norm', expected a list"),
    "biases": ({"bias": "lora_only"}, "lacks model.layers.0.self_attn.q_proj.bias"),
    "all biases": ({"bias": "all"}, "lacks model.layers.0.self_attn.k_proj.bias"),
    "odd biases": ({"bias": "some"}, "bias is 'some', expected one of none"),
    "magnitudes": ({"use_dora": True}, "lacks model.layers.0.self_attn.q_proj.lora_magnitude"),
    "a bias of B": ({"lora_bias": True}, "lacks model.layers.0.self_attn.q_proj.lora_B.bias"),
    "a switch": ({"use_dora": 1}, "use_dora is 1, expected true or false"),
    "rows": ({"trainable_token_indices": [3]}, "lacks model.embed_tokens.token_adapter"),
    "rows of what": ({"trainable_token_indices": {"q_proj": [3]}}, "names 'q_proj', which is"),
    "no rows": ({"trainable_token_indices": [-1]}, r"embed_tokens is \[-1\], expected a list"),
}  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("name", STATED)
def test_a_config_that_states_more_or_other(name, tmp_path):
    changes, message = STATED[name]
    folder = edited(save(tmp_path, delta_of(Q)), changes)
    with pytest.raises(ValueError, match=message):
        peft.load_adapter(folder, PARAMS, NAMES)


def test_magnitudes_beside_no_dora(tmp_path):
    folder = edited(save(tmp_path, delta_of({"q_proj": lora.DoRA(rank=2)})), {"use_dora": False})
    with pytest.raises(
        ValueError, match="lora_magnitude_vector, and its config says that use_dora"
    ):
        peft.load_adapter(folder, PARAMS, NAMES)


ONE_OF_TWO = {
    "a table": (Q | {"embed": lora.Full()}, "embed_tokens"),
    "a head": (Q | {"lm_head": lora.Full()}, "lm_head"),
    "a table's factors": ({"embed": lora.LoRA(rank=2)}, "embed_tokens"),
    "a head's factors": ({"lm_head": lora.LoRA(rank=2)}, "lm_head"),
    "a head's triplets": ({"lm_head": lora.AdaLoRA(total_steps=9, rank=3, target_rank=2)}, "lm_h"),
    "a head's vector": ({"lm_head": lora.IA3()}, "lm_head"),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", ONE_OF_TWO)
def test_one_of_a_tied_pair_wants_an_untied_base(name, tmp_path):
    method, which = ONE_OF_TWO[name]
    delta = delta_of(method, OWN)
    save(tmp_path, delta, OWN, OWN_NAMES)
    with pytest.raises(ValueError, match=rf"changes {which}.* models.untie\(params, config\)"):
        peft.load_adapter(tmp_path, PARAMS, NAMES)
    close(bound(tmp_path, OWN, OWN_NAMES, OWN_CONFIG), forward(lora.bind(OWN, delta), OWN_CONFIG))


def test_a_tied_table_that_has_no_form(tmp_path):
    dora = delta_of({"embed": lora.DoRA(rank=2)})
    with pytest.raises(ValueError, match="embed is the output head as well, and PEFT's DoRA"):
        save(tmp_path / "a", dora)
    with pytest.raises(ValueError, match="vLLM serves no adapter of a table that is the output"):
        embedding = delta_of(WHOLE["embedding"])
        peft.save_adapter(tmp_path / "b", embedding, PARAMS, NAMES, profile="vllm")


def test_layers_without_the_adapter_are_left_out(tmp_path):
    """And a scale that AdaLoRA's config does not state is folded into the singular values."""
    deltas = [delta_of({"q_proj": method}) for method in (
        lora.AdaLoRA(total_steps=9, rank=3, target_rank=2), lora.IA3(scales="input"))]  # fmt: skip
    for i, (field, delta) in enumerate(zip(("scale", "active"), deltas, strict=True)):
        node = delta["layers"]["attn"]["q_proj"]
        values = getattr(node, field) * jnp.float32([1, 0, 1 if i else 0.5])
        delta = {"layers": {"attn": {"q_proj": node.replace(**{field: values})}}}
        folder = save(tmp_path / str(i), delta)
        assert not any("layers.1." in name for name in load_file(folder / FILE))
        back = peft.load_adapter(folder, PARAMS, NAMES)
        cases.assert_close(*(lora.merge(PARAMS, d) for d in (back, delta)))


def test_untying_changes_nothing():
    np.testing.assert_allclose(forward(OWN, OWN_CONFIG), forward(PARAMS), rtol=1e-5, atol=1e-5)
    again, config = llama.untie(OWN, OWN_CONFIG)
    assert config == OWN_CONFIG and again["lm_head"] is OWN["lm_head"]
    shapes, _ = llama.untie(jax.eval_shape(lambda: PARAMS), CONFIG)
    assert shapes["lm_head"].shape == OWN["lm_head"].shape
    table = {"embed": PARAMS["embed"]}
    packed = PARAMS | lora.quantize(table, "nf4", targets="embed", block_size=8)
    np.testing.assert_allclose(
        forward(llama.untie(packed, CONFIG)[0], OWN_CONFIG), forward(packed), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["embedding", "table"])
def test_a_tied_pair_is_saved_as_one(name, tmp_path):
    """Whose second half PEFT ties to the first; apart, they are read over an untied base too."""
    delta = delta_of(WHOLE[name])
    folder = save(tmp_path, delta)
    assert json.loads((folder / "adapter_config.json").read_text())["ensure_weight_tying"]
    expected = forward(lora.bind(PARAMS, delta))
    close(bound(folder), expected)
    close(bound(folder, OWN, OWN_NAMES, OWN_CONFIG), expected)
    name = "base_model.model.lm_head." + ("lora_A.weight" if name == "embedding" else "weight")
    edited(folder, tensors=lambda t: t | {name: t[name] * 2})
    with pytest.raises(ValueError, match="changes lm_head alone"):
        peft.load_adapter(folder, PARAMS, NAMES)


@pytest.mark.sampled
@pytest.mark.parametrize("method", [
    lora.LoRA(rank=2), lora.DoRA(rank=2), lora.IA3(), lora.VeRA(rank=4),
    lora.AdaLoRA(total_steps=9, rank=3, target_rank=2),
])  # fmt: skip
def test_the_weight_beside_an_adapter_of_the_head(method, tmp_path):
    """PEFT saves it, (out, in), in case that the vocabulary was resized."""
    delta = delta_of({"lm_head": method}, OWN)
    folder = save(tmp_path, delta, OWN, OWN_NAMES)
    head = np.asarray(OWN["lm_head"]).T
    name = "base_model.model.lm_head.base_layer.weight"
    edited(folder, tensors=lambda t: t | {name: head})
    expected = forward(lora.bind(OWN, delta), OWN_CONFIG)
    close(bound(folder, OWN, OWN_NAMES, OWN_CONFIG), expected)
    for wrong in (head + 1, head[:-1], head.T):
        edited(folder, tensors=lambda t, wrong=wrong: t | {name: wrong})
        with pytest.raises(ValueError, match="lm_head was adapted over another weight"):
            peft.load_adapter(folder, OWN, OWN_NAMES)


def test_ia3_scales_the_bias_as_peft_does(tmp_path):
    """(x @ w + bias) * l, bound, merged, differentiated, stacked; and back."""
    fresh = delta_of(IA3)
    with pytest.raises(ValueError, match="PEFT's IA3 scales the layer's bias too"):
        save(tmp_path / "none", fresh)
    delta = peft.scale_biases(fresh, NAMES)
    attn = PARAMS["layers"]["attn"]

    def by_hand(delta):
        """The same, in the weights themselves."""
        vectors = {n: delta["layers"]["attn"][f"{n}_proj"].l for n in "qk"}
        scaled = {f"{n}_proj": attn[f"{n}_proj"] * v[:, None] for n, v in vectors.items()}
        scaled |= {f"{n}_bias": attn[f"{n}_bias"] * v for n, v in vectors.items()}
        mlp = PARAMS["layers"]["mlp"]
        down = mlp["down_proj"] * delta["layers"]["mlp"]["down_proj"].l[..., None]
        layers = PARAMS["layers"] | {"attn": attn | scaled, "mlp": mlp | {"down_proj": down}}
        return PARAMS | {"layers": layers}

    def loss(delta, bind):
        return jnp.sum(llama.forward(bind(delta), TOKENS, CONFIG) ** 2)

    @jax.jit
    def both(delta):
        binds = (lambda d: lora.bind(PARAMS, d)), by_hand, (lambda d: lora.merge(PARAMS, d))
        return [jax.value_and_grad(loss)(delta, bind) for bind in binds]

    (value, slope), (expected, expected_slope), (merged, _) = both(delta)
    close(value, expected)
    close(merged, expected)
    for path in (("attn", "q_proj"), ("attn", "k_proj"), ("mlp", "down_proj")):
        found, wanted = (s["layers"][path[0]][path[1]].l for s in (slope, expected_slope))
        close(found, wanted, rtol=1e-3)
    back = peft.load_adapter(save(tmp_path / "a", delta), PARAMS, NAMES)
    chex.assert_trees_all_equal(back, delta)
    cases.assert_close(lora.unmerge(lora.merge(PARAMS, delta), delta), PARAMS, 1e-4, 1e-5)
    stacked = lora.stack([delta, jax.tree.map(lambda x: x, delta)])
    chex.assert_trees_all_equal(lora.unstack(stacked)[1], delta)
    with pytest.raises(ValueError, match="IA3 over a layer with a bias cannot be chosen by row"):
        lora.bind(PARAMS, stacked, adapter_ids=jnp.array([0, 1]))
    lost = {"layers": {"attn": {"q_bias": delta["layers"]["attn"]["q_bias"]}}}
    with pytest.raises(
        ValueError, match="output-side IA3 at 'layers/attn/q_proj', which the delta"
    ):
        lora.bind(PARAMS, lost)
    assert "IA3BiasNode" in str(lora.describe(PARAMS, delta))


def test_ia3_without_a_bias_to_scale(tmp_path):
    zero = PARAMS["layers"]["attn"] | {"q_bias": jnp.zeros_like(ATTN["q_bias"])}
    params = PARAMS | {"layers": PARAMS["layers"] | {"attn": zero}}
    for i, method in enumerate([{"q_proj": lora.IA3()}, {"k_proj": lora.IA3(scales="input")}]):
        save(tmp_path / str(i), delta_of(method, params), params)


def test_ia3_of_0_1_0_left_the_bias_alone(tmp_path):
    """And its files say so by what they lack."""
    delta = delta_of({"q_proj": lora.IA3()})
    folder = save(tmp_path, peft.scale_biases(delta, NAMES))
    with safe_open(folder / FILE, framework="numpy") as file:
        metadata = dict(file.metadata())
    metadata.pop("lora_jax.ia3_scales_biases")
    tensors = load_file(folder / FILE)
    save_file(tensors, folder / FILE, metadata=metadata)
    chex.assert_trees_all_equal(peft.load_adapter(folder, PARAMS, NAMES), delta)


def test_rows_of_the_table(tmp_path):
    rows = np.float32([[1] * CONFIG.hidden_size, [2] * CONFIG.hidden_size])
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    folder = edited(
        save(tmp_path, delta_of(Q)),
        {"trainable_token_indices": [5, 3]},
        lambda tensors: tensors | {name: rows},
    )
    delta = peft.load_adapter(folder, PARAMS, NAMES)
    table = lora.merge(PARAMS, delta)["embed"]
    np.testing.assert_allclose(table, PARAMS["embed"].at[jnp.array([5, 3])].set(rows), atol=1e-6)
    with pytest.raises(ValueError, match="load the adapter over the tied base"):
        peft.load_adapter(folder, OWN, OWN_NAMES)
    other = OWN | {"lm_head": OWN["lm_head"] * 2}
    cases.assert_close(peft.load_adapter(folder, other, OWN_NAMES), delta)
    edited(folder, {"trainable_token_indices": [5, 3, 4]})
    with pytest.raises(ValueError, match="a row of 16 for each of the 3 different"):
        peft.load_adapter(folder, PARAMS, NAMES)


def test_a_constant_beside_b(tmp_path):
    """PEFT's lora_bias: it shifts the layer's bias, where there is one."""
    delta = delta_of(Q)
    shift = cases.normal(9, *ATTN["q_bias"].shape)
    folder = save(tmp_path / "a", delta)

    def shifted(tensors):
        names = [
            f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_B.bias" for i in range(3)
        ]
        return tensors | dict(zip(names, np.asarray(shift), strict=True))

    edited(folder, {"lora_bias": True}, shifted)
    back = peft.load_adapter(folder, PARAMS, NAMES)
    np.testing.assert_allclose(back["layers"]["attn"]["q_bias"].delta, 8 * shift, rtol=1e-6)
    config, params, _ = cases.llama_case()
    with pytest.raises(
        ValueError, match="adds a constant to the output of model.layers.0.*no bias"
    ):
        peft.load_adapter(folder, params, peft.model_names(config))


def test_adalora_by_its_scale_and_without_a_schedule(tmp_path):
    method = lora.AdaLoRA(total_steps=9, rank=3, target_rank=2, alpha=3)
    delta = delta_of({"q_proj": method})
    folder = save(tmp_path, delta)
    same = peft.load_adapter(folder, PARAMS, NAMES)["layers"]["attn"]["q_proj"]
    for config in ({"lora_alpha": 0}, {"lora_alpha": -1}, {"total_step": None}, {"tinit": 100},
                   {"tfinal": 9}, {"target_r": 9}, {"deltaT": 0}):  # fmt: skip
        edited(folder, {"lora_alpha": 3, "total_step": 9, "tinit": 0, "tfinal": 0, "deltaT": 1,
                        "target_r": 2} | config)  # fmt: skip
        node = peft.load_adapter(folder, PARAMS, NAMES)["layers"]["attn"]["q_proj"]
        chex.assert_trees_all_equal(
            (node.a, node.e, node.b, node.scale), (same.a, same.e, same.b, same.scale)
        )
    edited(folder, {"lora_alpha": None})
    with pytest.raises(ValueError, match="lora_alpha is null"):
        peft.load_adapter(folder, PARAMS, NAMES)
    kept = [True, False, True]
    masks = {f"model.layers.{i}.self_attn.q_proj.lora_E": kept for i in range(3)}
    edited(
        folder,
        {"lora_alpha": 3, "rank_pattern": masks},
        lambda tensors: {
            k: v[:, kept] if k.endswith("B") else v[np.array(kept)] for k, v in tensors.items()
        },
    )
    pruned = peft.load_adapter(folder, PARAMS, NAMES)["layers"]["attn"]["q_proj"]
    np.testing.assert_array_equal(pruned.e[:, :2], same.e[:, np.array([0, 2])])
    assert not np.any(pruned.e[:, 2]) and np.array_equal(pruned.scale, same.scale)
    edited(folder, {"rank_pattern": {}})
    with pytest.raises(ValueError, match="has 2 triplets, but its config says init_r 3"):
        peft.load_adapter(folder, PARAMS, NAMES)


def test_a_prompt_encoder_is_a_prompt(tmp_path):
    delta = delta_of(lora.Prompt(length=3), targets="embed")
    folder = edited(save(tmp_path, delta), {"peft_type": "P_TUNING", "encoder_hidden_size": 8})
    chex.assert_trees_all_equal(peft.load_adapter(folder, PARAMS, NAMES), delta)
    for config, message in (
        ({"num_virtual_tokens": 4}, "has 3 tokens, the config's num_virtual_tokens is 4"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2"),
    ):
        edited(folder, {"num_virtual_tokens": 3, "num_transformer_submodules": 1} | config)
        with pytest.raises(ValueError, match=message):
            peft.load_adapter(folder, PARAMS, NAMES)
    edited(folder, {"num_transformer_submodules": 1}, lambda t: {k: v[:, 1:] for k, v in t.items()})
    with pytest.raises(ValueError, match=r"has shape \(3, 15\), expected \(n, 16\)"):
        peft.load_adapter(folder, PARAMS, NAMES)
    with pytest.raises(ValueError, match="embed is trained beside a prompt"):
        save(tmp_path / "b", {**delta, **delta_of({"embed": lora.Full()})})


def test_whole_modules_of_a_foreign_model(tmp_path):
    """Kernels by heads, with biases by heads: PEFT's are matrices and vectors."""
    params = {"q": cases.normal(0, 2, 6, 2, 3), "q_bias": cases.normal(1, 2, 2, 3),
              "o": cases.normal(2, 2, 2, 3, 6)}  # fmt: skip
    names = {"q": "model.layers.{}.q_proj", "q_bias": "model.layers.{}.q_proj.bias",
             "o": "model.layers.{}.o_proj"}  # fmt: skip
    layouts = {"q": lora.Layout(contracted=(-3,), output=(-2, -1)),
               "o": lora.Layout(contracted=(-3, -2), output=(-1,))}  # fmt: skip
    delta = cases.llama_delta(params, {"o": lora.LoRA(rank=1), "q": lora.Full()}, layouts=layouts)
    peft.save_adapter(tmp_path, delta, params, names, layouts=layouts)
    tensors = load_file(tmp_path / FILE)
    assert tensors["base_model.model.model.layers.1.q_proj.weight"].shape == (6, 6)
    np.testing.assert_array_equal(
        tensors["base_model.model.model.layers.1.q_proj.bias"], params["q_bias"][1].reshape(-1)
    )
    back = peft.load_adapter(tmp_path, params, names, layouts=layouts)
    cases.assert_close(back.pop("q_bias").delta, jnp.zeros_like(params["q_bias"]))
    cases.assert_close(back, delta)


MODULES = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(3) for n in "qkv"]


@pytest.mark.parametrize(("expression", "count"), [
    (r".*(?:q|v)_proj", 6), (r"model\.layers\.\d{1,2}\.(?!self_attn\.q).*", 6),
    (r"(?i:.*K_PROJ)", 3),
    (r"(?:model|layers|\.|\d)+self_attn\.(?P<n>[qk])_proj", 6), (r".*(?<=q)_proj", 3),
    (r"model\.layers\.(\d)\.self_attn\.[a-z]_proj", 9), (r"(a+)+$", 0), (r".*[[:alpha:]]", 0),
])  # fmt: skip
def test_patterns_match_as_they_do_in_python(expression, count):
    (found,) = matching("x", [expression], MODULES)
    assert len(found) == count


@pytest.mark.sampled
@pytest.mark.parametrize("expression", [
    r"(?:[a-z_.0-9]+)+!", r"(.|.)(.|.)" * 20 + "!", "a?" * 5 + r"(\w+\s?)+\.(\w+\W?)+!",
    r"(.*)*\1!",
    ".*" * 60 + "!", r"(?:.?){60}!",
])  # fmt: skip
def test_a_pattern_that_takes_for_ever_ends(expression, monkeypatch):
    monkeypatch.setattr("lora_jax.interop.peft.patterns._SECONDS", 1)
    start = time.monotonic()
    try:
        assert matching("x", [expression], MODULES) == [set()]
    except ValueError as error:
        assert "takes more than 1 s" in str(error)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "expression", ["(", "a{2}{3}{", "(?P<x", "[", "*", "(" * 5000, r"(?<=a+)b"]
)
def test_what_is_no_pattern(expression):
    with pytest.raises(ValueError, match="x: expected names of modules, or regular expressions"):
        matching("x", [expression, "(?:a)"], MODULES)
