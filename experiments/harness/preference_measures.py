"""What preference learning is measured by: numbers that all losses share, and need no judge."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import lora_jax as lora
from experiments.harness import devices, losses, setup
from experiments.harness.measures import Measured, Measures, Numbers
from experiments.harness.samples import answering
from experiments.harness.shared import Shared
from lora_jax import data
from lora_jax.data.preferences import facts_of
from lora_jax.data.restaurant_check import mistakes
from lora_jax.training import preference, target_log_probs
from lora_jax.training.losses.pairs import pairs_of
from lora_jax.transform import Delta

WINS, MISTAKES, MARGIN, RIGHT = "win rate", "mistakes", "margin", "told right"


def measures_of(shared: Shared) -> Measured:
    """Over the first validation pairs, of a delta:

    - win rate: the share of prompts to which its greedy answer makes fewer mistakes than the
      untuned base's, by `restaurant_check.mistakes`; an equal number is half a win.
    - mistakes: facts left out or made up, the mean of an answer.
    - margin: by how many nats more than the base's its log-probability of the chosen answer
      exceeds that of the rejected one, the mean of a pair: DPO's reward margin at a beta of 1.
    - told right: the share of pairs whose margin is above 0; one of 0 is half.
    """
    config, model = shared.config, shared.model
    count = config.data.validation_examples
    pairs = list(itertools.islice(setup.records(config, "validation"), count))
    margins = _margins(config, shared, pairs)
    prompts = [
        data.render_messages(pair["prompt"], model.tokenizer, add_generation_prompt=True)
        for pair in pairs
    ]
    answers = answering(config, model, prompts)

    def mistaken(delta: Delta) -> list[int]:
        said = answers(lora.bind(model.params, delta))
        return [mistakes(facts_of(pair), text) for pair, text in zip(pairs, said, strict=True)]

    of_base = mistaken({})

    def measured(delta: Delta) -> Numbers:
        found = mistaken(delta) if delta else of_base
        return {WINS: win_rate(found, of_base), MISTAKES: statistics.fmean(found), **margins(delta)}

    return measured


MEASURES = Measures(of=measures_of, names=(WINS, MISTAKES, MARGIN, RIGHT), compared=WINS)


def win_rate(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """The share of fewer mistakes, an equal number counted as half."""
    return statistics.fmean(
        (one < other) + (one == other) / 2 for one, other in zip(ours, theirs, strict=True)
    )


def require_checkable(config: ConfigDict) -> None:
    """Raises ValueError for data whose answers the rule cannot read."""
    if config.data.source != "preferences":
        raise ValueError(
            f"config.data.source={config.data.source!r}: the win rate is by a rule for the corpus "
            "of preferences. Another source is trained on by experiments/rank_sweep.py with "
            "--config.train.loss=dpo."
        )


def _margins(
    config: ConfigDict, shared: Shared, pairs: Sequence[data.Record]
) -> Callable[[Delta], Numbers]:
    """The function from a delta to the mean margin, and to how many are above 0."""
    model, config = shared.model, losses.learning_by(config, "dpo")
    loss = losses.loss_of(config, model.config, model.params)
    execution = devices.execution(config, model.params, loss.fields)
    encoded = data.encode_pairs(pairs, model.tokenizer, seq_len=config.data.seq_len)
    batches = data.eval_batches(
        encoded,
        model.tokenizer,
        batch_size=config.data.batch_size,
        seq_len=config.data.seq_len,
        pack=config.data.pack,
    )
    attention = None if config.model.attention == "auto" else config.model.attention
    read = target_log_probs(model.config, remat=config.model.remat, attention=attention)

    def sums(delta: Delta, base: Any, batch: Mapping[str, Any]):
        ours, theirs = (
            pairs_of(read(lora.bind(base, bound), batch), batch) for bound in (delta, {})
        )
        chosen, rejected = (
            preference.rewards(*answers, beta=1.0) for answers in zip(ours, theirs, strict=True)
        )
        counted = (ours.chosen.lengths > 0) & (ours.rejected.lengths > 0)
        margin = jnp.where(counted, chosen - rejected, 0.0)
        right = jnp.where(counted, (jnp.sign(margin) + 1) / 2, 0.0)
        return jnp.stack([margin.sum(), right.sum()]), counted.sum().astype(jnp.float32)

    compiled = execution.evaluate(sums)

    def margins(delta: Delta) -> Numbers:
        if not delta:
            return {MARGIN: 0.0, RIGHT: 0.5}
        with execution.context():
            found = [
                jax.device_get(compiled(delta, model.params, execution.batch(batch)))
                for batch in batches
            ]
        margin, right = np.asarray([total for total, _ in found], np.float64).sum(axis=0).tolist()
        count = sum(float(number) for _, number in found)
        return {MARGIN: margin / count, RIGHT: right / count}

    return margins
