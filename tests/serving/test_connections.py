"""Clients that hang up or stall, many at once, and a server that ends: over loopback."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from served import BASE, GREEDY, adapter_folder, expected, on_loopback, served, service, wait_until

from lora_jax.serving.api.limits import Limits

LONG = GREEDY | {"max_tokens": 480, "ignore_eos": True}


def request(body, *, extra=""):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"{extra}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


def connect(address):
    host, _, port = address.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def read_all(connection):
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("queued", [False, True])
def test_a_client_that_hangs_up_cancels_its_requests(stream, queued):
    engine = FakeEngine(rows=1, seconds=0.005)
    with served(engine) as (made, address):
        with contextlib.ExitStack() as stack:
            if queued:
                first = stack.enter_context(connect(address))
                first.sendall(request(LONG))
                wait_until(lambda: engine.running)
            with connect(address) as second:
                second.sendall(request(LONG | {"n": 3, "stream": stream}))
                wait_until(lambda: len(engine.running) + len(engine.waiting) == 3 + queued)
                if stream and not queued:
                    assert b"200 OK" in second.recv(100)
            wait_until(lambda: len(engine.running) + len(engine.waiting) == queued)
        wait_until(lambda: engine.idle and not made.driver.busy)


def test_a_body_that_does_not_come():
    limits = Limits(body_seconds=0.1)
    with served(FakeEngine(), limits=limits) as (_, address), connect(address) as connection:
        connection.sendall(request(GREEDY)[:-5])
        assert b" 408 " in read_all(connection).splitlines()[0]


def test_a_client_that_hangs_up_in_its_body_leaves_nothing():
    with served(FakeEngine()) as (made, address):
        with connect(address) as connection:
            connection.sendall(request(GREEDY)[:-5])
        with connect(address) as connection:
            connection.sendall(request(GREEDY))
            assert b" 200 " in read_all(connection).splitlines()[0]


def test_a_client_that_reads_nothing_is_left_when_its_time_is_over(monkeypatch):
    monkeypatch.setattr("lora_jax.serving.api.connection._LAST_SECONDS", 0.1)
    engine = FakeEngine(rows=64, max_waiting=64)
    with served(engine, limits=Limits(seconds=0.5)) as (_, address), socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, _, port = address.removeprefix("http://").partition(":")
        deaf.connect((host, int(port)))
        deaf.sendall(request(LONG | {"stream": True, "n": 64, "logprobs": 3}))

        def was_left():
            with connect(address) as other:
                other.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                return b"lora_jax_request_seconds_count 1.0" in read_all(other)

        wait_until(was_left, 10)


def test_a_bound_on_requests_at_once():
    engine = FakeEngine(seconds=0.005)
    with contextlib.ExitStack() as stack:
        _, address = stack.enter_context(served(engine, limits=Limits(requests=2)))
        one, two = (stack.enter_context(connect(address)) for _ in range(2))
        one.sendall(request(LONG))
        two.sendall(request(LONG)[:-5])  # a body on its way counts
        wait_until(lambda: engine.running)
        time.sleep(0.05)
        with connect(address) as three:
            three.sendall(request(GREEDY))
            answer = read_all(three)
            assert b" 429 " in answer.splitlines()[0] and b"retry-after: 1" in answer
        with connect(address) as health:
            health.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b" 200 " in read_all(health).splitlines()[0]


def test_unloading_waits_for_what_runs():
    engine = FakeEngine(seconds=0.003)
    with served(engine) as (made, address), connect(address) as connection:
        connection.sendall(request(LONG | {"max_tokens": 60}))
        wait_until(lambda: engine.running)

        async def unload():
            task = asyncio.create_task(made.catalog.unload("red", made.driver))
            await asyncio.sleep(0.02)
            assert made.catalog.get("red") is None and "red" in engine.adapters
            await task

        asyncio.run(unload())
        assert "red" not in engine.adapters
        answer = json.loads(read_all(connection).split(b"\r\n\r\n", 1)[1])
        assert answer["usage"]["completion_tokens"] == 60


def test_no_answer_is_lost_or_mixed_up():
    """64 clients, four rows; some hang up, some send what is wrong."""
    engine = FakeEngine(rows=4, max_waiting=200)

    async def one(port, i):
        draw = random.Random(i)
        adapter = draw.choice(["red", "blue", None])
        prompt, limit = "ab"[i % 2] * draw.randint(1, 60), draw.randint(1, 60)
        what = draw.choice(["whole", "stream", "stream", "leave", "bad"])
        body = {"model": adapter or BASE, "prompt": prompt, "max_tokens": limit, "temperature": 0}
        body["stream"] = what in ("stream", "leave")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(body | ({"temperature": -1} if what == "bad" else {})))
        if what == "leave":
            await reader.read(draw.randint(1, 400))
            writer.close()
            return what
        head, _, content = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        text, finish, _ = expected(prompt, adapter=adapter, limit=limit)
        if what == "bad":
            assert b" 400 " in head.splitlines()[0]
        elif what == "whole":
            choice = json.loads(content)["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == (text, finish)
        else:
            assert b"data: [DONE]" in content
            events = [part for part in content.split(b"data: ")[1:] if part.startswith(b"{")]
            chunks = [json.JSONDecoder().raw_decode(part.decode())[0] for part in events]
            choices = [chunk["choices"][0] for chunk in chunks]
            assert "".join(choice["text"] for choice in choices) == text
            assert choices[-1]["finish_reason"] == finish
        return what

    async def all_of_them(port):
        return await asyncio.gather(*(one(port, i) for i in range(64)))

    with served(engine) as (made, address):
        done = asyncio.run(all_of_them(int(address.rpartition(":")[2])))
        assert len(done) == 64 and set(done) == {"whole", "stream", "leave", "bad"}
        wait_until(lambda: engine.idle and not made.driver.busy)


@pytest.mark.parametrize("grace, ended", [(5.0, True), (0.1, False)])
def test_a_server_that_ends_lets_requests_end_for_a_while(grace, ended):
    engine = FakeEngine(seconds=0.002 if ended else 0.02)
    with service(engine) as made, contextlib.ExitStack() as stack:
        with on_loopback(made, grace=grace) as address:
            connections = [stack.enter_context(connect(address)) for _ in range(2)]
            connections[0].sendall(request(LONG))
            connections[1].sendall(request(LONG | {"stream": True}))
            wait_until(lambda: len(engine.running) == 2)
            texts = []
            readers = [
                threading.Thread(target=lambda c=c: texts.append(read_all(c))) for c in connections
            ]
            for reader in readers:
                reader.start()
        for reader in readers:
            reader.join(10)
        assert engine.idle
        whole, streamed = sorted(texts, key=lambda text: b"event-stream" in text)
        if ended:
            assert b" 200 " in whole.splitlines()[0] and b"[DONE]" in streamed
        else:
            assert b" 503 " in whole.splitlines()[0] and b"shutting_down" in whole
            assert b"shutting_down" in streamed and b"[DONE]" not in streamed


def test_sigterm_ends_the_process_when_its_requests_have_ended(tmp_path):
    adapter_folder(tmp_path, "red")
    here = Path(__file__).parent
    command = [
        sys.executable,
        here / "serve_fake.py",
        f"--adapters={tmp_path}",
        "--port=0",
        "--grace=5",
    ]
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parents[1]}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        line = next(line for line in process.stdout if "http://" in line)
        address = line[line.index("http://") :].split()[0].removesuffix("/v1")
        with connect(address) as connection:
            connection.sendall(request(LONG | {"max_tokens": 100, "stream": True}))
            assert b"200 OK" in connection.recv(15)
            process.send_signal(signal.SIGTERM)
            assert b"[DONE]" in read_all(connection)
        assert process.wait(10) == 0
