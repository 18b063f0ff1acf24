"""Work for a client that may disconnect, and answers that are sent in chunks."""

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lora_jax.serving.api.errors import ApiError
from lora_jax.serving.api.generation import Generation
from lora_jax.serving.api.guard import check_content, too_large
from lora_jax.serving.api.limits import Limits

T = TypeVar("T")
_LAST_SECONDS = 5.0


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body. Raises ApiError for one that is too large or too slow, or not JSON by its type."""
    check_content(request.scope["headers"], limits.body_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise too_large(limits.body_bytes)
    except TimeoutError:
        message = f"The body did not come within {limits.body_seconds:g} seconds."
        raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None
    return bytes(body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, cancelled when the client disconnects, which raises ClientDisconnect.

    The request's body must have been read.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: each chunk of an answer as JSON, then [DONE].

    An error is sent as the last event. When the client disconnects, the answer is cancelled.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(send))
        finally:
            self._generation.close()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        last = "[DONE]"
        try:
            async with asyncio.timeout(self._generation.seconds_left):
                async for chunk in self._generation.chunks():
                    await _send_event(send, json.dumps(chunk, allow_nan=False))
        except ApiError as error:
            last = json.dumps(error.body())
        except TimeoutError:
            last = json.dumps(self._generation.too_slow().body())
        async with asyncio.timeout(_LAST_SECONDS):  # which a client that reads nothing runs out of
            await _send_event(send, last)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, data: str) -> None:
    body = f"data: {data}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})
