"""AdamW whose learning rate comes with each update, so that arms that differ in it share a step,
and optimizers whose state lives in host memory."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

Schedule = Literal["cosine", "linear", "constant"]


def adamw(
    *,
    steps: int,
    warmup_steps: int = 0,
    schedule: Schedule = "cosine",
    clip_norm: float | None = 1.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) after a clip by global norm.

    `update(grads, state, params, learning_rate=peak)`: the peak is an argument, scalar or traced;
    the schedule rises to it linearly over `warmup_steps` and falls to zero at `steps`.

    Raises:
      ValueError: for an unknown schedule, or a warm-up that leaves no step to train.
    """
    return optax.chain(
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_schedule(unit_schedule(schedule, steps, warmup_steps)),
        _scale_by_given_rate(),
    )


def paged(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` with its state in pinned host memory, whence each update streams it through the device.

    The numbers are those of `tx`. Between updates the device holds none of the state but scalars:
    Adam's moments, twice the trained parameters in float32, stay on the host, as in QLoRA's paged
    optimizers (Dettmers et al. 2023, arXiv:2305.14314, section 3), but moved by the compiled
    program where it needs them rather than on page faults.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        return _moved(inner.init(params), jax.memory.Space.Host)

    def update(updates, state, params=None, **extra):
        state = _moved(state, jax.memory.Space.Device)
        updates, state = inner.update(updates, state, params, **extra)
        return updates, _moved(state, jax.memory.Space.Host)

    return optax.GradientTransformationExtraArgs(init, update)


def _moved(state: Any, space: Any) -> Any:
    """Scalars stay where they are."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if jnp.ndim(x) else x, state)


def unit_schedule(schedule: Schedule, steps: int, warmup_steps: int) -> optax.Schedule:
    """The learning rate as a fraction of its peak, by step."""
    if not 0 <= warmup_steps < steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} must be at least 0 and less than steps={steps}."
        )
    rest = steps - warmup_steps
    shapes = {
        "cosine": optax.cosine_decay_schedule(1.0, rest),
        "linear": optax.linear_schedule(1.0, 0.0, rest),
        "constant": optax.constant_schedule(1.0),
    }
    if schedule not in shapes:
        raise ValueError(f"schedule={schedule!r}: expected one of {', '.join(shapes)}.")
    if warmup_steps == 0:
        return shapes[schedule]
    rise = optax.linear_schedule(1 / warmup_steps, 1.0, max(warmup_steps - 1, 1))
    return optax.join_schedules([rise, shapes[schedule]], [warmup_steps])


def _scale_by_given_rate() -> optax.GradientTransformationExtraArgs:
    def init(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates, state, params=None, *, learning_rate, **extra):
        del params, extra
        rate = jnp.asarray(learning_rate, jnp.float32)
        return jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
