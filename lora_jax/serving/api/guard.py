"""Checks of every request: their number and the key; and errors in the API's format."""

import hashlib
import hmac
import logging
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_jax.serving.api.errors import ApiError, busy, invalid

_log = logging.getLogger(__name__)
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
HEALTH = "/health"


class Guard:
    """Wraps an app.

    With a key, every path but /health needs it. Without one, requests of web pages of other hosts
    in a browser on this machine are refused: they could not read an answer, but load an adapter.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        requests: int,
        answered: Callable[[str, int], None],
    ):
        self._app, self._requests, self._answered = app, requests, answered
        self._key = None if api_key is None else _digest(api_key.encode("utf-8"))
        self._handled = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope["app"] = self  # the router then raises instead of answering in its own format
        self._handled += 1
        try:
            await self._answer(scope, receive, counted_send)
        except ClientDisconnect:
            status = status or 499
        except Exception as error:
            if status:  # half of an answer is sent; the server cuts the connection
                raise
            await _response(error)(scope, receive, counted_send)
        finally:
            self._handled -= 1
            self._answered(_route(scope), status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != HEALTH:
            self._check_key(scope)
            if self._handled > self._requests:
                raise busy(f"The server handles {self._requests} requests at once: ask again.")
        await self._app(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        headers = dict(reversed(scope["headers"]))  # the first of each name
        if self._key is None:
            origin = headers.get(b"origin", b"").decode("latin-1")
            if origin and not _is_loopback(origin):
                message = "Pages of other hosts may not use a server without a key."
                raise ApiError(403, message, code="cross_origin")
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        is_bearer = scheme.lower() == b"bearer"
        if not hmac.compare_digest(_digest(given.strip()), self._key) or not is_bearer:
            raise ApiError(
                401,
                "This server needs its key: send the header 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _digest(key: bytes) -> bytes:
    """A digest of fixed length, so that comparing takes the same time for any key."""
    return hashlib.sha256(key).digest()


def _is_loopback(origin: str) -> bool:
    try:
        return urlsplit(origin).hostname in LOOPBACK
    except ValueError:
        return False


def _route(scope: Scope) -> str:
    """The name of the endpoint, a fixed set, whatever paths clients request."""
    return getattr(scope.get("endpoint"), "__name__", "none")


def _response(error: Exception) -> Response:
    if isinstance(error, HTTPException):  # of routing: no such path, no such method
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        headers = dict(error.headers or {})
        error = ApiError(error.status_code, f"{error.detail}.", code=code, headers=headers)
    if not isinstance(error, ApiError):
        _log.error("A request failed.", exc_info=error)
        error = ApiError(500, "The server failed at this request; its log says how.", code="failed")
    return JSONResponse(error.body(), error.status, error.headers)


def check_content(headers: list[tuple[bytes, bytes]], most: int) -> None:
    """Raises ApiError for a body that is declared as too large, or as other than plain JSON."""
    named = dict(headers)
    length = named.get(b"content-length", b"0")
    if length.isdigit() and int(length[:20]) > most:
        raise too_large(most)
    content_type = named.get(b"content-type", b"application/json").decode("latin-1")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        message = f"Content-Type is {content_type[:80]!r}, expected application/json."
        raise ApiError(415, message, code="unsupported_media_type")
    if named.get(b"content-encoding", b"identity").lower() != b"identity":
        raise invalid(None, "The body is compressed: send it as it is.", "unsupported_encoding")


def too_large(most: int) -> ApiError:
    message = f"The body is larger than this server's limit of {most} bytes."
    return ApiError(413, message, code="body_too_large")
