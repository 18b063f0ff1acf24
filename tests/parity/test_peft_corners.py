"""The corners of PEFT's format, as files in both directions, with equal logits: tied bases, biases,
modules saved whole, rows of tables, tables saved beside."""

import dataclasses
import functools
import warnings

import cases
import family_cases
import jax
import numpy as np
import pytest
import small_llamas
from test_peft import config_of

import lora_jax as lora
from lora_jax.interop import peft as ours
from lora_jax.interop.model_tensors import assemble
from lora_jax.models import llama
from lora_jax.paths import nest
from lora_jax.transform import delta_nodes

peft = pytest.importorskip("peft", reason="needs requirements-parity.txt")
import torch  # noqa: E402
import transformers  # noqa: E402
from logits import relative, their_logits  # noqa: E402

TOKENS = family_cases.TOKENS
pytestmark = pytest.mark.mixed_dtypes
LM = {"task_type": "CAUSAL_LM"}
Q = {"r": 2, "target_modules": ["q_proj"]}
TIED, UNTIED, BIASED = "llama3_2", "llama3_1", "qwen2"


def lora_of(*targets, **more):
    return "LoraConfig", {"r": 2, "target_modules": list(targets), **more}


def adalora_of(*targets, **more):
    schedule = {"init_r": 4, "target_r": 2, "total_step": 10}
    return "AdaLoraConfig", {**schedule, "target_modules": list(targets), **more}


def ia3_of(*targets, inputs=(), **more):
    targets = {"target_modules": list(targets), "feedforward_modules": list(inputs)}
    return "IA3Config", {**targets, **more}


