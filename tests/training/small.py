"""A model, batches and arms small enough for every test."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax import training
from lora_jax.models import llama
from lora_jax.models.llama import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    context_length=64,
    tie_embeddings=True,
)
LOSS = training.next_token_loss(CONFIG)


def params():
    return llama.init(CONFIG, key=jax.random.key(0))


def batch(seed: int, rows: int = 4, length: int = 12):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, (rows, length + 1), dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": rng.random((rows, length)) < 0.5,
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }


def without_dropout(delta, base, batch):
    return LOSS(delta, base, batch, None)


def states(base, arms, tx):
    """States of `arms`, (method, targets, learning rate, seed) each, in shapes of their own."""
    return [
        training.init_state(
            lora.lora_transform(base, method, targets=targets, key=jax.random.key(seed))[1],
            tx,
            learning_rate=rate,
            seed=seed,
        )
        for method, targets, rate, seed in arms
    ]


@dataclasses.dataclass
class Batches:
    """An endless iterator with a position, as the data package's."""

    next_seed: int = 0

    def __next__(self):
        self.next_seed += 1
        return batch(self.next_seed)

    def get_state(self):
        return {"next_seed": self.next_seed}

    def set_state(self, state):
        self.next_seed = state["next_seed"]


def assert_close(ours, theirs, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs
    )


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), ours, theirs)


def zeros_like(tree):
    return jax.tree.map(jnp.zeros_like, tree)
