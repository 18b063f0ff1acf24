"""What the trace says of a leaf's axes, and what `lora_transform` makes of it."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import FOLLOWED, X

import lora_jax as lora

MATRIX, FLIPPED = lora.Layout(), lora.Layout(contracted=(-1,), output=(-2,))
HEADS_OUT = lora.Layout(contracted=(-3,), output=(-2, -1))
HEADS_IN = lora.Layout(contracted=(-3, -2), output=(-1,))
FUSED = lora.Layout(contracted=(-2,), output=(-3, -1))


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


USES = [
    (MATRIX, shaped(6, 4), lambda w, x: x @ w),
    (FLIPPED, shaped(4, 6), lambda w, x: x @ w.T),
    (FLIPPED, shaped(4, 6), lambda w, x: jnp.einsum("oi,bi->ob", w, x)),
    (HEADS_OUT, shaped(6, 2, 3), lambda w, x: jnp.einsum("bd,dnh->bnh", x, w)),
    (HEADS_IN, shaped(2, 3, 5), lambda w, x: jnp.einsum("bnh,nhd->bd", x.reshape(-1, 2, 3), w)),
    (HEADS_OUT, shaped(6, 2, 3), lambda w, x: x @ w.reshape(6, 6)),
    (FUSED, shaped(3, 6, 5), lambda w, x: jnp.einsum("bd,kde->kbe", x, w)),
    (MATRIX, shaped(3, 6, 6), lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]),
    (MATRIX, shaped(3, 6, 5), lambda w, x: jax.vmap(lambda w, x: x @ w)(w, jnp.stack([x] * 3))),
    (MATRIX, shaped(3, 6, 5), lambda w, x: x @ w[1]),
    (
        lora.Layout(contracted=(-3,), output=(-1,)),  # layers stacked in the middle
        shaped(6, 3, 6),
        lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, jnp.moveaxis(w, 1, 0))[0],
    ),
    (MATRIX, shaped(6, 1), lambda w, x: (x @ w)[:, 0]),
    (MATRIX, shaped(1, 6, 6), lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]),
    (None, shaped(4, 6), lambda w, x: x * w),
    (None, shaped(6), lambda w, x: x @ w),
    (None, shaped(2, 2), lambda w, x: x),
]


@pytest.mark.parametrize("i", range(len(USES)))
def test_a_layout_is_read_off_the_use(i):
    expected, weight, run = USES[i]
    found = lora.infer_layouts(lambda p, x: run(p["w"], x), {"w": weight}, shaped(4, 6))
    assert found == {"w": expected}


@pytest.mark.sampled
@pytest.mark.parametrize(
    "i",
    [
        pytest.param(i, marks=() if i in (1, 3, 4, 7, 10) else pytest.mark.slow)
        for i, (layout, *_) in enumerate(USES)
        if layout
    ],
)
def test_the_rank_is_that_of_the_matrix(i):
    """The update of a rank-1 delta, as the program applies it, maps all inputs onto one line."""
    layout, weight, run = USES[i]
    params = {"w": cases.normal(0, *weight.shape) / 3}
    base, delta = lora.lora_transform(
        params, lora.LoRA(rank=1), targets="w", key=jax.random.key(0), layouts={"w": layout}
    )
    merged = lora.merge(base, cases.moved(delta))["w"]
    matrices = np.asarray(layout.to_matrix(merged - params["w"])).astype(np.float64)
    assert matrices.shape[-2] == np.prod([weight.shape[axis] for axis in layout.contracted])
    assert (np.linalg.matrix_rank(matrices, tol=1e-5) == 1).all()
    x = cases.normal(1, 4, 6)
    ours = lora.adapt(lambda p, x: run(p["w"], x))(lora.bind(base, cases.moved(delta)), x)
    cases.assert_close(ours, run(merged, x))


def test_inside_every_kind_of_program():
    for programs in FOLLOWED.values():
        for program in programs:
            found = lora.infer_layouts(program.run, program.params, *program.args)
            assert found["w"] is not None


def test_a_tied_table_gets_the_layout_of_its_rows():
    def head_first(params, ids):
        logits = jnp.ones((2, 6)) @ params["table"].T
        return params["table"][ids] @ params["table"].T + logits[:1]

    found = lora.infer_layouts(head_first, {"table": shaped(9, 6)}, jnp.array([1, 2]))
    assert found["table"] == MATRIX and found["table"].gathered


def test_all_linear_is_what_the_trace_saw():
    """By name a table and a scale pass for matrices, and a matrix for a norm; the trace knows."""

    def run(params, ids):
        x = params["vectors"][ids] * params["gains"][:2]
        return x @ params["norm"]["mixing"]

    params = {"vectors": X, "gains": X, "norm": {"mixing": cases.normal(0, 6, 5)}}
    layouts = lora.infer_layouts(run, params, jnp.array([1, 2]))
    by_trace = lora.lora_transform(
        params, lora.LoRA(rank=1), key=jax.random.key(0), layouts=layouts
    )
    assert lora.transform.delta_nodes(by_trace[1]).keys() == {"norm/mixing"}
    named = lora.lora_transform(
        params, lora.LoRA(rank=1), targets="vectors", key=jax.random.key(0), layouts=layouts
    )
    assert lora.transform.delta_nodes(named[1]).keys() == {"vectors"}


def test_two_matrices_in_one_leaf():
    def run(params, x):
        return jnp.einsum("bd,dnh->bnh", x, params["w"]) + (x[:, :2] @ params["w"][0])[:, :, None]

    with pytest.raises(ValueError, match=r"^w, of shape \(6, 2, 2\), is used as two different"):
        lora.infer_layouts(run, {"w": shaped(6, 2, 2)}, shaped(4, 6))


LAYERED = [
    lambda w, x: jnp.einsum("bi,sio->sbo", x, w[1:]),
    lambda w, x: jnp.einsum("bi,sio->sbo", x, w) + (x @ w[0])[None],
    lambda w, x: (
        jnp.einsum("bi,sio->sbo", x, w) + jnp.einsum("sbi,sio->sbo", jnp.stack([x] * 3), w)
    ),
    lambda w, x: jnp.einsum("bi,sio->sbo", x, w) + jax.lax.scan(lambda x, w: (x @ w, x), x, w)[1],
    lambda w, x: jax.lax.fori_loop(0, 2, lambda _, c: (c[0] @ c[1][0], c[1]), (x, w))[0],
]


@pytest.mark.parametrize("i", range(len(LAYERED)))
def test_axes_of_which_some_use_reads_parts_are_stacked(i):
    """Though another use contracts all layers at a time."""
    found = lora.infer_layouts(
        lambda p, x: LAYERED[i](p["w"], x), {"w": shaped(3, 6, 6)}, shaped(4, 6)
    )
    assert found == {"w": MATRIX}


def test_an_axis_used_in_parts():
    def run(params, x):
        return jnp.einsum("bd,dnf->bnf", x, params["w"].reshape(6, 2, 4)[:, :, :, None][..., 0])

    def half(params, x):
        return jnp.einsum("bd,ndf->bnf", x, params["w"].reshape(2, 6, 4))

    def whole(params, x):
        x = jnp.stack([x] * 4, axis=-1)
        return jnp.einsum("bdf,ndf->bn", x, params["w"].reshape(2, 6, 4))

    assert lora.infer_layouts(run, {"w": shaped(6, 8)}, shaped(4, 6)) == {"w": MATRIX}
    assert lora.infer_layouts(half, {"w": shaped(12, 4)}, shaped(4, 6)) == {"w": MATRIX}
    with pytest.raises(ValueError, match=r"^w, of shape \(12, 4\), has an axis \(-2\) of which"):
        lora.infer_layouts(whole, {"w": shaped(12, 4)}, shaped(4, 6))


def test_a_stack_that_the_program_contradicts():
    def run(params, x):
        return jnp.einsum("bd,dnh->bnh", x, params["w"])

    params = {"w": cases.normal(0, 6, 2, 3)}
    base, delta = lora.lora_transform(params, lora.LoRA(rank=1), targets="w", key=jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"^w: dot_general, at .*layouts=infer_layouts\(fn, params"
    ):
        lora.adapt(run)(lora.bind(base, delta), X)


def test_layouts_of_unknown_leaves_and_impossible_axes():
    def transform(**layouts):
        return lora.lora_transform(
            {"w": X}, lora.LoRA(rank=1), targets="w", key=jax.random.key(0), layouts=layouts
        )

    with pytest.raises(ValueError, match="layouts names 'v'"):
        transform(v=MATRIX)
    with pytest.raises(ValueError, match=r"w: Layout.* does not fit shape \(4, 6\): expected"):
        transform(w=HEADS_IN)
    with pytest.raises(ValueError, match="does not fit"):
        transform(w=lora.Layout(contracted=(-1,), output=(-1,)))


LEFT_OUT = {
    "scale": (shaped(6), "multiplied entry by entry, as a norm's scale is (mul at "),
    "bias": (shaped(6), "added, as a bias is (add at "),
    "grid": (shaped(4, 6), "added, as a bias is (add at "),
    "in_jit": (shaped(6), "multiplied entry by entry, as a norm's scale is (mul at "),
    "in_scan": (shaped(3, 6), "added, as a bias is (add at "),
    "sorted": (shaped(4, 6), "no product (sort at "),
    "vector": (shaped(6), "contracted whole, or with none of its axes (dot_general at "),
    "unused": (shaped(6, 6), "never used"),
}


def test_every_leaf_that_is_no_matrix_has_its_reason_and_line():
    def run(p, x):
        x = x * p["scale"][None] + p["bias"][None] + p["grid"]
        x = jax.jit(lambda g: x * g[None])(p["in_jit"])
        x = jax.lax.scan(lambda x, b: (x + b[None], None), x, p["in_scan"])[0]
        return x @ p["w"] + (jnp.sort(p["sorted"]).sum() + x @ p["vector"]).sum()

    params = {name: weight for name, (weight, _) in LEFT_OUT.items()} | {"w": shaped(6, 6)}
    found = lora.infer_layouts(run, params, shaped(4, 6))
    assert found.reasons.keys() == LEFT_OUT.keys() and found["w"] == MATRIX
    for name, (_, said) in LEFT_OUT.items():
        assert found.reasons[name].startswith(said), found.reasons[name]
        assert said == "never used" or f"{__file__}:" in found.reasons[name]


def test_all_linear_goes_by_use_where_layouts_tell():
    """A matrix called an embedding is adapted; a table by another name is not."""

    def run(p, ids):
        return p["rows"][ids] @ p["time_embed"] @ p["lm_head"]

    params = {"rows": X, "time_embed": cases.normal(0, 6, 6), "lm_head": cases.normal(1, 6, 6)}
    layouts = lora.infer_layouts(run, params, jnp.array([1, 2]))
    _, delta = lora.lora_transform(
        params, lora.LoRA(rank=1), key=jax.random.key(0), layouts=layouts
    )
    assert delta.keys() == {"time_embed"}
