"""From the body of a request to its answer: parses, checks, submits, and collects events."""

import asyncio
import dataclasses
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from lora_jax.serving.api import json_body
from lora_jax.serving.api.answers import Answer
from lora_jax.serving.api.bodies import Ask
from lora_jax.serving.api.catalog import Catalog
from lora_jax.serving.api.driver import Driver, Ended, Running
from lora_jax.serving.api.errors import (
    ApiError,
    ended,
    generation_failed,
    invalid,
    refusal,
    too_slow,
)
from lora_jax.serving.api.limits import Limits
from lora_jax.serving.api.metrics import Metrics
from lora_jax.serving.api.served_model import ServedModel
from lora_jax.serving.request import Event, Refused, Request

_COMPLETION_TOKENS = 16  # OpenAI's default; a chat's is all that the context holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """What the API serves: a running driver, its base, its adapters."""

    driver: Driver
    model: ServedModel
    catalog: Catalog
    limits: Limits
    api_key: str | None = None


class Generation:
    """One body's answer. `begin` comes first, then `whole` or `chunks`, and `close` at the end."""

    def __init__(self, service: Service, metrics: Metrics):
        self._service, self._metrics = service, metrics
        self._began = time.monotonic()
        self._running: Running | None = None
        self._answer: Answer | None = None
        self._seen_token = False

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._began + self._service.limits.seconds - time.monotonic())

    async def begin(self, body: bytes, read: Callable[[Mapping[str, Any]], Ask]) -> Ask:
        """Submits the requests of a body. Raises ApiError."""
        service = self._service
        ask = await asyncio.to_thread(lambda: read(json_body.parse(body)))
        adapter = service.catalog.chosen(ask.model)
        _check_bounds(ask, service.limits)
        prompts = await asyncio.to_thread(service.model.tokens, ask)
        requests = [
            Request(
                tokens=tokens,
                adapter=adapter,
                max_new_tokens=_new_tokens(ask, len(tokens), service),
                sampling=dataclasses.replace(ask.sampling, seed=seed),
                stop=ask.stop,
                logprobs=ask.logprobs,
                ignore_eos=ask.ignore_eos,
            )
            for tokens in prompts
            for seed in _seeds(ask)
        ]
        try:
            self._running = await service.driver.submit(requests)
        except Refused as refused:
            raise refusal(refused, is_chat=ask.is_chat) from None
        except Ended as error:
            raise ended(error.reason) from None
        self._answer = Answer(ask, service.model, prompts)
        return ask

    async def whole(self) -> dict[str, Any]:
        """The complete answer. Raises ApiError."""
        answer = self._begun()
        try:
            async with asyncio.timeout(self.seconds_left):
                async for index, event in self._events():
                    answer.add(index, event)
        except TimeoutError:
            raise self.too_slow() from None
        return answer.whole()

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in chunks; the caller enforces `seconds_left`. Raises ApiError."""
        answer = self._begun()
        for chunk in answer.first_chunks():
            yield chunk
        async for index, event in self._events():
            if (added := answer.chunk(index, event)) is not None:
                yield added
        for chunk in answer.last_chunks():
            yield chunk

    def too_slow(self) -> ApiError:
        return too_slow(self._service.limits.seconds)

    def close(self) -> None:
        """Cancels what is still running."""
        if self._running is not None:
            self._service.driver.cancel(self._running)
        if self._answer is None:
            return
        seconds = time.monotonic() - self._began
        self._metrics.ended(seconds, self._answer.prompt_tokens, self._answer.new_tokens)

    def _begun(self) -> Answer:
        assert self._answer is not None, "begin comes first"
        return self._answer

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        assert self._running is not None, "begin comes first"
        try:
            async for index, event in self._running.events():
                if event.finish in ("failed", "cancelled"):  # nobody here cancels what is read on
                    raise generation_failed()
                if event.tokens and not self._seen_token:
                    self._seen_token = True
                    self._metrics.first_token(time.monotonic() - self._began)
                yield index, event
        except Ended as error:
            raise ended(error.reason) from None


def _check_bounds(ask: Ask, limits: Limits) -> None:
    prompts = max(1, len(ask.prompts))
    if prompts * ask.n > limits.choices:
        param = "n" if prompts <= limits.choices and ask.n > 1 else "prompt"
        message = (
            f"{prompts} prompts of {ask.n} answers each are {prompts * ask.n} choices; this "
            f"server's limit is {limits.choices} a request."
        )
        raise invalid(param, message)
    if limits.max_tokens is not None and (ask.max_tokens or 0) > limits.max_tokens:
        message = (
            f"{ask.max_tokens_param} is {ask.max_tokens}; this server's limit is "
            f"{limits.max_tokens} tokens an answer."
        )
        raise invalid(ask.max_tokens_param, message)


def _new_tokens(ask: Ask, prompt_tokens: int, service: Service) -> int:
    """How many tokens to answer with at most."""
    room = service.model.context_length - prompt_tokens
    if ask.max_tokens is None:
        bounds = (room, service.limits.max_tokens, None if ask.is_chat else _COMPLETION_TOKENS)
        return min(bound for bound in bounds if bound is not None)
    if ask.max_tokens > room:
        raise invalid(
            ask.max_tokens_param,
            f"A prompt of {prompt_tokens} tokens and {ask.max_tokens} new ones exceed the context "
            f"of {service.model.context_length}.",
            "context_length_exceeded",
        )
    return ask.max_tokens


def _seeds(ask: Ask) -> list[int]:
    """One for each of n answers; the first is the body's own."""
    first = ask.sampling.seed if ask.has_seed else secrets.randbits(63)
    return [first, *(_derived(first, index) for index in range(1, ask.n))]


def _derived(seed: int, index: int) -> int:
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
