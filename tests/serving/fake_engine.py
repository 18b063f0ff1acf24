"""An engine without a model: answers follow from the prompt, the adapter and the seed alone."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path

from lora_jax.data.tokenizer import byte_tokenizer
from lora_jax.serving.request import Event, Refused, Request, TokenLogprobs, check
from lora_jax.serving.text_stream import TextStream

TOKENIZER = byte_tokenizer()
VOCAB = TOKENIZER.vocab_size
CONTEXT = 512


def answer(request: Request, value: str | None) -> list[int]:
    """The tokens of a request's answer; `value` is what its adapter holds."""
    seed = request.sampling.seed if request.sampling.temperature > 0 else None
    asked = repr((request.tokens, value, seed)).encode()
    tokens = []
    while len(tokens) < request.max_new_tokens:
        digest = hashlib.sha256(asked + len(tokens).to_bytes(4)).digest()
        for byte in digest:
            if byte < 8 and not request.ignore_eos:
                return [*tokens, TOKENIZER.eos_id][: request.max_new_tokens]
            tokens.append(32 + byte % 95)
    return tokens[: request.max_new_tokens]


@dataclasses.dataclass
class Going:
    request: Request
    tokens: list[int]
    text: TextStream
    unread: int
    said: int = 0


class FakeEngine:
    """Reads `chunk` tokens of a prompt a step, then says one a step, for `rows` at once."""

    def __init__(self, *, rows=4, chunk=16, max_waiting=64, seconds=0.0, pause=None):
        self.rows, self.chunk, self.max_waiting = rows, chunk, max_waiting
        self.seconds, self.pause = seconds, pause
        self.adapters: dict[str, str] = {}
        self.waiting: dict[int, Going] = {}
        self.running: dict[int, Going] = {}
        self.cancelled: set[int] = set()
        self.tickets = 0
        self.steps = 0
        self.broken = False

    # What a pool of adapters does.

    def read(self, folder: Path) -> str:
        config = json.loads((folder / "adapter_config.json").read_text())
        if config.get("peft_type") != "LORA":
            raise ValueError(f"{folder}: peft_type {config.get('peft_type')!r} cannot be served.")
        return config["value"]

    def put(self, name: str, value: str) -> None:
        self.adapters[name] = value

    def drop(self, name: str) -> None:
        going = [*self.running.values(), *self.waiting.values()]
        assert all(one.request.adapter != name for one in going)
        del self.adapters[name]

    # What an engine does.

    def submit(self, request: Request) -> int:
        check(request, vocab_size=VOCAB, max_length=CONTEXT)
        if request.adapter is not None and request.adapter not in self.adapters:
            raise Refused("adapter", "unknown_adapter", f"{request.adapter!r} is not here.")
        if len(self.waiting) >= self.max_waiting:
            raise Refused("max_waiting", "queue_full", f"{self.max_waiting} wait: ask again.")
        self.tickets += 1
        value = None if request.adapter is None else self.adapters[request.adapter]
        self.waiting[self.tickets] = Going(
            request,
            answer(request, value),
            TextStream(TOKENIZER, request.stop),
            len(request.tokens),
        )
        return self.tickets

    def cancel(self, ticket: int) -> bool:
        found = self.waiting.pop(ticket, None) or self.running.pop(ticket, None)
        if found is None:
            return False
        self.cancelled.add(ticket)
        return True

    def step(self) -> list[Event]:
        assert not self.idle
        if self.broken:
            raise RuntimeError("broken")
        self.steps += 1
        if self.pause is not None:
            self.pause.wait(10)
        time.sleep(self.seconds)
        events = [Event(ticket=ticket, finish="cancelled") for ticket in self.cancelled]
        self.cancelled.clear()
        while self.waiting and len(self.running) < self.rows:
            ticket = next(iter(self.waiting))
            self.running[ticket] = self.waiting.pop(ticket)
        for ticket, going in list(self.running.items()):
            if going.unread > 0:
                going.unread -= self.chunk
                continue
            events.append(self._said(ticket, going))
        return events

    def _said(self, ticket: int, going: Going) -> Event:
        request, token = going.request, going.tokens[going.said]
        going.said += 1
        text = going.text.push(token)
        finish = None
        if going.text.stopped or (token == TOKENIZER.eos_id and not request.ignore_eos):
            finish = "stop"
        elif going.said == request.max_new_tokens:
            finish = "length"
        if finish:
            text += going.text.flush()
            del self.running[ticket]
        logprobs = ()
        if request.logprobs is not None:
            top = [(token, -0.5), ((token + 1) % 128, -1.5), (0xC3, float("-inf"))]
            logprobs = (TokenLogprobs(token, -0.5, tuple(top[: request.logprobs])),)
        return Event(
            ticket=ticket,
            tokens=(token,),
            text=text,
            logprobs=logprobs,
            finish=finish,
            prompt_tokens=len(request.tokens),
            shared_tokens=0,
        )

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running or self.cancelled)

    def stats(self) -> dict[str, float]:
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "steps": self.steps,
        }
