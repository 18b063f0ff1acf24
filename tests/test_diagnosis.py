"""The diagnosis of a delta: against dense SVDs in float64, and by its definitions."""

import dataclasses
import functools

import cases
import chex
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import paths
from lora_jax.diagnosis import spectra, walk
from lora_jax.diagnosis.measure import STATIC, measured
from lora_jax.methods import FullNode, IA3BiasNode, LoRANode
from lora_jax.quant import FORMATS
from lora_jax.transform import delta_nodes

KEY = jax.random.key(0)
METHODS = {
    **{name: cases.METHODS[name] for name in cases.MERGEABLE},
    "loha": lora.LoHa(rank=2),
    "pissa": lora.LoRA(rank=2, init="pissa"),
    "ranks": lora.LoRA(rank=(2, 0)),
    "ia3_input": lora.IA3(scales="input"),
}
STACK = {"layers": {"q_proj": cases.normal(0, 2, 7, 5)}}
THRESHOLD = 0.995  # of matrices this small, some leading directions are new by that


def made(params, method, seed=1, **kwargs):
    """A base, and a delta after some training."""
    base, delta = lora.lora_transform(params, method, key=KEY, **kwargs)
    return base, cases.moved(delta, seed)


def matrices(weight, layout=None):
    """`[layers, d_in, d_out]` in float64."""
    matrix = (layout or lora.Layout()).to_matrix(jnp.asarray(weight))
    return np.asarray(matrix, np.float64).reshape(-1, *matrix.shape[-2:])


def by_numpy(before, after, top):
    """What a layer's row must hold, by dense SVDs."""
    update = after - before
    u, s, vt = np.linalg.svd(update, full_matrices=False)
    rank = int((s > 1e-5 * s[0]).sum())
    p = s[:rank] / s[:rank].sum()
    inside = np.linalg.norm(u[:, :rank].T @ before @ vt[:rank].T)
    _, _, known = np.linalg.svd(before, full_matrices=False)
    _, values, directions = np.linalg.svd(after, full_matrices=False)
    return {
        "norm": np.linalg.norm(update),
        "spectral_norm": s[0],
        "weight_norm": np.linalg.norm(before),
        "weight_spectral_norm": np.linalg.norm(before, 2),
        "rank": rank,
        "effective_rank": np.exp(-(p * np.log(p)).sum()),
        "amplification": np.linalg.norm(update) / inside,
        "spectrum": s,
        "values": values[:top],
        "cosines": np.abs(directions[:top] @ known.T).max(1),
    }


def assert_row(row, before, after, *, rtol=2e-3):
    """A row against dense matrices `[layers, d_in, d_out]`; layers without an update are zero."""
    top = row.intruders.cosines.shape[-1]
    found = {name: getattr(row, name) for name in vars(row)} | vars(row.intruders)
    for layer, pair in enumerate(zip(before, after, strict=True)):
        mine = {
            name: np.asarray(value).reshape(len(before), -1)[layer]
            for name, value in found.items()
            if isinstance(value, np.ndarray) and name not in ("u", "v")
        }
        if row.is_zero.reshape(-1)[layer]:
            assert not any(mine[name].any() for name in ("norm", "amplification", "spectrum"))
            assert mine["effective_rank"] == 0 and (mine["cosines"] == 1).all()
            np.testing.assert_allclose(pair[1], pair[0], atol=1e-6)
            continue
        for name, expected in by_numpy(*pair, top).items():
            wanted = np.resize(np.asarray(expected), mine[name].shape)
            if name == "spectrum":  # a method of many factors lists zeros, or fewer
                wanted = np.pad(expected, (0, 99))[: mine[name].size]
            np.testing.assert_allclose(
                mine[name], wanted, rtol=rtol, atol=1e-5 * np.max(wanted), err_msg=name
            )


