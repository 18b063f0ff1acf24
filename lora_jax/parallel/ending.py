"""An error of one process ends all of a job.

The others wait for it in a collective, which nothing interrupts, until JAX's heartbeat timeout. So
each keeps a connection to process 0, over which the one that fails sends its error; JAX has a
service for this, which is not public.
"""

import contextlib
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax

from lora_jax.parallel import hosts

CONNECT_SECONDS = 5.0


@contextlib.contextmanager
def together(grace_seconds: float = 5.0) -> Iterator[None]:
    """Within it an exception on one process ends all of them, whatever they wait for.

    Each of the others has `grace_seconds` to end by itself, as it does where it raises the same
    error or hears of it in a collective; it then prints what the first one raised, and exits with
    1. All processes must enter it. In a job of one process it does nothing. A process that cannot
    reach process 0 prints so, and ends by JAX's heartbeat timeout alone.
    """
    if jax.process_count() == 1:
        yield
        return
    job = _Job(grace_seconds)
    try:
        yield
    except BaseException as error:
        job.tell(f"process {jax.process_index()}: {hosts.error_text(error)}")
        raise
    finally:
        job.over.set()


class _Job:
    """The connections of this process: on process 0 to all others, elsewhere to process 0."""

    def __init__(self, grace_seconds: float):
        self.over = threading.Event()
        self._grace, self._lines = grace_seconds, list[socket.socket]()
        offer: dict[str, Any] | None = None
        if hosts.is_first():
            server, token = socket.create_server(("", 0)), secrets.token_hex(16)
            offer = {"at": _addresses(), "port": server.getsockname()[1], "token": token}
            threading.Thread(target=self._accept, args=(server, token), daemon=True).start()
        offer = hosts.exchange(offer)[0]
        if offer is not None and not hosts.is_first():
            self._connect(offer)
        hosts.exchange("all are connected")

    def tell(self, message: str, but: socket.socket | None = None) -> None:
        """Sends a message over all connections but one."""
        for line in self._lines:
            if line is not but:
                with contextlib.suppress(OSError):  # it has ended already
                    line.sendall((message.replace("\n", " ") + "\n").encode())

    def _connect(self, offer: dict[str, Any]) -> None:
        for host in offer["at"]:
            try:
                line = socket.create_connection((host, offer["port"]), timeout=CONNECT_SECONDS)
                line.sendall(offer["token"].encode())
                line.settimeout(CONNECT_SECONDS)
                if line.recv(1):  # it is process 0 that listens there, and nobody else
                    return self._listen(line)
            except OSError:
                continue
        print(
            f"process {jax.process_index()} cannot reach process 0 at {', '.join(offer['at'])}, "
            f"port {offer['port']}: an error there will end this one by JAX's timeout alone.",
            file=sys.stderr,
        )

    def _accept(self, server: socket.socket, token: str) -> None:
        while True:
            line, _ = server.accept()
            with contextlib.suppress(OSError):
                line.settimeout(CONNECT_SECONDS)
                if secrets.compare_digest(line.recv(len(token)), token.encode()):
                    self._listen(line)
                    line.sendall(b"!")

    def _listen(self, line: socket.socket) -> None:
        line.settimeout(None)
        self._lines.append(line)
        threading.Thread(target=self._read, args=(line,), daemon=True).start()

    def _read(self, line: socket.socket) -> None:
        with contextlib.suppress(OSError):  # what a process that died leaves is for JAX's timeout
            message = line.makefile().readline().strip()
            if message:
                self.tell(message, but=line)
                self._end(message)

    def _end(self, message: str) -> None:
        if not self.over.wait(self._grace):
            print(f"ended by {message}", file=sys.stderr, flush=True)
            # The one that failed waits for this; where it is gone, so do we go.
            leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
            leaving.start()
            leaving.join(self._grace)
            os._exit(1)  # the main thread waits for a device, which nothing interrupts


def _addresses() -> list[str]:
    """Addresses by which other processes, here or on other machines, may reach this one."""
    found = [socket.gethostname(), "127.0.0.1"]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 1))  # sends nothing; asks for the way there
        found.insert(0, probe.getsockname()[0])
    return found
