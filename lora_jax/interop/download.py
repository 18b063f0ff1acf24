"""A resumable download with a progress bar."""

import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from lora_jax.interop.progress import byte_progress

_CHUNK = 1 << 18
_ATTEMPTS = 4
_CERTIFICATES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
Report = Callable[[int], None]


class DownloadError(ValueError):
    """The download is incomplete; the bytes received are kept, and the next call resumes there."""


def download(url: str, part: Path, *, size: int, pause: float = 1.0) -> None:
    """Fills `part` with the `size` bytes at `url` (http, https or file), resuming where it ends.

    If the server ignores the range of the request, it starts from the beginning. A broken
    connection is tried again up to three times, after a `pause` in seconds that doubles.

    Raises:
      DownloadError: no connection, a refusal by the server, or fewer bytes than `size`.
    """
    with byte_progress() as progress:
        task = progress.add_task(part.stem, total=size)
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(pause * 2 ** (attempt - 1))
            reason = _continue(url, part, size, lambda done: progress.update(task, completed=done))
            if _length(part) >= size:
                return
    raise DownloadError(
        f"{part.stem} stopped at {_length(part):,} of {size:,} bytes: {reason}. "
        "Run again: it goes on from there."
    )


def _continue(url: str, part: Path, size: int, report: Report) -> str:
    """Downloads over one connection; returns why it ended."""
    done = _length(part)
    if done >= size:
        return "complete"
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=60, context=_tls()) as response:
            if done and response.status != http.client.PARTIAL_CONTENT:
                done = 0
            with part.open("ab" if done else "wb") as file:
                return _pour(response, file, done, report)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        return str(error)


def _pour(response: BinaryIO, file: BinaryIO, done: int, report: Report) -> str:
    report(done)
    while chunk := response.read(_CHUNK):
        file.write(chunk)
        done += len(chunk)
        report(done)
    return "the server closed the connection"


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _tls() -> ssl.SSLContext:
    """The certificates that pip and requests would trust, so that a company's proxy works."""
    named = [os.environ[name] for name in _CERTIFICATES if os.environ.get(name)]
    if not named:
        return ssl.create_default_context()
    if Path(named[0]).is_dir():
        return ssl.create_default_context(capath=named[0])
    return ssl.create_default_context(cafile=named[0])
