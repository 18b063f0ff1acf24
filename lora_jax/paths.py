"""Paths name the leaves of a tree: `layers/attn/q_proj`, whatever the tree is made of."""

import contextlib
import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def path_name(key_path: jax.tree_util.KeyPath) -> str:
    """`layers/attn/q_proj`: the keys, indices or field names from the root to a leaf."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def flatten(tree: Any, is_leaf=None) -> dict[str, Any]:
    """`{path: leaf}` in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {path_name(path): leaf for path, leaf in leaves}


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or stands for one: abstract, or a `Weight`. Trees may hold more:
    functions, strings, Python numbers, dtypes."""
    shape = None if isinstance(leaf, type) else getattr(leaf, "shape", None)
    return isinstance(shape, tuple) and hasattr(leaf, "dtype")


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict that `flat` lists: `{"a/b": x}` becomes `{"a": {"b": x}}`."""
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = root
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return root


def one_key(key: Any, name: str = "key") -> jax.Array:
    """The typed key that `key` is, or that a raw one of `jax.random.PRNGKey` stands for.

    Raises:
      ValueError: for anything else, such as a seed, or a batch of keys.
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if shape == ():
            return key
    elif dtype == jnp.uint32:
        like = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        if shape == like.shape:
            return jax.random.wrap_key_data(jnp.asarray(key))
    raise ValueError(
        f"{name}: expected one key, such as jax.random.key(0), found {described(key)}. Of several "
        "keys take one, or vmap over them."
    )


def described(value: Any) -> str:
    """A value for an error message, an array by its dtype and shape."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"an array of {value.dtype} and shape {tuple(value.shape)}"
    return repr(value)


def is_known(array: Any) -> bool:
    """Whether the numbers of an array can be read here: it is neither traced nor on other hosts."""
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def keys_for(key: jax.Array, path: str, stack: tuple[int, ...]) -> jax.Array:
    """One key for each layer `[stack...]` of the weight at `path`, and for no other.

    Indices in the path are folded in like indices along stack axes, so that `layers/3/q_proj` and
    layer 3 of a stacked `layers/q_proj` are initialised with the same numbers.
    """
    parts = path.split("/")
    name = "/".join(part for part in parts if not part.isdigit())
    keys = jax.random.fold_in(key, stable_hash(name))
    for index in (int(part) for part in parts if part.isdigit()):
        keys = jax.random.fold_in(keys, index)
    for size in stack:
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        for _ in range(keys.ndim):
            fold = jax.vmap(fold, in_axes=(0, None))
        keys = fold(keys, jnp.arange(size))
    return keys


def stable_hash(text: str) -> int:
    """A 32-bit number that depends on the text alone, the same in every process and version."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Puts the path in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        own = type(error) if type(error).__init__ is ValueError.__init__ else ValueError
        raise own(f"{path}: {error}") from error


def nearest(name: str, candidates: Iterable[str], count: int = 5) -> list[str]:
    """The candidates that resemble `name` most, judged by whole path and by component."""

    def likeness(option: str) -> float:
        parts = [option, *option.split("/")]
        return max(difflib.SequenceMatcher(None, name, part).ratio() for part in parts)

    return sorted(candidates, key=likeness, reverse=True)[:count]
