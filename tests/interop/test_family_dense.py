"""Each dense family, and each change of a Llama's, computes what transformers recorded, in full
rows, packed rows and a cache."""

import dataclasses
from pathlib import Path

import dense_families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_checkpoints
from dense_families import CASES, FAMILIES, GREEDY, NOT_GENERATED, PROMPT, TOKENS
from jax.sharding import PartitionSpec

import lora_jax as lora
from lora_jax import models, parallel
from lora_jax.interop import load_gguf, load_huggingface, save_gguf, save_huggingface
from lora_jax.interop import peft as ours
from lora_jax.interop.huggingface_config import config_from_huggingface
from lora_jax.models import decoder
from lora_jax.models.generate import generate
from lora_jax.transform import delta_nodes

B, T = TOKENS.shape
VARIANTS = [name for name in CASES if name not in FAMILIES]
EACH = [*FAMILIES, *(pytest.param(name, marks=pytest.mark.sampled) for name in VARIANTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made: dict[str, Path] = {}

    def write(name):
        if name not in made:
            made[name] = dense_families.write(tmp_path_factory.mktemp("family") / "m", name)
        return made[name]

    return write


def computed(params, config):
    """Logits `[B, T, V]` of the texts in full rows, packed into one, and through a cache."""
    tokens = jnp.asarray(TOKENS)

    @jax.jit
    def each(params):
        head = models.output_head(params)
        packed = models.forward(
            params,
            tokens.reshape(1, -1),
            config,
            positions=jnp.tile(jnp.arange(T), B)[None],
            segment_ids=jnp.repeat(jnp.arange(B), T)[None],
        )
        cache, parts = decoder.start_cache(params, config, B, T), []
        for piece in jnp.split(tokens, [11, 12], axis=1):
            hidden, cache = decoder.extend(params, piece, cache, config)
            parts.append(config.family.read_out(hidden, head, config))
        whole = models.forward(params, tokens, config)
        return whole, packed.reshape(whole.shape), jnp.concatenate(parts, axis=1)

    return [np.asarray(logits) for logits in each(params)]


def greedy(model):
    lengths = jnp.array([PROMPT.shape[1]])
    options = {"max_new_tokens": GREEDY, "eos_id": -1}
    found = generate(model.params, jnp.asarray(PROMPT), lengths, model.config, **options)
    return found[0].tolist()


def relative(found, expected):
    return np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", EACH)
def test_logits_recorded_from_transformers(folder, name):
    model = load_huggingface(folder(name))
    whole, packed, cached = computed(model.params, model.config)
    recorded = dense_families.golden(name)
    assert relative(whole[:, -1, :6], recorded["logits"]) <= 1e-4
    assert relative(packed, whole) <= 1e-4 and relative(cached, whole) <= 1e-4
    if name in FAMILIES:
        assert greedy(model) == recorded["tokens"]


@pytest.mark.parametrize("name", CASES)
def test_folders_and_ggufs_come_back(folder, tmp_path, name):
    """Of a GGUF's own, the numbers that float16 holds; a family without one says so."""
    model = load_huggingface(folder(name))
    half = jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), model.params)
    anew = dataclasses.replace(model, source="none", params=half)
    save_huggingface(tmp_path / "out", anew)
    again = load_huggingface(tmp_path / "out")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, half)
    if reason := dense_families.NO_GGUF.get(name):
        with pytest.raises(ValueError, match=reason):
            save_gguf(tmp_path / "m.gguf", anew)
        return
    save_gguf(tmp_path / "m.gguf", anew)
    again = load_gguf(tmp_path / "m.gguf")
    expected = model.config
    if name in ("mistral window", "phi3 window"):  # which llama.cpp does not slide
        expected = dataclasses.replace(expected, context_length=7)
    assert again.config == expected
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), again.params, half)


@pytest.mark.parametrize("name", FAMILIES)
def test_adapted_it_computes_what_merged_it_computes(folder, name):
    model = load_huggingface(folder(name))
    base, delta = lora.lora_transform(model.params, lora.LoRA(rank=2), key=jax.random.key(0))
    delta = jax.tree.map(lambda x: x + 0.05, delta)
    forward = jax.jit(lambda weights: models.forward(weights, jnp.asarray(TOKENS), model.config))
    assert relative(forward(lora.bind(base, delta)), forward(lora.merge(base, delta))) <= 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_random_params_have_the_tree_of_a_checkpoint(folder, name):
    model = load_huggingface(folder(name))
    drawn = jax.eval_shape(lambda key: models.init(model.config, key=key), jax.random.key(0))
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, model.params)


@pytest.mark.parametrize("name", CASES)
def test_rules_name_every_leaf(folder, name):
    """Of sharding, and of targets: a preset finds fused matrices too."""
    config = load_huggingface(folder(name)).config
    params = jax.eval_shape(lambda key: models.init(config, key=key), jax.random.key(0))
    specs = parallel.match_specs(params, config.family.sharding)
    assert specs["layers/mlp/down_proj"] == PartitionSpec(None, "tensor", "fsdp")
    _, delta = jax.eval_shape(
        lambda params: lora.lora_transform(
            params, lora.LoRA(rank=2), targets=("attention", "mlp"), key=jax.random.key(0)
        ),
        params,
    )
    matrices = {leaf.path for leaf in config.family.parameters(config) if len(leaf.shape) == 2}
    assert delta_nodes(delta).keys() == matrices - {"embed", "lm_head"}


def test_shapes_that_people_name():
    for shape in models.SHAPES.values():
        leaves = shape.family.parameters(shape)
        assert len({leaf.path for leaf in leaves}) == len(leaves)
        assert len(shape.ropes) == shape.num_layers


