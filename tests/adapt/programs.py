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


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """`run(params, *args)`; every leaf of `params` is adapted."""

    run: Callable
    params: Any
    args: tuple = (X,)


def one(run, weight=W, *args):
    return Program(lambda params, *args: run(params["w"], *args), {"w": weight}, args or (X,))


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
    "lookup of rows, slices of rows": [
        one(lambda w, ids: jnp.take(w, ids, axis=0), TABLE, IDS),
        one(lambda w, ids: w[ids], TABLE, IDS),
        one(lambda w, ids: jax.vmap(jax.vmap(lambda i: w[i]))(ids), TABLE, IDS),
        one(lambda w, ids: w[1:6:2] + w[ids[0]], TABLE, IDS),
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
    ],
    "one layer of a stack: index, slice, dynamic index": [
        one(lambda w, x: jnp.tanh(x @ w[2]) @ w[0], STACK),
        one(lambda w, x: jnp.tanh(x @ w[1:][0]), STACK),
        one(lambda w, i, x: x @ w[i], STACK, jnp.int32(2), X),
    ],
    "jit": [one(lambda w, x: jax.jit(lambda w: x @ w)(w))],
    "checkpoint": [one(lambda w, x: jax.checkpoint(lambda x: jnp.tanh(x @ w))(x))],
    "scan over stacked weights": [
        one(lambda w, x: jax.lax.scan(scanned, x, w)[0], STACK),
        one(lambda w, x: jax.lax.scan(jax.checkpoint(scanned), x, w, reverse=True)[0], STACK),
        one(lambda w, x: jax.lax.scan(scanned, x, jnp.moveaxis(w, 1, 0))[0], STACK.swapaxes(0, 1)),
        one(lambda w, x: jax.lax.scan(lambda x, _: scanned(x, w), x, None, length=2)[0], STACK[0]),
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
    "shard_map": [one(column_parallel)],
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
    "convolution with a weight": [
        (
            "conv_general_dilated",
            one(
                lambda w, x: jax.lax.conv(x, w, (1,), "SAME"),
                normal(1, 2, 3, 3),
                normal(2, 1, 3, 5),
            ),
        )
    ],
    "elementwise product, sum or norm of a weight": [
        ("mul", one(lambda w, x: x @ (w * 2))),
        ("add", one(lambda w, x: x @ (w + 1))),
        ("integer_pow", one(lambda w, x: x @ w + jnp.sum(w**2))),
    ],
    "reshape that mixes both sides of the matrix": [
        ("reshape", one(lambda w, x: x @ w.reshape(-1).reshape(6, 4)))
    ],
    "product of two weights": [("dot_general", one(lambda w, x: x @ (w @ w.T)))],
}
