"""The cost of one training step, as the compiler reports it."""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import lora_jax as lora
from experiments.harness.arms import Arm
from experiments.harness.losses import make_loss
from experiments.harness.setup import as_configured
from experiments.harness.shared import optimizer, step_of
from lora_jax import models, training
from lora_jax.models import DecoderConfig


def step_costs(config: ConfigDict, arm: Arm, model: DecoderConfig) -> dict[str, float | None]:
    """FLOPs and memory of a step of the configured batch; nothing is allocated.

    Returns:
      `flops`: before XLA's own passes, with the loss at every position. A loop is counted once, so
      they are those of one layer and of two, laid out, and the difference for each further layer.
      `temp_bytes`: what the compiled step allocates beside its arguments.
      `peak_bytes`: that, and the base, the state and the batch.
      The last two are None where the compiler refuses the step, for example for lack of memory: it
      is compiled for one device, which a sharded step need not fit.
    """
    one, two = (
        _lowered(config, arm, dataclasses.replace(model, num_layers=n), unroll=n, chunk=sys.maxsize)
        .cost_analysis()["flops"]
        for n in (1, 2)
    )  # fmt: skip
    flops = one + (model.num_layers - 1) * (two - one)
    try:
        memory = _lowered(config, arm, model).compile().memory_analysis()
    except jax.errors.JaxRuntimeError:
        return {"flops": flops, "temp_bytes": None, "peak_bytes": None}
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "flops": flops,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": held + memory.temp_size_in_bytes,
    }


def _lowered(config: ConfigDict, arm: Arm, model: DecoderConfig, **options: Any) -> Any:
    def make(key):
        params = models.init(model, key=key, dtype=jnp.dtype(config.model.dtype))
        params = as_configured(config, params)
        base, delta = lora.lora_transform(params, arm.method, targets=arm.targets, key=key)
        tx = optimizer(config, arm)
        return training.init_state(delta, tx, learning_rate=arm.learning_rate, seed=arm.seed), base

    state, base = jax.eval_shape(make, jax.random.key(0))
    # As `Execution.states` leaves it: the run's own program is then found in JAX's cache.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
    loss = make_loss(config, model, **options)
    batch = loss.abstract_batch(config.data.batch_size, config.data.seq_len)
    return jax.jit(step_of(config, arm, loss), donate_argnums=0).lower(state, base, batch)
