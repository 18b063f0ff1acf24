"""The bodies of OpenAI's completions and chat completions, parsed to one value, `Ask`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.serving.api.errors import invalid, shown
from lora_jax.serving.api.fields import Fields
from lora_jax.serving.request import Sampling

Prompt = str | tuple[int, ...]

MOST_STOPS = 16
MOST_LOGPROBS = 20
_LARGE = 2**31 - 1

# Values at which a field changes nothing; at any other it is refused.
_NEUTRAL: dict[str, tuple] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
_NEUTRAL_COMPLETION = _NEUTRAL | {
    "echo": (False,),
    "suffix": ("",),
    "add_special_tokens": (True,),
    "response_format": ({"type": "text"},),
}
_NEUTRAL_CHAT = _NEUTRAL | {
    "echo": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
}
_HARMLESS = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prediction"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    *("parallel_tool_calls", "request_id", "priority"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """A parsed body. `logprobs=None` requests none, 0 those of the chosen tokens;
    `max_tokens_param` is the body's name of that field."""

    model: str
    prompts: tuple[Prompt, ...] = ()
    messages: tuple[dict[str, str], ...] = ()
    is_chat: bool
    n: int
    max_tokens: int | None
    max_tokens_param: str = "max_tokens"
    sampling: Sampling
    has_seed: bool
    stop: tuple[str, ...]
    logprobs: int | None
    ignore_eos: bool
    stream: bool
    include_usage: bool


def completion(body: Mapping[str, Any]) -> Ask:
    """Of `POST /v1/completions`. Raises ApiError 400 with the field named."""
    fields = Fields(body)
    model = fields.text("model")
    prompts = _prompts(fields.take("prompt"))
    logprobs = fields.integer("logprobs", 0, MOST_LOGPROBS)
    max_tokens = fields.integer("max_tokens", 1, _LARGE)
    shared = _shared(fields)
    if fields.integer("best_of", 1, _LARGE, shared["n"]) != shared["n"]:
        message = "best_of is not supported by this server: leave it out, or give the value of n."
        raise invalid("best_of", message, "unsupported_parameter")
    fields.finish(_NEUTRAL_COMPLETION, _HARMLESS)
    return Ask(
        model=model,
        prompts=prompts,
        is_chat=False,
        max_tokens=max_tokens,
        logprobs=logprobs,
        **shared,
    )


def chat(body: Mapping[str, Any]) -> Ask:
    """Of `POST /v1/chat/completions`. Raises ApiError 400 with the field named."""
    fields = Fields(body)
    model = fields.text("model")
    messages = _messages(fields.take("messages"))
    with_logprobs = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, MOST_LOGPROBS)
    if top is not None and not with_logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs to be true.")
    max_tokens = fields.integer("max_tokens", 1, _LARGE)
    newer = fields.integer("max_completion_tokens", 1, _LARGE)
    if None not in (max_tokens, newer) and max_tokens != newer:
        message = f"max_tokens is {max_tokens} and max_completion_tokens {newer}: give one of them."
        raise invalid("max_tokens", message)
    shared = _shared(fields)
    fields.finish(_NEUTRAL_CHAT, _HARMLESS)
    return Ask(
        model=model,
        messages=messages,
        is_chat=True,
        max_tokens=max_tokens if newer is None else newer,
        max_tokens_param="max_tokens" if newer is None else "max_completion_tokens",
        logprobs=(top or 0) if with_logprobs else None,
        **shared,
    )


