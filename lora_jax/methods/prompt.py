"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.layouts import Layout
from lora_jax.methods.method import Method
from lora_jax.nodes import Extra
from lora_jax.paths import stable_hash
from lora_jax.products import AnyWeight
from lora_jax.schema import leaf
from lora_jax.weights import embed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt(Method):
    """Trained rows that the model reads in front of the embedded tokens; no weight is adapted.

    Target the embedding table, whose width they have: `lora_transform(params, Prompt(length=20),
    targets="embed", key=key)`. They stand in the delta, and in the bound weights, as `prompt`.
    Tokens keep their places relative to each other and begin at position `length`; every example
    of a packed row sees the prompt.

    Attributes:
      length: how many rows.
      init: "vocab" takes the rows of random tokens, "normal" a normal distribution of deviation 1
        (PEFT's "RANDOM").
      tokens: the ids of a text whose rows to take instead, repeated or cut to `length`.

    Raises:
      ValueError: for a length below 1, an unknown init, no tokens, or targets other than one table.
    """

    has_nodes: ClassVar[bool] = False

    length: int = 20
    init: str = "vocab"
    tokens: tuple[int, ...] | None = None

    def __post_init__(self):
        self._require_count("length")
        known = self.init in ("vocab", "normal")
        self._require("init", known, "expected 'vocab' or 'normal'.")
        given = self.tokens is None or self.tokens
        self._require("tokens", given, "the initial text has no tokens.")

    @property
    def reads_values(self) -> bool:
        return self.tokens is not None or self.init == "vocab"

    def extras(
        self, weights: Mapping[str, AnyWeight], *, layouts: Mapping[str, Layout], key: jax.Array
    ) -> dict[str, Extra]:
        del layouts
        tables = list(weights.values())
        if len(tables) != 1 or tables[0].ndim != 2:
            found = ", ".join(f"{path} {tuple(w.shape)}" for path, w in weights.items())
            raise ValueError(
                f"Prompt takes its width from one embedding table [vocab, d], but is targeted at "
                f'{found}. Target the table alone, such as targets="embed".'
            )
        vocab, width = tables[0].shape
        key = jax.random.fold_in(key, stable_hash("prompt"))
        if self.tokens is not None:
            ids = jnp.resize(jnp.asarray(self.tokens, jnp.int32), (self.length,))
        elif self.init == "vocab":
            ids = jax.random.randint(key, (self.length,), 0, vocab)
        else:
            return {"prompt": PromptNode(jax.random.normal(key, (self.length, width), jnp.float32))}
        return {"prompt": PromptNode(embed(ids, tables[0]).astype(jnp.float32))}


@flax.struct.dataclass
class PromptNode(Extra):
    """`rows [P, d]`, float32; `[B, P, d]` where each row of a batch has a prompt of its own."""

    own_axes = ("row", "width")

    rows: jax.Array = leaf("stack row width")
