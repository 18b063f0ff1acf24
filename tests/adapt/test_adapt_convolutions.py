"""Convolutions: every library's layers, every method, formats, what they cost, what is refused."""

import cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, moved, normal
from flax import nnx

import lora_jax as lora

IMAGES, LINES = normal(0, 2, 6, 5, 4), normal(1, 2, 7, 4)
NHWC = ("NHWC", "HWIO", "NHWC")


def redrawn(params):
    seeds = iter(range(100))
    return jax.tree.map(lambda leaf: normal(next(seeds), *leaf.shape) / 3, params)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Conv(8, (3, 3), strides=(2, 1))(x))
        x = nn.gelu(nn.Conv(8, (3, 3), feature_group_count=2)(x))
        x = nn.gelu(nn.ConvTranspose(6, (2, 2), strides=(2, 2))(x))
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.Conv(4, (2, 2), kernel_dilation=2, padding="VALID")(x)


def linen():
    variables = jax.eval_shape(Linen().init, jax.random.key(0), IMAGES)
    stats = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), variables["batch_stats"])
    apply = lambda params, x: Linen().apply({"params": params, "batch_stats": stats}, x)  # noqa: E731
    return apply, redrawn(variables["params"]), IMAGES, 4


def nnx_convolutions():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Conv(4, 8, (3,), strides=2, rngs=rngs)
            self.second = nnx.Conv(8, 6, (3,), feature_group_count=2, rngs=rngs)
            self.third = nnx.ConvTranspose(6, 4, (2,), strides=2, rngs=rngs)

        def __call__(self, x):
            return self.third(nnx.gelu(self.second(nnx.gelu(self.first(x)))))

    graph, params = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param)
    return lambda params, x: nnx.merge(graph, params)(x), redrawn(params), LINES, 3


def equinox():
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        first: eqx.nn.Conv2d
        second: eqx.nn.Conv2d
        third: eqx.nn.ConvTranspose2d

        def __init__(self, key):
            self.first = eqx.nn.Conv2d(4, 8, 3, stride=2, padding=1, key=key)
            self.second = eqx.nn.Conv2d(8, 6, 3, padding=1, groups=2, key=key)
            self.third = eqx.nn.ConvTranspose2d(6, 4, 2, stride=2, key=key)

        def __call__(self, x):
            x = jax.nn.gelu(self.first(jnp.moveaxis(x, -1, 0)))
            return self.third(jax.nn.gelu(self.second(x)))

    model = eqx.filter_eval_shape(Model, jax.random.key(0))
    params, rest = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return lambda params, x: jax.vmap(eqx.combine(params, rest))(x), redrawn(params), IMAGES, 3


def haiku():
    hk = pytest.importorskip("haiku")

    def forward(x):
        x = jax.nn.gelu(hk.Conv2D(8, 3, stride=2)(x))
        x = jax.nn.gelu(hk.Conv2D(8, 3, feature_group_count=2, data_format="NHWC")(x))
        return hk.Conv2DTranspose(4, 2, stride=2)(x)

    model = hk.without_apply_rng(hk.transform(forward))
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    return model.apply, redrawn(shapes), IMAGES, 3


LIBRARIES = {"linen": linen, "nnx": nnx_convolutions, "equinox": equinox, "haiku": haiku}


def both_sides(apply, base, delta, x):
    """Results and gradients, adapted and merged."""

    @jax.jit
    def run(delta):
        def side(run, weigh):
            def loss(delta, x):
                y = run(weigh(base, delta), x)
                return jnp.sin(y).mean(), y

            (of_delta, of_x), y = jax.grad(loss, (0, 1), has_aux=True)(delta, x)
            mask = lora.trainable_mask(of_delta)
            return y, jax.tree.map(lambda g, t: g if t else 0 * g, of_delta, mask), of_x

        return side(lora.adapt(apply), lora.bind), side(apply, lora.merge)

    return run(delta)


