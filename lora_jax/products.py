"""What a model does with a weight. A product knows no method, and a method knows no product.

An adapter's branch is written with two methods of a product: `narrow(x, a)`, the same operation
with a narrow array in the place of the weight, and `widen(h, b)`, a matmul over the narrow axis.

    LoRA:  branch(x) = widen(narrow(x, a) * scale, b)

| product | of x and W | narrow | widen |
|---|---|---|---|
| `Matmul` | `x @ W` | `x @ a` | `h @ b` |
| `Lookup` | `W[ids]` | `a[ids]` | `h @ b` |
| `Rows` | `diag(x) @ W` | `diag(x) @ a` | `h @ b` |
| `Convolution` | `conv(x, W)` | `conv(x, a)` | `h @ b`, 1 x 1 |
| `Experts` | `ragged_dot(x, W, sizes)` | `ragged_dot(x, a, sizes)` | `ragged_dot(h, b, sizes)` |
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.weights import NARROW, Weight, dense, dense_float32, embed, linear, vary

AnyWeight = jax.Array | Weight


class Product(abc.ABC):
    """One way to apply a weight."""

    @abc.abstractmethod
    def __call__(self, x: Any, w: AnyWeight) -> jax.Array:
        """The output of the frozen weight, `[..., d_out]`."""

    @abc.abstractmethod
    def narrow(self, x: Any, a: jax.Array) -> jax.Array:
        """The same of `a [d_in, r]`: `[..., r]`, in the dtype of the product's result."""

    def widen(self, h: jax.Array, b: jax.Array) -> jax.Array:
        """`h @ b` for `h [..., r]` and `b [r, d_out]`."""
        return _widen(vary(h, like=b), vary(b.astype(h.dtype), like=h))

    def left(self, a: jax.Array, w: AnyWeight) -> jax.Array:
        """`a^T @ W`, `[r, d_out]`, exactly, for norms."""
        with jax.default_matmul_precision("highest"):
            return linear(a.T, w)

    @abc.abstractmethod
    def scale(self, x: Any, factor: jax.Array) -> Any:
        """The input with each of its `d_in` entries multiplied by `factor [d_in]`."""

    def dropped(self, x: Any, rate: float, key: jax.Array | None) -> Any:
        """The input of a branch with entries zeroed at `rate`, if a key is bound and there are
        entries to zero."""
        return x if key is None else drop(x, rate, key)


@dataclasses.dataclass(frozen=True)
class Matmul(Product):
    """`x @ W` for `x [..., d_in]`."""

    def __call__(self, x: jax.Array, w: AnyWeight) -> jax.Array:
        return linear(x, w)

    def narrow(self, x: jax.Array, a: jax.Array) -> jax.Array:
        return checkpoint_name(linear(x, a.astype(x.dtype)), NARROW)

    def scale(self, x: jax.Array, factor: jax.Array) -> jax.Array:
        return scaled(x, factor)