REFUSED = [
    ("gemma3", {"attn_logit_softcapping": 30.0}, "unknown attn_logit_softcapping=30.0"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "expected an object for full_attent"),
    ("gemma3", {"rope_parameters": {"full_attention": {}, "other": {}}}, "unknown other in rope_p"),
    (
        "gemma3",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "the RoPE of sliding_attention is scaled",
    ),
    ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_theta": 7.0}}}, "contradicts itse"),
    ("olmo2", {"clip_qkv": 8.0}, "unknown clip_qkv=8.0"),
    ("granite", {"num_local_experts": 4}, "unknown num_local_experts=4"),
    ("granite", {"residual_multiplier": "a"}, "residual_multiplier is 'a', expected a positive"),
    ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\], expected 5 times 1"),
    ("smollm3", {"layer_types": ["sliding_attention"] * 5}, "without a sliding_window in use"),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaling 'linear' in a phi3"),
    ("phi3", {"embd_pdrop": 0.1}, "embd_pdrop=0.1"),
    ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, expected at most 1"),
    ("phi3", {"partial_rotary_factor": 0.4}, "rope_dims=3 must be even"),
    ("phi3 longrope", {"partial_rotary_factor": 1.0}, "has 2 numbers, expected 4"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_would_compute_something_else_is_refused(tmp_path, name, changes, message):
    small_checkpoints.write_json(tmp_path / "config.json", CASES[name] | changes)
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        config_from_huggingface(tmp_path)


def test_windows_and_layers_that_differ():
    tiny = models.SHAPES["tiny"]
    with pytest.raises(ValueError, match="windows has 3 entries for 2 layers"):
        dataclasses.replace(tiny, windows=(4, None, 4))
    with pytest.raises(ValueError, match="nope has 36 entries for 2 layers"):
        dataclasses.replace(models.SHAPES["smollm3-3b"], num_layers=2)


def test_gguf_names_and_layouts_for_another_reader(folder, tmp_path):
    """transformers reads fused matrices, and a Gemma's norms, as we store them."""
    torch_and_transformers()
    import torch
    import transformers

    for name in ("phi3", "gemma2 heads", "gemma3 heads"):
        model = load_huggingface(folder(name))
        save_gguf(tmp_path / f"{name}.gguf", model)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=f"{name}.gguf", dtype=torch.float32
        ).eval()
        found = load_gguf(tmp_path / f"{name}.gguf")
        logits = models.forward(found.params, jnp.asarray(TOKENS), found.config)
        assert relative(logits, dense_families.their_logits(theirs, TOKENS)) <= 1e-4, name


def torch_and_transformers():
    pytest.importorskip("torch", reason="requirements-parity.txt is not installed")
    pytest.importorskip("transformers", reason="requirements-parity.txt is not installed")


@pytest.mark.parametrize("name", CASES)
def test_transformers_agrees(folder, tmp_path, name):
    """On logits and greedy tokens, and on a folder that is written anew."""
    torch_and_transformers()
    model = load_huggingface(folder(name))
    theirs = dense_families.their_model(folder(name))
    logits = dense_families.their_logits(theirs, TOKENS)
    whole, packed, cached = computed(model.params, model.config)
    for found in (whole, packed, cached):
        assert relative(found, logits) <= 1e-4
    if name not in NOT_GENERATED:
        assert greedy(model) == dense_families.their_tokens(theirs)
    save_huggingface(tmp_path / "out", dataclasses.replace(model, source="none"))
    written = dense_families.their_model(tmp_path / "out")
    assert relative(dense_families.their_logits(written, TOKENS), logits) <= 1e-6


@pytest.mark.mixed_dtypes
@pytest.mark.filterwarnings("ignore")  # peft's own use of transformers
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", [*FAMILIES, "biases"])
def test_adapters_of_peft_both_ways(folder, tmp_path, name, method):
    """On all linear layers: theirs in ours, with equal logits, and ours in theirs."""
    torch_and_transformers()
    peft = pytest.importorskip("peft", reason="requirements-parity.txt is not installed")
    import torch

    model = load_huggingface(folder(name))
    names = ours.model_names(model.config)
    options = {"r": 3, "lora_alpha": 5, "use_dora": method == "dora", "init_lora_weights": False}
    theirs = peft.get_peft_model(
        dense_families.their_model(folder(name)),
        peft.LoraConfig(**options, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for key, leaf in theirs.named_parameters():
            if "lora_" in key:
                leaf.add_(0.05 * torch.randn_like(leaf))
    theirs.save_pretrained(tmp_path / "theirs")
    delta = ours.load_adapter(tmp_path / "theirs", model.params, names)
    weights = lora.bind(model.params, delta)
    logits = models.forward(weights, jnp.asarray(TOKENS), model.config)
    assert relative(logits, dense_families.their_logits(theirs.eval(), TOKENS)) <= 1e-4

    kinds = {"lora": lora.LoRA(rank=2), "dora": lora.DoRA(rank=2)}
    base, delta = lora.lora_transform(model.params, kinds[method], key=jax.random.key(0))
    trains = lora.trainable_mask(delta)
    delta = jax.tree.map(lambda x, moves: x + 0.05 if moves else x, delta, trains)
    ours.save_adapter(tmp_path / "ours", delta, model.params, names)
    again = ours.load_adapter(tmp_path / "ours", model.params, names)
    jax.tree.map(np.testing.assert_array_equal, again, delta)
    theirs = peft.PeftModel.from_pretrained(
        dense_families.their_model(folder(name)), tmp_path / "ours"
    )
    logits = models.forward(lora.bind(base, delta), jnp.asarray(TOKENS), model.config)
    assert relative(logits, dense_families.their_logits(theirs.eval(), TOKENS)) <= 1e-4
