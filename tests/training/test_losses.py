"""A loss owns its batch: what follows from its fields, for every loss of the registry."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax import parallel, training
from lora_jax.training.losses.fields import check_batch
from lora_jax.training.rows import rows_of

ROWS, LENGTH = 4, 8
CASES = {name: entry.make(small.CONFIG) for name, entry in training.LOSSES.items()}
FIELDS = [(name, field) for name, loss in CASES.items() for field in loss.fields]


def abstract(name, **changes):
    return CASES[name].abstract_batch(ROWS, LENGTH) | changes


def array(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


@functools.cache
def adapted():
    return lora.lora_transform(small.params(), lora.LoRA(rank=2), key=jax.random.key(0))


def traced(loss, batch):
    base, delta = adapted()
    return jax.eval_shape(lambda d, b, x: loss(d, b, x, None), delta, base, batch)


@pytest.mark.parametrize("name", CASES)
def test_a_loss_takes_the_batch_that_it_declares(name):
    """Also beside arrays that it does not, as wider integers, and by its own maker's keywords."""
    loss, scalar = CASES[name], array(dtype=jnp.float32)
    wide = {
        field: array(*x.shape, dtype=np.int16 if x.dtype == jnp.int32 else x.dtype)
        for field, x in abstract(name).items()
    }
    for batch in (abstract(name), abstract(name, more=array(3)), wide):
        assert traced(loss, batch) == (scalar, scalar)
    with jax.numpy_dtype_promotion("strict"):
        assert traced(loss, abstract(name)) == (scalar, scalar)
    settings = {key: setting.value for key, setting in loss.settings.items()}
    assert loss.settings_of(**settings).keys() == settings.keys()
    made = training.LOSSES[name].make(
        small.CONFIG, remat="full", unroll=2, chunk=4, attention="xla"
    )
    assert traced(made, abstract(name)) == (scalar, scalar) and made.name == name
    assert jax.eval_shape(loss.positions, abstract(name)).shape == ()


@pytest.mark.parametrize("name, field", FIELDS)
def test_a_batch_of_another_form_is_refused_by_name(name, field):
    loss, good = CASES[name], abstract(name)
    x, axes = good[field], loss.fields[field].names

    def refuses(match, batch):
        with pytest.raises(ValueError, match=match):
            traced(loss, batch)

    shown = rf"the loss {name}.*'{field}'"
    refuses(rf"the loss {name} needs.*'{field}', \[rows.*which the batch lacks: it holds \w+",
            {key: value for key, value in good.items() if key != field})  # fmt: skip
    wrong = jnp.int32 if x.dtype == jnp.float32 else jnp.float32
    refuses(f"{shown} holds {wrong.__name__}, expected (integers|bool|floats)",
            good | {field: array(*x.shape, dtype=wrong)})  # fmt: skip
    refuses(f"{shown} has shape .*, expected .*rows", good | {field: array(*x.shape, 1)})
    refuses(f"{shown} has shape .*, expected .*rows", good | {field: array(dtype=x.dtype)})
    other = next(key for key in good if key != field)
    for axis, called in enumerate(axes):
        odd = array(*x.shape[:axis], x.shape[axis] + 1, *x.shape[axis + 1 :], dtype=x.dtype)
        batch = {other: good[other]} | good | {field: odd}
        if called.isdecimal():
            refuses(f"{shown} has shape .*, expected .*{called}", batch)
        else:
            refuses(rf"the loss {name}.*has \d {called}, .* has \d.*as many", batch)


def test_a_batch_that_is_no_mapping_is_refused():
    with pytest.raises(ValueError, match=r"next_token takes a batch that maps tokens.*ShapeDtype"):
        CASES["next_token"](None, None, array(2, 3), None)
    with pytest.raises(ValueError, match="lacks: it holds nothing"):
        CASES["next_token"](None, None, {}, None)


@pytest.mark.parametrize("axes", ["", "positions rows", "2 rows", "rows rows", "rows columns",
                                  "rows positions positions", "rows -1", "rows 2.5"])  # fmt: skip
def test_a_field_begins_with_rows(axes):
    with pytest.raises(
        ValueError, match="expected axes that begin with rows, .*'rows 2 positions'"
    ):
        training.Field(axes, jnp.int32)


