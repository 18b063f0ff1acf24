"""bitsandbytes' 4-bit checkpoints: the weights keep their bits."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_checkpoints
import small_llamas

import lora_jax as lora
from lora_jax.interop import Pretrained, load_huggingface
from lora_jax.quant import to_bitsandbytes

CONFIG = small_llamas.VARIANTS["llama3_1"] | {"intermediate_size": 128}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}
STATE = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Pretrained:
    folder, weights = tmp_path_factory.mktemp("plain"), small_llamas.draw_weights(CONFIG)
    return load_huggingface(small_checkpoints.write_huggingface(folder, CONFIG, weights))


def tensors_of(base: dict) -> dict[str, np.ndarray]:
    weights = small_llamas.draw_weights(CONFIG)
    for part, names in (("attn", "q k v o"), ("mlp", "gate up down")):
        for name in names.split():
            stacked = base["layers"][part][f"{name}_proj"]
            for i in range(2):
                layer = jax.tree.map(lambda x: x[i], stacked)  # noqa: B023
                module = "self_attn" if part == "attn" else "mlp"
                key = f"model.layers.{i}.{module}.{name}_proj.weight"
                del weights[key]
                weights |= to_bitsandbytes(layer, key)
    return weights


def write(folder: Path, weights: dict) -> Path:
    config = CONFIG | {"quantization_config": BITSANDBYTES}
    return small_checkpoints.write_huggingface(folder, config, weights)


@pytest.mark.sampled
@pytest.mark.parametrize("double_quant", [False, True])
def test_every_bit_is_kept(tmp_path, plain, double_quant):
    base = lora.quantize(plain.params, "nf4", double_quant=double_quant)
    loaded = load_huggingface(write(tmp_path / "packed", tensors_of(base))).params
    assert jax.tree.structure(loaded) == jax.tree.structure(base)
    jax.tree.map(np.testing.assert_array_equal, loaded, base)
    half = load_huggingface(tmp_path / "packed", dtype=jnp.bfloat16).params
    assert half["layers"]["mlp"]["up_proj"].dtype == half["embed"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [64, 128]}, r"'model\.layers\.0\.mlp\.up_proj\.weight' has shape \(64, 128\)"),
        ({"shape": [1 << 40, 64]}, r"nf4 is corrupt: expected JSON"),
        ({"blocksize": None}, r"nf4 is corrupt: expected JSON"),
        ({"dtype": "os.system"}, r"nf4 is corrupt: expected JSON"),
        ({"nested_offset": "x"}, r"nf4 is corrupt: expected JSON"),
        ({"blocksize": 32}, r"up_proj\.weight.absmax holds 128 entries of uint8, expected 256"),
    ],
)
def test_hostile_states(tmp_path, plain, changes, message):
    weights = tensors_of(lora.quantize(plain.params, "nf4"))
    state = json.loads(weights[STATE].tobytes()) | changes
    weights[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    with pytest.raises(ValueError, match=message):
        load_huggingface(write(tmp_path / "packed", weights))


def test_some_layers_in_floats(tmp_path, plain):
    weights = tensors_of(lora.quantize(plain.params, "nf4"))
    name = STATE.partition(".quant_state")[0]
    weights = {key: value for key, value in weights.items() if not key.startswith(name)}
    weights[name] = small_llamas.draw_weights(CONFIG)[name]
    with pytest.raises(ValueError, match=r"of layers/mlp/up_proj, 1 of 2 tensors are in 4 bits"):
        load_huggingface(write(tmp_path / "packed", weights))
