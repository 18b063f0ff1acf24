"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190)."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.layouts import Layout
from lora_jax.methods.method import Method, over_layers
from lora_jax.nodes import Extra
from lora_jax.paths import keys_for
from lora_jax.products import AnyWeight
from lora_jax.schema import leaf
from lora_jax.weights import linear

# Names in the trees of Hugging Face, Flax, Haiku, Llama and GPT-2: projections of keys or of
# values, projections of anything else, an array below the name of its module, other modules.
_KEYS = re.compile(r"(?:keys?|values?|[kv])(?:_proj(?:ection)?)?|w[kv]|to_[kv]")
_OTHER = re.compile(
    r"(?:.+_)?(?:proj|projection|qkv)|q|o|w[qo123]|to_(?:q|out)|query|queries|out|output|gate|up"
    r"|down|c_attn|c_fc|fc_?\d?|lin\d?|linear\d?|dense.*|embed.*|wte|wpe|.*head",
    re.I,
)
_ARRAY = re.compile(r"kernel|weight|w|array")
_ELSEWHERE = re.compile(r"(?:.*_)?(?:mlp|ffn|ff|feed_forward|feedforward|experts?|moe)(?:_\d+)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix(Method):
    """Trained keys and values in front of every layer's own; no weight is adapted.

    Target the key projections, whose output axes they have: `lora_transform(params,
    Prefix(length=20), targets="k_proj", key=key)`. They stand beside them as `prefix`, for
    instance `layers/attn/prefix`, one in each attention layer. A target whose name is that of
    another projection is refused here, and one that a model does not read is refused by the model.
    The keys get no rotary embedding; tokens begin at position `length`, and every example of a
    packed row sees the prefix.

    Attributes:
      length: how many keys and values a layer.
      hidden: None trains them as they are. A number trains an embedding of `length` rows and an
        MLP with so many hidden units instead, which gives the keys and values of all stacked
        layers: `tanh(rows @ w1 + b1) @ w2 + b2` (section 4.3 of the paper).

    Init: normal with deviation 1; 1 / sqrt(d_in) for the MLP's matrices, and zero for its biases.

    Raises:
      ValueError: for a length or a hidden width below 1; from `lora_transform`, for a target that
        is named as another projection than of keys or values, and for two in one attention layer.
    """

    has_nodes: ClassVar[bool] = False

    length: int = 20
    hidden: int | None = None

    def __post_init__(self):
        self._require_count("length")
        if self.hidden is not None:
            self._require_count("hidden")

    def extras(
        self, weights: Mapping[str, AnyWeight], *, layouts: Mapping[str, Layout], key: jax.Array
    ) -> dict[str, Extra]:
        _require_one_each(list(weights))
        found: dict[str, Extra] = {}
        for path, weight in weights.items():
            stack, _, d_out = layouts[path].split(weight.shape)
            place = "/".join([*path.split("/")[:-1], "prefix"])
            found[place] = self._init(stack, math.prod(d_out), place, key)
        return found

    def _init(self, stack: tuple[int, ...], width: int, path: str, key: jax.Array) -> Extra:
        def normal(key, *shape, deviation=1.0):
            return deviation * jax.random.normal(key, shape, jnp.float32)

        def layers(init):
            return over_layers(init, stack)(keys_for(key, path, stack))

        if self.hidden is None:
            pair = layers(lambda k: normal(k, 2, self.length, width))
            return PrefixNode(k=pair[..., 0, :, :], v=pair[..., 1, :, :])
        keys, deviation = jax.random.split(keys_for(key, path, ())), 1 / math.sqrt(self.hidden)
        return EncodedPrefixNode(
            rows=normal(keys[0], self.length, width),
            w1=normal(keys[1], width, self.hidden, deviation=1 / math.sqrt(width)),
            b1=jnp.zeros(self.hidden, jnp.float32),
            w2=layers(lambda k: normal(k, self.hidden, 2 * width, deviation=deviation)),
            b2=jnp.zeros((*stack, 2 * width), jnp.float32),
        )


def _require_one_each(targets: list[str]) -> None:
    """Raises ValueError unless each target may be the key or the value projection of an attention
    of its own."""
    way_out = 'Target the key projections alone, such as targets="k_proj".'
    taken: dict[str, str] = {}
    for path in targets:
        *module, name = path.split("/")
        if _ARRAY.fullmatch(name) and module and _is_projection(module[-1]):
            *module, name = module
        is_other = _OTHER.fullmatch(name) and not _KEYS.fullmatch(name)
        if is_other or any(_ELSEWHERE.fullmatch(part) for part in module):
            raise ValueError(
                f"{path}: a Prefix takes the width of an attention layer's keys, and stands beside "
                f"the projection that makes them, which this one is not by its name. {way_out}"
            )
        first = taken.setdefault("/".join(module), path)
        if first != path:
            raise ValueError(
                f"{first} and {path} are targets of a Prefix in one module, and an attention layer "
                f"has one. {way_out}"
            )


def _is_projection(name: str) -> bool:
    return bool(_KEYS.fullmatch(name) or _OTHER.fullmatch(name))


@flax.struct.dataclass
class PrefixNode(Extra):
    """`k` and `v`, `[stack..., P, d_out]`, float32; what an attention layer reads."""

    own_axes = ("row", "width")

    k: jax.Array = leaf("stack row width")
    v: jax.Array = leaf("stack row width")


@flax.struct.dataclass
class EncodedPrefixNode(Extra):
    """Keys and values as an MLP makes them of `rows`, all float32; a pair is `2 * d_out` wide."""

    own_axes = ("row", "width", "hidden", "pair")

    rows: jax.Array = leaf("row width")
    w1: jax.Array = leaf("width hidden")
    b1: jax.Array = leaf("hidden")
    w2: jax.Array = leaf("stack hidden pair")
    b2: jax.Array = leaf("stack pair")

    def bound(self) -> PrefixNode:
        with jax.default_matmul_precision("highest"):  # the exported values are the trained ones
            inner = jnp.tanh(linear(self.rows, self.w1) + self.b1[None])
            pair = jnp.matmul(inner, self.w2) + self.b2[..., None, :]
        k, v = jnp.split(pair, 2, axis=-1)
        return PrefixNode(k=k, v=v)
