"""What a run says where nobody watches: in a pipe or a log file."""

import types

from experiments.harness import progress


def test_a_line_every_few_seconds_with_the_time_left(tmp_path, monkeypatch, capsys):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock.now)
    assert not progress.console.is_terminal
    with progress.reporting(tmp_path / "metrics.jsonl") as log:
        log({"event": "started", "step": 2, "steps": 10, "arms": ["one"]})
        for step in range(3, 11):
            clock.now += 4
            log({"step": step, "arm": "one", "loss": 2.0, "tokens_per_second": 5.0})
    lines = [line for line in capsys.readouterr().out.splitlines() if " of 10: " in line]
    assert [line.split(maxsplit=2)[2] for line in lines] == [
        "step 5 of 10: one loss 2.0000, 20 s left",
        "step 8 of 10: one loss 2.0000, 8 s left",
    ]
