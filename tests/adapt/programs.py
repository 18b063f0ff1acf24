"""What programs do with weights: a program for each line of `adapt`'s table."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import normal
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

MESH = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
W, STACK, TABLE = normal(1, 6, 4) / 2, normal(2, 3, 6, 6) / 2, normal(3, 9, 6)
HEADS = normal(4, 6, 2, 3)
X = normal(5, 4, 6)
IDS = np.array([[1, 0, 8], [3, 3, 2]], np.int32)
OUTSIDE, LAST = np.array([-10, -1, 0, 8, 9, 100], np.int32), np.int32(5)
SOME = OUTSIDE[:4]
FOUR, IN_HEADS = normal(10, 2, 3, 6, 6) / 2, normal(11, 2, 3, 4)
EXPLICIT = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """`run(params, *args)`; every leaf of `params` is adapted."""

    run: Callable
    params: Any
    args: tuple = (X,)


def one(run, weight=W, *args):
    return Program(lambda params, *args: run(params["w"], *args), {"w": weight}, args or (X,))


def taken(axis, mode, **fill):
    return one(lambda w, ids: jnp.take(w, ids, axis=axis, mode=mode, **fill), TABLE, OUTSIDE)


def carrying(w, x):
    return jax.lax.fori_loop(0, 2, lambda _, carry: (carry[0] @ carry[1], carry[1]), (x, w))[0]


def absorbed(w, x):
    """The query meets the keys' projection before the latent does."""
    keys, values = jnp.split(w.reshape(5, 3, 4), 2, axis=-1)
    latent = jnp.einsum("bhd,rhd->bhr", x.reshape(4, 3, 2), keys)
    return jnp.einsum("bhr,rhd->bhd", jnp.tanh(latent), values)


def chosen(x, w):
    return jnp.einsum("bi,bio->bo", x, w)


def each_layer(w, x):
    return jnp.einsum("bi,sio->sbo", x, w)


def two_layers(w, start, x):
    return each_layer(jax.lax.dynamic_slice_in_dim(w, start, 2), x)


def turning(w, carry):
    """A loop out of which the weight comes transposed."""
    return jax.lax.fori_loop(0, 2, lambda i, carry: (carry[0] @ w, w.T), carry)[0]


@jax.custom_vjp
def straight_through(w):
    return w


straight_through.defvjp(lambda w: (w, None), lambda _, dw: (dw,))


def scanned(x, w):
    return jnp.tanh(x @ w), None


@jax.custom_vjp
def clipped(x, w, slope):
    """A function whose gradient is not its derivative: that of x is trebled."""
    return jnp.tanh(x @ w) * slope


def _clipped_forward(x, w, slope):
    return clipped(x, w, slope), (x, w, slope)


def _clipped_backward(saved, dy):
    x, w, slope = saved
    dz = dy * (1 - jnp.tanh(x @ w) ** 2) * slope
    return 3 * dz @ w.T, x.T @ dz, None


clipped.defvjp(_clipped_forward, _clipped_backward)


@jax.custom_jvp
def curved(x, w):
    return jnp.tanh(x @ w)


@curved.defjvp
def _curved_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return curved(x, w), 2 * (dx @ w + x @ dw)


def kernel(x, y):
    def add(x_ref, y_ref, out_ref):
        out_ref[...] = x_ref[...] + y_ref[...]

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(add, out_shape=shape, interpret=True)(x, y)


@jax.custom_vjp
def shifted(x):
    return kernel(x, x)


shifted.defvjp(lambda x: (shifted(x), None), lambda _, dy: (3 * dy,))


def column_parallel(w, x):
    """Both sides of the matrix split: rows over one mesh axis, columns over the other."""

    def block(w, x):
        return jax.lax.psum(x @ w, "x")

    specs = dict(in_specs=(P("x", "y"), P(None, "x")), out_specs=P(None, "y"))
    return jax.shard_map(block, mesh=MESH, **specs)(w, x)


def data_parallel(w, x):
    """A whole weight on every device, which differs along no mesh axis until it meets an x."""
    specs = dict(in_specs=(P(), P("x")), out_specs=P("x"))
    return jax.shard_map(lambda w, x: x @ w, mesh=MESH, **specs)(w, x)


def by_expert(x, w):
    return jax.lax.ragged_dot(x, w, jnp.array([1, 2, 1]))


def joined(w):
    return jnp.concatenate([w, w], axis=-1)


def filtered(x, w):
    return jnp.tanh(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC))


