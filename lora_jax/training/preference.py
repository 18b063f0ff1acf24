"""The equations of learning from preferences, as functions of log-probabilities of sequences.

Arrays are of any one shape, an entry for each pair (or, for KTO, each answer), and so are the
losses that are returned; which entries count is up to the caller. `losses/` has each as a `Loss`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Sequences(NamedTuple):
    """Answers under one model.

    Attributes:
      log_probs: float32, the summed log-probability of each one's tokens.
      lengths: integers, how many these are; 0 for what is no answer.
    """

    log_probs: jax.Array
    lengths: jax.Array

    @property
    def means(self) -> jax.Array:
        """The mean log-probability of a token; 0 for what is no answer."""
        return self.log_probs / jnp.asarray(jnp.maximum(self.lengths, 1), jnp.float32)


class Pairs(NamedTuple):
    """The chosen answer w and the rejected answer l to each prompt."""

    chosen: Sequences
    rejected: Sequences


def dpo(policy: Pairs, reference: Pairs, *, beta: Any, label_smoothing: Any = 0.0) -> jax.Array:
    """DPO, with a probability e that a label is wrong:

        m    = beta * ((log p(w) - log p_ref(w)) - (log p(l) - log p_ref(l)))
        loss = -(1 - e) log sigmoid(m) - e log sigmoid(-m)

    Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7; for e Mitchell 2023, "A note on DPO
    with noisy preferences", equation 3.
    """
    return _smoothed(beta * _margin(policy, reference), label_smoothing)


def dpo_norm(
    policy: Pairs, reference: Pairs, *, beta: Any, label_smoothing: Any = 0.0
) -> jax.Array:
    """DPO with mean log-probabilities of tokens for sums, so that a longer answer weighs no more.

    Its beta is larger than DPO's by about the length of an answer.

    Source: Lambert et al. 2024, arXiv:2411.15124, section 5.1.2.
    """
    return _smoothed(beta * _mean_margin(policy, reference), label_smoothing)


def ipo(policy: Pairs, reference: Pairs, *, beta: Any) -> jax.Array:
    """IPO, whose margin goes to 1 / (2 beta) and not to infinity:

        m    = (log p(w) - log p_ref(w)) / |w| - (log p(l) - log p_ref(l)) / |l|
        loss = (m - 1 / (2 beta))^2

    With means over tokens, as its authors ran it; the paper writes no lengths.

    Source: Azar et al. 2023, arXiv:2310.12036, equation 17, where beta is tau.
    """
    return (_mean_margin(policy, reference) - 1 / (2 * beta)) ** 2


def simpo(policy: Pairs, *, beta: Any, gamma: Any) -> jax.Array:
    """SimPO, which needs no reference:

        loss = -log sigmoid(beta * (log p(w) / |w| - log p(l) / |l|) - gamma)

    Source: Meng et al. 2024, arXiv:2405.14734, equation 6.
    """
    margin = policy.chosen.means - policy.rejected.means
    return -jax.nn.log_sigmoid(beta * margin - gamma)


def orpo(policy: Pairs, *, beta: Any) -> jax.Array:
    """ORPO, a preference beside the loss of the chosen answer, with P the mean over tokens:

        loss = -log P(w) - beta * log sigmoid(log odds(w) - log odds(l)),  odds = P / (1 - P)

    Source: Hong et al. 2024, arXiv:2403.07691, equations 4 to 7, where beta is lambda.
    """
    chosen, rejected = (
        jnp.where(answers.lengths > 0, answers.means, -1.0)  # 0 would be certain
        for answers in policy
    )
    return -chosen - beta * jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(log_p: jax.Array) -> jax.Array:
    """`log(p / (1 - p))` of `log p`; of a p that rounds to 1, that of the float32 below."""
    log_p = jnp.minimum(log_p, -jnp.finfo(jnp.float32).epsneg)
    return log_p - jnp.log(-jnp.expm1(log_p))


def kto(
    policy: Sequences,
    reference: Sequences,
    desirable: jax.Array,
    baseline: jax.Array,
    *,
    beta: Any,
    desirable_weight: Any = 1.0,
    undesirable_weight: Any = 1.0,
) -> jax.Array:
    """KTO, of answers that are desirable or not, without pairs:

        r    = log p(y) - log p_ref(y)
        loss = w_D (1 - sigmoid(beta * (r - z0)))  if y is desirable,
               w_U (1 - sigmoid(beta * (z0 - r)))  if not

    Args:
      policy, reference: the answers under both.
      desirable: bool.
      baseline: z0, from `kto_baseline`.
      beta: how averse to risk the value is.
      desirable_weight, undesirable_weight: w_D and w_U, against labels of unequal numbers.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, equations 7 and 8.
    """
    ratio = policy.log_probs - reference.log_probs
    gain = 1 - jax.nn.sigmoid(beta * (ratio - baseline))
    loss = 1 - jax.nn.sigmoid(beta * (baseline - ratio))
    return jnp.where(desirable, desirable_weight * gain, undesirable_weight * loss)


def kto_baseline(policy: Sequences, reference: Sequences) -> jax.Array:
    """z0, a scalar: the divergence of the policy from the reference, by the mean log ratio of
    answers to other prompts than their own, at least 0. No gradient flows through it.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1.
    """
    counted = policy.lengths > 0
    ratio = jnp.where(counted, policy.log_probs - reference.log_probs, 0.0)
    mean = ratio.sum() / jnp.maximum(counted.sum(), 1).astype(jnp.float32)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def rewards(policy: Sequences, reference: Sequences, *, beta: Any) -> jax.Array:
    """What DPO's policy implicitly rewards an answer with, `beta * (log p(y) - log p_ref(y))`: of a
    pair the difference is its reward margin, and above 0 it is told right (equation 5)."""
    return beta * (policy.log_probs - reference.log_probs)


def _margin(policy: Pairs, reference: Pairs) -> jax.Array:
    chosen, rejected = (
        ours.log_probs - theirs.log_probs for ours, theirs in zip(policy, reference, strict=True)
    )
    return chosen - rejected


def _mean_margin(policy: Pairs, reference: Pairs) -> jax.Array:
    chosen, rejected = (
        ours.means - theirs.means for ours, theirs in zip(policy, reference, strict=True)
    )
    return chosen - rejected


def _smoothed(margin: jax.Array, wrong: Any) -> jax.Array:
    right = jax.nn.log_sigmoid(margin)
    return -(1 - wrong) * right - wrong * jax.nn.log_sigmoid(-margin)
