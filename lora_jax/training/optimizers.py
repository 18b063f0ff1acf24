"""Optax's optimizers by name, with a learning rate in their state, so that arms that differ in it
share a step; and optimizers whose state is in host memory."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lora_jax.training.muon import muon

Schedule = Literal["cosine", "linear", "constant"]


def adafactor(**settings: Any) -> optax.GradientTransformation:
    """The direction of `optax.adafactor`, of any settings but its rate and decay."""
    return optax.chain(optax.adafactor(learning_rate=None, **settings), optax.scale(-1.0))


def sgd(momentum: float | None = None, nesterov: bool = False) -> optax.GradientTransformation:
    """The direction of `optax.sgd`."""
    return optax.identity() if momentum is None else optax.trace(momentum, nesterov)


# Each gives the direction that an update goes against, before decay, schedule and rate.
DIRECTIONS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.scale_by_adam,
    "muon": muon,
    "adafactor": adafactor,
    "sgd": sgd,
    "lion": optax.scale_by_lion,
}


def require_known(name: str) -> None:
    """Raises ValueError unless `optimizer` has one of this name."""
    if name not in DIRECTIONS:
        raise ValueError(f"optimizer {name!r}: expected one of {', '.join(DIRECTIONS)}.")


def optimizer(
    name: str = "adamw",
    *,
    steps: int,
    warmup_steps: int = 0,
    schedule: Schedule = "cosine",
    clip_norm: float | None = 1.0,
    weight_decay: float = 0.0,
    learning_rate: float = float("nan"),
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of optax behind a clip by global norm.

    `delta <- delta - rate * schedule(step) * (direction + weight_decay * delta)`, where `rate` is
    the hyperparameter `learning_rate` of the state (`optax.inject_hyperparams`): `init_state` sets
    it, and arms of one step may differ in it. The schedule rises to 1 linearly over `warmup_steps`
    and falls to zero at `steps`.

    Args:
      name: the direction is that of
        "adamw": Loshchilov & Hutter 2019, arXiv:1711.05101;
        "muon": Jordan 2024, as in `optax.contrib.muon`; see `lora_jax.training.muon`;
        "adafactor": Shazeer & Stern 2018, arXiv:1804.04235. Its statistics are those of a leaf:
          layers that are stacked share one clip and one parameter scale. Of ranks by layer,
          `LoRA(rank=(1, 8))`, it and "muon" see the padded width;
        "sgd": the gradient, or its `momentum`;
        "lion": Chen et al. 2023, arXiv:2302.06675.
      steps, warmup_steps, schedule: as above.
      clip_norm: of the gradient; None leaves it as it is.
      weight_decay: decoupled, whatever the optimizer.
      learning_rate: the peak, for callers who do not use `init_state`. NaN by default, so that a
        rate that was never set shows in the first update.
      settings: other arguments of optax's function, such as `b1` of "adamw".

    Raises:
      ValueError: for an unknown name or schedule, or a warm-up that leaves no step to train.
    """
    require_known(name)
    fraction = unit_schedule(schedule, steps, warmup_steps)

    def build(learning_rate: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
            DIRECTIONS[name](**settings),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_schedule(fraction),
            optax.scale_by_learning_rate(learning_rate),
        )

    return optax.inject_hyperparams(build, hyperparam_dtype=jnp.float32)(learning_rate)


adamw = functools.partial(optimizer, "adamw")


def with_learning_rate(state: Any, learning_rate: Any) -> Any:
    """An optimizer's state with another `learning_rate`, float32.

    Raises:
      ValueError: where it has no hyperparameter of that name.
    """
    try:
        return optax.tree.set(state, learning_rate=jnp.asarray(learning_rate, jnp.float32))
    except KeyError:
        raise ValueError(
            f"learning_rate={learning_rate} is given, but the optimizer's state holds none. Make "
            "it with training.optimizer(...) or optax.inject_hyperparams(optax.sgd)(rate), or "
            "leave the learning_rate out where the optimizer has its own."
        ) from None


def paged(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` with its state in pinned host memory, from which each update streams it through the
    device.

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
    """The learning rate as a fraction of its peak, by step: optax's schedules behind a warm-up."""
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
