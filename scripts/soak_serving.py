"""Sends many requests of every sort to a running server, and checks its answers and its memory.

    python scripts/serve.py --adapters=DIR --port=8000
    python scripts/soak_serving.py --url=http://127.0.0.1:8000 --requests=2000

Whole answers, streams, clients that hang up and bad bodies, over the base and its adapters, in an
order that --seed fixes. Every answer is held to the first one of the same body. Prints one JSON
object, and writes it to --output: counts, seconds (p50 and p99), and the memory of the server's
process as /metrics says it. Ends with 1 where an answer was lost or another one, an error
unexpected, or memory grew.
"""

import argparse
import contextlib
import dataclasses
import http.client
import importlib.metadata
import json
import os
import platform
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SORTS = {"whole": 50, "stream": 30, "hang_up": 10, "bad": 10}
PATH = "/v1/completions"
WORDS = ["the", "river", "pub", "serves", "cheap", "food", "near", "a", "friendly", "place"]
GROWTH_BYTES, GROWTH = 32 << 20, 1.05  # above this, memory is not flat
BAD: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"\xff\xfe", 400),
    (b'{"model": ', 400),
    (b"[" * 20_000, 400),
    (b'{"model": "no-such-model", "prompt": "x"}', 404),
    (b'{"model": "no-such-model", "prompt": NaN}', 400),
    (b"x" * (4 << 20), 413),
]
BAD_FIELDS: list[dict[str, Any]] = [
    {"temperature": -1},
    {"max_tokens": 10**30},
    {"n": -5},
    {"stop": [""]},
    {"echo": True},
    {"temprature": 1},
]


@dataclasses.dataclass
class Tally:
    """What was seen, by all threads."""

    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: list[float] = dataclasses.field(default_factory=list)
    first_seconds: list[float] = dataclasses.field(default_factory=list)
    answers: dict[str, Any] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)
    memory: list[int] = dataclasses.field(default_factory=list)

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def complain(self, what: str) -> None:
        with self.lock:
            self.wrong.append(what[:300])

    def hold(self, body: dict[str, Any], answer: Any) -> None:
        """Holds an answer to the first one of the same body."""
        key = json.dumps(body, sort_keys=True)
        with self.lock:
            first = self.answers.setdefault(key, answer)
        if first != answer:
            self.complain(f"{key} was answered {first!r}, and then {answer!r}")


