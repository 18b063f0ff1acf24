"""The digest of an export: the logits of a fixed probe, against which any loader is checked."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.interop.forward import AnyForward
from lora_jax.parallel import hosts
from lora_jax.quant import Quantized
from lora_jax.transform import Delta, bind
from lora_jax.weights import PyTree, is_weight

KEY = "lora_jax.digest"  # in the metadata of safetensors
PROBE, POSITIONS, TOP = 16, 4, 8
# How far logits may be off, relative to the largest, by the dtype of the base's matrices.
_ROUNDING = {"float64": 1e-3, "float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2}
_QUANTIZED = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digest:
    """Expected logits: at each position of a probe, those of the tokens that score highest.

    Attributes:
      tokens: the probe `[T]`.
      positions: `[P]`, indices of tokens: the logits are of what follows them.
      ids: `[P, K]`, the tokens whose logits are kept.
      logits, base_logits: `[P, K]`, with the adapter and without it.
      log_normalizers: `[P]`: a log-probability is a logit minus this, for engines that
        return log-probabilities alone.
      weights: the dtype or the format of the base's matrices, such as "float32" or "nf4".
      adapter: a name for the bits of the adapter's tensors; empty where there is no file of them.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]
    logits: tuple[tuple[float, ...], ...]
    base_logits: tuple[tuple[float, ...], ...]
    log_normalizers: tuple[float, ...]
    weights: str
    adapter: str = ""

    def to_json(self) -> str:
        fields = {k: v for k, v in dataclasses.asdict(self).items() if v != ""}
        return json.dumps({"version": 1, **fields}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, source: str = "the digest") -> "Digest":
        """Raises ValueError for a text that is not a digest."""
        try:
            fields = json.loads(text)
            if fields.pop("version") != 1:
                raise ValueError("its version is not 1")
            digest = cls(**{name: _frozen(value) for name, value in fields.items()})
            digest._check()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{source} is not a digest of lora_jax: {error}.") from None
        return digest

    def _check(self) -> None:
        shape = (len(self.positions), len(self.ids[0]) if self.ids else 0)
        for rows in (self.ids, self.logits, self.base_logits):
            if np.shape(rows) != shape or not np.isfinite(np.asarray(rows, np.float64)).all():
                raise ValueError("its rows are not alike, or not finite")
        if min(shape) < 1 or len(self.log_normalizers) != shape[0]:
            raise ValueError("it holds no logits")
        counts = np.asarray([*self.tokens, *self.positions, *np.ravel(self.ids)])
        if not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
            raise ValueError("its tokens are not counts")
        if max(self.positions) >= len(self.tokens):
            raise ValueError("a position is beyond its tokens")
        if not (isinstance(self.weights, str) and isinstance(self.adapter, str)):
            raise ValueError("its names are not text")

    def picked(self, logits: np.ndarray) -> np.ndarray:
        """Of the logits `[T, V]` of its tokens, those that it keeps, `[P, K]`."""
        rows = np.asarray(logits, np.float32).reshape(-1, np.shape(logits)[-1])[-len(self.tokens) :]
        return rows[np.asarray(self.positions)[:, None], np.asarray(self.ids)]


