"""Chooses the tokens that the next step reads: host code that knows no device.

Requests are admitted in their order. One that runs has a row, a place for its adapter and pages for
the tokens it has read; when pages run out, the youngest loses its own and is read again later. So
the oldest always continues, and since each fits into all pages alone, every request ends.
"""

import dataclasses
from collections import deque

from lora_jax.serving.adapters import BASE, Adapters, BankFull, Lease, UnavailableError
from lora_jax.serving.page_allocator import PageAllocator, first_digest, next_digest
from lora_jax.serving.request import Refused, Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The resources that a scheduler allocates.

    Attributes:
      rows: how many requests run at once.
      readers: how many of them read a chunk of their prompts in one step.
      chunk: how many tokens of a prompt one step reads.
      page_size, pages: positions a page, and pages in all.
      max_waiting: how many requests wait at most.
    """

    rows: int
    readers: int
    chunk: int
    page_size: int
    pages: int
    max_waiting: int


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request in the scheduler.

    Attributes:
      ticket: its number; a smaller one came earlier.
      request: as it was submitted.
      tokens: the prompt and the answer so far.
      read: how many of them the pages hold.
      pages: in the order of positions.
      digests: of the first pages, as many as were needed.
      lease: of its adapter, from the first admission to the end.
      shared: how many tokens of the prompt another request had read at the first admission.
    """

    ticket: int
    request: Request
    tokens: list[int]
    read: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    digests: list[bytes] = dataclasses.field(default_factory=list)
    lease: Lease | None = None
    shared: int | None = None

    @property
    def answered(self) -> int:
        return len(self.tokens) - len(self.request.tokens)

    @property
    def unread(self) -> int:
        return len(self.tokens) - self.read

    @property
    def positions(self) -> int:
        """How many it needs until its end: the last token of an answer is not read."""
        return len(self.request.tokens) + self.request.max_new_tokens - 1


@dataclasses.dataclass(frozen=True)
class Work:
    """One step: how many tokens of which sequences it reads; a chunk of prompts, or one a row."""

    counts: list[tuple[Sequence, int]]
    is_chunk: bool


class Scheduler:
    """Waiting and running sequences, and their pages."""

    def __init__(self, limits: Limits, adapters: Adapters):
        self.limits, self.adapters = limits, adapters
        self.allocator = PageAllocator(limits.pages)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # the oldest first
        self.failed: list[Sequence] = []  # whose adapter is gone; for the engine to report
        self.preempted = 0
        self._read_last = False

    def submit(self, sequence: Sequence) -> None:
        """Raises Refused where the queue is full, or the sequence can never have enough pages."""
        limits = self.limits
        if self._pages_for(sequence.positions) > limits.pages:
            raise Refused(
                "max_new_tokens",
                "too_long",
                f"prompt and answer take {sequence.positions} positions, and all {limits.pages} "
                f"pages have {limits.pages * limits.page_size}: ask for fewer tokens.",
            )
        if len(self.waiting) >= limits.max_waiting:
            raise Refused("", "queue_full", f"{len(self.waiting)} requests wait: try again later.")
        self.waiting.append(sequence)

    def end(self, sequence: Sequence) -> None:
        """Releases all that a sequence holds, at any time."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release_pages(sequence)
        if sequence.lease not in (None, BASE):
            self.adapters.release(sequence.lease)
        sequence.lease = None

    def plan(self) -> Work | None:
        """The next step, for which pages are allocated; chunks of prompts and single tokens take
        turns. None where nothing can run now."""
        self._admit()
        while self.running:
            reading = [s for s in self.running if s.unread > 1]
            chooses = [s for s in self.running if s.unread == 1]
            is_chunk = bool(reading) and not (chooses and self._read_last)
            self._read_last = is_chunk
            taken = reading[: self.limits.readers] if is_chunk else chooses
            most = self.limits.chunk if is_chunk else 1
            counts = [(s, min(s.unread, most)) for s in taken]
            for sequence, count in counts:
                self._grow(sequence, count)
            if counts := [(s, count) for s, count in counts if s in self.running]:
                return Work(counts, is_chunk)
        return None

    def advance(self, work: Work) -> list[tuple[int, Sequence]]:
        """Counts what a step has read, and shares the pages that it filled. Returns the rows whose
        sequences are read to their end, for which the step has chosen a token."""
        size = self.limits.page_size
        for sequence, count in work.counts:
            sequence.read += count
            for page in range((sequence.read - count) // size, sequence.read // size):
                digest = self._digests(sequence, page + 1)[page]
                self.allocator.register(sequence.pages[page], digest)
        return [(row, s) for row, (s, _) in enumerate(work.counts) if s.unread == 0]

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.limits.rows:
            sequence = self.waiting[0]
            if not self._acquire(sequence):
                if sequence in self.failed:
                    self.waiting.popleft()
                    continue
                return
            if not self._allocate(sequence):
                return
            self.running.append(self.waiting.popleft())

    def _acquire(self, sequence: Sequence) -> bool:
        """Whether its adapter is in the bank, for this sequence until its end."""
        name = sequence.request.adapter
        if sequence.lease is not None:
            return True
        try:
            sequence.lease = BASE if name is None else self.adapters.acquire(name)
        except UnavailableError:
            self.failed.append(sequence)
        except BankFull:  # until another ends
            pass
        return sequence.lease is not None

    def _allocate(self, sequence: Sequence) -> bool:
        """Pages for all tokens that are known and the next, those that are shared first. The last
        token is always read, since the next is chosen from its logits."""
        size = self.limits.page_size
        digests = self._digests(sequence, (len(sequence.tokens) - 1) // size)
        shared = self.allocator.find(digests)
        self.allocator.retain(shared)
        needed = self._pages_for(min(len(sequence.tokens) + 1, sequence.positions))
        new = self.allocator.allocate(needed - len(shared))
        if new is None:
            self.allocator.release(shared)
            return False
        sequence.pages = shared + new
        sequence.read = len(shared) * size
        if sequence.shared is None:
            sequence.shared = sequence.read
        return True

    def _grow(self, sequence: Sequence, count: int) -> None:
        """Pages for `count` more positions. Takes those of the youngest while there are none, of
        `sequence` itself if that is the youngest."""
        while sequence in self.running:
            lacking = self._pages_for(sequence.read + count) - len(sequence.pages)
            new = self.allocator.allocate(max(0, lacking))
            if new is not None:
                sequence.pages += new
                return
            youngest = self.running.pop()
            self._release_pages(youngest)
            self.waiting.appendleft(youngest)
            self.preempted += 1

    def _release_pages(self, sequence: Sequence) -> None:
        self.allocator.release(sequence.pages)
        sequence.pages, sequence.read = [], 0

    def _digests(self, sequence: Sequence, count: int) -> list[bytes]:
        """The digests of its first `count` pages."""
        size, known = self.limits.page_size, sequence.digests
        assert sequence.lease is not None
        start = first_digest(sequence.request.adapter, sequence.lease.version)
        for page in range(len(known), count):
            before = known[-1] if known else start
            known.append(next_digest(before, sequence.tokens[page * size : (page + 1) * size]))
        return known[:count]

    def _pages_for(self, positions: int) -> int:
        return -(-positions // self.limits.page_size)
