"""One process's share of what several do together; experiments/test_several_processes runs them."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import parallel
from lora_jax.parallel import hosts


def test_a_process_alone_agrees_with_itself():
    settings = {"train.steps": 4, "ranks": (1, 2)}
    assert hosts.is_first() and hosts.exchange(settings) == [settings]
    hosts.require_agreement(settings)


def test_processes_that_disagree_are_told_on_what(monkeypatch):
    others = [{"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1, "c": 3}]
    monkeypatch.setattr(hosts, "exchange", lambda ours: others)
    with pytest.raises(
        ValueError,
        match=r"b \(2 on process 0, None on process 2\), c \(None on process 0, 3 on process 2\)",
    ):
        hosts.require_agreement(others[0])


def test_a_folder_that_one_process_lacks(tmp_path, monkeypatch):
    hosts.require_shared(tmp_path)
    monkeypatch.setattr(hosts, "exchange", lambda ours: [ours, False, True])
    with pytest.raises(ValueError, match="process 1 does not see .* choose a --workdir"):
        hosts.require_shared(tmp_path)


def test_an_error_of_the_first_process_is_everybodys(monkeypatch):
    def fail():
        raise FileNotFoundError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        hosts.on_first(fail)
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    monkeypatch.setattr(hosts, "exchange", lambda ours: ["no such thing", ours])
    with pytest.raises(ValueError, match="no such thing"):
        hosts.on_first(pytest.fail)


@pytest.mark.parametrize(
    "error", [KeyError("k"), MemoryError("m"), KeyboardInterrupt(), TypeError("t")]
)
def test_whatever_the_first_process_raises_the_others_are_told(monkeypatch, error):
    def fail():
        raise error

    told = []
    monkeypatch.setattr(hosts, "exchange", lambda ours: told.append(ours) or [ours])
    with pytest.raises(type(error)) as raised:
        hosts.on_first(fail)
    assert raised.value is error and type(error).__name__ in told[0]
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    monkeypatch.setattr(hosts, "exchange", lambda ours: [*told, ours])
    with pytest.raises(ValueError, match=type(error).__name__):
        hosts.on_first(pytest.fail)


TWO = """
import sys, jax
from lora_jax.parallel import ending, hosts
address, me, fails = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
hosts.start(coordinator_address=address, num_processes=2, process_id=me, timeout_seconds=300)
with ending.together(grace_seconds=0.5):
    hosts.exchange("all are there")
    if me == fails:
        raise KeyError("the disk is full")
    hosts.exchange("the other never comes")
"""


@pytest.mark.parametrize("fails", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_of_one_process_ends_the_other(fails):
    """It waits for a collective, which nothing interrupts, and JAX's heartbeat for 300 s."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    root = Path(hosts.__file__).parents[2]
    job = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, address, str(me), str(fails)],
            cwd=root,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in range(2)
    ]
    try:
        told = [process.communicate(timeout=120)[1] for process in job]
    finally:
        for process in job:
            process.kill()
    assert [process.returncode for process in job] == [1, 1]
    assert f"ended by process {fails}: KeyError: 'the disk is full'" in told[1 - fails]
    assert "Traceback" in told[fails] and "ended by" not in told[fails]


def test_a_notice_of_preemption_is_kept_until_it_is_asked_for():
    before = signal.getsignal(signal.SIGTERM)
    with hosts.preemption() as stop_requested:
        assert not stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested() and stop_requested()
    assert signal.getsignal(signal.SIGTERM) == before


def test_placing_gives_each_device_its_slice():
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    shardings = {
        "a": NamedSharding(mesh, PartitionSpec("fsdp", "tensor")),
        "b": NamedSharding(mesh, PartitionSpec()),
    }
    tree = {"a": np.arange(32, dtype=np.float32).reshape(8, 4), "b": np.int32(3)}
    placed = hosts.place(tree, shardings)
    for name, sharding in shardings.items():
        assert placed[name].sharding == sharding
    jax.tree.map(np.testing.assert_array_equal, hosts.gathered(placed), tree)


def test_what_the_host_reads_is_whole_on_every_device():
    """Arms may lie on devices of another process."""
    mesh = parallel.make_mesh({"arms": 2, "fsdp": 4})
    by_arm = hosts.place(np.arange(2.0), NamedSharding(mesh, PartitionSpec("arms")))
    evaluate = parallel.on_mesh(mesh, {}).evaluate(lambda delta, base, batch: (2 * delta,))
    (sums,) = evaluate(by_arm, None, None)
    assert sums.sharding.is_fully_replicated