TIE = {"ensure_weight_tying": True}
# Of each: the model, PEFT's config, and whether our base must be untied for it.
THEIRS = {
    "table": (TIED, lora_of("embed_tokens", "q_proj"), True),
    "tied table": (TIED, lora_of("embed_tokens", "q_proj", **TIE), False),
    # Which PEFT ties by the pattern of a head, and not by that of a table.
    "table, tied in vain": (TIED, ("LoraConfig", {
        "r": 2, "target_modules": r".*\.(embed_tokens|q_proj)", **TIE}), True),
    "tied head, by a pattern": (TIED, ("LoraConfig", {
        "r": 2, "target_modules": r"lm_head|.*\.q_proj", **TIE}), False),
    "tied head": (TIED, lora_of("lm_head", "q_proj", **TIE), False),
    "head": (TIED, lora_of("lm_head", "q_proj"), True),
    "table and head": (TIED, lora_of("lm_head", "embed_tokens"), True),
    "saved table": (TIED, lora_of("q_proj", modules_to_save=["embed_tokens"]), True),
    "tied saved table": (TIED, lora_of("q_proj", modules_to_save=["embed_tokens"], **TIE), False),
    "saved head": (TIED, lora_of("q_proj", modules_to_save=["lm_head"]), True),
    "tied saved head": (TIED, lora_of("q_proj", modules_to_save=["lm_head"], **TIE), False),
    "saved both": (TIED, lora_of("q_proj", modules_to_save=["lm_head", "embed_tokens"]), True),
    "saved table of ia3": (TIED, ia3_of("k_proj", modules_to_save=["embed_tokens"]), True),
    "table and head of dora": (TIED, lora_of("lm_head", "embed_tokens", use_dora=True), True),
    "head of adalora": (TIED, adalora_of("lm_head", "q_proj"), True),
    "head of ia3": (TIED, ia3_of("lm_head", "k_proj"), True),
    "head of ia3's input": (TIED, ia3_of("lm_head", "k_proj", inputs=["lm_head"]), True),
    "head of vera": (TIED, ("VeraConfig", {"r": 4, "target_modules": ["lm_head"]}), True),
    "rows": (TIED, lora_of("q_proj", trainable_token_indices=[1, 5]), False),
    "rows, tied": (TIED, lora_of("q_proj", trainable_token_indices=[1, 5], **TIE), False),
    "rows of the head": (TIED, lora_of("q_proj", trainable_token_indices={"lm_head": [2]}), True),
    "rows of each": (TIED, lora_of(
        "q_proj", trainable_token_indices={"embed_tokens": [1, 5], "lm_head": [2]}), True),
    "the same rows": (TIED, lora_of(
        "q_proj", trainable_token_indices={"embed_tokens": [1, 5], "lm_head": [1, 5]}), False),
    "untied table": (UNTIED, lora_of("embed_tokens", "q_proj"), False),
    "untied head": (UNTIED, lora_of("lm_head", "q_proj", use_rslora=True), False),
    "untied head, tied in vain": (UNTIED, lora_of("lm_head", "embed_tokens", **TIE), False),
    "untied head of dora": (UNTIED, lora_of("lm_head", "embed_tokens", use_dora=True), False),
    "untied head of adalora": (UNTIED, adalora_of("lm_head", "q_proj"), False),
    "untied head of ia3": (UNTIED, ia3_of("lm_head", "k_proj"), False),
    "untied head of vera": (UNTIED, ("VeraConfig", {"r": 4, "target_modules": ["lm_head"]}), False),
    "untied rows": (UNTIED, lora_of("q_proj", trainable_token_indices=[1, 5]), False),
    "untied rows of each": (UNTIED, lora_of(
        "q_proj", trainable_token_indices={"embed_tokens": [1, 5], "lm_head": [2]}), False),
    "saved norms": (UNTIED, lora_of("q_proj", modules_to_save=["norm", "mlp"]), False),
    "prompt and head": (UNTIED, ("PromptTuningConfig", {
        "num_virtual_tokens": 3, "modules_to_save": ["lm_head", "norm"], **LM}), False),
    "prefix and head": (UNTIED, ("PrefixTuningConfig", {
        "num_virtual_tokens": 3, "modules_to_save": ["lm_head"], **LM}), False),
    "p-tuning": (UNTIED, ("PromptEncoderConfig", {
        "num_virtual_tokens": 3, "encoder_hidden_size": 8, **LM}), False),
    "p-tuning, lstm": (UNTIED, ("PromptEncoderConfig", {
        "num_virtual_tokens": 3, "encoder_hidden_size": 8,
        "encoder_reparameterization_type": "LSTM", **LM}), False),
    "no alpha": (UNTIED, adalora_of("q_proj", lora_alpha=0), False),
    "negative alpha": (UNTIED, adalora_of("q_proj", lora_alpha=-3), False),
    "alpha 0": (UNTIED, lora_of("q_proj", lora_alpha=0), False),
    "layers": (UNTIED, lora_of("q_proj", layers_to_transform=[1], layers_pattern="layers"), False),
    "one layer": (UNTIED, lora_of("q_proj", layers_to_transform=0), False),
    "excluded": (UNTIED, ("LoraConfig", {
        "r": 2, "target_modules": "all-linear", "exclude_modules": ["q_proj"]}), False),
    "excluded, by a pattern": (UNTIED, ("LoraConfig", {
        "r": 2, "target_modules": ["q_proj", "k_proj"],
        "exclude_modules": r".*\.1\..*k_proj"}), False),
    "patterns": (UNTIED, ("LoraConfig", {
        "r": 2, "target_modules": r"model\.layers\.\d{1,2}\.(?:self_attn|mlp)\.(?!k_)\w+_proj",
        "rank_pattern": {r"(?:q|v)_proj": 3, r"\w{4}_proj": 1},
        "alpha_pattern": {r"layers\.(?=0).*(?:v_proj)+": 5}}), False),
    "biases and ia3": (BIASED, ia3_of("q_proj", "k_proj", "v_proj", "down_proj",
                                      inputs=["down_proj"]), False),
    "biases and ia3's input": (BIASED, ia3_of("q_proj", "k_proj", inputs=["q_proj"]), False),
    "biases and ia3 beside a saved": (BIASED, ia3_of("q_proj", modules_to_save=["k_proj"]), False),
    "biases and lora": (BIASED, lora_of("q_proj", "down_proj", bias="lora_only"), False),
    "all biases": (BIASED, lora_of("q_proj", bias="all", use_dora=True), False),
    "biases of vera": (BIASED, ("VeraConfig", {
        "r": 4, "target_modules": ["q_proj"], "bias": "vera_only"}), False),
    "biases of adalora": (BIASED, adalora_of("q_proj", bias="all"), False),
    "biases of b": (BIASED, lora_of("q_proj", "k_proj", lora_bias=True), False),
    "biases and those of b": (BIASED, lora_of("q_proj", lora_bias=True, bias="lora_only"), False),
    "norms of heads": ("qwen3", lora_of("q_proj", modules_to_save=["norm"]), False),
    "another family": ("mistral", lora_of("lm_head", "o_proj", use_dora=True), False),
    "a saved module with a bias": (BIASED, lora_of("q_proj", modules_to_save=["k_proj"]), False),
}  # fmt: skip


