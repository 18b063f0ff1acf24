"""Programs around `nf4_matmul` compiled ahead of time, and the shapes of what they take."""

from functools import partial

import jax
import jax.numpy as jnp

from lora_jax.kernels.nf4_matmul import nf4_matmul


def weight(K: int, N: int, *layers: int):
    return (
        jax.ShapeDtypeStruct((*layers, K // 2, N), jnp.uint8),
        jax.ShapeDtypeStruct((*layers, K // 64, N), jnp.float32),
    )


def on(mesh, spec, argument):
    sharding = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(argument.shape, argument.dtype, sharding=sharding)


def compiled(mesh, platform: str, f, *arguments):
    placed = [on(mesh, jax.P(), argument) for argument in arguments]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(f).trace(*placed).lower(lowering_platforms=(platform,)).compile()


def value_and_gradient(x, dy, codes, absmax, *, implementation=None):
    f = partial(nf4_matmul, implementation=implementation)
    y, vjp = jax.vjp(lambda x: f(x, codes, absmax), x)
    return y, *vjp(dy)


def training_step(x, codes, absmax, *, implementation=None):
    """A loss and its gradient through rematerialised layers with a low-rank branch."""

    def loss(ab):
        def layer(x, weight):
            h = nf4_matmul(x, *weight, implementation=implementation) + (x @ ab[0]) @ ab[1]
            return x + jax.nn.silu(h), None

        y, _ = jax.lax.scan(jax.checkpoint(layer), x, (codes, absmax))
        return jnp.square(y.astype(jnp.float32)).mean()

    d = x.shape[-1]
    return jax.value_and_grad(loss)((jnp.ones((d, 16), x.dtype), jnp.zeros((16, d), x.dtype)))