def digest_of(
    forward: AnyForward, base: PyTree, delta: Delta, tokens: Sequence[int] | None = None
) -> Digest:
    """The digest of a delta over its base.

    Where the base is sharded over several processes, all of them must call it.

    Args:
      forward: the model.
      base: the frozen tree that the delta was made for.
      delta: the adapter.
      tokens: the probe; by default a few that follow from the size of the vocabulary.

    Raises:
      ValueError: the logits are not finite numbers.
    """
    params = forward.prepared(base)
    weights = bind(params, delta)
    if tokens is None:
        tokens = fixed_probe(forward.vocab_size, forward.room(weights))
    before, after = (run(forward, tree, tokens) for tree in (params, weights))
    if not np.isfinite(before).all() or not np.isfinite(after).all():
        whose = "adapter's" if np.isfinite(before).all() else "base's"
        raise ValueError(
            f"the {whose} logits are not finite numbers: such an adapter is of no use. If training "
            "has diverged, take an earlier checkpoint."
        )
    count = min(POSITIONS, len(tokens))
    positions = [len(tokens) * (i + 1) // count - 1 for i in range(count)]
    ids = np.argsort(-after[positions], axis=-1, kind="stable")[:, :TOP]
    rows = np.asarray(positions)[:, None]
    normalizers = jax.nn.logsumexp(jnp.asarray(after[positions], jnp.float32), axis=-1)
    return Digest(
        tokens=tuple(map(int, tokens)),
        positions=tuple(positions),
        ids=_frozen(ids.tolist()),
        logits=_rounded(after[rows, ids]),
        base_logits=_rounded(before[rows, ids]),
        log_normalizers=_rounded(np.asarray(normalizers)),
        weights=formats_of(base),
    )


def observed(
    forward: AnyForward, params: PyTree, digest: Digest, *, weights: str | None = None
) -> Digest:
    """The digest of a model without an adapter, such as a merged one, at the probe of another: for
    `verify(against=...)`.

    `weights` is the dtype or format that they were stored in, where that is not what they have now:
    see `stored_formats`.
    """
    logits = run(forward, forward.prepared(params), digest.tokens)
    kept = _rounded(digest.picked(logits))
    weights = formats_of(params) if weights is None else weights
    return dataclasses.replace(digest, logits=kept, weights=weights, adapter="")


def fixed_probe(vocab_size: int, room: int | None) -> list[int]:
    """The same tokens every time, distributed over the vocabulary."""
    count = PROBE if room is None else min(PROBE, room)
    return [((i + 1) * 2654435761 % 2**32) * vocab_size >> 32 for i in range(count)]


def run(forward: AnyForward, weights: PyTree, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """The logits `[T, V]` of one row, float32 and on this host."""
    with jax.default_matmul_precision("highest"):
        logits = _logits(forward, weights, jnp.asarray(tokens, jnp.int32)[None])
    return np.asarray(hosts.gathered(logits), np.float32)[0]


@functools.partial(jax.jit, static_argnums=0)
def _logits(forward, weights, tokens):
    return forward.logits(weights, tokens)


def disagreement(
    digest: Digest, weights: str, logits: np.ndarray, base_logits: np.ndarray | None = None
) -> str | None:
    """How logits differ from a digest's; None where they agree.

    A digest and logits of bases in other dtypes, or quantised, agree where they differ by no more
    than that explains. A result that begins with "another base" is about `base_logits`.

    Args:
      digest: of the export.
      weights: the dtype or format of the base's matrices here, as `formats_of` names it.
      logits: `[T, V]` of the digest's tokens, with the adapter.
      base_logits: likewise without it, if known.
    """
    expected, before = np.asarray(digest.logits), np.asarray(digest.base_logits)
    found, largest = digest.picked(logits), np.abs(before).max() + 1e-9
    if not np.isfinite(found).all():
        return "the logits are not finite numbers"
    rounding = _allowed(digest.weights, weights)
    if base_logits is not None:
        off = np.abs(digest.picked(base_logits) - before).max() / largest
        if off > rounding:
            return (
                f"another base: without the adapter, logits differ by {off:.2g} of the largest "
                f"from those that the export was made with (over {digest.weights} weights; here "
                f"{weights}, which explains {rounding:g})"
            )
        before_here = digest.picked(base_logits)
    else:
        before_here = before
    there, here = expected - before, found - before_here
    size = np.abs(there).max()
    loose = 0.02 if rounding <= 1e-3 else 0.15 if rounding < _QUANTIZED else 0.6
    noise = 1e-4 if base_logits is not None and rounding <= 1e-3 else 0.1 * rounding
    if np.abs(here - there).max() <= loose * size + noise * largest:
        return None
    if np.abs(here).max() <= 0.05 * size:
        return "the adapter has no effect here: the logits are those of the base"
    ratio = float(np.vdot(here, there) / np.vdot(there, there))
    likeness = np.vdot(here, there) / np.linalg.norm(here) / max(np.linalg.norm(there), 1e-30)
    if likeness > 0.9 and abs(ratio - 1) > 0.05:
        return (
            f"the adapter moves the logits {ratio:.2f} times as far as it should: another scale "
            "(alpha, rank, rslora), or an update that was rounded away or merged twice"
        )
    return (
        f"the logits are off by {np.abs(here - there).max() / max(size, 1e-9):.2g} of the "
        "adapter's own effect: an older or newer version of the adapter, tensors that were dropped "
        "or changed, or a merge of something else"
    )


def check_digest(
    digest: Digest, forward: AnyForward, params: PyTree, *, weights: str | None = None
) -> str | None:
    """What is wrong with a merged model that carries a digest; None where it computes what it was
    exported with. `weights` as in `observed`."""
    if max(digest.tokens) >= forward.vocab_size or np.max(digest.ids) >= forward.vocab_size:
        return "another vocabulary than the digest's"
    logits = run(forward, forward.prepared(params), digest.tokens)
    return disagreement(digest, formats_of(params) if weights is None else weights, logits)


def formats_of(params: PyTree) -> str:
    """The dtypes and formats of a tree's matrices: "float32", "bfloat16+nf4"."""
    flat = paths.flatten(params, is_leaf=is_weight).values()
    names = {
        leaf.format if isinstance(leaf, Quantized) else jnp.dtype(leaf.dtype).name
        for leaf in flat
        if leaf.ndim > 1
    }
    return "+".join(sorted(names)) or "none"


def name_of(tensors: Mapping[str, np.ndarray]) -> str:
    """A name for the bits of an adapter's tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {value.shape} {value.dtype}\n".encode() + value.tobytes())
    return digest.hexdigest()[:16]


def can_run(params: PyTree) -> bool:
    """Whether this process can run the model by itself: on arrays that are all addressable."""
    leaves = jax.tree.leaves(params)
    return not any(
        isinstance(leaf, jax.ShapeDtypeStruct)
        or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable)
        for leaf in leaves
    )


def _allowed(*weights: str) -> float:
    names = {name for text in weights for name in text.split("+")}
    quantized = any(name not in _ROUNDING for name in names)
    if quantized and weights[0] != weights[-1]:
        return _QUANTIZED
    return max([_ROUNDING[name] for name in names if name in _ROUNDING], default=3e-2)


def _rounded(values: np.ndarray) -> Any:
    """As floats of seven digits."""
    return _frozen(np.vectorize(lambda v: float(f"{v:.7g}"))(values).tolist())


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
