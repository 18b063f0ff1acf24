"""What holds for every format: error bounds, bytes, layouts, exactness under jit, clear errors."""

import dataclasses
import math

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.models import llama
from lora_jax.models.llama import LlamaConfig
from lora_jax.quant import FORMATS, from_bitsandbytes, to_bitsandbytes
from lora_jax.training import checkpoints
from lora_jax.weights import linear, transpose

W = {"up_proj": cases.normal(0, 3, 64, 40)}  # stacked layers
X = cases.normal(1, 5, 64)


def quantized(format="nf4", tree=W, double_quant=True, block_size=16):
    return lora.quantize(tree, format, **cases.format_options(format, block_size, double_quant))


def one_layer(tree, i=1):
    return jax.tree.map(lambda leaf: leaf[i], tree)


@pytest.fixture(params=FORMATS)
def format(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["single", "double"])
def double_quant(request):
    return request.param


STORED = [(name, False) for name in FORMATS] + [
    (name, True) for name, kind in FORMATS.items() if kind.doubled
]


@pytest.fixture(params=STORED, ids=lambda how: f"{how[0]}-{'double' if how[1] else 'single'}")
def how(request):
    """Every format, with every choice of double quantisation that it has."""
    return dict(zip(("format", "double_quant"), request.param, strict=True))


@pytest.mark.parametrize("format", cases.CODEBOOKS)
def test_values_lie_within_half_a_step(format):
    w, weight = np.asarray(W["up_proj"]), quantized(format, double_quant=False)["up_proj"]
    values = np.sort(FORMATS[format].codebook)
    step = np.diff(values[values >= -1]).max() / 2
    absmax = np.repeat(np.asarray(weight.absmax), 16, axis=-2)
    assert (np.abs(weight.dense() - w) <= absmax * (step + 1e-6)).all()


def test_double_quantisation_moves_the_scales_little():
    weight, exact = (quantized(double_quant=d)["up_proj"] for d in (True, False))
    np.testing.assert_array_equal(weight.codes, exact.codes)
    error = np.abs(weight.absmax_values() - exact.absmax)
    centred = np.abs(exact.absmax - np.asarray(exact.absmax).mean((1, 2), keepdims=True))
    assert (error <= 0.008 * centred.max()).all()


def test_quantising_again_changes_nothing(format):
    values = lora.dequantize(quantized(format, double_quant=False))
    again = lora.dequantize(quantized(format, values, double_quant=False))
    chex.assert_trees_all_equal(again, values)


def test_stacked_layers_are_quantised_apart(how):
    stacked = quantized(**how)
    for i in range(3):
        alone = quantized(tree={"up_proj": W["up_proj"][i]}, **how)
        chex.assert_trees_all_equal(one_layer(stacked, i), alone)


@pytest.mark.optimized
def test_every_way_to_decode_gives_the_same_bits(how):
    tree = quantized(**how)
    on_host = lora.dequantize(tree)
    chex.assert_trees_all_equal(jax.jit(lora.dequantize)(tree), on_host)
    chex.assert_trees_all_equal(
        jax.tree.map(lambda w: w.dense(), tree, is_leaf=lora_weight), on_host
    )


def lora_weight(leaf):
    return isinstance(leaf, lora.Weight)


def test_formats_have_structures_of_their_own():
    """JAX compares dataclasses by their fields: `jit` would mistake one for another."""
    structures = [jax.tree.structure(quantized(format)) for format in FORMATS]
    assert not any(a == b for i, a in enumerate(structures) for b in structures[:i])


def test_jitted_quantising_gives_the_same_bits(how):
    def again(tree):
        return quantized(tree=tree, **how)

    chex.assert_trees_all_equal(jax.jit(again)(W), again(W))
    shapes = jax.eval_shape(again, W)
    assert jax.tree.structure(shapes) == jax.tree.structure(again(W))
    assert jax.tree.map(jnp.shape, again(W)) == jax.tree.map(lambda s: s.shape, shapes)


@pytest.mark.sampled
def test_linear_embed_and_transpose(how):
    weight = one_layer(quantized(**how))["up_proj"]
    dense, tokens = weight.dense(), jnp.array([[3, 62], [0, 17]])
    cases.assert_close(linear(X, weight), X @ dense)
    chex.assert_trees_all_equal(lora.embed(tokens, weight), dense[tokens])
    head = transpose(weight)
    assert head.shape == (40, 64) and head.T is weight
    y = cases.normal(2, 2, 3, 40)
    cases.assert_close(linear(y, head), y @ dense.T)
    chex.assert_trees_all_equal(head.dense(), dense.T)
    for apply, x, matrix in ((weight, X, dense), (head, y, dense.T)):
        ours = jax.grad(lambda x: jnp.sin(linear(x, apply)).sum())(x)  # noqa: B023
        cases.assert_close(ours, jax.grad(lambda x: jnp.sin(x @ matrix).sum())(x))  # noqa: B023


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_round_last(format, dtype):
    w = jnp.asarray(W["up_proj"], dtype)
    weight, wide = (quantized(format, {"w": x})["w"] for x in (w, w.astype(jnp.float32)))
    assert weight.dtype == jnp.dtype(dtype) and wide.dtype == jnp.float32
    chex.assert_trees_all_equal(weight.dense(), wide.dense().astype(dtype))
    x = X.astype(dtype)
    assert linear(x, one_layer(weight)).dtype == x.dtype


