"""Continuous batching: requests in, events out."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.interop.model import Pretrained
from lora_jax.models.config import DecoderConfig
from lora_jax.serving import paged_cache, steps
from lora_jax.serving.adapters import Adapters, BaseAlone
from lora_jax.serving.request import Event, Refused, Request, TokenLogprobs, check
from lora_jax.serving.sampling import Chosen, choose_each
from lora_jax.serving.scheduler import Limits, Scheduler, Sequence, Work
from lora_jax.serving.shapes import (
    Shape,
    all_shapes,
    batch_of,
    empty_batch,
    empty_sampling,
    sampling_of,
    shape_of,
)
from lora_jax.serving.text_stream import TextStream


class Engine:
    """Answers many requests in one running batch, each as if it were alone.

    A host object for one thread. Everything on the device is one pure step, compiled ahead of time
    for a fixed set of shapes.

    Args:
      model: its params may be quantised, and placed on a mesh as training's are (`placement`).
      adapters: a pool over these params; None serves the base alone.
      rows: how many requests run at once.
      page_size, pages: positions a page, and pages for all requests.
      chunk: how many tokens of a prompt are read between two steps of those that answer.
      readers: how many prompts are read at once.
      max_waiting: how many requests wait at most.
      max_length: of a prompt and its answer; by default, and at most, the model's context or what
        all pages hold.
      mesh: the devices that the params are placed on, if several.

    Raises:
      ValueError: for a size that makes no engine.
    """

    def __init__(
        self,
        model: Pretrained,
        adapters: Adapters | None = None,
        *,
        rows: int = 8,
        page_size: int = 16,
        pages: int = 512,
        chunk: int = 64,
        readers: int = 4,
        max_waiting: int = 256,
        max_length: int | None = None,
        mesh: Mesh | None = None,
    ):
        sizes = {"rows": rows, "page_size": page_size, "pages": pages, "readers": readers}
        for name, size in {**sizes, "max_waiting": max_waiting}.items():
            if size < 1:
                raise ValueError(f"{name}={size}: expected at least 1.")
        if chunk < 2:
            raise ValueError(f"chunk={chunk}: expected at least 2 tokens.")
        most = min(model.config.context_length, pages * page_size + 1)
        self.max_length = most if max_length is None else min(most, max_length)
        if self.max_length < 2:
            raise ValueError(f"max_length={max_length}: expected a prompt and one token, 2.")
        limits = Limits(
            rows=rows,
            readers=min(readers, rows),
            chunk=chunk,
            page_size=page_size,
            pages=pages,
            max_waiting=max_waiting,
        )
        self._model = model
        self._adapters = BaseAlone() if adapters is None else adapters
        self._scheduler = Scheduler(limits, self._adapters)
        self._sequences: dict[int, Sequence] = {}
        self._streams: dict[int, TextStream] = {}
        self._ended: list[Event] = []
        self._readers: dict[Shape, Any] = {}
        self._choosers: dict[int, Any] = {}
        self._tickets = 0
        self._counts = dict.fromkeys(
            ("steps", "prompt_tokens", "new_tokens", "shared_tokens", "finished", "cancelled"), 0
        )
        self._mesh = mesh
        self._shardings = None if mesh is None else _shardings(mesh, model.config)
        self._pages = paged_cache.init_pages(
            model.config, pages, page_size, model.params["embed"].dtype
        )
        if self._shardings is not None:
            self._pages = jax.device_put(self._pages, self._shardings[0])

    def warm_up(self) -> int:
        """Compiles every step that any request may need, and returns how many there are."""
        limits, widths = self._scheduler.limits, self._adapters.widths
        shapes = all_shapes(limits, self.max_length, widths)
        with ThreadPoolExecutor() as pool:  # XLA compiles outside of Python's lock
            list(pool.map(self._reader, shapes))
            rows = sorted({shape.rows for shape in shapes})
            list(pool.map(self._chooser, rows))
        return len(shapes) + len(rows)

    def submit(self, request: Request) -> int:
        """Puts a request in the queue, and returns its ticket.

        Raises:
          Refused: naming the field that is at fault, and why.
        """
        check(request, vocab_size=self._model.config.vocab_size, max_length=self.max_length)
        name = request.adapter
        if name is not None and name not in self._adapters:
            raise Refused("adapter", "unknown_adapter", f"there is no adapter {name!r} here.")
        sequence = Sequence(self._tickets, request, list(map(int, request.tokens)))
        self._scheduler.submit(sequence)
        self._tickets += 1
        self._sequences[sequence.ticket] = sequence
        self._streams[sequence.ticket] = TextStream(self._model.tokenizer, request.stop)
        self._counts["prompt_tokens"] += len(request.tokens)
        return sequence.ticket

    def cancel(self, ticket: int) -> bool:
        """Ends a request; the next step brings its last event. False if it has ended already."""
        sequence = self._sequences.get(ticket)
        if sequence is None:
            return False
        self._counts["cancelled"] += 1
        self._ended.append(self._end(sequence, "cancelled"))
        return True

    def step(self) -> list[Event]:
        """Runs one step on the device: a chunk of prompts, or a token for every row that answers.
        Returns what is new, for each request at most one event."""
        work = self._scheduler.plan()
        for sequence in self._scheduler.failed:
            self._ended.append(self._end(sequence, "failed"))
        self._scheduler.failed.clear()
        events, self._ended = self._ended, []
        return events if work is None else events + self._run(work)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do and nothing left to tell."""
        return not self._sequences and not self._ended

    def stats(self) -> dict[str, int]:
        """Counters since the start, and gauges: `running`, `waiting`, `pages_used` (by requests),
        `pages` and `programs` (compiled steps)."""
        scheduler = self._scheduler
        return {
            **self._counts,
            "preempted": scheduler.preempted,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "pages": scheduler.limits.pages,
            "pages_used": scheduler.limits.pages - scheduler.allocator.available,
            "programs": len(self._readers) + len(self._choosers),
        }

    def _run(self, work: Work) -> list[Event]:
        limits, widths = self._scheduler.limits, self._adapters.widths
        shape = shape_of(work, limits, self.max_length, widths)
        read, batch = self._reader(shape), self._on_device(batch_of(work, shape))
        self._pages, logits = read(self._model.params, self._adapters.bank, self._pages, batch)
        self._counts["steps"] += 1
        done = self._scheduler.advance(work)
        if not done:
            return []
        how = self._on_device(sampling_of(work, shape.rows))
        chosen = jax.device_get(self._chooser(shape.rows)(logits, how))
        return [self._answer(sequence, row, chosen) for row, sequence in done]

    def _answer(self, sequence: Sequence, row: int, chosen: Chosen) -> Event:
        """The event of a token that was chosen for a sequence."""
        token, request = int(chosen.token[row]), sequence.request
        if token < 0:
            return self._end(sequence, "failed")
        sequence.tokens.append(token)
        self._counts["new_tokens"] += 1
        logprobs = () if request.logprobs is None else (_logprobs(chosen, row, request.logprobs),)
        new: dict[str, Any] = {"tokens": (token,), "logprobs": logprobs}
        if token == self._model.tokenizer.eos_id and not request.ignore_eos:
            return self._end(sequence, "stop", **new)
        stream = self._streams[sequence.ticket]
        new["text"] = stream.push(token)
        if stream.stopped:
            return self._end(sequence, "stop", **new)
        if sequence.answered == request.max_new_tokens:
            return self._end(sequence, "length", **new)
        return _event(sequence, **new)

    def _end(self, sequence: Sequence, finish: str, *, text: str = "", **new: Any) -> Event:
        self._scheduler.end(sequence)
        del self._sequences[sequence.ticket]
        stream = self._streams.pop(sequence.ticket)
        self._counts["finished"] += finish in ("stop", "length")
        self._counts["shared_tokens"] += sequence.shared or 0
        return _event(sequence, finish=finish, text=text + stream.flush(), **new)

    def _reader(self, shape: Shape) -> Any:
        """The compiled step that reads batches of a shape, and raises for another."""
        if shape not in self._readers:
            config, bind = self._model.config, self._adapters.bind
            jitted = steps.jitted(config, bind, self.max_length, self._shardings)
            batch = self._on_device(empty_batch(shape))
            arguments = (self._model.params, self._adapters.bank, self._pages, batch)
            with self._on_mesh():
                lowered = jitted.lower(*arguments)
            self._readers[shape] = lowered.compile()
        return self._readers[shape]

    def _chooser(self, rows: int) -> Any:
        """The compiled step that chooses a token for each of so many rows."""
        if rows not in self._choosers:
            shape = next(shape for shape in self._readers if shape.rows == rows)
            logits = self._readers[shape].out_info[1]
            jitted = jax.jit(choose_each, out_shardings=self._shardings and self._shardings[1])
            how = self._on_device(empty_sampling(rows))
            with self._on_mesh():
                lowered = jitted.lower(logits, how)
            self._choosers[rows] = lowered.compile()
        return self._choosers[rows]

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        """What steps are lowered in: models and kernels read the mesh from it."""
        if self._mesh is None:
            return contextlib.nullcontext()
        return jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh)

    def _on_device(self, batch: Any) -> Any:
        return batch if self._shardings is None else jax.device_put(batch, self._shardings[1])


def _shardings(mesh: Mesh, config: DecoderConfig) -> tuple[NamedSharding, NamedSharding]:
    """Of pages, and of all that is small."""
    return paged_cache.sharding(mesh, config), NamedSharding(mesh, PartitionSpec())


def _logprobs(chosen: Chosen, row: int, count: int) -> TokenLogprobs:
    top = zip(chosen.top_token[row, :count], chosen.top_logprob[row, :count], strict=True)
    return TokenLogprobs(
        int(chosen.token[row]),
        float(chosen.logprob[row]),
        tuple((int(token), float(logprob)) for token, logprob in top),
    )


def _event(sequence: Sequence, **new: Any) -> Event:
    prompt, shared = len(sequence.request.tokens), sequence.shared or 0
    return Event(ticket=sequence.ticket, prompt_tokens=prompt, shared_tokens=shared, **new)
