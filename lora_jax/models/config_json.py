"""The keys of a config.json: those read, those known to change nothing, and no others.

Source: transformers 5.24, by running its models with each key changed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_LARGEST = 1 << 31  # no count in a config is larger; a flipped digit is

_READ = """
    model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings original_max_position_embeddings
    rms_norm_eps tie_word_embeddings rope_theta rope_scaling rope_parameters sliding_window
    use_sliding_window max_window_layers layer_types quantization_config
"""
# Read by transformers, and supported with these values; null counts as left out.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "is_causal": (True,),
    "attention_dropout": (0,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
}
_HARMLESS = """
    architectures attention_bias auto_map attn_implementation custom_pipelines dtype
    finetuning_task gradient_checkpointing id2label initializer_range is_decoder is_llama_config
    label2id license max_sequence_length mlp_bias model_max_length name_or_path
    neftune_noise_alpha num_labels output_attentions output_hidden_states pretraining_tp
    problem_type return_dict task_specific_params tf_legacy_loss tie_last_hidden_states
    tokenizer_class torch_dtype torchscript transformers.js_config transformers_version
    unsloth_fixed unsloth_version use_bfloat16 use_cache use_flash_attention use_return_dict

    bos_token bos_token_id cls_token_id decoder_start_token_id eos_token eos_token_id
    mask_token_id pad_token pad_token_id sep_token_id unk_token unk_token_id

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_scores prefix remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stated:
    """The values of a config.json, with its model type's defaults where it leaves them out."""

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def number(self, key: str, default: float | None = None) -> float:
        return positive(self.path, self.values, key, default)

    def count(self, key: str, default: int | None = None) -> int:
        return whole(self.path, self.values, key, default)

    def flag(self, key: str) -> bool:
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise ValueError(f"{self.path}: {key} is {value!r}, expected true or false.")
        return value

    def switch(self, key: str) -> bool:
        """The flag; false where it is null."""
        return self.values.get(key) is not None and self.flag(key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelType:
    """The config.json files of one `model_type`.

    Attributes:
      architecture: the class of transformers that they name.
      read: returns the config of the values.
      defaults: the defaults of transformers for keys that a file leaves out.
      reads: the keys that `read` reads, beside those of every decoder.
      supported: `{key: values}` of keys that change what the model computes, or that other types
        do not read; null counts as left out.
    """

    architecture: str
    read: Callable[[Stated], Any]
    defaults: Mapping[str, Any]
    reads: frozenset[str] = frozenset()
    supported: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)


def stated_values(path: Path, values: Mapping[str, Any], model_type: ModelType) -> Stated:
    """The values to read, of a model that is supported.

    Raises:
      ValueError: a key that is not known, or whose value is not supported.
    """
    family = values.get("model_type")
    shared = {key: _SUPPORTED[key] for key in _SUPPORTED.keys() - model_type.reads}
    supported = shared | dict(model_type.supported)
    wrong = [
        f"{key}={values[key]!r} (supported: {', '.join(map(repr, supported[key]))})"
        for key in supported
        if values.get(key) is not None and values[key] not in supported[key]
    ]
    if wrong:
        raise ValueError(
            f"{path}: unsupported {', '.join(wrong)} in a model of type {family!r}; it changes "
            "what the model computes, or how it trains."
        )
    known = {*_READ.split(), *_HARMLESS.split(), *supported, *model_type.reads}
    unknown = [
        f"{key}={_short(value)}"
        for key, value in values.items()
        if key not in known and not key.startswith("_") and value is not None
    ]
    if unknown:
        raise ValueError(
            f"{path}: unknown {', '.join(unknown[:8])}, which may change what the model computes. "
            "Where it does not (transformers gives the same logits without it), remove it from "
            "config.json, or set it to null."
        )
    defaults = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False} | dict(model_type.defaults)
    return Stated(path=path, values={**defaults, **values})


def positive(
    path: Path, values: Mapping[str, Any], key: str, default: float | None = None
) -> float:
    """The positive number under `key`; the default where it is missing or null."""
    value = default if values.get(key) is None else values[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ValueError(f"{path}: {key} is {value!r}, expected a positive number.")
    return value


def whole(path: Path, values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """The positive count under `key`; the default where it is missing or null."""
    value = positive(path, values, key, default)
    if value != int(value) or value > _LARGEST:
        raise ValueError(f"{path}: {key} is {value!r}, expected a count below {_LARGEST}.")
    return int(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
