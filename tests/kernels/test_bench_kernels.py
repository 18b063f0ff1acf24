"""The benchmark's arithmetic, its check of answers, and what it refuses."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/bench_kernels.py"
SPEC = importlib.util.spec_from_file_location("bench_kernels", SCRIPT)
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


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
    result = {"device": "cpu", "date": "", "versions": {}, "records": records}
    assert len(bench.table(result).splitlines()) == 4 + len(records)


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
