"""scripts/serve.py and scripts/soak_serving.py."""

import os
import socket

import pytest
from fake_engine import FakeEngine
from served import MODEL, adapter_folder, served

from lora_jax.serving.api.catalog import Catalog, folders
from scripts import serve, soak_serving


def never(arguments, adapters):
    raise AssertionError("what is expensive comes last")


def ended_with(capsys, *flags):
    assert serve.main(list(flags), never) == 1
    error = capsys.readouterr().err
    assert error.startswith("serve: ") and "Traceback" not in error
    return error


def test_mistakes_are_told_before_a_model_is_loaded(capsys, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"Port {port} " in ended_with(capsys, f"--port={port}")
    assert "no folder" in ended_with(capsys, f"--adapters={tmp_path / 'none'}")
    (tmp_path / "file").touch()
    assert "no folder" in ended_with(capsys, f"--adapters={tmp_path / 'file'}")
    assert "--api-key" in ended_with(capsys, "--host=0.0.0.0")
    assert "--api-key is empty" in ended_with(capsys, "--api-key=")
    assert "--host=no.such" in ended_with(capsys, "--host=no.such.host.invalid", "--api-key=k")


@pytest.mark.parametrize(
    "flag",
    ["--port=-1", "--port=99999", "--rows=0", "--pages=" + "9" * 5000, "--timeout=x", "--grace=nan"]
    + ["--quantize=int3", "--unheard=1"],
)
def test_flags_that_are_wrong(capsys, flag):
    with pytest.raises(SystemExit) as ended:
        serve.main([flag], never)
    assert ended.value.code == 2 and flag.partition("=")[0] in capsys.readouterr().err


def test_adapters_that_cannot_be_served_are_reported_and_left_out(capsys, tmp_path):
    engine = FakeEngine()
    for name in ("red", "blue", MODEL.name):
        adapter_folder(tmp_path, name)
    adapter_folder(tmp_path, "oft", peft_type="OFT")
    (adapter_folder(tmp_path, "torn") / "adapter_config.json").write_text("{")
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").touch()
    catalog = Catalog(MODEL.name, engine)
    serve.take_in(catalog, folders(tmp_path))
    assert [known.name for known in catalog] == ["blue", "red"] and set(engine.adapters) == {
        "blue",
        "red",
    }
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all(line.startswith("serve: left out: ") for line in said)
    assert "OFT" in said[0] and "base's own name" in said[1] and "torn" in said[2]


def soaked(capsys, requests, *flags):
    with served(FakeEngine(rows=8)) as (_, address):
        status = soak_serving.main([f"--url={address}", f"--requests={requests}", *flags])
    said = capsys.readouterr().out
    assert status == 0, said
    return said


def test_a_short_soak(capsys):
    assert '"p99"' in soaked(capsys, 40, "--concurrency=8", "--bodies=10")


@pytest.mark.slow
def test_a_soak(capsys):
    soaked(capsys, int(os.environ.get("SOAK", "200")))


def test_memory_that_grows_is_told():
    flat = [100 << 20, 200 << 20, *[210 << 20] * 10]
    assert not soak_serving.grew(flat) and not soak_serving.grew([1, 2])
    assert soak_serving.grew([value + (i * 10 << 20) for i, value in enumerate(flat)])
