"""Meshes, rules, and where deltas of every method lie."""

import cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax import parallel, paths, training
from lora_jax.models import SHAPES, SHARDING, llama

PARAMS = {
    "layers": {"q_proj": jnp.zeros((2, 16, 32)), "down_proj": jnp.zeros((2, 32, 16))},
    "norm": jnp.zeros(16),
}
RULES = {"q_proj": P(None, "tensor"), "down_proj": P("tensor", "fsdp"), "norm": P()}


def specs_of(tree):
    return {path: sharding.spec for path, sharding in paths.flatten(tree).items()}


def test_a_mesh_has_all_axes_and_one_may_take_the_rest():
    mesh = parallel.make_mesh({"fsdp": -1, "tensor": 2})
    assert mesh.shape == {"arms": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
    mesh = parallel.mesh_of("tensor", sequence=2)
    assert mesh.shape == {"arms": 1, "fsdp": 1, "sequence": 2, "tensor": 4}


def test_a_delta_lies_as_its_weight_does():
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    specs = parallel.match_specs(PARAMS, RULES)
    assert specs["layers/q_proj"] == P(None, None, "tensor") and specs["norm"] == P(None)
    key = jax.random.key(0)
    _, delta = lora.lora_transform(PARAMS, lora.LoRA(rank=3), key=key)
    state = training.init_state(delta, optax.adam(1.0), seed=0)
    lying = specs_of(parallel.state_shardings(mesh, state, specs))
    factors = {
        "q_proj/a": P(None, None, None),
        "q_proj/b": P(None, None, "tensor"),
        "down_proj/a": P(None, "tensor", None),
        "down_proj/b": P(None, None, "fsdp"),
    }
    for name, expected in factors.items():
        found = [spec for path, spec in lying.items() if path.endswith(name)]
        assert found == [expected] * 3  # the delta, and Adam's two moments
    arms = specs_of(parallel.delta_shardings(mesh, lora.stack([delta] * 2), specs, arms=True))
    assert arms["layers/q_proj/b"] == P("arms", None, None, "tensor")


@pytest.mark.sampled
def test_every_method_lies_on_a_mesh(method):
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    params = {"layers": {k: v[:, :16, :16] for k, v in PARAMS["layers"].items()}}
    base, delta = lora.lora_transform(params, method, key=jax.random.key(0))
    specs = parallel.match_specs(base, RULES)
    placed = jax.device_put(delta, parallel.delta_shardings(mesh, delta, specs))
    if isinstance(method, lora.Full):
        assert placed["layers"]["down_proj"].delta.sharding.spec == P(None, "tensor", "fsdp")
    for path, leaf in paths.flatten(placed).items():
        if path.endswith(("q_proj/b", "q_proj/low/b")):
            assert leaf.sharding.spec == P(None, None, "tensor")


@pytest.mark.parametrize("format", cases.STORAGES)
def test_a_leaf_of_many_axes_and_a_quantised_one(format):
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    kernel = {"kernel": jnp.zeros((64, 4, 8))}
    layouts = {"kernel": lora.Layout(contracted=(-3,), output=(-2, -1))}
    specs = parallel.match_specs(kernel, {"kernel": P("fsdp", "tensor", None)})
    _, delta = lora.lora_transform(
        kernel, lora.LoRA(rank=2), key=jax.random.key(0), layouts=layouts
    )
    lying = specs_of(parallel.delta_shardings(mesh, delta, specs))
    assert lying["kernel/a"] == P("fsdp", None) and lying["kernel/b"] == P(None, "tensor", None)
    how = {"layouts": layouts, "targets": "kernel", **cases.format_options(format, 8)}
    base = lora.quantize(kernel, format, **how)
    placed = specs_of(
        parallel.base_shardings(parallel.make_mesh({"fsdp": 2, "tensor": 4}), base, specs)
    )
    along_nested_blocks = {"kernel/absmax/scale": P(None), "kernel/absmax/offset": P()}
    for path, spec in placed.items():
        assert spec == along_nested_blocks.get(path, P("fsdp", "tensor")), path
    with pytest.raises(ValueError, match="kernel.*not the first on its side"):
        parallel.base_shardings(mesh, base, {"kernel": P(None, None, "tensor")})


@pytest.mark.slow
@pytest.mark.parametrize("format", [None, *cases.STORAGES])
def test_a_flax_model_by_rules_of_its_own(format):
    model = nn.Sequential([nn.Embed(32, 64), nn.MultiHeadDotProductAttention(4), nn.Dense(32)])
    tokens = np.arange(8 * 6, dtype=np.int32).reshape(8, 6) % 32
    params = model.init(jax.random.key(0), tokens)
    layouts = lora.infer_layouts(model.apply, params, tokens)
    if format:
        params = lora.quantize(params, format, layouts=layouts, **cases.format_options(format, 8))
    base, delta = lora.lora_transform(
        params, lora.LoRA(rank=2, init="gaussian"), key=jax.random.key(1), layouts=layouts
    )
    apply = lora.adapt(model.apply)

    def loss(delta, base, tokens):
        return jnp.square(apply(lora.bind(base, delta), tokens)).mean()

    mesh = parallel.make_mesh({"fsdp": 2, "tensor": 4})
    rules = {"(query|key|value)/kernel": P("fsdp", "tensor", None), ".*": P()}
    specs = parallel.match_specs(base, rules)
    lying = parallel.delta_shardings(mesh, delta, specs)
    alone = jax.jit(jax.value_and_grad(loss))(delta, base, tokens)
    placed = jax.device_put(base, parallel.base_shardings(mesh, base, specs))
    arguments = jax.device_put((delta, tokens), (lying, parallel.batch_sharding(mesh)))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.value_and_grad(parallel.over_mesh(loss, specs)))
        together = gradient(arguments[0], placed, arguments[1])
    cases.assert_close(together, alone)


