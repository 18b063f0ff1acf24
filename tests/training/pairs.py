"""Pairs of answers, small enough for every test, and losses of them written out over all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import small

import lora_jax as lora
from lora_jax import training
from lora_jax.models import llama
from lora_jax.training.preference import Pairs, Sequences

PROMPT, LENGTH = 4, 10


def pairs(rows=4, seed=0):
    """Answers of several lengths to one prompt a pair; the last row is padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, small.CONFIG.vocab_size, (rows, 2, LENGTH + 1), dtype=np.int32)
    tokens[:, 1, :PROMPT] = tokens[:, 0, :PROMPT]
    lengths = rng.integers(PROMPT + 1, LENGTH + 1, (rows, 2, 1))
    lengths[-1] = 0
    at = np.arange(LENGTH, dtype=np.int32)
    filled = at < lengths
    return {
        "tokens": np.where(filled, tokens[..., :-1], 0),
        "targets": np.where(filled, tokens[..., 1:], 0),
        "loss_mask": filled & (at >= PROMPT - 1),
        "segment_ids": filled.astype(np.int32),
        "positions": np.where(filled, at, 0),
    }


def packed(batch, length):
    """The same pairs one after another in a single row of `length` positions."""
    row = {name: np.zeros((1, 2, length), x.dtype) for name, x in batch.items()}
    for slot in range(2):
        start = 0
        for pair in range(len(batch["tokens"])):
            filled = batch["segment_ids"][pair, slot] > 0
            stop = start + filled.sum()
            for name, x in batch.items():
                row[name][0, slot, start:stop] = x[pair, slot][filled]
            row["segment_ids"][0, slot, start:stop] = pair + 1
            start = stop
    return row


def answers(weights, batch, slot):
    """Sequences of one slot, a row each, from a log-softmax of all logits."""
    tokens, targets, mask = (batch[k][:, slot] for k in ("tokens", "targets", "loss_mask"))
    log_probs = jax.nn.log_softmax(llama.forward(weights, tokens, small.CONFIG))
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return Sequences(jnp.where(mask, picked, 0).sum(-1), mask.sum(-1))


def both(weights, batch):
    return Pairs(*(answers(weights, batch, slot) for slot in range(2)))


def start(rank=2, shift=0.02, base=None):
    """A base and a delta that is not zero."""
    base = small.params() if base is None else base
    _, delta = lora.lora_transform(base, lora.LoRA(rank=rank), key=jax.random.key(0))
    return base, jax.tree.map(lambda x: x + shift, delta)


BATCH = pairs()
READ = training.target_log_probs(small.CONFIG, chunk=8)
GIVEN = {
    "dpo": {"beta": 0.7, "label_smoothing": 0.2},
    "dpo_norm": {"beta": 3.0, "label_smoothing": 0.1},
    "ipo": {"beta": 0.4},
    "simpo": {"beta": 2.5, "gamma": 0.6},
    "orpo": {"beta": 0.3},
    "kto": {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.7},
}
MAKERS = {name: training.LOSSES[name].make for name in GIVEN}
BESIDE_REFERENCE = ("dpo", "dpo_norm", "ipo", "kto")


def judged(batch):
    """The same rows for KTO, where the second answer of a row is one to another prompt."""
    good = np.arange(len(batch["tokens"])) % 2 == 0
    return batch | {"desirable": np.tile(good[:, None], (1, batch["tokens"].shape[-1]))}


def batch_of(name, batch=BATCH):
    return judged(batch) if name == "kto" else batch


def loss(name, **more):
    return MAKERS[name](small.CONFIG, chunk=8, **GIVEN[name], **more)