@pytest.mark.mixed_dtypes
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if i else ()) for i, name in enumerate(LIBRARIES)],
)
def test_layers_of_every_library(name):
    apply, params, x, count = LIBRARIES[name]()
    layouts = lora.infer_layouts(apply, params, x)
    base, delta = lora.lora_transform(
        params, lora.LoRA(rank=2), key=jax.random.key(0), layouts=layouts
    )
    assert len(lora.transform.delta_nodes(delta)) == count
    fresh = lora.adapt(apply)(lora.bind(base, delta), x)
    assert_close(fresh, apply(params, x), rtol=1e-4, atol=1e-5)
    ours, theirs = both_sides(apply, base, moved(delta, size=0.3), x)
    assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def plain(params, x):
    return jax.lax.conv_general_dilated(x, params["w"], (1, 2), "SAME", dimension_numbers=NHWC)


def in_groups(params, x):
    return jax.lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=2
    )


FORMS = {"plain": (plain, normal(2, 3, 3, 4, 6)), "in_groups": (in_groups, normal(2, 3, 3, 2, 6))}
METHODS = {name: method for name, method in cases.METHODS.items() if name in cases.MERGEABLE}
GROUPED = ("lora", "dora", "ia3", "full")
CASES = [("plain", name) for name in METHODS] + [("in_groups", name) for name in GROUPED]


@pytest.mark.parametrize(("form", "name"), CASES)
def test_every_method_is_its_merged_kernel(form, name):
    run, kernel = FORMS[form]
    method = METHODS[name]
    layouts = lora.infer_layouts(run, {"w": kernel}, IMAGES)
    base, delta = lora.lora_transform(
        {"w": kernel}, method, targets="w", key=jax.random.key(0), layouts=layouts
    )
    delta = moved(delta, size=0.3)
    ours = lora.adapt(run)(lora.bind(base, delta), IMAGES)
    assert_close(ours, run(lora.merge(base, delta), IMAGES), rtol=1e-4, atol=1e-5)
    again = lora.unmerge(lora.merge(base, delta), delta)
    assert_close(again, base, rtol=1e-3, atol=1e-4)


def transformed(run, kernel, method, x=IMAGES, **given):
    layouts = lora.infer_layouts(run, {"w": kernel}, x)
    return lora.lora_transform(
        {"w": kernel}, method, targets="w", key=jax.random.key(0), layouts=layouts, **given
    )


def test_a_factor_is_a_convolution_and_the_other_is_one_by_one():
    """PEFT's form: A has the kernel's window and r outputs, B is 1 x 1; with groups, of each."""
    node = transformed(plain, FORMS["plain"][1], lora.LoRA(rank=2))[1]["w"]
    assert node.a.shape == (3, 3, 4, 2) and node.b.shape == (2, 6)
    node = transformed(in_groups, FORMS["in_groups"][1], lora.LoRA(rank=4, alpha=8))[1]["w"]
    assert node.a.shape == (2, 3, 3, 2, 2) and node.b.shape == (2, 2, 3)
    assert (node.scale == 2).all(), "alpha / r, whatever the groups"


def test_dora_scales_each_output_channel():
    """As PEFT's: the norm of a channel runs over its inputs and its window."""
    _, delta = transformed(plain, FORMS["plain"][1], lora.DoRA(rank=2))
    norms = np.linalg.norm(np.asarray(FORMS["plain"][1]).reshape(-1, 6), axis=0)
    np.testing.assert_allclose(delta["w"].magnitude, norms, rtol=1e-5)


def test_rows_of_a_batch_use_their_own_adapter():
    base, delta = transformed(plain, FORMS["plain"][1], lora.LoRA(rank=2))
    deltas = [moved(delta, seed) for seed in range(3)]
    ids = jnp.array([2, 0])
    ours = lora.adapt(plain)(lora.bind(base, lora.stack(deltas), adapter_ids=ids), IMAGES)
    each = [
        plain(lora.merge(base, deltas[i]), IMAGES[row : row + 1])[0] for row, i in enumerate(ids)
    ]
    assert_close(ours, jnp.stack(each), rtol=1e-4, atol=1e-5)


