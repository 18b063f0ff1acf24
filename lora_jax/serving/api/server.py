"""The server process: its port, its signals, and its shutdown."""

import asyncio
import contextlib
import signal
import socket

import uvicorn

from lora_jax.serving.api.app import app
from lora_jax.serving.api.generation import Service
from lora_jax.serving.api.guard import LOOPBACK

_BACKLOG = 2048
_CLOSING_SECONDS = 5.0  # to send what is left when requests have ended


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; `port=0` takes a free one.

    Raises:
      ValueError: the port is in use, or the host is not this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"--host={host}: {error.strerror or error}.") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise ValueError(
            f"Port {port} of {host} cannot be served on: {error.strerror}. Choose another --port."
        ) from None
    return listening


def check_exposure(host: str, api_key: str | None) -> None:
    """Raises ValueError for a server that other hosts can reach and that needs no key."""
    if api_key == "":
        raise ValueError("--api-key is empty: leave it out, or give a key.")
    if host not in LOOPBACK and api_key is None:
        raise ValueError(
            f"--host={host} can be reached from elsewhere, which needs an --api-key; without one, "
            "serve on 127.0.0.1."
        )


class Server(uvicorn.Server):
    """Ends at SIGTERM or SIGINT: no new requests, those that run end or, after `grace` seconds,
    are cancelled. Ends by itself when the engine has failed."""

    def __init__(self, service: Service, *, grace: float = 30.0):
        config = uvicorn.Config(
            app(service),
            lifespan="off",
            log_config=None,  # the process's own holds
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(grace + _CLOSING_SECONDS) + 1,
            backlog=_BACKLOG,
        )
        super().__init__(config)
        self._service, self._grace = service, grace

    def fail(self) -> None:
        """Ends the server. Called in the engine's thread."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self._service.driver.drain(self._grace))
        await super().shutdown(sockets)
        await draining


def serve(server: Server, listening: socket.socket) -> None:
    """Serves until a signal ends it."""
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn repeats it at the end
    try:
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, previous)