@functools.cache
def base(variant):
    values = small_llamas.VARIANTS[variant]
    weights = small_llamas.draw_weights(values)
    config = config_of(values)
    config = dataclasses.replace(
        config,
        qkv_bias=values["model_type"] == "qwen2",
        qk_norm=values["model_type"] == "qwen3",
        head_dim=values.get("head_dim", config.head_dim),
    )
    params = assemble(config, "huggingface", weights.__getitem__, "float32")
    return params, config


def their_base(variant):
    values = small_llamas.VARIANTS[variant]
    config = transformers.AutoConfig.for_model(**values)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    weights = {k: torch.from_numpy(v) for k, v in small_llamas.draw_weights(values).items()}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model


def their_adapter(variant, kind, arguments):
    model = peft.get_peft_model(their_base(variant), getattr(peft, kind)(**arguments))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if hasattr(model.base_model, "vera_A"):
        trained["base_model.vera_A.default"] = model.base_model.vera_A["default"]
        trained["base_model.vera_B.default"] = model.base_model.vera_B["default"]
    for name, value in trained.items():
        value.data.add_(torch.from_numpy(family_cases.draw(name, tuple(value.shape))))
    return model


def our_logits(weights, config):
    return np.asarray(jax.jit(llama.forward, static_argnums=2)(weights, TOKENS, config))


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load(folder, variant, untied=False):
    params, config = base(variant)
    if untied:
        params, config = llama.untie(params, config)
    return ours.load_adapter(folder, params, ours.model_names(config)), params, config


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_loads_here_and_ours_goes_back(name, tmp_path):
    variant, (kind, arguments), untied = THEIRS[name]
    model = their_adapter(variant, kind, arguments)
    model.save_pretrained(tmp_path / "a")
    expected = their_logits(model, TOKENS)
    if untied:
        with pytest.raises(ValueError, match="untie"):
            load(tmp_path / "a", variant)
    delta, params, config = load(tmp_path / "a", variant, untied)
    assert relative(our_logits(lora.bind(params, delta), config), expected) < 1e-5
    if not kind.startswith("Pr"):
        assert relative(our_logits(lora.merge(params, delta), config), expected) < 1e-4
    if name == "alpha 0":
        return
    ours.save_adapter(
        tmp_path / "b", delta, params, ours.model_names(config), num_kv_heads=config.num_kv_heads
    )
    again = peft.PeftModel.from_pretrained(their_base(variant), tmp_path / "b")
    assert relative(their_logits(again, TOKENS), expected) < 1e-5
    back, *_ = load(tmp_path / "b", variant, untied)
    assert relative(our_logits(lora.bind(params, back), config), expected) < 1e-5


@pytest.mark.parametrize("variant", [TIED, UNTIED])
def test_tables_saved_because_they_were_asked_for(variant, tmp_path):
    model = their_adapter(variant, *lora_of("q_proj"))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    delta, params, config = load(tmp_path / "a", variant)
    assert list(delta) == ["layers"]
    found = our_logits(lora.bind(params, delta), config)
    assert relative(found, their_logits(model, TOKENS)) < 1e-5
    model.resize_token_embeddings(96)
    model.save_pretrained(tmp_path / "b", save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"has shape \(96, 64\)"):
        load(tmp_path / "b", variant)


