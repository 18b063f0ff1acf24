"""The comparison of formats, on a tiny model."""

import json

import command
import pytest

from configs import tiny
from experiments.harness import formats, pictures
from experiments.quantization import FORMATS


@pytest.mark.slow
def test_formats_are_measured_once_and_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command.write_talk(tmp_path)
    config = tiny.get_config()
    config.update_from_flattened_dict(
        {"data.source": "jsonl", "data.path": "talk.jsonl", "data.seq_len": 128}
    )
    chosen = {name: FORMATS[name] for name in ("exact", "int8", "nf4, double")}
    results = formats.compare(config, dict(list(chosen.items())[:2]), tmp_path)
    results = formats.compare(config, chosen, tmp_path)
    exact, int8, nf4 = results["formats"]
    assert [row["format"] for row in results["formats"]] == list(chosen)
    assert exact["val_loss"] == pytest.approx(results["unrotated"], rel=1e-5)
    assert exact["normal_error"] == exact["model_error"] == 0 and exact["bits"] == 32
    assert 0.005 < int8["normal_error"] < 0.01 < 0.08 < nf4["normal_error"] < 0.1
    assert int8["bits"] == 8.5 and nf4["bits"] == pytest.approx(4.127, abs=1e-3)
    assert abs(int8["val_loss"] - exact["val_loss"]) < abs(nf4["val_loss"] - exact["val_loss"])

    written = formats.write(tmp_path, "Quantisation", "python x.py", results)
    pictures.loss_by_format(tmp_path / "quantization.png", written)
    assert json.loads((tmp_path / "results.json").read_text())["formats"] == results["formats"]
    assert "| nf4, double | 4.127 |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "quantization.png").read_bytes()[:4] == b"\x89PNG"
