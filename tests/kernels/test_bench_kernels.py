"""The benchmark's arithmetic, its check of answers, and what it refuses."""

import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lora_jax.kernels.grouped_lora import grouped_lora

SCRIPT = Path(__file__).parents[2] / "scripts/bench_kernels.py"
SPEC = importlib.util.spec_from_file_location("bench_kernels", SCRIPT)
bench = importlib.util.module_from_spec(SPEC)
sys.modules["bench_kernels"] = bench
sys.path.insert(0, str(SCRIPT.parent))
SPEC.loader.exec_module(bench)
import bench_grouped_lora as grouped  # noqa: E402


def test_limits_are_bytes_at_few_rows_and_operations_at_many():
    h100 = bench.LIMITS["H100"]
    few = {p: bench.floor(1, 4096, 4096, packed=p, limit=h100) for p in (False, True)}
    many = {p: bench.floor(8192, 4096, 4096, packed=p, limit=h100) for p in (False, True)}
    # 16 bits a weight against 4.5, beside the activations' 16 kB.
    assert few[False] / few[True] == pytest.approx(16 / 4.5, rel=0.01)
    assert many[False] == many[True] == 2 * 8192 * 4096**2 / h100[1]


def test_tiny_shapes_run_here_with_every_answer_checked(capsys, monkeypatch):
    monkeypatch.setattr(bench, "peer_process", lambda: None)
    shapes = {"rows": (3,), "matrices": ((256, 64),)}
    records = bench.measure(shapes, None, "xla", blocks=1)
    assert [record["backward"] for record in records] == [False, True]
    assert {"kernel_us", "xla_us", "bfloat16_us"} <= records[0].keys()
    result = {"kernel": "", "device": "cpu", "date": "", "versions": {}, "records": records}
    assert len(bench.table(result).splitlines()) == 4 + len(records)


def test_grouped_lora_runs_here_with_every_answer_checked(capsys):
    result = bench.run("grouped_lora", jax.devices()[0], None, tiny=True, blocks=1)
    assert [record["backward"] for record in result["records"]] == [False, False, True, True]
    assert {"kernel_us", "xla_us", "base_us"} <= result["records"][0].keys()
    assert len(bench.table(result).splitlines()) == 4 + len(result["records"])


def test_a_wrong_answer_of_grouped_lora_ends_the_run():
    x, _, _, a, b, pages, sizes = grouped.arguments(40, 3, 64, 128, 2, None)
    y = np.array(grouped_lora(x, a, b, pages[0], sizes))
    grouped.check_tokens("kernel", y, x, a, b, pages[0], sizes)
    with pytest.raises(SystemExit, match="kernel is wrong"):
        grouped.check_tokens("kernel", y, x, a, b, pages[1], sizes)
    with pytest.raises(SystemExit, match="kernel is wrong: tokens without pages"):
        grouped.check_tokens("kernel", y + np.array(1, y.dtype), x, a, b, pages[0], sizes - 1)


def test_adapters_are_bound_by_their_bytes_until_segments_are_long():
    h100 = bench.LIMITS["H100"]
    few, many = (grouped.floor(N, 8, 4096, 4096, 2, h100) for N in (8, 8192))
    assert few == 2 * (8 * 16 + 8) * 8192 / h100[0]
    assert many == 2 * (8 * 16 + 8192) * 8192 / h100[0], "the tokens' own"


def test_a_wrong_answer_ends_the_run():
    x, w = np.ones((2, 64)), np.ones((64, 3))
    bench.check("kernel", x @ w, x, w)
    with pytest.raises(SystemExit, match="kernel is wrong"):
        bench.check("kernel", x @ w + 3, x, w)
    with pytest.raises(SystemExit, match="kernel is wrong"):
        bench.check("kernel", x @ w * np.nan, x, w)


@pytest.mark.parametrize("arguments", [[], ["--shapes=tiny", "--output=somewhere"]])
def test_no_figures_are_written_without_the_hardware(arguments, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["bench_kernels.py", *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"kernels and their limits|mean nothing"):
        bench.main()
    assert not any(tmp_path.iterdir())
