"""A model with its adapter bound, to which every other form is compared."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.interop.digest import Digest, disagreement, fixed_probe, formats_of, run
from lora_jax.interop.forward import AnyForward
from lora_jax.interop.peft.files import load_adapter, save_adapter
from lora_jax.interop.peft.names import Names
from lora_jax.interop.verify.merged import held_to, merged_weights
from lora_jax.interop.verify.report import Finding, Form
from lora_jax.quant import Quantized
from lora_jax.transform import Delta, bind, delta_nodes
from lora_jax.weights import PyTree, is_weight


@dataclasses.dataclass
class Bound:
    """A model with its adapter bound, and its logits on a probe."""

    forward: AnyForward
    base: PyTree
    delta: Delta
    params: PyTree
    weights: PyTree
    tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    before: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))
    after: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))

    @classmethod
    def of(cls, forward: AnyForward, base: PyTree, delta: Delta) -> "Bound":
        params = forward.prepared(base)
        return cls(forward, base, delta, params, bind(params, delta))

    def read(self, probe: Sequence[int] | None) -> None:
        """Runs the base and the bound weights on a probe."""
        room, vocabulary = self.forward.room(self.weights), self.forward.vocab_size
        tokens = np.asarray(fixed_probe(vocabulary, room) if probe is None else probe).reshape(-1)
        if not tokens.size or (room is not None and tokens.size > room):
            raise ValueError(
                f"the probe has {tokens.size} tokens, and this model reads from 1 to {room} (its "
                "context less what the adapter puts in front). Give another text."
            )
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise ValueError(
                f"the probe's tokens go from {tokens.min()} to {tokens.max()}, and the base's "
                f"vocabulary is of {vocabulary}. Is it another model's probe?"
            )
        if not np.array_equal(tokens, self.tokens):
            self.tokens = tokens.astype(np.int32)
            self.before = run(self.forward, self.params, self.tokens)
            self.after = run(self.forward, self.weights, self.tokens)

    def held_to(self, digest: Digest, name: str, check_base: bool, source: str) -> str:
        """ "agrees", or what is wrong."""
        self.read(digest.tokens)
        if np.max(digest.ids) >= self.before.shape[-1]:
            wrong: str | None = "another base: its vocabulary is smaller than the digest's"
        else:
            wrong = disagreement(digest, formats_of(self.base), self.after, self.before)
        if wrong and wrong.startswith("another base") and check_base:
            raise ValueError(
                f"{source} was made for {wrong}. Load the base that the adapter names; "
                "check_base=False goes on with this one."
            )
        if digest.adapter and digest.adapter != name:
            changed = "the file's tensors are not those that were exported"
            return f"{changed}; {wrong}" if wrong else changed
        return wrong or "agrees"

    def form(self, name: str, logits: np.ndarray) -> Form:
        rows = logits.reshape(-1, logits.shape[-1])[-len(self.tokens) :]
        width = min(rows.shape[-1], self.after.shape[-1])  # a padded vocabulary
        return held_to(self.after[:, :width], self.before[:, :width], name, rows[:, :width])

    def without_effect(self) -> list[Finding]:
        if not np.isfinite(self.after).all():
            return [Finding("error", "the adapted model's logits are not finite numbers")]
        if np.abs(self.after - self.before).max() > 1e-6 * np.abs(self.before).max():
            return []
        return [Finding("error", "the adapter does nothing: with it and without it, the logits of "
                        "the probe are the same")]  # fmt: skip

    def merged(self) -> list[Form]:
        flat = paths.flatten(self.base, is_leaf=is_weight)
        adapted = [flat[path] for path in delta_nodes(self.delta) if path in flat]
        dtypes = sorted({jnp.dtype(leaf.dtype).name for leaf in adapted})
        formats = sorted({leaf.format for leaf in adapted if isinstance(leaf, Quantized)})
        ways: dict[str, dict[str, bool]] = {"merged in float32": {"wide": True}}
        if dtypes and dtypes != ["float32"]:
            ways[f"merged in {'+'.join(dtypes)}"] = {"wide": False}
        if formats:
            ways[f"merged in {'+'.join(formats)}"] = {"wide": False, "requantized": True}
        return [self._merged(name, **how) for name, how in ways.items()]

    def _merged(self, name: str, **how: Any) -> Form:
        try:
            weights = merged_weights(self.forward, self.base, self.delta, **how)
        except ValueError as error:
            return Form(name=name, why=f"none ({error})")
        return self.form(name, run(self.forward, weights, self.tokens))

    def read_back(self, names: Names, layouts: Mapping, num_kv_heads: int | None) -> Form:
        """Written as PEFT's files and read again."""
        name = "exported and read back"
        with tempfile.TemporaryDirectory() as folder:
            try:
                save_adapter(
                    folder, self.delta, self.base, dict(names), layouts=layouts,
                    num_kv_heads=num_kv_heads, base_fingerprint="none",
                )  # fmt: skip
                again = load_adapter(folder, self.base, names, layouts=layouts, check_base=False)
            except ValueError as error:
                return Form(name=name, why=f"none ({error})")
        return self.form(name, run(self.forward, bind(self.params, again), self.tokens))

    def compared(self, name: str, other: Digest, adapter: str) -> list[Finding]:
        """Findings of a comparison of logits from elsewhere with this adapter's."""
        if max(other.tokens) >= self.forward.vocab_size:
            return [Finding("error", f"{name}: its probe is of another vocabulary")]
        before, after = (run(self.forward, w, other.tokens) for w in (self.params, self.weights))
        here = dataclasses.replace(
            other,
            logits=tuple(map(tuple, other.picked(after).tolist())),
            base_logits=tuple(map(tuple, other.picked(before).tolist())),
            weights=formats_of(self.base),
        )
        found = np.zeros_like(after)
        found[np.asarray(other.positions)[:, None], np.asarray(other.ids)] = other.logits
        wrong = disagreement(here, other.weights, found)
        findings = [Finding("error", f"{name}: {wrong}")] if wrong else []
        if adapter and other.adapter and other.adapter != adapter:
            text = f"{name} holds another version of the adapter ({other.adapter}, here {adapter})"
            findings.append(Finding("error" if wrong else "warning", text))
        return findings