def test_bad_meshes():
    def refuses(match, sizes):
        with pytest.raises(ValueError, match=match):
            parallel.make_mesh(sizes)

    refuses("no axis 'data'.*arms, fsdp, sequence, tensor", {"data": 8})
    refuses("fsdp=3 does not divide 8 devices", {"fsdp": 3})
    refuses("tensor=3, fsdp=-1 does not divide 8", {"tensor": 3, "fsdp": -1})
    refuses("one may be -1", {"fsdp": -1, "tensor": -1})
    with pytest.raises(ValueError, match="'ddp': expected one of single, pmap, fsdp"):
        parallel.mesh_of("ddp")
    with pytest.raises(ValueError, match=r"tensor=2 beside mode 'fsdp'.*fsdp\+tensor"):
        parallel.mesh_of("fsdp", tensor=2)


def test_bad_rules_and_weights():
    with pytest.raises(ValueError, match=r"no rule says how layers/down_proj.*'\.\*'"):
        parallel.match_specs(PARAMS, {"q_proj": P()})
    with pytest.raises(ValueError, match="'norm' gives.*norm, which has only 1 axes"):
        parallel.match_specs(PARAMS, {"norm": P("fsdp", "tensor"), ".*": P()})
    mesh = parallel.make_mesh({"fsdp": 8})
    odd = {"w": jnp.zeros((4, 12))}
    with pytest.raises(
        ValueError, match="w: an axis of 12 cannot be split over the 8 devices of fsdp=8"
    ):
        parallel.base_shardings(mesh, odd, {"w": P(None, "fsdp")})
    quantised = lora.quantize({"w": jnp.ones((64, 8))}, "nf4", block_size=16)
    with pytest.raises(ValueError, match="w: an axis of 4.*smaller blocks"):
        parallel.base_shardings(mesh, quantised, {"w": P("fsdp", None)})


def test_bad_batches_and_arms():
    mesh = parallel.make_mesh({"fsdp": 4, "sequence": 2})
    execution = parallel.on_mesh(mesh, parallel.match_specs(PARAMS, RULES))

    def batch(rows, length):
        return {"tokens": np.zeros((rows, length), np.int32)}

    with pytest.raises(ValueError, match="6 rows cannot be split over fsdp=4"):
        execution.batch(batch(6, 8))
    with pytest.raises(ValueError, match="7 positions cannot be split over sequence=2"):
        execution.batch(batch(8, 7))
    with pytest.raises(ValueError, match="6 rows cannot be split over 8 devices"):
        parallel.replicated().batch(batch(6, 8))
    tokens = np.zeros((2, 8), np.int32)  # a micro-batch of a batch that the mesh divides
    with (
        jax.set_mesh(mesh),
        pytest.raises(
            ValueError, match="2 rows of 8 positions cannot be split over fsdp=4 and sequence=2"
        ),
    ):
        training.token_losses(np.zeros((2, 8, 4)), np.zeros((4, 6)), tokens, tokens == 0)
    _, delta = lora.lora_transform(PARAMS, lora.LoRA(rank=2), key=jax.random.key(0))
    state = training.init_state(delta, optax.adam(1.0), seed=0)
    three = jax.tree.map(lambda *x: jnp.stack(x), state, state, state)
    arms = parallel.on_mesh(parallel.make_mesh({"arms": 8}), parallel.match_specs(PARAMS, RULES))
    with pytest.raises(ValueError, match="3 arms cannot be split over arms=8"):
        arms.states(three, True)


@pytest.mark.parametrize("name", ["llama-3-8b", "llama-3-70b"])
def test_llamas_lie_on_pods(name):
    """Every leaf of the large shapes divides over 64 devices, in floats and in NF4."""
    config = SHAPES[name]

    def make(key):
        return llama.init(config, key=key, dtype=jnp.bfloat16)

    params = jax.eval_shape(make, jax.random.key(0))
    quantised = jax.eval_shape(lambda key: lora.quantize(make(key), "nf4"), jax.random.key(0))
    for sizes in ({"fsdp": 64}, {"fsdp": 8, "tensor": 8}):
        mesh = jax.sharding.AbstractMesh(
            tuple(({"arms": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | sizes).values()),
            ("arms", "fsdp", "sequence", "tensor"),
        )
        for base in (params, quantised):
            specs = parallel.match_specs(base, SHARDING)
            parallel.base_shardings(mesh, base, specs)
