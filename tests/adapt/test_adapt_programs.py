"""Each line of `adapt`'s table is true."""

import re

import jax
import jax.numpy as jnp
import pytest
from cases import assert_close, moved
from programs import FOLLOWED, REFUSED, Program, X

import lora_jax as lora

METHOD = lora.LoRA(rank=2, alpha=4.0)
BFLOAT16 = {"cast, stop_gradient, copies, barriers, constraints": 0}


def adapted(program: Program):
    layouts = lora.infer_layouts(program.run, program.params, *program.args)
    layouts = {path: layout for path, layout in layouts.items() if layout}
    smallest = min(program.params["w"].shape)
    method = METHOD if smallest > 1 else lora.LoRA(rank=1, alpha=4.0)
    base, delta = lora.lora_transform(
        program.params, method, targets=".*", key=jax.random.key(0), layouts=layouts
    )
    return base, moved(delta)


def loss_and_gradient(run, weigh, base, delta, args):
    """A loss that tells all results apart, its gradient for the delta and, where it has one, for
    the last argument."""
    x = args[-1]
    floating = jnp.issubdtype(x.dtype, jnp.floating)

    def loss(delta, x, others):
        results = run(weigh(base, delta), *others, x)
        finite = jnp.isfinite(results)  # fill values may not be
        return jnp.sum(jnp.where(finite, jnp.sin(jnp.where(finite, results, 0)), 0)), results

    which = (0, 1) if floating else 0
    grads, results = jax.jit(jax.grad(loss, which, has_aux=True))(delta, x, args[:-1])
    return results, [grads[0], grads[1]] if floating else [grads]


def trained(grads):
    (of_delta, *others) = grads
    mask = lora.trainable_mask(of_delta)
    return [jax.tree.map(lambda g, t: g if t else 0 * g, of_delta, mask), *others]


CASES = [
    pytest.param(name, i, marks=pytest.mark.slow if i else ())  # the first of each line at once
    for name, programs in FOLLOWED.items()
    for i in range(len(programs))
]


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "i"), CASES)
def test_it_is_the_merged_function(name, i):
    program = FOLLOWED[name][i]
    base, delta = adapted(program)
    ours = loss_and_gradient(lora.adapt(program.run), lora.bind, base, delta, program.args)
    theirs = loss_and_gradient(program.run, lora.merge, base, delta, program.args)
    loose = BFLOAT16.get(name) == i
    tolerance = {"rtol": 0.1, "atol": 0.02} if loose else {"rtol": 2e-5, "atol": 3e-6}
    assert_close(ours[0], theirs[0], **tolerance)
    assert_close(trained(ours[1]), trained(theirs[1]), **tolerance)


REFUSALS = [
    (name, i, primitive)
    for name, programs in REFUSED.items()
    for i, (primitive, _) in enumerate(programs)
]


@pytest.mark.parametrize(("name", "i", "primitive"), REFUSALS)
def test_it_refuses(name, i, primitive):
    _, program = REFUSED[name][i]
    base, delta = lora.lora_transform(program.params, METHOD, targets=".*", key=jax.random.key(0))
    with pytest.raises(ValueError, match=rf"^w: ({primitive}), at .*programs\.py:\d+, ") as error:
        jax.eval_shape(lora.adapt(program.run), lora.bind(base, delta), *program.args)
    assert "{'w': None, ...}" in str(error.value) and "fn(merge(base, delta)" in str(error.value)


def test_the_table_in_the_docstring_is_what_was_run():
    table = re.search(r"(?:=+ +=+\n)(.*?)(?: *=+ +=+)", lora.adapt.__doc__, re.DOTALL)[1]
    lines = [re.split(r"  +", line.strip()) for line in table.strip().splitlines()]
    outcomes = {"applied": FOLLOWED, "followed": FOLLOWED, "walked into": FOLLOWED}
    outcomes |= {"as they are": FOLLOWED, "ValueError": REFUSED}
    assert [name for name, _ in lines] == [*FOLLOWED, *REFUSED]
    assert all(name in outcomes[outcome] for name, outcome in lines)


@pytest.mark.parametrize("first", ["lookup of rows", "layers of a stack"])
def test_parts_of_a_weight_wherever_the_indices_point(first):
    """All programs of a line at once, in value."""
    (programs,) = (FOLLOWED[name] for name in FOLLOWED if name.startswith(first))
    weights = [adapted(program) for program in programs]

    @jax.jit
    def run(deltas, args):
        rows = list(zip(programs, weights, deltas, args, strict=True))
        ours = [lora.adapt(p.run)(lora.bind(w[0], d), *a) for p, w, d, a in rows]
        return ours, [p.run(lora.merge(w[0], d), *a) for p, w, d, a in rows]

    ours, theirs = run([delta for _, delta in weights], [program.args for program in programs])
    assert_close(ours, theirs)


def test_a_gradient_of_its_own_that_builds_the_weight():
    """The error comes when the gradient is taken, which is after `adapt` has returned."""

    @jax.custom_vjp
    def layer(x, w):
        return x @ w

    layer.defvjp(
        lambda x, w: (x @ w, (x, w)),
        lambda saved, dy: (dy @ (saved[1] * saved[1]).T, saved[0].T @ dy),
    )
    base, delta = adapted(FOLLOWED["jit"][0])

    def loss(delta, x):
        return lora.adapt(lambda params, x: layer(x, params["w"]))(lora.bind(base, delta), x).sum()

    with pytest.raises(ValueError, match=r"^w: mul, at .*test_adapt_programs\.py:\d+, would build"):
        jax.grad(loss)(delta, X)
