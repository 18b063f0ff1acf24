"""IA3: its two formulas, its merged form, and what a stack may leave out."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, moved

import lora_jax as lora

PARAMS = {"k_proj": cases.normal(0, 6, 5), "down_proj": cases.normal(1, 6, 6)}
METHOD = {"k_proj": lora.IA3(), "down_proj": lora.IA3(scales="input")}
X, KEY = cases.normal(2, 3, 6), jax.random.key(0)


def made(method=METHOD, params=PARAMS, **kwargs):
    delta = jax.jit(lambda p: lora.lora_transform(p, method, key=KEY, **kwargs)[1])(params)
    return params, moved(delta)


def test_formulas():
    base, delta = made()
    weights = lora.bind(base, delta)
    k, down = delta["k_proj"].l[None], delta["down_proj"].l[None]
    assert_close(lora.linear(X, weights["k_proj"]), (X @ PARAMS["k_proj"]) * k)
    assert_close(lora.linear(X, weights["down_proj"]), (X * down) @ PARAMS["down_proj"])


def test_merged_form_scales_columns_or_rows():
    base, delta = made()
    merged = lora.merge(base, delta)
    assert_close(merged["k_proj"], PARAMS["k_proj"] * delta["k_proj"].l[None])
    assert_close(merged["down_proj"], PARAMS["down_proj"] * delta["down_proj"].l[:, None])


@pytest.mark.parametrize("scales", ["output", "input"])
def test_more_axes(scales):
    params = {"kernel": cases.normal(3, 2, 3, 5)}
    layouts = {"kernel": lora.Layout(contracted=(-3, -2), output=(-1,))}
    base, delta = made(lora.IA3(scales=scales), params, layouts=layouts)
    node = delta["kernel"]
    assert node.l.shape == ((5,) if scales == "output" else (2, 3))
    merged = lora.merge(base, delta)
    factor = node.l[None, None] if scales == "output" else node.l[..., None]
    assert_close(merged["kernel"], params["kernel"] * factor)
    assert_close(node.as_matrix().merge(params["kernel"].reshape(6, 5)).reshape(2, 3, 5),
                 merged["kernel"])  # fmt: skip


def test_unmerge_does_not_guess():
    base, delta = made()
    delta["k_proj"] = delta["k_proj"].replace(l=delta["k_proj"].l.at[2].set(0))
    back = lora.unmerge(lora.merge(base, delta), delta)["k_proj"]
    assert np.isnan(back[:, 2]).all() and np.isfinite(np.delete(back, 2, axis=1)).all()


def test_a_member_of_a_stack_without_the_target_neither_applies_nor_trains_it():
    both = made()[1]
    one = {"k_proj": both["k_proj"]}
    stacked = lora.stack([one, both])

    def loss(delta):
        weights = lora.bind(PARAMS, delta)
        return jnp.sin(lora.linear(X, weights["down_proj"]).T @ lora.linear(X, weights["k_proj"]))

    def total(delta):
        return loss(delta).sum()

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(total)))(stacked)
    assert np.isclose(values[0], total(one)) and np.isclose(values[1], total(both))
    assert not np.any(gradients["down_proj"].l[0]) and np.all(gradients["down_proj"].l[1])


def test_errors():
    with pytest.raises(ValueError, match="scales='both'.*'output' or 'input'"):
        lora.IA3(scales="both")
    base, delta = made()
    with pytest.raises(ValueError, match=r"k_proj: .*shape \(6, 5\), the base has \(6, 4\)"):
        lora.bind(base | {"k_proj": jnp.ones((6, 4))}, delta)
    weight = lora.bind(base, delta)["down_proj"]
    with pytest.raises(ValueError, match="looked up by index: there is no input to scale"):
        lora.embed(jnp.array([1]), weight)
