"""The keys that a GGUF file may have for its architecture and tokenizer, and their values.

llama.cpp reads more of them than our Llama does; a value that would change what it computes is an
error, and so is an unknown key.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.models.families import ARCHITECTURES

_READ = """
    context_length embedding_length block_count feed_forward_length attention.head_count
    attention.head_count_kv attention.key_length attention.layer_norm_rms_epsilon
    rope.freq_base rope.scaling.original_context_length
"""
_HARMLESS = "vocab_size tensor_data_layout rope.scaling.finetuned"
_TOKENIZER = """
    model pre tokens token_type scores merges bos_token_id eos_token_id unknown_token_id
    padding_token_id seperator_token_id cls_token_id mask_token_id eot_token_id eom_token_id
    add_bos_token add_eos_token add_sep_token add_space_prefix remove_extra_whitespaces
    token_type_count prefix_token_id suffix_token_id middle_token_id fim_pre_token_id
    fim_suf_token_id fim_mid_token_id fim_pad_token_id fim_rep_token_id fim_sep_token_id
"""


def check_keys(path: Path, metadata: Mapping[str, Any], family: str, head_dim: int) -> None:
    """Raises ValueError if a key of the architecture or of the tokenizer is not known, or has a
    value with which llama.cpp would compute something else."""
    if metadata.get("general.type", "model") != "model":
        raise ValueError(
            f"{path} holds a {metadata['general.type']!r}, expected a 'model'; adapters are read "
            "from PEFT's folders."
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise ValueError(
            f"{path} is one of {metadata['split.count']} parts of a model; join them by "
            "llama.cpp's gguf-split first."
        )
    _check_architecture(path, metadata, family, head_dim)
    known = {*_TOKENIZER.split()}
    for key, value in metadata.items():
        name = key.removeprefix("tokenizer.ggml.")
        if name != key and name not in known:
            raise ValueError(_unknown(path, key, value, "how a text is split into tokens"))


def _check_architecture(
    path: Path, metadata: Mapping[str, Any], family: str, head_dim: int
) -> None:
    known = {*_READ.split(), *_HARMLESS.split(), *ARCHITECTURES[family].reads}
    supported: dict[str, tuple[Any, ...]] = {
        "attention.value_length": (head_dim,),
        "attention.causal": (True,),
        "attention.scale": (0, head_dim**-0.5),
        "attention.clamp_kqv": (0,),
        "attention.max_alibi_bias": (0,),
        "expert_count": (0,),
        "expert_used_count": (0,),
        "use_parallel_residual": (False,),
        "rope.dimension_count": (head_dim,),
        "rope.scaling.type": ("none", "linear", "yarn"),
        "rope.scaling.attn_factor": (1,),
        "rope.scaling.factor": (0, 1),  # without a type, llama.cpp scales by it linearly
        "rope.scale_linear": (0, 1),
        "logit_scale": (0, 1),
        "residual_scale": (0, 1),
        "embedding_scale": (0, 1),
        "attn_logit_softcapping": (0,),
        "final_logit_softcapping": (0,),
    }
    kind = metadata.get(f"{family}.rope.scaling.type")
    for key, value in metadata.items():
        name = key.removeprefix(f"{family}.")
        if name == key or name in known:
            continue
        if name not in supported:
            raise ValueError(_unknown(path, key, value, "what the model computes"))
        if name in ("rope.scaling.factor", "rope.scale_linear") and kind is not None:
            continue  # "none" switches it off, the others read it
        if name == "rope.scaling.attn_factor" and kind == "none":
            continue
        if not any(_same(value, one) for one in supported[name]):
            raise ValueError(
                f"{path}: {key} is {value!r}; supported: "
                f"{', '.join(map(repr, supported[name]))}. With another value llama.cpp computes "
                "what this model does not."
            )


def _same(value: Any, supported: Any) -> bool:
    if isinstance(value, float) and not isinstance(supported, str):
        return math.isclose(value, supported, rel_tol=1e-6)
    return value == supported


def _unknown(path: Path, key: str, value: Any, what: str) -> str:
    text = repr(value)
    return (
        f"{path}: the metadata key {key} ({text if len(text) < 60 else text[:57] + '...'}) is not "
        f"known, and may change {what}. Load the model from its Hugging Face folder, or convert "
        "it without that key."
    )
