"""The requests and events of an engine: plain values on the host."""

import dataclasses
import numbers
from collections.abc import Sized

MOST_LOGPROBS = 20  # of the likeliest tokens, beside the chosen one
MOST_STOPS = 16
LONGEST_STOP = 1024
HIGHEST_TEMPERATURE = 100.0


class Refused(ValueError):  # noqa: N818 - what happened to the request; nothing broke
    """A request that is not accepted.

    Attributes:
      field: the request's field that is at fault; empty where none is.
      reason: "invalid", "too_long", "unknown_adapter" or "queue_full", which may pass.
    """

    def __init__(self, field: str, reason: str, message: str):
        super().__init__(message)
        self.field, self.reason = field, reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen.

    Attributes:
      temperature: 0 takes the most likely token; else logits are divided by it and sampled.
      top_p: samples from the smallest set of tokens whose probabilities sum to at least this.
      top_k: samples from so many most likely tokens; 0 from all.
      seed: 64 bits, signed. Samples depend on it and on the request's own tokens alone.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue.

    Attributes:
      tokens: the prompt.
      adapter: its name in the pool; None is the base.
      max_new_tokens: how many tokens to answer with at most.
      sampling: how they are chosen.
      stop: texts that end the answer, and are not part of it.
      logprobs: None for none; else the chosen token's, and those of so many likeliest.
      ignore_eos: reads on past the end token.
    """

    tokens: tuple[int, ...]
    adapter: str | None = None
    max_new_tokens: int = 64
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities under the model, before temperature and the like.

    Attributes:
      token, logprob: the chosen one.
      top: `(token, logprob)` of the likeliest, as many as the request states.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """The news of one request after a step.

    Attributes:
      ticket: the request's.
      tokens: new ones, an end token included.
      text: new text that can no longer become part of a stop string or of another character. The
        texts of all events are the answer.
      logprobs: one for each of `tokens`, where requested.
      finish: None while more follows; else "stop" (an end token or a stop string), "length",
        "cancelled", or "failed": the model's logits are not numbers, or the adapter is gone.
      prompt_tokens: how many the prompt has.
      shared_tokens: how many of them another request had read already.
    """

    ticket: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: str | None = None
    prompt_tokens: int = 0
    shared_tokens: int = 0


def check(request: Request, *, vocab_size: int, max_length: int) -> None:
    """Raises Refused for a request that an engine of this vocabulary and length cannot answer."""
    if not isinstance(request.tokens, tuple | list) or not request.tokens:
        raise _invalid("tokens", request.tokens, "at least one token")
    new = _integer("max_new_tokens", request.max_new_tokens, 1, 2**31 - 1)
    if len(request.tokens) + new > max_length:
        field = "tokens" if len(request.tokens) >= max_length else "max_new_tokens"
        raise Refused(
            field,
            "too_long",
            f"a prompt of {len(request.tokens)} tokens and {new} new ones exceed the {max_length} "
            "that this engine holds for a request: shorten the prompt, or ask for fewer.",
        )
    _check_tokens(request.tokens, vocab_size)
    _check_sampling(request.sampling)
    if request.logprobs is not None:
        _integer("logprobs", request.logprobs, 0, MOST_LOGPROBS)
    if not isinstance(request.adapter, str | None):
        raise _invalid("adapter", request.adapter, "a name, or None for the base")
    if not isinstance(request.ignore_eos, bool):
        raise _invalid("ignore_eos", request.ignore_eos, "True or False")
    _check_stops(request.stop)


def _check_tokens(tokens: tuple[int, ...], vocab_size: int) -> None:
    for place, token in enumerate(tokens):
        if not _is_integer(token) or not 0 <= token < vocab_size:
            raise Refused(
                "tokens",
                "invalid",
                f"tokens[{place}] is {_short(token)}: the model's vocabulary has {vocab_size}, "
                "from 0. Is it the tokenizer of this model?",
            )


def _check_sampling(sampling: Sampling) -> None:
    _number("temperature", sampling.temperature, HIGHEST_TEMPERATURE)
    _number("top_p", sampling.top_p, 1.0)
    _integer("top_k", sampling.top_k, 0, 2**31 - 1)
    _integer("seed", sampling.seed, -(2**63), 2**63 - 1)


def _check_stops(stops: tuple[str, ...]) -> None:
    if not isinstance(stops, tuple | list) or len(stops) > MOST_STOPS:
        raise _invalid("stop", stops, f"at most {MOST_STOPS} texts")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= LONGEST_STOP:
            raise _invalid("stop", stop, f"texts of 1 to {LONGEST_STOP} characters")


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _integer(field: str, value: int, lowest: int, highest: int) -> int:
    if not _is_integer(value) or not lowest <= value <= highest:
        raise _invalid(field, value, f"an integer from {lowest} to {highest}")
    return value


def _number(field: str, value: float, highest: float) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= highest:
        raise _invalid(field, value, f"a number from 0 to {highest:g}")


def _invalid(field: str, found: object, expected: str) -> Refused:
    return Refused(field, "invalid", f"{field}={_short(found)}: expected {expected}.")


def _short(value: object) -> str:
    """A short text for a value of any size: Python prints no integer of many thousand digits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= 60 else f"{value[:57]!r}..."
    if isinstance(value, int | float | None):
        return repr(value)
    size = f" of {len(value)}" if isinstance(value, Sized) else ""
    return f"a {type(value).__name__}{size}"