class Client:
    """Requests to one server, each over a connection of its own."""

    def __init__(self, url: str, api_key: str | None, tally: Tally):
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.headers = {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.tally = tally

    @contextlib.contextmanager
    def open(
        self, method: str, path: str, body: bytes | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The response, of which the head was read; asks again while the server is busy."""
        while True:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=600)
            with contextlib.closing(connection):
                # A server may answer before it has read a body that is too large.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.request(method, path, body, self.headers)
                with connection.getresponse() as response:
                    if response.status != 429:
                        yield response
                        return
                    wait = float(response.headers["Retry-After"])
            self.tally.count("busy")
            time.sleep(wait * random.uniform(0.2, 1))

    def post(self, body: bytes) -> tuple[int, bytes]:
        with self.open("POST", PATH, body) as response:
            return response.status, response.read()

    def get(self, path: str) -> bytes:
        with self.open("GET", path) as response:
            content = response.read()
        if response.status != 200:
            raise ValueError(f"GET {path} answered {response.status}: {content[:200]!r}")
        return content

    def memory(self) -> int:
        """Of the server's process, in bytes; 0 where it does not say."""
        for line in self.get("/metrics").decode().splitlines():
            if line.startswith("process_resident_memory_bytes "):
                return int(float(line.split()[1]))
        return 0

    def whole(self, body: dict[str, Any]) -> None:
        began = time.monotonic()
        status, content = self.post(json.dumps(body).encode())
        if status != 200:
            self.tally.complain(f"{body} answered {status}: {content[:200]!r}")
            return
        self.tally.seconds.append(time.monotonic() - began)
        choice = json.loads(content)["choices"][0]
        self.tally.hold(body, [choice["text"], choice["finish_reason"]])

    def stream(self, body: dict[str, Any], *, leave_after: int | None = None) -> None:
        """A stream; one that is left after so many lines is not held to anything."""
        began = time.monotonic()
        content = json.dumps(body | {"stream": True}).encode()
        choices: list[dict[str, Any]] = []
        last = b""
        with self.open("POST", PATH, content) as response:
            for number, line in enumerate(response):
                if number == leave_after:
                    return
                if line.startswith(b"data: {"):
                    if not choices:
                        self.tally.first_seconds.append(time.monotonic() - began)
                    choices += json.loads(line[len(b"data: ") :]).get("choices", [])
                last = line.strip() or last
        if last != b"data: [DONE]":
            self.tally.complain(f"{body} ended with {response.status}: {last!r}")
            return
        self.tally.seconds.append(time.monotonic() - began)
        text = "".join(choice["text"] for choice in choices)
        self.tally.hold(body, [text, choices[-1]["finish_reason"]])

    def bad(self, draw: random.Random, body: dict[str, Any]) -> None:
        content, status = draw.choice(BAD)
        if draw.random() < 0.5:
            content, status = json.dumps(body | draw.choice(BAD_FIELDS)).encode(), 400
        answered, answer = self.post(content)
        if answered != status or "error" not in json.loads(answer):
            self.tally.complain(f"{content[:80]!r} answered {answered}: {answer[:200]!r}")


def bodies(models: list[str], count: int, tokens: int, seed: int) -> list[dict[str, Any]]:
    """Bodies whose answers are the same each time."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = " ".join(draw.choices(WORDS, k=draw.choice([1, 5, 20, 60])))
        body = {
            "model": draw.choice(models),
            "prompt": prompt,
            "max_tokens": draw.randint(1, tokens),
            "temperature": draw.choice([0, 0, 0.8]),
            "seed": draw.randrange(2**40),
        }
        made.append(body | ({"stop": "e"} if draw.random() < 0.1 else {}))
    return made


def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    tally = Tally()
    client = Client(arguments.url, arguments.api_key, tally)
    models = [card["id"] for card in json.loads(client.get("/v1/models"))["data"]]
    asked = bodies(models, arguments.bodies, arguments.tokens, arguments.seed)
    every = max(1, arguments.requests // 20)

    def one(index: int) -> None:
        draw = random.Random(f"{arguments.seed} {index}")
        sort, body = draw.choices(list(SORTS), list(SORTS.values()))[0], draw.choice(asked)
        try:
            if index % every == 0:
                tally.memory.append(client.memory())
            if sort == "whole":
                client.whole(body)
            elif sort == "bad":
                client.bad(draw, body)
            else:
                left = draw.randint(0, 12) if sort == "hang_up" else None
                client.stream(body, leave_after=left)
            tally.count(sort)
        except Exception as error:  # it is what is looked for
            tally.complain(f"{sort} {body}: {type(error).__name__}: {error}")

    began = time.monotonic()
    with ThreadPoolExecutor(arguments.concurrency) as threads:
        list(threads.map(one, range(arguments.requests)))
    seconds = time.monotonic() - began
    memory = [*tally.memory, client.memory()]
    if grew(memory):
        tally.complain(f"the server's memory grew: {memory}")
    return {
        "ok": not tally.wrong,
        "requests": arguments.requests,
        "models": len(models),
        "seconds": round(seconds, 2),
        "counts": tally.counts,
        "answer_seconds": percentiles(tally.seconds),
        "first_token_seconds": percentiles(tally.first_seconds),
        "memory_mib": [round(value / (1 << 20)) for value in memory],
        "wrong": tally.wrong[:20],
    }


def grew(memory: list[int]) -> bool:
    """Whether the last quarter is above the second, when all has been compiled and cached."""
    quarter = len(memory) // 4
    if quarter == 0:
        return False
    before, after = max(memory[quarter : 2 * quarter]), max(memory[-quarter:])
    return after > before * GROWTH + GROWTH_BYTES


def percentiles(values: list[float]) -> dict[str, float | None]:
    ordered = sorted(values)

    def at(share: float) -> float | None:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4)

    return {"p50": at(0.5), "p99": at(0.99)} if ordered else {"p50": None, "p99": None}


def parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--url", default="http://127.0.0.1:8000")
    made.add_argument("--api-key", "--api_key")
    made.add_argument("--requests", type=int, default=2000)
    made.add_argument("--concurrency", type=int, default=32)
    made.add_argument("--bodies", type=int, default=100, help="Different ones.")
    made.add_argument("--tokens", type=int, default=48, help="Of an answer at most.")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--output", type=Path, help="Also write the report here, as JSON.")
    return made


def where(argv: list[str]) -> dict[str, Any]:
    """What a record needs beside its figures; device and versions are those of this process."""
    names = ("jax", "jaxlib", "starlette", "uvicorn")
    return {
        "command": " ".join(["python", "scripts/soak_serving.py", *argv]),
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    try:
        report = soak(arguments)
        record = json.dumps(where(argv) | report, indent=2)
        if arguments.output:
            arguments.output.write_text(record + "\n")
    except (OSError, ValueError) as error:
        print(f"soak_serving: {error}", file=sys.stderr)
        return 1
    print(record)
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