def assert_repaired(base, found, before, *, factor=0.3, atol=2e-5):
    """The merged weights are those of the definition, and other targets are the same nodes."""
    repaired = found.repair(factor)
    after = paths.flatten(lora.merge(base, repaired))
    for path, row in found.targets.items():
        new = row.intruders
        change = np.einsum("...ik,...k,...ok->...io", new.u, new.values * new.is_new, new.v)
        layout = found.layouts[path]
        expected = matrices(before[path], layout) + (factor - 1) * change.reshape(-1, *row.shape)
        np.testing.assert_allclose(
            matrices(after[path], layout), expected, atol=atol * np.abs(expected).max()
        )
    return repaired


@pytest.mark.parametrize("name", METHODS)
def test_factors_are_what_merging_adds(name):
    base, delta = made({"q_proj": cases.normal(0, 7, 5)}, _one_layer(METHODS[name]))
    nodes = delta_nodes(delta)
    factors = nodes["q_proj"].resolve(base["q_proj"], nodes).factors()
    if factors is None:
        assert name in ("full", "dora", "ia3", "ia3_input")
        return
    added = lora.merge({"q_proj": jnp.zeros((7, 5))}, delta)["q_proj"]
    np.testing.assert_allclose(factors[0] @ factors[1], added, atol=1e-5)


def _one_layer(method):
    several = isinstance(getattr(method, "rank", None), tuple)
    return dataclasses.replace(method, rank=2) if several else method


@pytest.mark.sampled
@pytest.mark.parametrize("name", METHODS)
def test_every_method_against_a_dense_svd(name):
    base, delta = made(STACK, METHODS[name])
    found = lora.diagnose(base, delta, threshold=THRESHOLD)
    row, merged = found.targets["layers/q_proj"], paths.flatten(lora.merge(base, delta))
    assert row.shape == (7, 5) and not found.skipped
    assert_row(row, matrices(base["layers"]["q_proj"]), matrices(merged["layers/q_proj"]))
    repaired = assert_repaired(base, found, merged)["layers"]["q_proj"]
    assert row.intruders.count.any(), "nothing was repaired: choose another threshold"
    low_rank = {"lora", "lora_variant", "vera", "adalora", "loha", "pissa", "ranks"}
    expected = "LoRANode" if name in low_rank else "DoRANode" if name == "dora" else "FullNode"
    assert type(repaired).__name__ == expected


@functools.cache
def weights(kind):
    """A params tree, its layouts, and the same dense in float32."""
    if kind in FORMATS:
        options = cases.format_options(kind, 32, double_quant=False)
        options.pop("double_quant")
        params = lora.quantize({"q_proj": cases.normal(3, 2, 64, 32)}, kind, **options)
        return params, None
    if kind == "bfloat16":
        return {"q_proj": cases.normal(4, 6, 5).astype(jnp.bfloat16)}, None
    if kind == "heads":
        layout = lora.Layout(contracted=(-3,), output=(-2, -1))
        return {"q_proj": cases.normal(5, 2, 6, 2, 3)}, {"q_proj": layout}
    assert kind == "from the left"
    layout = lora.Layout(contracted=(-1,), output=(-2,))
    return {"q_proj": cases.normal(6, 5, 6)}, {"q_proj": layout}


@pytest.mark.sampled
@pytest.mark.parametrize("method", ["lora", "full", "dora"])
@pytest.mark.parametrize("kind", ["bfloat16", "heads", "from the left", *cases.STORAGES])
def test_every_weight_against_a_dense_svd(kind, method):
    params, layouts = weights(kind)
    base, delta = made(params, cases.METHODS[method], layouts=layouts)
    found = lora.diagnose(base, delta, layouts=layouts, threshold=THRESHOLD)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), lora.dequantize(base))
    merged = paths.flatten(lora.merge(exact, delta))
    layout = found.layouts["q_proj"]
    pair = matrices(exact["q_proj"], layout), matrices(merged["q_proj"], layout)
    rtol = 2e-2 if kind in FORMATS else 2e-3  # their own dtype rounds what they decode
    assert_row(found.targets["q_proj"], *pair, rtol=rtol)
    found = dataclasses.replace(found, base=exact)
    assert_repaired(exact, found, merged)


# Properties of one update, whatever makes it.


def lora_delta(a, b, scale=1.0):
    node = LoRANode(a=jnp.asarray(a), b=jnp.asarray(b), scale=jnp.float32(scale))
    return {"w": node}


