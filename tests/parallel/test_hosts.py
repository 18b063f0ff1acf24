"""One process's share of what several do together; experiments/test_several_processes runs them."""

import os
import signal

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
    jax.tree.map(np.testing.assert_array_equal, hosts.whole(placed), tree)


def test_what_the_host_reads_is_whole_on_every_device():
    """Arms may lie on devices of another process."""
    mesh = parallel.make_mesh({"arms": 2, "fsdp": 4})
    by_arm = hosts.place(np.arange(2.0), NamedSharding(mesh, PartitionSpec("arms")))
    evaluate = parallel.on_mesh(mesh, {}).evaluate(lambda delta, base, batch: (2 * delta,))
    (sums,) = evaluate(by_arm, None, None)
    assert sums.sharding.is_fully_replicated