@pytest.mark.parametrize("alpha", [6, 0])
def test_pruned_triplets(alpha, tmp_path):
    """Of which PEFT leaves out of the file what it masked, under the scale of all."""
    model = their_adapter(UNTIED, *adalora_of("q_proj", lora_alpha=alpha))
    kept = {0: [True, False, True, False], 1: [False, False, False, False]}
    pattern = {}
    for layer, mask in kept.items():
        name = f"model.layers.{layer}.self_attn.q_proj"
        module = model.get_submodule(f"base_model.model.{name}")
        module.lora_E["default"].data[~torch.tensor(mask)] = 0
        pattern[f"{name}.lora_E.default"] = mask
    model.peft_config["default"].rank_pattern = pattern
    expected = their_logits(model, TOKENS)
    model.save_pretrained(tmp_path)
    delta, params, config = load(tmp_path, UNTIED)
    assert relative(our_logits(lora.bind(params, delta), config), expected) < 1e-5


METHODS = {
    "lora": ({"o_proj": lora.LoRA(rank=2)}, None),
    "lora of q": ({"q_proj": lora.LoRA(rank=2)}, None),
    "dora": ({"o_proj": lora.DoRA(rank=2)}, None),
    "adalora": ({"q_proj": lora.AdaLoRA(total_steps=9, rank=3, target_rank=2)}, None),
    "vera": ({"q_proj": lora.VeRA(rank=4)}, None),
    "ia3": ({"q_proj|up_proj": lora.IA3(), "down_proj": lora.IA3(scales="input")}, None),
    "prompt": (lora.Prompt(length=3), "embed"),
    "prefix": (lora.Prefix(length=3), "k_proj"),
}
FULL = {
    "nothing": (), "a table": ("embed",), "norms": (".*norm",), "a weight": ("k_proj",),
    "a bias": ("k_bias",), "a layer": ("k_proj", "k_bias"), "its own bias": ("q_bias",),
    "biases": ("q_bias", "k_bias"), "an mlp": ("gate_proj", "v_proj"), "a head": ("lm_head",),
}  # fmt: skip
REFUSED = {("ia3", "its own bias"), ("ia3", "biases"), ("prompt", "a table")}


def delta_of(params, names, method, whole):
    """Of a method and `Full`, two deltas as one."""
    rules, targets = METHODS[method]
    delta = cases.llama_delta(params, rules, **({"targets": targets} if targets else {}))
    if method == "ia3":
        delta = ours.scale_biases(delta, names)
    if whole:
        full = cases.llama_delta(params, dict.fromkeys(whole, lora.Full()))
        delta = nest(delta_nodes(delta) | delta_nodes(full))
    return delta


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("method", METHODS)
def test_ours_with_whole_weights_loads_there(method, untied, tmp_path):
    """Over a Qwen2, which has biases and whose head is tied."""
    params, config = base(BIASED)
    if untied:
        params, config = llama.untie(params, config)
    names = ours.model_names(config)
    for i, (what, whole) in enumerate(FULL.items()):
        if what == "a head" and not untied:
            continue
        delta = delta_of(params, names, method, whole)
        folder = tmp_path / str(i)
        save = functools.partial(
            ours.save_adapter, folder, delta, params, names, num_kv_heads=config.num_kv_heads
        )
        if (method, what) in REFUSED:
            with pytest.raises(ValueError, match=r"PEFT"):
                save()
            assert not folder.exists()
            continue
        save()
        expected = our_logits(lora.bind(params, delta), config)
        theirs = peft.PeftModel.from_pretrained(their_base(BIASED), folder)
        assert relative(their_logits(theirs, TOKENS), expected) < 1e-5, what
        back = ours.load_adapter(folder, params, names)
        assert relative(our_logits(lora.bind(params, back), config), expected) < 1e-5, what
        theirs.save_pretrained(folder / "again")
        back = ours.load_adapter(folder / "again", params, names)
        assert relative(our_logits(lora.bind(params, back), config), expected) < 1e-5, what
