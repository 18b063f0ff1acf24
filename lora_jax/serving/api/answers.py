"""The bodies of answers: complete ones, and the chunks of a stream."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from lora_jax.serving.api.bodies import Ask
from lora_jax.serving.api.served_model import ServedModel
from lora_jax.serving.request import Event, TokenLogprobs

_LOWEST = -9999.0  # in the place of -inf, which JSON does not have


class Answer:
    """The answer to one body, choice by choice, from its events."""

    def __init__(self, ask: Ask, model: ServedModel, prompts: Sequence[Sequence[int]]):
        self.ask, self._model = ask, model
        self.prompt_tokens = sum(map(len, prompts))
        self.new_tokens = 0
        self._choices = [_Choice() for _ in range(len(prompts) * ask.n)]
        self._shared = [0] * len(prompts)
        self._head = {
            "id": f"{'chatcmpl' if ask.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": ask.model,
        }

    def first_chunks(self) -> list[dict[str, Any]]:
        """The first chunks of a chat's stream, which state the role."""
        if not self.ask.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, {"delta": delta}, None) for index in range(len(self._choices))]

    def chunk(self, index: int, event: Event) -> dict[str, Any] | None:
        """The chunk that an event adds to a stream; None where it adds nothing."""
        logprobs = self._add(index, event)
        if not (event.text or event.finish or logprobs):
            return None
        content: dict[str, Any]
        if self.ask.is_chat:
            content = {"delta": {"content": event.text} if event.text else {}}
        else:
            content = {"text": event.text}
        return self._chunk(index, content | {"logprobs": logprobs}, event.finish)

    def last_chunks(self) -> list[dict[str, Any]]:
        """The usage, where the body requests it."""
        if not self.ask.include_usage:
            return []
        return [self._kind(chunk=True) | {"choices": [], "usage": self.usage()}]

    def add(self, index: int, event: Event) -> None:
        """Adds an event to the complete answer."""
        choice = self._choices[index]
        logprobs = self._add(index, event)
        choice.texts.append(event.text)
        if logprobs:
            choice.extend(logprobs)

    def whole(self) -> dict[str, Any]:
        choices = [self._whole_choice(i, choice) for i, choice in enumerate(self._choices)]
        return self._kind(chunk=False) | {"choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._shared)},
        }

    def _add(self, index: int, event: Event) -> dict[str, Any] | None:
        choice, prompt = self._choices[index], index // self.ask.n
        self.new_tokens += len(event.tokens)
        if index % self.ask.n == 0:  # the others share this one's prompt
            self._shared[prompt] = max(self._shared[prompt], event.shared_tokens)
        choice.finish = event.finish
        if self.ask.logprobs is None or not event.logprobs:
            return None
        if self.ask.is_chat:
            content = [self._chat_logprobs(entry) for entry in event.logprobs]
            return {"content": content, "refusal": None}
        return self._completion_logprobs(choice, event.logprobs)

    def _chat_logprobs(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._scored(token, logprob) for token, logprob in entry.top]
        return self._scored(entry.token, entry.logprob) | {"top_logprobs": top}

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        text, as_bytes = self._model.token_text(token)
        return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": as_bytes}

    def _completion_logprobs(
        self, choice: "_Choice", entries: Sequence[TokenLogprobs]
    ) -> dict[str, Any]:
        texts = [self._model.token_text(entry.token)[0] for entry in entries]
        offsets = []
        for text in texts:
            offsets.append(choice.offset)
            choice.offset += len(text)
        tops = [
            {self._model.token_text(id)[0]: max(p, _LOWEST) for id, p in reversed(entry.top)}
            | {text: max(entry.logprob, _LOWEST)}
            for text, entry in zip(texts, entries, strict=True)
        ]
        return {
            "tokens": texts,
            "token_logprobs": [max(entry.logprob, _LOWEST) for entry in entries],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _chunk(self, index: int, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, "finish_reason": finish} | content
        usage = {"usage": None} if self.ask.include_usage else {}
        return self._kind(chunk=True) | {"choices": [choice]} | usage

    def _whole_choice(self, index: int, choice: "_Choice") -> dict[str, Any]:
        text = "".join(choice.texts)
        if self.ask.is_chat:
            content: dict[str, Any] = {
                "message": {"role": "assistant", "content": text, "refusal": None}
            }
        else:
            content = {"text": text}
        rest = {"logprobs": choice.logprobs or None, "finish_reason": choice.finish}
        return {"index": index} | content | rest

    def _kind(self, *, chunk: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.ask.is_chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"object": kind} | self._head


class _Choice:
    """One choice so far."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.logprobs: dict[str, Any] = {}
        self.finish: str | None = None
        self.offset = 0

    def extend(self, logprobs: dict[str, Any]) -> None:
        for name, values in logprobs.items():
            if isinstance(values, list):
                self.logprobs.setdefault(name, []).extend(values)
            else:
                self.logprobs[name] = values