@dataclasses.dataclass(frozen=True)
class Lookup(Product):
    """`W[ids]` for integers `ids [...]`, in `dtype`."""

    dtype: Any

    def __call__(self, x: jax.Array, w: AnyWeight) -> jax.Array:
        return embed(x, w)

    def narrow(self, x: jax.Array, a: jax.Array) -> jax.Array:
        return embed(x, a).astype(self.dtype)

    def scale(self, x: jax.Array, factor: jax.Array) -> jax.Array:
        raise ValueError("an embedding is looked up by index: there is no input to scale.")

    def dropped(self, x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
        return x


@dataclasses.dataclass(frozen=True)
class Convolution(Product):
    """`run(x, W)` for `x [batch, ...]` and `W [d_in, d_out]`, to `[batch, ..., d_out]`: linear in
    each. A row of W is one input channel at one place of the kernel."""

    run: Callable[[jax.Array, jax.Array], jax.Array]

    def __call__(self, x: jax.Array, w: AnyWeight) -> jax.Array:
        return _run(self.run, x, w, ())

    def narrow(self, x: jax.Array, a: jax.Array) -> jax.Array:
        return checkpoint_name(self.run(x, a.astype(x.dtype)), NARROW)

    def scale(self, x: jax.Array, factor: jax.Array) -> jax.Array:
        raise ValueError(
            "the inputs of a convolution meet several rows of its kernel and cannot be scaled for "
            "each: scale its outputs."
        )


@dataclasses.dataclass(frozen=True)
class Experts(Product):
    """`run(x, W, *given)` for rows `x [m, d_in]`, each with its own expert of `W [g, d_in, d_out]`:
    `[m, d_out]`. A node's matrices keep their axis of experts; of its vectors it has one for each
    row, see `lora_jax.node_parts.by_rows`."""

    run: Callable[..., jax.Array]
    given: tuple[jax.Array, ...]
    has_expert: jax.Array

    def __call__(self, x: jax.Array, w: AnyWeight) -> jax.Array:
        return _run(self.run, x, w, self.given)

    def narrow(self, x: jax.Array, a: jax.Array) -> jax.Array:
        return checkpoint_name(self._each(x, a.astype(x.dtype)), NARROW)

    def widen(self, h: jax.Array, b: jax.Array) -> jax.Array:
        return self._each(h, b.astype(h.dtype))

    def _each(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """Matrices that all experts share have no axis of them. Rows of no expert give zeros."""
        if w.ndim > 2:
            return self.run(x, w, *self.given)
        y = linear(x, w)
        return jnp.where(self.has_expert[:, None], y, jnp.zeros_like(y))

    def scale(self, x: jax.Array, factor: jax.Array) -> jax.Array:
        return scaled(x, factor)


def _run(run: Callable, x: jax.Array, w: AnyWeight, given: tuple[jax.Array, ...]) -> jax.Array:
    return _run_frozen(run, x, w, given) if isinstance(w, Weight) else run(x, w, *given)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_frozen(run: Callable, x: jax.Array, w: Weight, given: tuple[jax.Array, ...]) -> jax.Array:
    """`run(x, W, *given)`, linear in x, which keeps nothing of W but its stored bytes for the
    backward pass."""
    return run(x, dense(w).astype(x.dtype), *given)


def _run_frozen_forward(run, x, w, given):
    return _run_frozen(run, x, w, given), (w, given, jnp.zeros((0,), x.dtype), x.shape)


def _run_frozen_backward(run, saved, dy):
    w, given, of_dtype, shape = saved
    matrix = dense(w).astype(of_dtype.dtype)
    like = jax.ShapeDtypeStruct(shape, of_dtype.dtype)
    return *jax.linear_transpose(lambda x: run(x, matrix, *given), like)(dy), None, None


_run_frozen.defvjp(_run_frozen_forward, _run_frozen_backward)


@dataclasses.dataclass(frozen=True)
class Rows(Product):
    """`diag(x) @ W` in float32, exactly: with `x = 1` the outputs of all unit inputs, which are the
    rows of a merged weight."""

    def __call__(self, x: Any, w: AnyWeight) -> jax.Array:
        return x * dense_float32(w)

    def narrow(self, x: Any, a: jax.Array) -> jax.Array:
        return x * a.astype(jnp.float32)

    def widen(self, h: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(h, b, precision="highest")

    def left(self, a: jax.Array, w: AnyWeight) -> jax.Array:
        return jnp.matmul(a.T, self(1.0, w), precision="highest")

    def scale(self, x: Any, factor: jax.Array) -> jax.Array:
        return x * factor[:, None]


def scaled(y: jax.Array, factor: jax.Array) -> jax.Array:
    """`y * factor` over the last axis, in float32 and rounded once."""
    product = y.astype(jnp.float32) * jnp.broadcast_to(factor, y.shape)
    return product.astype(y.dtype)


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """`x` with entries zeroed at `rate` and the rest divided by `1 - rate`."""
    if rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


# JAX's own gradient of b puts the cotangent `dy [..., d_out]` first in its product, and XLA's CPU
# backend then copies it into its transpose: an eighth of a whole training step.
@jax.custom_vjp
def _widen(h: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(h, b)


def _widen_forward(h, b):
    return jnp.matmul(h, b), (h, b)


def _widen_backward(saved, dy):
    h, b = saved
    rows = tuple(range(h.ndim - 1))
    db = jax.lax.dot_general(h, dy, ((rows, rows), ((), ())))
    return jax.lax.dot_general(dy, b, (((dy.ndim - 1,), (1,)), ((), ()))), db


_widen.defvjp(_widen_forward, _widen_backward)