def test_a_field_holds_numbers():
    with pytest.raises(ValueError, match="expected bool, integers or floats"):
        training.Field("rows", jax.random.key(0).dtype)
    floats = {"x": training.Field("rows", jnp.float32)}
    check_batch("mine", floats, {"x": np.zeros(2, np.float16)})
    with pytest.raises(ValueError, match="mine: the batch's 'x' holds int32, expected floats"):
        check_batch("mine", floats, {"x": np.zeros(2, np.int32)})


def test_the_batch_is_checked_when_the_step_is_traced_and_no_more():
    base, delta = adapted()
    tx = training.adamw(steps=5)
    step = training.train_step(CASES["next_token"], tx)
    once = jax.jit(chex.assert_max_traces(lambda *args: step(*args), n=1))
    state = training.init_state(delta, tx, learning_rate=1e-2, seed=0)
    for seed in range(2):
        state, metrics = once(state, base, small.batch(seed))
    assert np.isfinite(metrics.loss)


def test_plain_rows_as_a_batch():
    """Every token but the first counts, as the plain cross-entropy of all logits has it."""
    tokens = small.batch(0)["tokens"]
    batch = training.next_token_batch(tokens)
    assert CASES["next_token"].positions(batch) == tokens[:, 1:].size
    total, count = CASES["next_token"]({}, small.params(), batch, None)
    logits = small.llama.forward(small.params(), tokens[:, :-1], small.CONFIG)
    losses = jnp.take_along_axis(-jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    chex.assert_trees_all_close((total, count), (losses.sum(), losses.size), rtol=1e-5)


def test_a_cut_batch_has_as_many_rows_everywhere():
    assert rows_of({"x": np.zeros((3, 2)), "y": [np.zeros(3)]}) == 3
    with pytest.raises(ValueError, match="x has 3 rows there and y/0 has 2"):
        rows_of({"x": np.zeros((3, 2)), "y": [np.zeros(2)]})
    with pytest.raises(ValueError, match="y of the batch is a scalar"):
        rows_of({"x": np.zeros(3), "y": np.float32(1)})
    with pytest.raises(ValueError, match="no arrays"):
        rows_of({})
    tx = training.adamw(steps=5)
    base, delta = adapted()
    batch = small.batch(0) | {"targets": small.batch(0, rows=2)["targets"]}
    step = training.train_step(CASES["next_token"], tx, accumulate=2)
    with pytest.raises(ValueError, match="rows there and tokens has 4|targets has 2"):
        step(training.init_state(delta, tx, seed=0), base, batch)
    with pytest.raises(ValueError, match="rows there and tokens has 4|targets has 2"):
        parallel.replicated(jax.devices()[:2]).batch(batch)


PAIRS = {
    "pairs": training.Field("rows 2 positions", jnp.int32),
    "labels": training.Field("rows", jnp.int32),
}


def test_fields_lie_over_a_mesh_by_their_axes():
    mesh = parallel.make_mesh({"fsdp": 4, "sequence": 2})
    batch = {"pairs": np.zeros((4, 2, 6), np.int32), "labels": np.zeros(4, np.int32)}
    placed = parallel.on_mesh(mesh, {}, PAIRS).batch(batch | {"more": np.zeros(3)})
    specs = {name: x.sharding.spec for name, x in placed.items()}
    assert specs == {"pairs": P("fsdp", None, "sequence"), "labels": P("fsdp")}
    plain = parallel.on_mesh(mesh, {}).batch({"x": batch["pairs"], "y": batch["labels"]})
    assert [x.sharding.spec for x in plain.values()] == [P("fsdp", "sequence", None), P("fsdp")]

    def refuses(match, **changes):
        with pytest.raises(ValueError, match=match):
            parallel.on_mesh(mesh, {}, PAIRS).batch(batch | changes)

    refuses("4 rows, .*'pairs' has 4|5 rows", labels=np.zeros(5, np.int32))
    refuses("7 positions cannot be split over sequence=2", pairs=np.zeros((4, 2, 7), np.int32))
    refuses(r"'pairs' has shape \(4, 3, 6\)", pairs=np.zeros((4, 3, 6), np.int32))
