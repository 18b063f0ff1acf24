"""Adapters that start from the weight: PiSSA, OLoRA, LoftQ, and the way back to a plain one."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, assert_equal, moved
from test_protocol_weights import Int8, quantized

import lora_jax as lora
from lora_jax.methods import LoRANode

STARTS = ["pissa", "pissa_niter_4", "olora"]
PARAMS = {"layers": {"q_proj": cases.normal(0, 2, 12, 9)}, "out": cases.normal(1, 9, 7)}
TARGETS = ("q_proj", "out")
KEY = jax.random.key(0)


def made(init, params=PARAMS, **kwargs):
    kwargs = {"rank": 3, "alpha": 6.0} | kwargs
    method = lora.LoRA(init=init, **kwargs)
    return jax.jit(lambda p: lora.lora_transform(p, method, targets=TARGETS, key=KEY))(params)


@pytest.mark.parametrize("init", STARTS)
def test_the_adapted_model_starts_as_the_base(init):
    base, delta = made(init)
    assert np.abs(base["out"] - PARAMS["out"]).max() > 0.1
    assert_close(lora.merge(base, delta), PARAMS, atol=2e-6)


def test_pissa_takes_the_leading_triplets():
    base, delta = made("pissa")
    for matrix, node in ((PARAMS["layers"]["q_proj"][1],
                          jax.tree.map(lambda x: x[1], delta["layers"]["q_proj"])),
                         (PARAMS["out"], delta["out"])):  # fmt: skip
        u, s, vt = np.linalg.svd(np.asarray(matrix), full_matrices=False)
        assert_close(node.update(matrix.shape), u[:, :3] * s[:3] @ vt[:3], rtol=1e-4, atol=1e-5)
        assert_close(jnp.linalg.norm(node.a, axis=0), np.sqrt(s[:3] / 2), rtol=1e-4)
        assert_close(jnp.linalg.norm(node.b, axis=1), np.sqrt(s[:3] / 2), rtol=1e-4)


def test_fast_pissa_comes_close():
    """To the smallest rest that any factors of the rank leave."""
    exact, fast = (made(init)[0]["out"] for init in ("pissa", "pissa_niter_4"))
    assert 1 <= np.linalg.norm(fast) / np.linalg.norm(exact) < 1.01


def test_olora_takes_leading_rows_and_columns_of_qr():
    base, delta = made("olora")
    q, r = np.linalg.qr(np.asarray(PARAMS["out"]).T)
    assert_close(delta["out"].a, r[:3].T, rtol=1e-4, atol=1e-5)
    assert_close(delta["out"].b, q[:, :3].T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_trained_one_is_a_plain_adapter_of_the_original_base(init):
    base, start = made(init)
    trained = moved(start)
    plain = lora.as_plain_lora(trained, start)
    assert plain["out"].rank == 6
    assert_close(lora.merge(PARAMS, plain), lora.merge(base, trained), atol=5e-6)


def test_ranks_of_their_own_for_each_layer():
    method = {"q_proj": lora.LoRA(init="pissa", rank=(2, 0))}
    base, delta = lora.lora_transform(PARAMS, method, key=KEY)
    assert_equal(base["layers"]["q_proj"][1], PARAMS["layers"]["q_proj"][1])
    assert_close(lora.merge(base, delta), PARAMS, atol=2e-6)
    assert np.linalg.matrix_rank(delta["layers"]["q_proj"].update((2, 12, 9))).tolist() == [2, 0]


def test_more_axes():
    params = {"kernel": PARAMS["layers"]["q_proj"][0].reshape(12, 3, 3)}
    layouts = {"kernel": lora.Layout(contracted=(-3,), output=(-2, -1))}
    base, delta = lora.lora_transform(params, lora.LoRA(init="pissa", rank=3), key=KEY,
                                      layouts=layouts)  # fmt: skip
    assert delta["kernel"].b.shape == (3, 3, 3)
    assert_close(lora.merge(base, delta), params, atol=2e-6)


class Again(Int8):
    """With a way to quantise a dense weight again."""

    def requantized(self, dense):
        again = quantized(dense)
        return Again(again.codes, again.scale)


jax.tree_util.register_dataclass(Again, ["codes", "scale"], [])


def again(leaf):
    return Again(quantized(leaf).codes, quantized(leaf).scale)


def test_a_quantised_base_keeps_its_format():
    base = {"layers": {"q_proj": again(PARAMS["layers"]["q_proj"])}, "out": PARAMS["out"]}
    rest, delta = made("pissa", base)
    assert isinstance(rest["layers"]["q_proj"], Again)
    merged = lora.merge(rest, delta)["layers"]["q_proj"]
    step = float(rest["layers"]["q_proj"].scale.max())
    assert np.abs(merged - base["layers"]["q_proj"].dense()).max() <= 0.51 * step
    plain = {"layers": {"q_proj": quantized(PARAMS["layers"]["q_proj"])}, "out": PARAMS["out"]}
    with pytest.raises(ValueError, match="Int8 has no way to quantise"):
        made("pissa", plain)


def coarse(leaf):
    """Int8 in name, with five levels."""
    scale = jnp.abs(leaf).max(axis=-2, keepdims=True) / 2
    return Coarse(jnp.round(leaf / scale).astype(jnp.int8), scale)


class Coarse(Int8):
    def requantized(self, dense):
        return coarse(dense)


jax.tree_util.register_dataclass(Coarse, ["codes", "scale"], [])


def test_loftq_approaches_the_original_weights():
    base = {"layers": {"q_proj": coarse(PARAMS["layers"]["q_proj"])}, "out": PARAMS["out"]}
    _, delta = made("kaiming", base)

    def error(base, delta):
        return float(jnp.linalg.norm((lora.merge(base, delta)["layers"]["q_proj"]
                                      - PARAMS["layers"]["q_proj"]).reshape(-1)))  # fmt: skip

    errors = [error(base, delta)]
    for iterations in (1, 2, 5):
        found = lora.loftq_start(PARAMS, base, delta, iterations=iterations)
        assert isinstance(found[0]["layers"]["q_proj"], Coarse)
        assert_equal(found[1]["out"], delta["out"])  # its base is an array
        errors.append(error(*found))
    # What is left of the error of quantisation is best among all deltas of the rank.
    rest = np.asarray(PARAMS["layers"]["q_proj"] - base["layers"]["q_proj"].dense())
    singular = np.linalg.svd(rest, compute_uv=False)
    assert np.isclose(errors[1], np.sqrt((singular[:, 3:] ** 2).sum()), rtol=1e-4)
    assert errors[0] > errors[1] > errors[2] > errors[3]


def test_loftq_wants_the_original_of_every_adapted_weight():
    base = {"layers": {"q_proj": coarse(PARAMS["layers"]["q_proj"])}, "out": PARAMS["out"]}
    _, delta = made("kaiming", base)
    with pytest.raises(ValueError, match="layers/q_proj: the delta adapts it, and params, the ori"):
        lora.loftq_start({"out": PARAMS["out"]}, base, delta)


def test_other_nodes_pass_through():
    base, delta = lora.lora_transform(PARAMS, lora.Full(), targets="out", key=KEY)
    assert lora.as_plain_lora(delta, delta)["out"] is delta["out"]
    assert lora.loftq_start(PARAMS, base, delta)[1]["out"] is delta["out"]
    assert lora.eva_start(delta, {})["out"] is delta["out"]
    assert not isinstance(delta["out"], LoRANode)


def test_dora_keeps_its_base():
    with pytest.raises(ValueError, match=r"DoRA\(init='pissa'\): expected one of"):
        lora.DoRA(init="pissa")