@pytest.mark.sampled
def test_a_kernel_with_two_output_axes(format):
    """`[d, heads, head_dim]` is quantised as the matrix `[d, heads * head_dim]`."""
    kernel = cases.normal(3, 2, 32, 4, 6)
    layout = lora.Layout(contracted=(-3,), output=(-2, -1))
    how = cases.format_options(format, 16)
    weight = lora.quantize({"query": kernel}, format, layouts={"query": layout}, **how)["query"]
    flat = quantized(format, {"query": kernel.reshape(2, 32, 24)})["query"]
    assert weight.shape == kernel.shape
    chex.assert_trees_all_equal(weight.codes, flat.codes)
    chex.assert_trees_all_equal(weight.dense(), flat.dense().reshape(kernel.shape))
    assert weight.as_matrix(layout).shape == (2, 32, 24)
    chex.assert_trees_all_equal(weight.as_matrix(layout).dense(), flat.dense())
    with pytest.raises(ValueError, match="was quantised as Layout.*cannot be read as Layout"):
        weight.as_matrix(lora.Layout())


def test_a_weight_applied_from_the_left():
    w = cases.normal(3, 24, 32)  # y = w @ x
    layout = lora.Layout(contracted=(-1,), output=(-2,))
    weight = lora.quantize({"w": w}, "nf4", layouts={"w": layout}, block_size=16)["w"]
    assert weight.shape == (24, 32) and weight.codes.shape == (16, 24)
    chex.assert_trees_all_equal(weight.dense(), quantized(tree={"w": w.T})["w"].dense().T)


def test_nf4_stores_4_127_bits_a_parameter():
    tree = {"down_proj": jax.ShapeDtypeStruct((2, 14_336, 4096), jnp.bfloat16)}

    def bits(**options):
        weight = jax.eval_shape(lambda t: lora.quantize(t, **options), tree)["down_proj"]
        return 8 * weight.nbytes / math.prod(weight.shape)

    assert bits(format="nf4") == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-5)
    assert f"{bits(format='nf4'):.3f}" == "4.127"
    assert bits(format="fp4", double_quant=False) == 4.5
    assert bits(format="int8", double_quant=False) == 8.5


def test_a_weight_prints_itself_in_one_line():
    weight = lora.quantize({"w": jnp.ones((256, 128), jnp.bfloat16)}, "nf4")["w"]
    assert repr(weight) == str(weight) == (
        "NF4(256x128 bfloat16, blocks of 64, absmax in 8 bits, 4.128 bits a parameter)"
    )  # fmt: skip
    assert weight.nbytes == 256 * 64 + 4 * 128 + 2 * 4 + 4


@pytest.mark.parametrize("format", cases.STORAGES)
def test_merging_may_requantise(format):
    tree = quantized(format)
    base, delta = lora.lora_transform(tree, lora.LoRA(rank=2), key=jax.random.key(0))
    delta = cases.moved(delta)
    plain, again = lora.merge(base, delta), lora.merge(base, delta, requantize=True)
    chex.assert_trees_all_equal(again, quantized(format, plain))
    jitted = jax.jit(lambda b, d: lora.merge(b, d, requantize=True))(base, delta)
    assert jax.tree.structure(jitted) == jax.tree.structure(tree)
    chex.assert_trees_all_equal(lora.merge({"up_proj": plain["up_proj"]}, delta, requantize=True),
                       lora.merge(plain, delta))  # fmt: skip


def test_quantised_trees_have_fingerprints(format):
    tree = quantized(format)
    other = dataclasses.replace(tree["up_proj"], codes=tree["up_proj"].codes.at[0, 0, 0].add(1))
    name = checkpoints.fingerprint(tree)
    assert name == checkpoints.fingerprint(quantized(format))
    assert name != checkpoints.fingerprint({"up_proj": other})