def _shared(fields: Fields) -> dict[str, Any]:
    """The fields that both kinds of body have."""
    seed = fields.integer("seed", -(2**63), 2**63 - 1)
    stream = fields.boolean("stream")
    return {
        "n": fields.integer("n", 1, _LARGE, 1),
        "sampling": Sampling(
            temperature=fields.number("temperature", 0, 2, 1.0),
            top_p=fields.number("top_p", 0, 1, 1.0),
            top_k=max(0, fields.integer("top_k", -1, _LARGE, 0)),
            seed=seed or 0,
        ),
        "has_seed": seed is not None,
        "stop": fields.texts("stop", MOST_STOPS),
        "ignore_eos": fields.boolean("ignore_eos"),
        "stream": stream,
        "include_usage": _include_usage(fields.take("stream_options"), stream),
    }


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        message = f"stream_options is {shown(options)}, expected an object."
        raise invalid("stream_options", message)
    if not stream:
        raise invalid("stream_options", "stream_options is given, and stream is not true.")
    fields = Fields(options)
    include_usage = fields.boolean("include_usage")
    fields.finish({"continuous_usage_stats": (False,)}, ["include_obfuscation"])
    return include_usage


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """A text, tokens, or a list of either."""
    if value is None:
        message = "prompt is missing, expected a text, tokens, or a list of texts or of tokens."
        raise invalid("prompt", message, "missing_required_parameter")
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        found = "an empty array" if value == [] else shown(value)
        raise invalid("prompt", f"prompt is {found}, expected a text, tokens, or a list of them.")
    if type(value[0]) is int:
        return (_tokens(value, "prompt"),)
    return tuple(_one_prompt(item, f"prompt[{i}]") for i, item in enumerate(value))


def _one_prompt(value: Any, param: str) -> Prompt:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise invalid(param, f"{param} is {shown(value)}, expected a text or a list of tokens.")
    return _tokens(value, param)


def _tokens(values: Sequence[Any], param: str) -> tuple[int, ...]:
    for index, token in enumerate(values):
        if type(token) is not int:
            message = f"{param}[{index}] is {shown(token)}, expected a token's number."
            raise invalid(f"{param}[{index}]", message)
    return tuple(values)


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_NEUTRAL_MESSAGE: dict[str, tuple] = {
    "tool_calls": ([],),
    "function_call": (),
    "tool_call_id": (),
    "audio": (),
    "refusal": ("",),
    "annotations": ([],),
    "reasoning_content": ("",),
}


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if value is None:
        message = "messages is missing, expected a list of messages."
        raise invalid("messages", message, "missing_required_parameter")
    if not isinstance(value, list) or not value:
        found = "an empty array" if value == [] else shown(value)
        raise invalid("messages", f"messages is {found}, expected a list of messages.")
    return tuple(_message(item, f"messages[{i}]") for i, item in enumerate(value))


def _message(value: Any, param: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise invalid(param, f"{param} is {shown(value)}, expected an object.")
    fields = Fields({f"{param}.{name}": item for name, item in value.items()})
    role = fields.text(f"{param}.role")
    if role not in _ROLES:
        message = f"{param}.role is {shown(role)}, expected one of: {', '.join(_ROLES)}."
        raise invalid(f"{param}.role", message)
    content = _content(fields.take(f"{param}.content"), f"{param}.content")
    name = fields.texts(f"{param}.name", 1)
    neutral = {f"{param}.{key}": values for key, values in _NEUTRAL_MESSAGE.items()}
    fields.finish(neutral, ())
    return {"role": _ROLES[role], "content": content} | ({"name": name[0]} if name else {})


def _content(value: Any, param: str) -> str:
    """A text, or parts that are texts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        found = "an empty array" if value == [] else shown(value)
        raise invalid(param, f"{param} is {found}, expected a text, or parts of type text.")
    return "".join(_part(part, f"{param}[{i}]") for i, part in enumerate(value))


def _part(value: Any, param: str) -> str:
    if not isinstance(value, dict):
        raise invalid(param, f"{param} is {shown(value)}, expected an object.")
    if value.get("type") != "text":
        message = f"{param}.type is {shown(value.get('type'))}; this server reads text alone."
        raise invalid(f"{param}.type", message, "unsupported_parameter")
    if not isinstance(value.get("text"), str):
        raise invalid(f"{param}.text", f"{param}.text is {shown(value.get('text'))}, no text.")
    if unknown := value.keys() - {"type", "text"}:
        name = f"{param}.{min(unknown)[:80]}"
        raise invalid(name, f"Unknown field {shown(name)}.", "unknown_parameter")
    return value["text"]
