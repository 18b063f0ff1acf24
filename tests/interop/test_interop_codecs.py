"""A method's PEFT format is one value: the registry of codecs, and what follows from one."""

import dataclasses
import json
import re

import cases
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.interop import peft
from lora_jax.interop.peft import codecs
from lora_jax.interop.peft.codec import Codec
from lora_jax.interop.verify.coverage import AdapterFile, Places
from lora_jax.methods import AdaLoRANode, IA3InputNode, LoRANode, LowRank, VeRANode

CONFIG, PARAMS, TOKENS = cases.llama_case()
NAMES = peft.model_names(CONFIG)
LORA = codecs.codec_of("x", {"peft_type": "LORA"})
NODES = {
    "lora": {"q_proj": lora.LoRA(rank=2)},
    "ia3": {"k_proj": lora.IA3(), "down_proj": lora.IA3(scales="input")},
    "vera": {"q_proj|v_proj": lora.VeRA(rank=4)},
    "adalora": {"o_proj": lora.AdaLoRA(total_steps=9, rank=3, target_rank=2)},
    "prompt": {"embed": lora.Prompt(length=3)},
    "prefix": {"k_proj": lora.Prefix(length=3)},
}


def a_codec(types, *nodes):
    return Codec(types=types, nodes=nodes, decode=LORA.decode, encode=LORA.encode)


TWICE = {
    "a type": (a_codec(("X", "P_TUNING"), VeRANode), a_codec(("P_TUNING",), LoRANode), "P_TUNING"),
    "a node": (a_codec(("X",), LoRANode, VeRANode), a_codec(("Y",), VeRANode), "VeRANode"),
    "a subclass": (a_codec(("X",), LowRank), a_codec(("Y",), LoRANode), "LoRANode"),
    "both": (a_codec(("X",), VeRANode), a_codec(("X",), AdaLoRANode, VeRANode), "VeRANode, X"),
}


@pytest.mark.parametrize("name", TWICE)
def test_two_codecs_for_one_type_or_node_are_refused(name):
    one, other, what = TWICE[name]
    for pair in ((one, other), (other, one)):
        with pytest.raises(ValueError, match=f"^{what} has two codecs, ") as e:
            codecs.checked((a_codec(("Z",), IA3InputNode), *pair))
        for codec in pair:
            assert str(codec) in str(e.value)


def test_the_registry_has_each_type_once():
    assert codecs.checked(codecs.CODECS) == codecs.CODECS
    with pytest.raises(ValueError, match="has two codecs"):
        codecs.checked((*codecs.CODECS, codecs.CODECS[0]))


@pytest.mark.parametrize("found", [None, "LOKR", ["LORA"], "lora"])
def test_a_type_without_a_codec(found):
    with pytest.raises(ValueError, match=r"^here: peft_type .* is not supported; supported: LORA,"):
        codecs.codec_of("here", {"peft_type": found})


@pytest.mark.sampled
@pytest.mark.parametrize("name", NODES)
def test_every_tensor_has_its_place_by_the_codec(name, tmp_path):
    """What a file holds is found again without a list of names of tensors."""
    delta = cases.llama_delta(PARAMS, NODES[name])
    peft.save_adapter(tmp_path, delta, PARAMS, NAMES, num_kv_heads=CONFIG.num_kv_heads)
    file = AdapterFile.read(tmp_path)
    codec = codecs.codec_of("x", file.config)
    assert file.config["peft_type"] == codec.types[0]
    assert ("target_modules" in file.config) == codec.in_layers
    own = {name for name in load_file(tmp_path / "adapter_model.safetensors") if name in codec.own}
    assert own == set(codec.own)
    assert file.placed_in(Places.of(PARAMS, NAMES, {}, ())) == len(file.tensors)
    other = {path: name.replace("layers", "blocks") for path, name in NAMES.items()}
    assert file.placed_in(Places.of(PARAMS, other, {}, ())) == len(own)


@pytest.mark.parametrize("name", ["ia3", "vera", "adalora"])
def test_tables_are_linear_layers_to_lora_alone(name, tmp_path):
    """PEFT would refuse the file."""
    (method, *_) = NODES[name].values()
    delta = cases.llama_delta(PARAMS, {"embed|q_proj": method})
    with pytest.raises(ValueError, match=r"embed: PEFT has no (IA3|VeRA|AdaLoRA) of an embedding"):
        peft.save_adapter(tmp_path / "a", delta, PARAMS, NAMES)
    assert not (tmp_path / "a").exists()


OF_ANOTHER = {
    "lora": ({"bias": "vera_only"}, "bias is 'vera_only', expected one of none, all, lora_only"),
    "vera": ({"bias": "lora_only"}, "bias is 'lora_only', expected one of none, all, vera_only"),
    "adalora": ({"rank_pattern": {"q": 3}}, "rank_pattern is .*expected an object of lists of"),
}


@pytest.mark.parametrize("name", OF_ANOTHER)
def test_values_are_those_of_the_type(name, tmp_path):
    changed, message = OF_ANOTHER[name]
    peft.save_adapter(tmp_path, cases.llama_delta(PARAMS, NODES[name]), PARAMS, NAMES)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match=message):
        peft.load_adapter(tmp_path, PARAMS, NAMES)


@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_a_delta_that_adapts_nothing_has_no_file(name, tmp_path):
    delta = cases.llama_delta(PARAMS, NODES[name])
    (leaf,) = delta["layers"]["attn"]
    node = delta["layers"]["attn"][leaf]
    node = dataclasses.replace(node, scale=jnp.zeros_like(node.scale))
    with pytest.raises(ValueError, match=re.escape("adapts nothing: every layer's scale is zero")):
        peft.save_adapter(tmp_path / "a", {"layers": {"attn": {leaf: node}}}, PARAMS, NAMES)


def test_tensors_of_another_method_are_named(tmp_path):
    peft.save_adapter(tmp_path, cases.llama_delta(PARAMS, NODES["lora"]), PARAMS, NAMES)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    file.unlink()
    save_file(whole | {"base_model.vera_A": next(iter(whole.values()))}, file)
    with pytest.raises(ValueError, match="base_model.vera_A belongs to VERA, not to LORA"):
        peft.load_adapter(tmp_path, PARAMS, NAMES)