@pytest.mark.optimized
@pytest.mark.mixed_dtypes
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_no_float_copy_of_a_weight_outlives_its_layer(dtype):
    """A step's temporaries, activations and all, are a few layers' worth of float32."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_layers=16, num_heads=4,
        num_kv_heads=4, head_dim=32, context_length=64,
    )  # fmt: skip

    def make(key):
        params = llama.init(config, key=key, dtype=jnp.dtype(dtype))
        return lora.lora_transform(lora.quantize(params, "nf4"), lora.LoRA(rank=2), key=key)

    def loss(delta, base, tokens):
        logits = llama.forward(lora.bind(base, delta), tokens, config)
        return (logits.astype(jnp.float32) ** 2).mean()

    base, delta = jax.eval_shape(make, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(delta, base, tokens).compile()
    layer = 4 * (4 * 128 * 128 + 3 * 128 * 256)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * layer  # of 16


def bad(match, tree=W, format="nf4", **options):
    with pytest.raises(ValueError, match=match):
        lora.quantize(tree, format, **({"block_size": 16} | options))


def test_an_unknown_format():
    bad(f"format 'nf5': expected one of {', '.join(FORMATS)}", format="nf5")


@pytest.mark.parametrize("block_size", [0, 60, -64, 8192])
def test_a_wrong_block_size(block_size):
    bad("block_size=.*: expected one of 8, 16, 32, 64", block_size=block_size)


def test_rows_that_are_no_multiple_of_the_block():
    bad("mlp/up_proj has 48 rows .*multiple of the block size 64: give block_size=16, or leave",
        {"mlp": {"up_proj": np.ones((48, 8), np.float32)}}, block_size=64)  # fmt: skip
    bad("up_proj has 50 rows .*: leave it out", {"up_proj": np.ones((50, 8), np.float32)})


@pytest.mark.parametrize("dtype", [np.int32, np.complex64])
def test_weights_that_are_no_real_numbers(dtype):
    bad(f"codes holds {np.dtype(dtype)}: only real floating-point weights",
        {"codes": np.ones((16, 16), dtype)})  # fmt: skip


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite(value):
    w = np.asarray(W["up_proj"]).copy()
    w[2, 5, 7] = value
    bad("layers/up_proj: it holds NaN or infinity", {"layers": {"up_proj": w}})


def test_scales_whose_sum_exceeds_float32():
    w = {"up_proj": np.full((16, 32), 3e38, np.float32)}
    bad("up_proj: the sum of its absmax exceeds float32: give double_quant=False", w)
    assert (quantized(tree=w, double_quant=False)["up_proj"].dense() == 3e38).all()


def test_a_weight_that_is_quantised_already():
    bad("up_proj is a NF4 already. Leave it out", quantized())


def test_a_rule_or_a_layout_that_matches_nothing():
    bad("target 'q_prj' matches nothing", targets="q_prj")
    bad("layouts names 'up'.*up_proj", layouts={"up": lora.Layout()})


def state_dict(**changes):
    weight = one_layer(quantized(block_size=64))["up_proj"]
    return {**to_bitsandbytes(weight), **changes}


def test_packed_bytes_that_do_not_fit_their_state():
    with pytest.raises(ValueError, match=r"weight holds 1279 entries of uint8, expected 1280"):
        from_bitsandbytes(state_dict(weight=state_dict()["weight"][:-1]))


def test_state_dicts_that_are_incomplete_or_of_another_codebook():
    tensors = state_dict()
    key = "weight.quant_state.bitsandbytes__nf4"
    with pytest.raises(ValueError, match="no 4-bit weight of bitsandbytes, or its state dict"):
        from_bitsandbytes({k: v for k, v in tensors.items() if k != key})
    with pytest.raises(ValueError, match="lacks weight.nested_absmax"):
        from_bitsandbytes({k: v for k, v in tensors.items() if k != "weight.nested_absmax"})
    with pytest.raises(ValueError, match="quant_map is not the codebook"):
        from_bitsandbytes(state_dict(**{"weight.quant_map": np.ones(16, np.float32)}))
    rows = np.frombuffer(tensors[key].tobytes().replace(b"[40, 64]", b"[80, 32]"), np.uint8)
    with pytest.raises(ValueError, match="blocks of 64 run across its rows of 32"):
        from_bitsandbytes(state_dict(**{key: rows}))


def test_weights_that_bitsandbytes_has_no_place_for():
    with pytest.raises(ValueError, match="no Int8 weights; expected NF4, FP4"):
        to_bitsandbytes(one_layer(quantized("int8"))["up_proj"])
    with pytest.raises(ValueError, match="is stacked: convert it layer by layer"):
        to_bitsandbytes(quantized()["up_proj"])


def test_state_dicts_convert_back_without_loss(double_quant):
    for format in ("nf4", "fp4"):
        tree = quantized(format, double_quant=double_quant)
        weight = one_layer(tree)["up_proj"]
        chex.assert_trees_all_equal(from_bitsandbytes(to_bitsandbytes(weight, "q"), "q"), weight)


@pytest.mark.parametrize("format", cases.STORAGES)
def test_weights_split_over_devices(format):
    """Each device multiplies by the columns, or the rows, that it holds."""
    w, x = cases.normal(0, 128, 40) / 8, cases.normal(1, 5, 128)
    weight = quantized(format, {"w": w}, double_quant=False)["w"]
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec

    def split(x, w):
        return jnp.sin(linear(x, w)).sum()[None]

    spec = P(None, "model")
    specs = {"in_specs": (P(), weight.local_specs(spec)), "out_specs": P("model")}
    total = lambda x, w: jax.shard_map(split, mesh=mesh, **specs)(x, w).sum()  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(total))(x, weight)
    whole = jax.value_and_grad(lambda x: jnp.sin(x @ weight.dense()).sum())(x)
    cases.assert_close((value, gradient), whole)

    specs = {"in_specs": (P(None, "model"), weight.local_specs(P("model", None))), "out_specs": P()}

    def rows(x, w):
        assert w.shape == (32, 40)
        return jax.lax.psum(linear(x, w), "model")

    cases.assert_close(jax.shard_map(rows, mesh=mesh, **specs)(x, weight), x @ weight.dense())


def test_double_quantised_weights_split_along_layers_alone():
    weight = quantized()["up_proj"]
    spec = jax.sharding.PartitionSpec("layers", None, None)
    assert weight.local_specs(spec).absmax.scale == jax.sharding.PartitionSpec("layers", None)
    with pytest.raises(ValueError, match="cannot be split by .*give|double_quant=False"):
        weight.local_specs(jax.sharding.PartitionSpec(None, None, "model"))


def test_checkpoints_keep_the_bytes(tmp_path, how):
    tree = quantized(**how)
    checkpoints.save(tmp_path, 1, tree, identity={}, position=None)
    _, restored, _ = checkpoints.restore(tmp_path, tree, identity={})
    chex.assert_trees_all_equal(restored, tree)
    assert restored["up_proj"].codes.dtype == jnp.uint8


RAGGED = {
    "up_proj": np.ones((64, 4), np.float32),
    "patches": {"kernel": np.ones((60, 4), np.float32), "other": np.ones((20, 4), np.float16)},
    "router": np.ones((64, 4), np.float32),
    "lm_head": np.ones((64, 4), np.float32),
}


def formats_of(tree):
    flat = lora.paths.flatten(tree, is_leaf=lora.weights.is_weight)
    return {path: getattr(leaf, "format", None) for path, leaf in flat.items()}


def test_a_preset_leaves_ragged_rows_in_floats_and_says_so():
    message = r"patches/kernel, patches/other stay in floats, 1,120 bytes, .* has 60 rows"
    with pytest.warns(UserWarning, match=message):
        base = lora.quantize(RAGGED, "nf4")
    assert formats_of(base) == {
        "up_proj": "nf4", "router": "nf4", "patches/kernel": None, "patches/other": None,
        "lm_head": None,
    }  # fmt: skip
    with pytest.warns(UserWarning, match="patches/kernel stay in floats, 960 bytes"):
        leaf = lora.quant.quantizer("nf4")("patches/kernel", RAGGED["patches"]["kernel"])
    assert isinstance(leaf, jax.Array)


def test_targets_that_are_named_are_refused_together():
    bad("patches/kernel has 60 rows (.|\n)*patches/other has 20 rows", RAGGED, targets="patches")
    with pytest.raises(ValueError, match="patches/kernel has 60 rows"):
        lora.quant.quantizer("nf4", targets="patches")(
            "patches/kernel", RAGGED["patches"]["kernel"]
        )


def test_a_mapping_of_formats_as_lora_transform_takes_methods():
    formats = {"router": None, "patches": None, "lm_head": "int8", "all-linear": "nf4"}
    base = lora.quantize(RAGGED, formats)
    assert formats_of(base) == {
        "up_proj": "nf4", "router": None, "patches/kernel": None, "patches/other": None,
        "lm_head": "int8",
    }  # fmt: skip
    finish = lora.quant.quantizer(formats)
    assert finish("lm_head", RAGGED["lm_head"]).format == "int8"
    assert isinstance(finish("router", RAGGED["router"]), jax.Array)
    bad("target 'lm_head' is mapped to 'nf5': expected one of", RAGGED, {"lm_head": "nf5"})
    bad("target 'z' matches nothing", RAGGED, {"z": None, "all-linear": "nf4"})
    bad("beside a mapping", RAGGED, formats, targets="router")
