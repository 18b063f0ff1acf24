"""The benchmarks at size, on a shape of no size."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import bench_sweep
import bench_train

from lora_jax.models import SHAPES

pytestmark = pytest.mark.mixed_dtypes
TINY = SHAPES["tiny"]


@pytest.mark.slow
def test_a_setting_is_measured(monkeypatch):
    """What a CPU cannot say is said to be missing."""
    monkeypatch.setitem(bench_train.SETTINGS, "short", (True, 1, 32, "full"))
    record = bench_train.measure("short", "tiny", blocks=1, steps=1)
    assert record["tokens_per_second"] > 0 and 0 < record["loss"] < 10
    assert record["model_flop_utilisation"] is None and record["peak_bytes"] is None


@pytest.mark.slow
def test_a_sweep_is_measured_and_counted():
    measured = bench_sweep.measure(TINY, False, arms=2, tokens=32, blocks=1)
    assert measured["in_turn_over_batched"] > 0
    record = bench_sweep.counted(TINY, False, arms=2, tokens=32, chip="cpu")
    # The arms share nothing but the base: as many operations, and fewer bytes.
    assert record["flops_in_turn_over_batched"] == pytest.approx(1, rel=0.1)
    assert record["bytes_in_turn_over_batched"] > 1


@pytest.mark.parametrize("script", [bench_train, bench_sweep])
def test_times_of_no_size_are_not_written(script, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["bench", "--shape=tiny", f"--output={tmp_path}/x.json"])
    with pytest.raises(SystemExit, match="mean nothing and are not written"):
        script.main()
    assert not any(tmp_path.iterdir())