def test_a_weight_of_two_matrices_is_named():
    def run(params, x):
        return in_groups(params, x) + plain(params, x[..., :2])[..., :1].sum()

    with pytest.raises(ValueError, match="w, of shape .* convolved with in 1 groups and in 2"):
        lora.infer_layouts(run, {"w": FORMS["in_groups"][1]}, IMAGES)


def test_a_rank_that_the_groups_do_not_divide():
    kernel = FORMS["in_groups"][1]
    message = r"^w: LoRA\(rank=3\) is not divisible by the 2 groups of this convolution"
    with pytest.raises(ValueError, match=message):
        transformed(in_groups, kernel, lora.LoRA(rank=3))
    with pytest.raises(ValueError, match="^w: VeRA has no form for a convolution of 2 groups"):
        transformed(in_groups, kernel, lora.VeRA(rank=2))
    params = {"w": kernel, "dense": normal(3, 6, 6)}
    run = lambda params, x: in_groups(params, x) @ params["dense"]  # noqa: E731
    layouts = lora.infer_layouts(run, params, IMAGES)
    method = lora.LoRA(rank=3)
    base, delta = lora.lora_transform(params, method, key=jax.random.key(0), layouts=layouts)
    assert delta.keys() == {"dense"}
    (row,) = lora.describe(base, delta, method, layouts=layouts).frozen
    assert "not divisible by the 2 groups" in row.reason


def test_inputs_that_meet_several_rows_cannot_be_scaled():
    base, delta = transformed(plain, FORMS["plain"][1], lora.IA3(scales="input"))
    with pytest.raises(ValueError, match="^w: conv_general_dilated, at .* scale its outputs"):
        lora.adapt(plain)(lora.bind(base, delta), IMAGES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("format", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_quantised_kernels(form, format):
    run, _ = FORMS[form]
    kernel = normal(4, 2, 2, 4 if form == "plain" else 2, 6)
    layouts = lora.infer_layouts(run, {"w": kernel}, IMAGES)
    base = lora.quantize({"w": kernel}, format, targets="w", layouts=layouts, block_size=8)
    _, delta = lora.lora_transform(
        base, lora.LoRA(rank=2), targets="w", key=jax.random.key(0), layouts=layouts
    )
    delta = moved(delta)
    assert base["w"].shape == kernel.shape
    dense = lora.dequantize(base)

    def loss(delta, x, base):
        return jnp.sin(lora.adapt(run)(lora.bind(base, delta), x)).sum()

    ours, theirs = jax.jit(
        lambda delta, x: [jax.value_and_grad(loss, (0, 1))(delta, x, b) for b in (base, dense)]
    )(delta, IMAGES)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert_close(lora.adapt(run)(base, IMAGES), run(dense, IMAGES), rtol=1e-4, atol=1e-5)


def test_flops_are_those_of_the_form_written_by_hand():
    jax.config.update("jax_disable_most_optimizations", False)
    x, kernel = normal(0, 2, 16, 16, 32), normal(1, 3, 3, 32, 48)
    base, delta = transformed(plain, kernel, lora.LoRA(rank=4, alpha=8), x)

    def by_hand(delta, base, x):
        node = delta["w"]
        h = plain({"w": node.a}, x) * node.scale
        return plain(base, x) + h @ node.b

    def ours(delta, base, x):
        return lora.adapt(plain)(lora.bind(base, delta), x)

    def step(f):
        grads = jax.grad(lambda delta, base, x: jnp.sin(f(delta, base, x)).sum())
        return jax.jit(grads).lower(delta, base, x).compile()

    flops = [step(f).cost_analysis()["flops"] for f in (ours, by_hand)]
    assert flops[0] == pytest.approx(flops[1], rel=0.01)
