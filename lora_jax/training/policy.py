"""The equations of learning from rewards with groups of answers: GRPO and Dr. GRPO.

A policy answers each prompt several times; what an answer is worth is its reward beside those of
its group. `losses/grpo.py` has the losses, `rollouts.py` the answers, `reinforce.py` the step.
"""

from typing import Any

import jax
import jax.numpy as jnp

EPSILON = 1e-4  # beside the deviation of a group, as in trl


def group_advantages(rewards: jax.Array, *, scale: bool) -> jax.Array:
    """What each answer is worth beside its group: `r - mean(r)`, and where `scale` says so, over
    `std(r) + 1e-4`, the deviation of a sample (n - 1).

    Dr. GRPO leaves the deviation out, since with it a group in which nearly all answers are equally
    good weighs more.

    Args:
      rewards: `[P, G]`, of G answers to each of P prompts; NaN for an answer without one, which
        counts for nothing and is worth 0.
      scale: whether to divide.

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2; Liu et al. 2025, arXiv:2503.20783,
    section 3.2.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    counted = ~jnp.isnan(rewards)
    number = jnp.maximum(counted.sum(-1, keepdims=True), 1).astype(jnp.float32)
    mean = jnp.where(counted, rewards, 0.0).sum(-1, keepdims=True) / number
    centred = jnp.where(counted, rewards - mean, 0.0)
    if not scale:
        return centred
    variance = (centred**2).sum(-1, keepdims=True) / jnp.maximum(number - 1, 1)
    return centred / (jnp.sqrt(variance) + EPSILON)


def clipped(
    policy: jax.Array, sampler: jax.Array, advantages: jax.Array, *, low: Any, high: Any
) -> jax.Array:
    """The loss of each token, with the ratio of its probability to that with which it was sampled:

        q    = exp(log p - log p_sampler)
        loss = -min(q A, clip(q, 1 - low, 1 + high) A)

    A ratio that has left the range on the side that the advantage favours has no gradient.

    Source: Schulman et al. 2017, arXiv:1707.06347, equation 7.
    """
    ratio = jnp.exp(policy - sampler)
    within = jnp.clip(ratio, 1 - low, 1 + high)
    return -jnp.minimum(ratio * advantages, within * advantages)


def k3(policy: jax.Array, reference: jax.Array) -> jax.Array:
    """An estimate of the divergence of the policy from a reference at each token that the policy
    drew, never below 0 and without bias:

        exp(log p_ref - log p) - (log p_ref - log p) - 1

    Source: Schulman 2020, "Approximating KL divergence"; arXiv:2402.03300, equation 4.
    """
    gap = reference - policy
    return jnp.exp(gap) - gap - 1