def orthogonal(seed, *shape):
    return np.linalg.qr(cases.drawn(seed, *shape))[0].astype(np.float32)


BASE = {"w": cases.normal(10, 12, 9)}
A, B = cases.drawn(11, 12, 3), cases.drawn(12, 3, 9)
OTHER = lora_delta(cases.drawn(13, 12, 2), cases.drawn(14, 2, 9))


@functools.cache
def compared():
    """One delta with others that are the same update by other factors, or orthogonal to it."""
    turn = orthogonal(15, 3, 3)
    inputs, outputs = np.linalg.qr(A)[0], np.linalg.qr(B.T)[0]
    apart = [
        np.linalg.svd(side, full_matrices=True)[0][:, 3:5].astype(np.float32)
        for side in (inputs, outputs)
    ]
    others = {
        "itself": lora_delta(A, B),
        "turned": lora_delta(A @ turn, turn.T @ B),
        "scaled": lora_delta(2 * A, B, scale=-0.25),
        "padded": lora_delta(np.pad(A, ((0, 0), (0, 2))), np.pad(B, ((0, 2), (0, 0)))),
        "dense": {"w": FullNode(delta=jnp.asarray(A @ B))},
        "apart": lora_delta(apart[0], apart[1].T),
        "other": OTHER,
        "zero": lora_delta(A, np.zeros_like(B)),
    }
    return lora.diagnose(BASE, lora_delta(A, B), others=others, top=0).targets["w"].overlaps


@pytest.mark.parametrize("side", ["input", "output"])
def test_overlaps_by_their_definition(side):
    found = {name: getattr(overlap, side) for name, overlap in compared().items()}
    for name in ("itself", "turned", "scaled", "dense"):
        phi = found[name][:3, :3]
        np.testing.assert_allclose(phi, found["itself"], atol=1e-4, err_msg=name)
        np.testing.assert_allclose(np.diag(phi), 1, atol=1e-4)
    np.testing.assert_allclose(found["padded"][:, :3], found["itself"], atol=1e-5)
    np.testing.assert_allclose(
        found["padded"][:, 3:], found["itself"][:, 2:].repeat(2, 1), atol=1e-5
    )
    np.testing.assert_allclose(found["apart"], 0, atol=1e-6)
    assert not found["zero"].any()
    assert all(((phi >= 0) & (phi <= 1)).all() for phi in found.values())
    swapped = lora.diagnose(BASE, OTHER, others={"first": lora_delta(A, B)}, top=0)
    theirs = getattr(swapped.targets["w"].overlaps["first"], side)
    np.testing.assert_allclose(theirs, found["other"].T, atol=1e-5)
    # Equation 4 of the paper, spelled out.
    u, _, vt = np.linalg.svd(A.astype(np.float64) @ B)
    other = OTHER["w"]
    ou, _, ovt = np.linalg.svd(np.asarray(other.a, np.float64) @ np.asarray(other.b, np.float64))
    one, two = (u, ou) if side == "input" else (vt.T, ovt.T)
    for i in range(3):
        for j in range(2):
            phi = np.linalg.norm(one[:, : i + 1].T @ two[:, : j + 1]) ** 2 / min(i + 1, j + 1)
            np.testing.assert_allclose(found["other"][i, j], phi, atol=1e-4)


def test_the_amplification_of_a_planted_update():
    """`dW = U diag(s) V^T` along two singular directions of W, whose values are t: `|s| / |t|`."""
    u, v = orthogonal(20, 12, 9), orthogonal(21, 9, 9)
    t, s = np.arange(9, 0, -1, dtype=np.float32), np.float32([6.0, 2.0])
    base = {"w": jnp.asarray((u * t) @ v.T)}
    found = lora.diagnose(base, lora_delta(u[:, 4:6] * s, v[:, 4:6].T), top=0).targets["w"]
    np.testing.assert_allclose(found.amplification, np.sqrt(40 / 41), rtol=1e-5)
    np.testing.assert_allclose(found.spectrum, s, rtol=1e-5)
    np.testing.assert_allclose(found.weight_spectral_norm, 9, rtol=1e-5)
    np.testing.assert_allclose(found.effective_rank, 4 / 3**0.75, rtol=1e-5)  # p = 3/4, 1/4
    assert found.rank == 2 and found.rank_for(0.9) == 1 and found.rank_for(0.901) == 2


