"""`adapt(fn)(bind(base, delta))` is `fn(merge(base, delta))` for generated programs.

Twelve kinds of weights share 200 programs in a default run, and 5,000 under `-m slow`.
"""

import contextlib
import functools
import re

import generated
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generated import KINDS
from hypothesis import HealthCheck, Phase, given, settings

import lora_jax as lora
from lora_jax.tracing import inner_jaxprs, single_equations

SHARES = {kind: 60 if kind == "lora" else 20 if kind == "nf4_lora" else 12 for kind in KINDS}
TOLERANCE = {"float32": (1e-4, 1e-5), "float16": (2e-2, 1e-2), "bfloat16": (1e-1, 6e-2)}
SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def check(program, kind):
    """The same value and gradients, or the error that the program must get."""
    refused = program.args.refused if not isinstance(kind.method, lora.Full) else ()
    base, delta = generated.weights(program, kind)
    if refused:
        with pytest.raises(ValueError, match=error("|".join(refused))):
            jax.eval_shape(functools.partial(adapted, program, base), delta, program.args.arrays)
        return
    compare(program, base, delta)
    asks = program.asked and kind.transposes and not kind.format
    if asks and (layout := generated.inferred(program)):
        base, delta = generated.weights(program, kind, layout)
        try:
            jax.eval_shape(functools.partial(adapted, program, base), delta, program.args.arrays)
        except ValueError as refusal:  # what were layers are a side of the matrix then
            returned = "w: the function returns this weight transposed"  # at no line
            assert re.match(error(".*"), str(refusal)) or str(refusal).startswith(returned)
            return
        compare(program, base, delta)


def error(primitives):
    return rf"^w: ({primitives}), at .*pieces\.py:\d+, .*'w'"


def adapted(program, base, delta, given):
    return lora.adapt(program.run)(lora.bind(base, delta), given)


def compare(program, base, delta):
    ours, theirs = jax.jit(functools.partial(both, program, base))(delta, program.args.arrays)
    loose = max(program.args.dtypes, key=lambda dtype: TOLERANCE[dtype])
    assert_close(ours, theirs, *TOLERANCE[loose])


def both(program, base, delta, arrays):
    """Results and gradients of the adapted program, and of the merged one."""
    floats = [i for i, array in enumerate(arrays) if jnp.issubdtype(array.dtype, jnp.floating)]

    def side(run, weigh):
        def loss(delta, moving):
            given = list(arrays)
            for i, array in zip(floats, moving, strict=True):
                given[i] = array
            results = run(weigh(base, delta), given)
            return sum(map(_summed, jax.tree.leaves(results)), jnp.float32(0)), results

        moving = [arrays[i] for i in floats]
        (of_delta, others), results = jax.grad(loss, (0, 1), has_aux=True)(delta, moving)
        mask = lora.trainable_mask(of_delta)
        trained = jax.tree.map(lambda g, trains: g if trains else 0 * g, of_delta, mask)
        return results, trained, others

    merge = lora.merge if delta else lambda base, _: lora.dequantize(base)
    return side(lora.adapt(program.run), lora.bind), side(program.run, merge)


def _summed(y):
    y = y.astype(jnp.float32)
    finite = jnp.isfinite(y)  # fill values may not be
    # Slowly curved, or the last bit of a 16-bit y would change its cotangent by several per cent.
    return jnp.sum(jnp.where(finite, 4 * jnp.sin(jnp.where(finite, y, 0) / 4), 0))


def assert_close(ours, theirs, rtol, atol):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        mine, other = np.asarray(mine, np.float64), np.asarray(other, np.float64)
        largest = np.abs(other[np.isfinite(other)]).max(initial=1)
        np.testing.assert_allclose(mine, other, rtol=rtol, atol=atol * largest)


@pytest.mark.parametrize("name", KINDS)
def test_it_is_the_merged_program(name):
    _run(name, SHARES[name])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("name", KINDS)
def test_it_is_the_merged_program_of_thousands(name, part):
    _run(name, 25 * SHARES[name] // 4, seed=part + 1)


def _run(name, count, seed=0):
    kind = KINDS[name]

    # A failing program of thousands is not made small: that can take longer than all of them.
    phases = [Phase.generate] if seed else list(Phase)

    @settings(SETTINGS, max_examples=count, phases=phases)
    @given(generated.programs(kind))
    def holds(program):
        check(program, kind)

    (hypothesis.seed(seed)(holds) if seed else holds)()


def test_the_generator_reaches_every_rule(monkeypatch):
    """Traced, not run. The exceptions have programs of their own in `programs`."""
    reached = set()
    rules = {*single_equations.RULES, *inner_jaxprs.RULES} - {
        "pvary",
        "reshard",
        "closed_call",
        "stack",
    }

    def noting(name, rule):
        def note(*args):
            reached.add(name)
            return rule(*args)

        return note

    for table in (single_equations.RULES, inner_jaxprs.RULES):
        for name, rule in list(table.items()):
            monkeypatch.setitem(table, name, noting(name, rule))

    def trace(program):
        if reached >= rules:
            return
        base, delta = generated.weights(program, KINDS["lora"])
        with contextlib.suppress(ValueError):  # what may be refused, the property says
            jax.eval_shape(lora.adapt(program.run), lora.bind(base, delta), program.args.arrays)

    for length, count in ((8, 250), (1, 150)):  # some ends are possible after few moves alone
        generate = settings(SETTINGS, max_examples=count, phases=[Phase.generate])
        generate(given(generated.programs(KINDS["lora"], length=length))(trace))()
    assert reached >= rules
