"""The thread that runs an engine, and passes its events to asyncio."""

import asyncio
import concurrent.futures
import contextlib
import logging
import queue
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from lora_jax.serving.request import Event, Request

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Engine(Protocol):
    """Continues many requests at once; one thread at a time may use it."""

    def submit(self, request: Request) -> int:
        """A ticket. Raises Refused."""
        ...

    def cancel(self, ticket: int) -> bool: ...

    def step(self) -> list[Event]: ...

    @property
    def idle(self) -> bool: ...

    def stats(self) -> Mapping[str, float]: ...


class Ended(Exception):  # noqa: N818 - of what happened; a stop is no error
    """There are no more events, though a request is not finished; `reason` is why."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


STOPPED, FAILED = "stopped", "failed"


class Running:
    """Requests that were submitted together, and their events."""

    def __init__(self, requests: Sequence[Request], loop: asyncio.AbstractEventLoop):
        self.requests = tuple(requests)
        self.loop = loop
        self.tickets: list[int] = []
        self._events: asyncio.Queue[tuple[int, Event] | Ended] = asyncio.Queue()

    def put(self, item: tuple[int, Event] | Ended) -> None:
        """Called in the loop's thread."""
        self._events.put_nowait(item)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Each event with the index of its request, until all are finished. Raises Ended."""
        left = len(self.requests)
        while left:
            item = await self._events.get()
            if isinstance(item, Ended):
                raise item
            left -= item[1].finish is not None
            yield item


class Driver:
    """Runs `engine` in a thread of its own, which alone touches it.

    An engine that raises is not used again: running requests are ended, new ones refused, and
    `on_failure` is called.
    """

    def __init__(self, engine: Engine, on_failure: Callable[[], None] = lambda: None):
        self.stats = engine.stats()
        self.failed = self.draining = False
        self._engine, self._on_failure = engine, on_failure
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._running: dict[int, tuple[Running, int]] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = 10.0) -> None:
        """Ends running requests and the thread, which is abandoned if it does not end in time."""
        self._commands.put(self._stop)
        if self._thread.ident is not None:
            self._thread.join(seconds)

    async def run(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises, called in the engine's thread between two steps."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self.failed or self._stopping:
                    raise Ended(FAILED if self.failed else STOPPED)
                future.set_result(function())
            except BaseException as error:  # raised by the caller's await
                future.set_exception(error)

        if self.failed or not self._thread.is_alive():
            raise Ended(FAILED if self.failed else STOPPED)
        self._commands.put(command)
        return await asyncio.wrap_future(future)

    async def submit(self, requests: Sequence[Request]) -> Running:
        """Submits all of `requests`, or none. Raises Refused, Ended."""
        running = Running(requests, asyncio.get_running_loop())
        try:
            await self.run(lambda: self._submit(running))
        except BaseException:
            self.cancel(running)  # which follows the submission, should that still take place
            raise
        return running

    def cancel(self, running: Running) -> None:
        """Ends what is left of `running`, which gets no more events. Called from any thread."""
        self._commands.put(lambda: self._cancel(running))

    def in_use(self, adapter: str) -> bool:
        """Whether a request of `adapter` is running. In the engine's thread."""
        return any(run.requests[i].adapter == adapter for run, i in self._running.values())

    @property
    def busy(self) -> bool:
        return bool(self._running)

    async def drain(self, seconds: float) -> None:
        """Waits at most `seconds` for running requests, then ends them; new ones are refused."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.busy and not self.failed:
                    await asyncio.sleep(0.02)
        with contextlib.suppress(Ended):
            await self.run(lambda: self._end_all(STOPPED))

    # In the engine's thread.

    def _work(self) -> None:
        try:
            while not self._stopping:
                self._obey()
                if not self._stopping and not self._engine.idle:
                    self._deliver(self._engine.step())
                    self.stats = self._engine.stats()
        except BaseException:
            self.failed = True
            _log.exception("The engine failed; the server takes no more requests.")
            self._end_all(FAILED)
            self._on_failure()
        while not self._stopping:  # commands of those who do not know yet
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _obey(self) -> None:
        """Runs the queued commands; waits for one where the engine is idle."""
        if self._engine.idle:
            self._commands.get()()
        while not self._stopping:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                break
            command()
        self.stats = self._engine.stats()

    def _submit(self, running: Running) -> None:
        try:
            for index, request in enumerate(running.requests):
                ticket = self._engine.submit(request)
                running.tickets.append(ticket)
                self._running[ticket] = running, index
        except BaseException:
            self._cancel(running)
            raise

    def _cancel(self, running: Running) -> None:
        for ticket in running.tickets:
            if self._running.pop(ticket, None) is not None and not self.failed:
                self._engine.cancel(ticket)

    def _deliver(self, events: Sequence[Event]) -> None:
        """Passes a step's events on, in one call a loop."""
        items: dict[asyncio.AbstractEventLoop, list[tuple[Running, Any]]] = defaultdict(list)
        for event in events:
            running, index = self._running.get(event.ticket, (None, 0))
            if running is None:  # cancelled a moment ago
                continue
            if event.finish is not None:
                del self._running[event.ticket]
            items[running.loop].append((running, (index, event)))
        for loop, batch in items.items():
            _hand_over(loop, batch)

    def _end_all(self, reason: str) -> None:
        for running in {id(running): running for running, _ in self._running.values()}.values():
            self._cancel(running)
            _hand_over(running.loop, [(running, Ended(reason))])
        self._running.clear()

    def _stop(self) -> None:
        self._stopping = True
        self._end_all(STOPPED)


def _hand_over(loop: asyncio.AbstractEventLoop, batch: list[tuple[Running, Any]]) -> None:
    def put() -> None:
        for running, item in batch:
            running.put(item)

    with contextlib.suppress(RuntimeError):  # a loop that was closed has nobody who waits
        loop.call_soon_threadsafe(put)