def test_a_planted_intruder_is_found_and_removed():
    """Of `W` of values 9 to 4, an update of one direction that W has (which must stay), and one of
    size 7 that it has not, in a stack beside a layer that has none."""
    u, v = orthogonal(22, 12, 9), orthogonal(23, 9, 9)
    t = np.float32([9, 8, 6, 5, 4, 3])
    weight = (u[:, :6] * t) @ v[:, :6].T
    base = {"w": jnp.asarray(np.stack([weight, weight]))}
    new = np.stack([u[:, 7] * 7, u[:, 0]], axis=1), np.stack([v[:, 7], v[:, 0]])
    old = np.stack([u[:, 1], u[:, 0]], axis=1), np.stack([v[:, 1], v[:, 0]])
    a, b = (np.stack(pair).astype(np.float32) for pair in zip(new, old, strict=True))
    delta = {"w": LoRANode(a=jnp.asarray(a), b=jnp.asarray(b), scale=jnp.ones(2))}
    found = lora.diagnose(base, delta, top=4)
    intruders = found.targets["w"].intruders
    assert intruders.count.tolist() == [1, 0]
    assert intruders.is_new[0].tolist() == [False, False, True, False]  # after 10 and 8
    np.testing.assert_allclose(intruders.cosines[0, 2], 0, atol=1e-5)
    np.testing.assert_allclose(intruders.values[0], [10, 8, 7, 6], rtol=1e-5)
    for factor in (0.0, 0.5, 1.0, 2.0):
        repaired = found.repair(factor)
        merged = np.asarray(lora.merge(base, repaired)["w"])
        kept = weight + np.outer(u[:, 0], v[:, 0])
        expected = kept + 7 * factor * np.outer(u[:, 7], v[:, 7])
        np.testing.assert_allclose(merged[0], expected, atol=1e-5)
        assert repaired["w"].rank == (2 if factor == 1 else 3)
    assert not lora.diagnose(base, found.repair(0.0), top=4).targets["w"].intruders.count.any()


