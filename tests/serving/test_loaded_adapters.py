"""Adapters that are loaded at run time are there after a restart, however the server ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from served import GREEDY, MODEL, adapter_folder, refused, service
from starlette.testclient import TestClient

from lora_jax.serving.api import loaded_file
from lora_jax.serving.api.app import app
from lora_jax.serving.api.catalog import Catalog
from lora_jax.serving.api.loaded_file import NAME, LoadedFile
from scripts import serve, soak_serving

HERE = Path(__file__).parent


@pytest.fixture
def parent(tmp_path):
    """A folder of adapters, beside others."""
    for name in ("red", "blue"):
        adapter_folder(tmp_path / "adapters", name)
    for name in ("green", "grey"):
        adapter_folder(tmp_path, name)
    return tmp_path / "adapters"


@contextlib.contextmanager
def client_of(parent):
    """A client of a server that begins with what `parent` lists."""
    engine, loaded = FakeEngine(), LoadedFile(parent)
    catalog = Catalog(MODEL.name, engine, loaded)
    serve.take_in(catalog, serve.at_start(parent, loaded))
    with service(engine, catalog=catalog) as made, TestClient(app(made)) as client:
        yield client


def load(client, name, folder):
    body = {"lora_name": name, "lora_path": str(folder)}
    return client.post("/v1/load_lora_adapter", json=body)


def unload(client, name):
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def served_by(parent):
    """What a server that begins now serves: each adapter's folder, by name."""
    with client_of(parent) as client:
        cards = client.get("/v1/models").json()["data"][1:]
        return {card["id"]: Path(card["root"]).name for card in cards}


def test_a_restart_serves_what_was_loaded_and_not_unloaded(parent, monkeypatch):
    monkeypatch.chdir(parent.parent)
    with client_of(parent) as client:
        assert load(client, "green", "green").status_code == 200  # where the server was started
        assert load(client, "gone", parent.parent / "grey").status_code == 200
        assert unload(client, "gone").status_code == 200
        assert unload(client, "blue").status_code == 200
    monkeypatch.chdir("/")
    assert served_by(parent) == {"blue": "blue", "red": "red", "green": "green"}


def test_a_name_stays_with_what_was_loaded_last(parent, capsys):
    with client_of(parent) as client:
        assert unload(client, "red").status_code == 200
        assert load(client, "red", parent.parent / "grey").status_code == 200
        assert unload(client, "blue").status_code == 200
        assert load(client, "blue", parent / "blue").status_code == 200
    assert served_by(parent) == {"blue": "blue", "red": "grey"}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and str(parent / "red") in said[0] and NAME in said[0]
    (parent.parent / "grey" / "adapter_config.json").unlink()
    assert served_by(parent) == {"blue": "blue"}  # and not another red
    assert "left out: red: " in capsys.readouterr().out
    assert LoadedFile(parent).read()["red"] == parent.parent / "grey"  # for when it is back


def test_a_change_that_cannot_be_written_is_not_made(parent, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with client_of(parent) as client:
        assert load(client, "green", parent.parent / "green").status_code == 200
        before = (parent / NAME).read_text()
        with monkeypatch.context() as patched:
            patched.setattr(loaded_file.os, "fsync", full)
            for response in (load(client, "grey", parent.parent / "grey"), unload(client, "green")):
                error = refused(response, 500, code="not_recorded")
                assert "No space left" in error["message"]
        assert (parent / NAME).read_text() == before
        for name, status in (("green", 200), ("grey", 404), ("red", 200)):
            response = client.post("/v1/completions", json=GREEDY | {"model": name})
            assert response.status_code == status
        assert load(client, "grey", parent.parent / "grey").status_code == 200


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[]", b'{"a": 1}', b'{"a": "b"}', b'{"a": "/\\u0000"}']
)
def test_a_broken_file_is_told_before_a_model_is_loaded(parent, capsys, content):
    (parent / NAME).write_bytes(content)
    assert serve.main([f"--adapters={parent}", "--port=0"], lambda *_: pytest.fail()) == 1
    error = capsys.readouterr().err
    assert NAME in error and "Mend it, or remove it" in error and "Traceback" not in error


def test_threads_lose_nothing(parent):
    loaded = LoadedFile(parent)
    names = [f"a{i}" for i in range(40)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: loaded.add(name, parent / name), names))
        list(threads.map(loaded.remove, names[:20]))
    assert loaded.read().keys() == set(names[20:])
    assert {path.name for path in parent.iterdir()} == {"red", "blue", NAME}


@contextlib.contextmanager
def process(parent, *command):
    """A server's process and a client of it."""
    environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}"}
    arguments = [sys.executable, *command, f"--adapters={parent}", "--port=0"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as running:
        try:
            line = next((line for line in running.stdout if "http://" in line), "")
            assert line, "the server ended"
            url = line[line.index("http://") :].split()[0]
            yield running, soak_serving.Client(url, None, soak_serving.Tally())
        finally:
            running.kill()


def killed_in_the_middle(parent, extra, command):
    """Loads `extra` and kills the server while it answers; what the next one says is the same."""
    with process(parent, *command) as (running, client):
        body = json.dumps({"lora_name": "extra", "lora_path": str(extra)}).encode()
        with client.open("POST", "/v1/load_lora_adapter", body) as response:
            assert response.status == 200, response.read()
        models = [card["id"] for card in json.loads(client.get("/v1/models"))["data"]]
        asked = soak_serving.bodies(models, 24, 16, seed=0)
        for asked_body in asked:
            asked_body["prompt"] = asked_body["prompt"][:12]
        enough = threading.Semaphore(0)

        def one(asked_body):
            with contextlib.suppress(OSError, ValueError):
                client.stream(asked_body)
                enough.release()

        with ThreadPoolExecutor(8) as threads:
            futures = [threads.submit(one, asked_body) for asked_body in asked * 50]
            for _ in range(2 * len(asked)):
                assert enough.acquire(timeout=120)
            running.send_signal(signal.SIGKILL)
            for future in futures:
                future.cancel()
        assert running.wait(10) == -signal.SIGKILL
    before = client.tally
    with process(parent, *command) as (_, client):
        again = [card["id"] for card in json.loads(client.get("/v1/models"))["data"]]
        client.tally.answers = dict(before.answers)
        for asked_body in asked:
            client.whole(asked_body)
    assert sorted(again) == sorted(models) and "extra" in again
    assert len(before.answers) == len(asked) and not client.tally.wrong


def test_a_server_that_is_killed_serves_the_same_again(parent):
    killed_in_the_middle(parent, parent.parent / "green", [HERE / "serve_fake.py"])
