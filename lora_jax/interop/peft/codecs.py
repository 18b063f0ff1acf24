"""The codecs: of the methods that PEFT and we both have."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax.interop.peft import adalora, ia3, loha, lora, prefix, prompt, vera
from lora_jax.interop.peft.codec import Codec


def checked(codecs: Sequence[Codec]) -> tuple[Codec, ...]:
    """The same codecs.

    Raises:
      ValueError: where two read one peft_type, or write one class of nodes.
    """
    for i, one in enumerate(codecs):
        for other in codecs[:i]:
            types = set(one.types) & set(other.types)
            nodes = {
                min(a.__name__, b.__name__)
                for a in one.nodes
                for b in other.nodes
                if issubclass(a, b) or issubclass(b, a)
            }
            if types or nodes:
                raise ValueError(
                    f"{', '.join(sorted(types | nodes))} has two codecs, {other} and {one}: leave "
                    "one of them out of CODECS, or keep their types and nodes apart."
                )
    return tuple(codecs)


CODECS = checked(
    (
        lora.CODEC,
        ia3.CODEC,
        vera.CODEC,
        adalora.CODEC,
        loha.CODEC,
        prompt.CODEC,
        prefix.CODEC,
    )
)


def codec_of(source: str, config: Mapping[str, Any]) -> Codec:
    """The codec that reads an adapter of this adapter_config.json.

    Raises:
      ValueError: for a peft_type that none reads.
    """
    peft_type = config.get("peft_type")
    known = {name: codec for codec in CODECS for name in codec.types}
    if not isinstance(peft_type, str) or peft_type not in known:
        raise ValueError(
            f"{source}: peft_type {peft_type!r:.200} is not supported; supported: "
            f"{', '.join(known)}."
        )
    return known[peft_type]


def codec_for(nodes: Mapping[str, Any]) -> Codec:
    """The codec that writes these nodes.

    Raises:
      ValueError: for a node that none writes, for nodes of several codecs, and for no node.
    """
    found: dict[str, tuple[Codec, str]] = {}
    for path, node in nodes.items():
        codec = next((codec for codec in CODECS if isinstance(node, codec.nodes)), None)
        if codec is None:
            raise ValueError(
                f"{path}: PEFT has no form for {type(node).__name__}. Merge it, and export the "
                "merged model."
            )
        found.setdefault(codec.types[0], (codec, path))
    if len(found) != 1:
        listed = ", ".join(f"{name} ({path})" for name, (_, path) in found.items()) or "none"
        raise ValueError(f"an adapter of PEFT has one method, this delta has {listed}.")
    return next(iter(found.values()))[0]


def served_by_vllm() -> Iterable[str]:
    """The methods that vLLM serves."""
    return [codec.method for codec in CODECS if codec.encode_vllm]