@pytest.mark.sampled
@pytest.mark.parametrize("name", METHODS)
def test_a_delta_that_changes_nothing_says_so(name):
    base, delta = lora.lora_transform(STACK, METHODS[name], key=KEY)
    found = lora.diagnose(base, delta)  # the programs of the first test
    row = found.targets["layers/q_proj"]
    assert row.is_zero.all() and not row.intruders.count.any()
    for value in (row.norm, row.amplification, row.effective_rank, row.relative_norm, row.spectrum):
        assert (value == 0).all()
    assert (row.rank_for() == 0).all() and "no update" in str(found)
    assert found.repair(0.0)["layers"]["q_proj"] is delta["layers"]["q_proj"]


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (8, 8)])
def test_triplets_from_the_gram_matrix(shape):
    matrix = cases.drawn(30, *shape)
    matrix[:, -1] = matrix[:, 0]  # and with a value that is zero, or not, by the shape
    u, s, v = map(np.asarray, jax.jit(spectra.by_gram)(1e-25 * matrix))
    _, expected, _ = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(s * 1e25, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose((u * s) @ v.T * 1e25, matrix, atol=1e-5)
    rank = np.linalg.matrix_rank(matrix)
    for side in (u, v):
        np.testing.assert_allclose(
            side.T @ side, np.eye(len(s)) * (np.arange(len(s)) < rank), atol=1e-4
        )


# What it costs.


@pytest.mark.parametrize("name", ["lora", "pissa", "adalora", "vera", "loha"])
def test_no_dense_update_is_built_or_decomposed_where_factors_suffice(name):
    rows, columns = 40, 24
    base, delta = made({"q_proj": cases.normal(40, 2, rows, columns)}, METHODS[name])
    nodes = delta_nodes(delta)
    node = nodes["q_proj"].resolve(base["q_proj"], nodes)
    options = {"layout": lora.Layout(), "stack_ndim": 1, "directions": 9}

    def results_of(primitive, top):
        measure = functools.partial(measured, **options, top=top)
        found = jaxprs.of(primitive, measure, base["q_proj"], node, [node])
        return [[variable.aval.shape for variable in eqn.outvars] for eqn in found]

    for top in (0, 3):
        sizes = [size for shapes in results_of("svd", top) for shape in shapes for size in shape]
        assert 1 < max(sizes) <= 4, "an SVD is of the core between the factors"
    # The only product of the weight's own shape would be the update, which intruders need.
    own = [[(rows, columns)], [(columns, rows)]]
    assert not [shapes for shapes in results_of("dot_general", 0) if shapes in own]
    assert [shapes for shapes in results_of("dot_general", 3) if shapes in own]


def test_a_second_delta_compiles_nothing(monkeypatch):
    base, delta = made(STACK, METHODS["lora"])
    traced = jax.jit(chex.assert_max_traces(measured.__wrapped__, n=1), static_argnames=STATIC)
    monkeypatch.setattr(walk, "measured", traced)
    lora.diagnose(base, delta, threshold=THRESHOLD)
    lora.diagnose(base, cases.moved(delta, 5), threshold=0.1)


# What is wrong, or left out.


def test_what_has_no_row_is_listed():
    params = {
        "q_proj": cases.normal(50, 6, 5),
        "k_proj": cases.normal(51, 6, 5),
        "layers": {"norm": cases.normal(52, 3, 6)},
        "embed": cases.normal(53, 8, 6),
    }
    method = {"q_proj": lora.LoRA(rank=2), "k_proj": lora.Bottleneck(size=2),
              "norm": lora.Full(), "embed": lora.Prompt(length=2)}  # fmt: skip
    base, delta = made(params, method)
    found = lora.diagnose(base, delta, top=0)
    assert set(found.targets) == {"q_proj"}
    assert len(found.skipped) == 3 and "no matrix" in found.skipped["layers/norm"]
    assert "layers/norm: not diagnosed" in str(found)
    with pytest.raises(ValueError, match="k_proj.*no update of a matrix|no update of a matrix"):
        lora.diagnose(base, {name: node for name, node in delta.items() if name != "q_proj"})


def test_a_layout_says_what_a_full_delta_cannot():
    base = {"q_proj": cases.normal(54, 6, 2, 3)}
    _, delta = made(base, lora.Full(), targets=".*")
    layout = lora.Layout(contracted=(-3,), output=(-2, -1))
    found = lora.diagnose(base, delta, layouts={"q_proj": layout}, top=0)
    assert found.targets["q_proj"].shape == (6, 6)
    assert lora.diagnose(base, delta, top=0).targets["q_proj"].norm.shape == (6,)
    with pytest.raises(ValueError, match="no update of a matrix.*q_proj: no matrix"):
        lora.diagnose(base, delta, layouts={"q_proj": None})


def test_what_shares_with_a_repaired_node_is_repaired_too():
    """A bias that an IA3 scales follows its Full; a projection that nobody shares is gone, and one
    that another VeRA still reads is kept."""
    base = {"q_proj": cases.normal(60, 7, 5), "bias": cases.normal(61, 5)}
    _, delta = made(base, lora.IA3(), targets="q_proj")
    delta["bias"] = IA3BiasNode(of="q_proj")
    found = lora.diagnose(base, delta, threshold=1.0)
    repaired = found.repair(0.5)
    before = lora.merge(base, delta)
    assert {type(node) for node in repaired.values()} == {FullNode} and found.skipped["bias"]
    np.testing.assert_allclose(lora.merge(base, repaired)["bias"], before["bias"], atol=1e-6)
    params = {"q_proj": cases.normal(62, 7, 5), "k_proj": cases.normal(63, 7, 5)}
    base, delta = made(params, lora.VeRA(rank=4))
    found = lora.diagnose(base, delta, threshold=1.0)
    assert set(found.repair(0.5)) == {"q_proj", "k_proj"}
    intruders = found.targets["k_proj"].intruders
    none = dataclasses.replace(intruders, is_new=np.zeros_like(intruders.is_new))
    targets = dict(
        found.targets, k_proj=dataclasses.replace(found.targets["k_proj"], intruders=none)
    )
    partly = dataclasses.replace(found, targets=targets).repair(0.5)
    assert len(partly) == 3 and partly["k_proj"] is delta["k_proj"]
    np.testing.assert_array_equal(
        lora.merge(base, partly)["k_proj"], lora.merge(base, delta)["k_proj"]
    )


def wrong():
    delta, nan = lora_delta(A, B), lora_delta(np.full_like(A, np.nan), B)
    small, vast = {"w": cases.normal(0, 5, 9)}, {"w": jnp.full((12, 9), jnp.inf)}
    abstract = jax.eval_shape(lambda: BASE)
    many = lora.stack([delta, delta])
    yield "another base", small, delta, {}, r"w: the delta was made for .*\(12, 9\)"
    yield "another tree", {"v": BASE["w"]}, delta, {}, "the delta adapts 'w', which the base"
    yield "no delta", BASE, {}, {}, "no update of a matrix to diagnose: it is empty"
    yield "params", BASE, BASE, {}, "expected a delta node"
    yield "many", BASE, many, {}, "w: the delta was made for a weight of shape"
    yield "abstract", abstract, delta, {}, "w: diagnose reads values"
    yield "diverged", BASE, nan, {}, "w: the update has values that are not finite"
    yield "infinite", vast, delta, {}, "w: the weight has values that are not finite"
    yield "top", BASE, delta, {"top": -1}, "top=-1: expected an integer of at least 0"
    yield "directions", BASE, delta, {"directions": 0}, "directions=0: expected an integer"
    yield "threshold", BASE, delta, {"threshold": 2.0}, "threshold=2.0: expected a cosine"
    yield "layouts", BASE, delta, {"layouts": {"v": None}}, "layouts names 'v'"
    two = {"w": BASE["w"], "v": BASE["w"]}
    elsewhere = {"others": {"theirs": {"v": delta["w"]}}}
    yield "targets", two, delta, elsewhere, r"others\['theirs'\]: it adapts v, the delta w"
    yield "empty other", BASE, delta, {"others": {"x": {}}}, r"others\['x'\]: it adapts no matrix"
    heads = {"w": cases.normal(0, 6, 2, 3)}
    tuned = {"w": FullNode(delta=jnp.ones((6, 2, 3)))}
    layout = lora.Layout(contracted=(-3,), output=(-2, -1))
    by_heads = lora.lora_transform(heads, lora.LoRA(rank=1), key=KEY, layouts={"w": layout})[1]
    unlike = {"others": {"x": by_heads}}
    yield "other layout", heads, tuned, unlike, r"others\['x'\]: w: it takes the weight as Layout"
    misfit = {"others": {"x": lora_delta(A[:5], B)}}
    yield "other shape", BASE, delta, misfit, r"others\['x'\]: w: the delta was made for"


@pytest.mark.parametrize("wrong", list(wrong()), ids=lambda wrong: wrong[0])
def test_wrong_arguments(wrong):
    _, base, delta, options, message = wrong
    with pytest.raises(ValueError, match=message):
        lora.diagnose(base, delta, **({"top": 0} | options))


def test_values_of_a_traced_function_are_refused():
    with pytest.raises(ValueError, match="w: diagnose reads values"):
        jax.jit(lambda base: lora.diagnose(base, lora_delta(A, B)).targets["w"].norm)(BASE)


def test_wrong_repairs():
    found = lora.diagnose(BASE, lora_delta(A, B), top=0)
    with pytest.raises(ValueError, match="intruders were not looked for"):
        found.repair(0.5)
    for factor in (-1, float("nan"), "0.5", None):
        with pytest.raises(ValueError, match="expected a number of at least 0"):
            found.repair(factor)
    with pytest.raises(ValueError, match="share=0: expected"):
        found.targets["w"].rank_for(0)
