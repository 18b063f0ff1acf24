"""Attention: the TPU kernel interpreted, beside the formula; and which implementation is taken."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import context_mesh
from lora_jax.kernels import attention
from lora_jax.kernels.attention import attend, causal_mask, cudnn, masked_attention, splash

RNG = np.random.default_rng(0)
B, T, N, K, H = 2, 256, 4, 2, 32
Q, KEYS, VALUES, COTANGENT = (
    RNG.standard_normal((B, T, heads, H), np.float32) for heads in (N, K, K, N)
)
# As packing numbers them: from 1, in runs, with 0 for padding at a row's end.
SEGMENTS = np.stack([np.repeat([1, 2, 3], [100, 29, 127]), np.repeat([1, 2, 0], [3, 200, 53])])
SEGMENTS = SEGMENTS.astype(np.int32)
INTERPRETED = partial(splash.attend, name="attended", interpret=True)


def formula(q, k, v, segment_ids):
    return masked_attention(q, k, v, causal_mask(T, segment_ids))


def value_and_gradients(f, segment_ids):
    def both(q, k, v):
        y, vjp = jax.vjp(lambda *a: f(*a, segment_ids), q, k, v)
        return y, *vjp(COTANGENT)

    return jax.jit(both)(Q, KEYS, VALUES)


def assert_is_the_formula(ours, segment_ids):
    """Both sum 256 products in float32, in another order: no element of either is off by more than
    256 roundings of 2^-24 of the largest."""
    for found, expected in zip(ours, value_and_gradients(formula, segment_ids), strict=True):
        bound = T * 2.0**-24 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize(
    "segment_ids", [SEGMENTS, pytest.param(None, marks=pytest.mark.slow)], ids=["packed", "whole"]
)
def test_the_tpu_kernel_is_the_formula(segment_ids):
    assert_is_the_formula(value_and_gradients(INTERPRETED, segment_ids), segment_ids)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"sequence": 2, "arms": 2}], ids=str)
def test_over_a_mesh_it_is_the_formula(axes):
    names = ("arms", "fsdp", "sequence", "tensor")
    auto = (jax.sharding.AxisType.Auto,) * 4
    mesh = jax.make_mesh([axes.get(name, 1) for name in names], names, axis_types=auto)
    with jax.set_mesh(mesh):
        assert_is_the_formula(value_and_gradients(INTERPRETED, SEGMENTS), SEGMENTS)


def test_the_batch_of_a_vmap_is_more_rows():
    """Arms with queries of their own over the same segments."""
    q, k, v, segments = (x[:, 96:104] for x in (Q, KEYS, VALUES, SEGMENTS))
    mapped = jax.jit(jax.vmap(attend, (0, None, None, None)))(np.stack([q, 2 * q]), k, v, segments)
    np.testing.assert_allclose(mapped[1], attend(2 * q, k, v, segments), atol=1e-6)


def test_rows_of_a_vmap_reach_cudnn_as_rows():
    """An argument that the arms share is repeated; one that is not there stays away."""
    shapes = []

    def rows(x, scale, absent):
        shapes.append(x.shape)
        return (x * scale[:, None],)

    x, scale = np.arange(12.0).reshape(3, 2, 2), np.array([2.0, 3.0])
    (y,) = jax.vmap(cudnn.over_rows(rows), (0, None, None))(x, scale, None)
    np.testing.assert_array_equal(y, x * scale[None, :, None])
    assert shapes[-1] == (6, 2)


def test_a_prompt_and_a_prefix_are_seen_by_every_segment():
    """Masked by hand: 3 keys without queries, then 2 rows that belong to all segments."""
    q, k, v = Q[:, :8], KEYS[:, :11], VALUES[:, :11]
    segments = np.array([[1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 3]], np.int32)
    rows, columns = np.arange(8)[:, None], np.arange(11)[None] - 3
    ids = np.pad(segments, ((0, 0), (2, 0)))
    column_ids = np.pad(ids, ((0, 0), (3, 0)))
    everyones = columns < 2
    same = (ids[:, :, None] == column_ids[:, None]) | everyones
    mask = (columns <= rows) & same
    expected = masked_attention(q, k, v, jnp.asarray(mask)[:, None])
    np.testing.assert_array_equal(attend(q, k, v, segments, prompt=2, prefix=3), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [("splash", "'splash' needs a TPU, and this program is for a cpu"),
     ("cudnn", "'cudnn' needs a GPU, and this program is for a cpu"),
     ("flash", "'flash' is not one of xla, splash, cudnn")],
)  # fmt: skip
def test_an_implementation_asked_for_by_name_does_not_fall_back(name, message):
    with pytest.raises(ValueError, match=f"attention: {message}.*Leave `implementation` out"):
        attend(Q, KEYS, VALUES, implementation=name)


@pytest.mark.parametrize(
    ("platform", "changes", "message"),
    [("tpu", {}, None),
     ("tpu", {"length": 200}, "no blocks for 2 rows of 200 positions"),
     ("tpu", {"prompt": 3}, "takes neither a prompt nor a prefix"),
     ("tpu", {"dtype": np.float16}, "takes bfloat16 and float32, and the queries are float16"),
     ("gpu", {"dtype": jnp.bfloat16}, None),
     ("gpu", {}, "takes bfloat16 and float16, and the queries are float32"),
     ("gpu", {"dtype": jnp.bfloat16, "prefix": 1}, "takes neither a prompt nor a prefix"),
     ("gpu", {"dtype": jnp.bfloat16, "length": 255}, "and an even length, not 32 and 255")],
)  # fmt: skip
def test_what_a_kernel_lacks(platform, changes, message, monkeypatch):
    """On a platform of its own, which is not here: the lack is found before anything runs."""

    class Device:
        device_kind = platform

    Device.platform = platform
    monkeypatch.setattr(context_mesh, "device", Device)
    name = {"tpu": "splash", "gpu": "cudnn"}[platform]
    length, dtype = changes.get("length", T), changes.get("dtype", np.float32)
    q, k = (jax.ShapeDtypeStruct((B, length, heads, H), dtype) for heads in (N, K))
    found = attention._lack(name, q, k, changes.get("prompt", 0), changes.get("prefix", 0))
    assert found is None if message is None else message in found