def convolved(x, w, *how, **more):
    return one(lambda w, x: jax.lax.conv_general_dilated(x, w, *how, **more), w, x)


NHWC = ("NHWC", "HWIO", "NHWC")
IMAGE, FILTERS = normal(2, 2, 5, 6, 6), normal(1, 2, 3, 2, 6, 6) / 4
FOLLOWED = {
    "einsum, matmul: contracted with an activation": [
        one(lambda w, x: x @ w),
        one(lambda w, x: jnp.einsum("io,bi->ob", w, x)),
        one(lambda w, x: jnp.einsum("btd,dnh->btnh", x[None], w), HEADS),
        one(lambda w, x: jnp.einsum("bnh,nhd->bd", x, w), normal(6, 2, 3, 5), normal(7, 4, 2, 3)),
        one(lambda w, x: jax.lax.dot(x, w, precision="highest")),
        one(lambda w, x: jax.lax.dot(x, w, preferred_element_type=jnp.float32)),
    ],
    "batched einsum over stacked weights (experts)": [
        one(lambda w, x: jnp.einsum("etd,edf->etf", x, w), STACK, normal(8, 3, 4, 6)),
        one(lambda w, x: jnp.einsum("etd,edf->tef", x, w), STACK, normal(8, 3, 4, 6)),
    ],
    "convolution: any space, stride, dilation, layout": [
        convolved(IMAGE, normal(1, 3, 2, 6, 4) / 4, (2, 1), "SAME", dimension_numbers=NHWC),
        convolved(IMAGE, normal(1, 3, 2, 6, 4) / 4, (1, 1), "VALID", None, (1, 2), NHWC),
        convolved(normal(2, 2, 6, 7), normal(1, 4, 6, 3) / 4, (1,), [(2, 1)]),
        convolved(IMAGE, normal(1, 1, 1, 6, 4) / 4, (1, 1), "SAME", dimension_numbers=NHWC),
        convolved(normal(2, 2, 6), normal(1, 4, 6), (), "VALID"),
        one(lambda w, x: jax.vmap(lambda w: filtered(x, w))(w), FILTERS, IMAGE),
        one(
            lambda w, x: jax.lax.scan(lambda x, w: (filtered(x, w), None), x, w)[0], FILTERS, IMAGE
        ),
    ],
    "convolution in groups, or of stacked weights": [
        convolved(IMAGE, normal(1, 2, 2, 3, 4), (1, 1), "SAME", None, None, NHWC, 2),
        convolved(normal(2, 2, 6, 7), normal(1, 4, 3, 3), (1,), "SAME", feature_group_count=2),
        one(lambda w, x: jax.vmap(filtered)(jnp.stack([x, -x]), w), FILTERS, IMAGE),
    ],
    "transposed convolution": [
        one(lambda w, x: jax.lax.conv_transpose(x, w, (2, 2), "SAME"), FILTERS[0], IMAGE),
    ],
    "ragged_dot: rows sorted by expert": [
        one(lambda w, x: jax.lax.ragged_dot(x, w, jnp.array([1, 0, 2])), STACK, X),
        one(lambda w, x: jax.lax.ragged_dot(x, w.swapaxes(1, 2), jnp.array([1, 2, 1])), STACK, X),
        one(lambda w, x: jax.lax.scan(lambda x, w: (by_expert(x, w), None), x, w)[0], FOUR, X),
    ],
    "sum over stacked weights, each with its activation": [
        one(lambda w, x: jnp.einsum("bsi,sio->bo", x, w), STACK, normal(8, 4, 3, 6)),
    ],
    "lookup of rows in every mode, slices of rows": [
        one(lambda w, ids: jnp.take(w, ids, axis=0), TABLE, IDS),
        one(lambda w, ids: w[ids], TABLE, IDS),
        one(lambda w, ids: jax.vmap(jax.vmap(lambda i: w[i]))(ids), TABLE, IDS),
        one(lambda w, ids: w[1:6:2] + w[ids[0]], TABLE, IDS),
        *(taken(axis, mode) for axis in (0, 1) for mode in ("fill", "clip", "wrap")),
        taken(0, "fill", fill_value=7.0),
        taken(1, "fill", fill_value=-np.inf),
        one(lambda w, ids: w.at[ids].get(mode="promise_in_bounds"), TABLE, OUTSIDE),
        one(lambda w, ids: w[ids], normal(1, 1, 4), OUTSIDE),  # of a single row
        # ids count the merged axis in the program's order, not in the matrix's
        one(lambda w, ids: w.transpose(1, 0, 2).reshape(6, 4)[ids], IN_HEADS, IDS % 6),
        one(lambda w, x: x @ w.transpose(1, 0, 2).reshape(6, 4)[1:5], IN_HEADS, X[:, :4]),
        one(lambda w, ids: jax.vmap(lambda w: w[ids])(w), STACK, OUTSIDE),
        one(lambda w, i, x: x @ jax.lax.dynamic_slice(w, (i, 0), (4, 4)), W, LAST, X[:, :4]),
    ],
    "tied table: rows, and its transpose as output head": [
        one(lambda w, ids: jnp.tanh(w[ids]) @ w.T, TABLE, IDS),
    ],
    "transpose, swapaxes, moveaxis": [
        one(lambda w, x: (w.T @ x.T).T),
        one(lambda w, x: jnp.einsum("bd,nhd->bnh", x, jnp.moveaxis(w, 0, -1)), HEADS),
    ],
    "reshape within one side of the matrix": [
        one(lambda w, x: x @ w.reshape(6, 6), HEADS),
        one(lambda w, x: jnp.einsum("bd,dnh->bnh", x, w.reshape(6, 2, 2))),
        one(lambda w, x: x @ w[None].squeeze(0)),
        one(lambda w, x: x @ w.reshape(2, 3, 4)[:, :, None].reshape(6, 4)),
        one(lambda w, x: x @ jax.lax.reshape(w, (6, 6), (1, 0)), STACK[0]),
    ],
    "cast, stop_gradient, copies, barriers, constraints": [
        one(lambda w, x: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)),
        one(lambda w, x: x @ jax.lax.stop_gradient(w) + x @ w),
        one(lambda w, x: x @ jax.lax.optimization_barrier(jnp.copy(w))),
        one(
            lambda w, x: (
                x
                @ jax.lax.with_sharding_constraint(
                    w, jax.sharding.NamedSharding(MESH, P(None, "x"))
                )
            )
        ),
        one(lambda w, x: x @ jax.sharding.reshard(w, jax.sharding.NamedSharding(EXPLICIT, P()))),
    ],
    "parts of a side: split, slice, index": [
        one(lambda w, x: x[:, :3] @ w[:3] + x[:, 3:] @ w[3:] + jnp.tanh(x @ w[:, 2:]) @ w[:2]),
        one(lambda w, x: jnp.concatenate([x @ part for part in jnp.split(w, 2, axis=1)])),
        one(lambda w, x: x @ w.reshape(6, 2, 2)[:, 0] + x @ w.reshape(6, 2, 2)[:, :, 1]),
        one(lambda w, i, x: x @ jax.lax.dynamic_slice_in_dim(w, i, 3, 1), W, np.int32(9), X),
        one(lambda w, x: each_layer(w[:, :, 1:4], x), STACK),
        one(lambda w, x: x @ (w[:, 1:] * 2) + jnp.sum(w[2:] ** 2)),
        one(
            lambda w, x: jax.lax.fori_loop(
                0, 2, lambda _, c: (c[0] @ c[1], c[1]), (x[:, :4], w[:4])
            )[0]
        ),
    ],
    "parts of a side as layers (absorbed attention)": [
        one(lambda w, x: jnp.einsum("bi,iho->bho", x[:, :2], w.reshape(2, 3, 4))),
        one(lambda w, x: jnp.einsum("bhi,iho->bho", x.reshape(4, 3, 2), w.reshape(2, 3, 4))),
        one(lambda w, x: absorbed(w, x), normal(6, 5, 12)),
    ],
    "concatenation, stack and padding of weights": [
        one(lambda w, x: x @ jnp.concatenate([w, x[:, :2].repeat(2, 0)[:6], -w[:, :1]], axis=1)),
        one(lambda w, x: jnp.concatenate([x, x], 1) @ jnp.concatenate([w, w * 2], axis=0)),
        one(lambda w, x: each_layer(jnp.stack([w, 2 * w]), x)),
        one(lambda w, x: jnp.pad(x, ((0, 0), (1, 2))) @ jnp.pad(w, ((1, 2), (0, 3)))),
        one(lambda w, x: x @ jnp.pad(w, ((0, 0), (0, 4)))[:, 2:7].astype(jnp.float32)),
        one(lambda w, x: jnp.concatenate([w, w], 1).T.reshape(8, 3, 2)[5:, 1] @ x[:, :2].T),
        one(lambda w, x: jnp.concatenate([w, w], 1)[:, None].squeeze(1).T @ x.T),
    ],
    "layers of a stack: index, slice, split, unstack": [
        one(lambda w, x: jnp.tanh(x @ w[2]) @ w[0], STACK),
        one(lambda w, x: jnp.tanh(x @ w[1:][0]), STACK),
        one(lambda w, i, x: x @ w[i], STACK, jnp.int32(2), X),
        *(
            one(lambda w, i, x: two_layers(w, i, x), STACK, np.dtype(dtype).type(i), X)
            for dtype, i in (("int32", 2), ("int32", -7), ("int8", -1), ("uint8", 255))
        ),
        one(lambda w, i, x: jax.vmap(lambda w: x @ w[i])(w), FOUR, jnp.int32(9), X),
        one(lambda w, x: each_layer(jnp.split(w, 3)[1], x), STACK),
        one(lambda w, x: jnp.tanh(x @ jnp.unstack(w)[2]), STACK),
        one(lambda w, x: each_layer(w[3:], x).sum() + x @ w[0], STACK),
        one(lambda w, x: x @ jnp.moveaxis(w, 0, 1).reshape(6, 6, 6)[4], FOUR),  # merged stacks
    ],
    "experts by an array of indices, in every mode": [
        one(lambda w, i, x: jnp.einsum("bi,bnio->nbo", x, w[i]), STACK, IDS[[0, 1, 0, 1]] % 3, X),
        one(lambda w, i, x: jax.vmap(lambda i, x: x @ w[i])(i, x), STACK, IDS[0, [0, 1, 0, 0]], X),
        *(
            one(
                lambda w, i, x, how=how: chosen(x, jnp.take(w, i, axis=0, **how)),
                STACK,
                OUTSIDE[:4],
                X,
            )
            for how in ({}, {"mode": "clip"}, {"mode": "fill", "fill_value": 0.0})
        ),
        one(lambda w, i, x: x @ jnp.take(w, i, axis=0), STACK, jnp.int32(1), X),
        one(lambda w, i, x: chosen(x, w.reshape(6, 6, 6)[i]), FOUR, OUTSIDE[1:5], X),
    ],
    "times a scalar, or a vector along one side": [
        one(lambda w, x: x @ (w * 2) + x @ (-w / 3)),
        one(lambda w, x: x @ (w * x[0][:, None]) * jnp.sum(w[2:3] * 2)),
        one(lambda w, x: x @ (x[:1, :4] * w)),
        one(lambda w, x: each_layer(w * x[0, :3, None, None], x), STACK),
        one(lambda w, x: x @ (w * x[0].reshape(1, 2, 3)).reshape(6, 6), HEADS),
    ],
    "jit": [one(lambda w, x: jax.jit(lambda w: x @ w)(w))],
    "checkpoint": [one(lambda w, x: jax.checkpoint(lambda x: jnp.tanh(x @ w))(x))],
    "scan over stacked weights": [
        one(lambda w, x: jax.lax.scan(scanned, x, w)[0], STACK),
        one(lambda w, x: jax.lax.scan(jax.checkpoint(scanned), x, w, reverse=True)[0], STACK),
        one(lambda w, x: jax.lax.scan(scanned, x, jnp.moveaxis(w, 1, 0))[0], STACK.swapaxes(0, 1)),
        one(lambda w, x: jax.lax.scan(lambda x, _: scanned(x, w), x, None, length=2)[0], STACK[0]),
        one(lambda w, x: jax.lax.scan(scanned, x, w[None])[0], STACK[0]),
        one(lambda w, x: jax.lax.scan(scanned, x, w.reshape(6, 6, 6))[0], FOUR),
    ],
    "while_loop, fori_loop": [
        one(lambda w, x: jax.lax.fori_loop(0, 3, lambda i, x: scanned(x, w[i])[0], x), STACK),
    ],
    "cond, switch": [
        one(lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w[0], lambda: x @ w[1]), STACK),
    ],
    "vmap over stacked weights": [
        one(lambda w, x: jax.vmap(lambda w: x @ w)(w), STACK),
        one(lambda w, x: jax.vmap(jnp.matmul)(x, w), STACK, normal(9, 3, 4, 6)),
    ],
    "shard_map": [one(column_parallel), one(data_parallel)],
    "custom_jvp, custom_vjp that take a weight": [
        one(lambda w, x: clipped(clipped(x, w[0], 2), w[1], 3), STACK),
        one(
            lambda w, x: jax.lax.scan(jax.checkpoint(lambda x, w: (clipped(x, w, 2), None)), x, w)[
                0
            ],
            STACK,
        ),
        one(lambda w, x: jax.lax.scan(lambda x, w: (curved(x, w), None), x, w)[0], STACK),
    ],
    "pallas_call, custom_vjp and others without a weight": [
        one(lambda w, x: shifted(x @ w)),
        one(lambda w, x: jax.lax.sort(jax.nn.relu(x @ w))),
    ],
}
REFUSED = {
    "pallas_call that takes a weight": [
        ("pallas_call", one(lambda w, x: kernel(x[:, :4], w), normal(1, 4, 4)))
    ],
    "convolution in groups of its batch": [
        (
            "conv_general_dilated",
            convolved(normal(2, 2, 6, 7), normal(1, 4, 6, 3), (1,), "SAME", batch_group_count=2),
        ),
    ],
    "elementwise operation, sum or norm of a weight": [
        ("mul", one(lambda w, x: x @ (w * x.T))),
        ("mul", one(lambda w, x: x @ (w * w))),
        ("add", one(lambda w, x: x @ (w + 1))),
        ("add", one(lambda w, x: x @ (w + w.T), STACK[0])),
        ("integer_pow|square", one(lambda w, x: x @ w + jnp.sum(w**2))),
        ("mul|square", one(lambda w, x: x @ w / jnp.linalg.norm(w))),
        ("reduce_precision", one(lambda w, x: x @ jax.lax.reduce_precision(w, 8, 7))),
    ],
    "cast of a weight to integers": [
        ("convert_element_type", one(lambda w, x: x @ w.astype(jnp.int32).astype(jnp.float32)))
    ],
    "reversal, padding between entries, repetition": [
        ("rev", one(lambda w, x: x @ w[::-1])),
        ("pad", one(lambda w, x: x @ jax.lax.pad(w, 0.0, ((0, 0, 0), (0, 0, 1))))),
        ("pad", one(lambda w, x: x[:, :5] @ jax.lax.pad(w, 0.0, ((-1, 0, 0), (0, 0, 0))))),
        (
            "conv_general_dilated",
            one(lambda w, x: filtered(x, joined(w)), FILTERS[0], IMAGE),
        ),
        ("broadcast_in_dim", one(lambda w, x: x @ jnp.repeat(w, 2, axis=1))),
    ],
    "select, write into a weight, lookup of entries": [
        ("select_n", one(lambda w, x: x @ jnp.where(np.eye(6, 4, dtype=bool), w, 0.0))),
        ("scatter", one(lambda w, x: x @ w.at[0].set(0.0))),
        ("gather", one(lambda w, x: x[:, :2] * w[np.array([0, 1]), np.array([1, 0])][None])),
    ],
    "lookup or slice that differs from layer to layer": [
        ("gather", one(lambda w, ids: jax.vmap(lambda w, i: w[i])(w, ids), STACK, IDS.T)),
    ],
    "reshape that mixes both sides of the matrix": [
        ("reshape", one(lambda w, x: x[:, :4] @ w.reshape(4, 6))),
        ("sort", one(lambda w, x: x @ jax.lax.sort(w.reshape(-1)).reshape(6, 4))),
    ],
    "reshape that splits a side where it was not": [
        ("reshape", one(lambda w, x: jnp.einsum("bd,dnh->bnh", x, w.reshape(6, 3, 2)), HEADS)),
    ],
    "scan along a side": [
        ("scan", one(lambda w, x: jax.lax.scan(lambda s, row: (s + row.sum(), None), 0.0, w)[0])),
    ],
    "contraction with no side": [
        ("dot_general", one(lambda w, x: jnp.einsum("bc,io->bcio", x, w))),
        ("dot_general", one(lambda w, x: jnp.einsum("bi,io->bio", x, w))),
    ],
    "product of two weights": [("dot_general", one(lambda w, x: x @ (w @ w.T)))],
    "weight out of a branch, a scan or a custom rule": [
        ("cond", one(lambda w, x: x @ jax.lax.cond(x[0, 0] > 0, lambda: w, lambda: w.T), STACK[0])),
        ("scan", one(lambda w, x: x @ jax.lax.scan(lambda c, w: (c, w.T), 0, w)[1][0], STACK)),
        ("custom_vjp_call", one(lambda w, x: x @ straight_through(w))),
    ],
    "loop that carries a weight and changes its form": [
        ("scan", one(lambda w, x: turning(w, (x, w)), STACK[0])),
        ("scan", one(lambda w, x: turning(w, (x, jnp.zeros((6, 6)))), STACK[0])),
    ],
}
