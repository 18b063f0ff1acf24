"""Runs an experiment as a user does, from an empty folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICK = (
    f"--config={ROOT}/configs/tiny.py",
    "--config.data.source=jsonl",
    "--config.data.path=talk.jsonl",
    "--config.data.seq_len=128",
    "--config.train.steps=4",
    "--config.train.warmup_steps=1",
    "--config.train.eval_every=2",
    "--config.train.checkpoint_every=1",
    "--config.samples.max_new_tokens=4",
)
# A run of four steps compiles for longer than it trains.
QUICK_COMPILATION = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def write_talk(folder: Path, lines: int = 24) -> None:
    text = "".join(
        json.dumps({"prompt": f"count to {i}", "response": " ".join("ab"[j % 2] for j in range(i))})
        + "\n"
        for i in range(2, lines)
    )
    (folder / "talk.jsonl").write_text(text)


def start(folder: Path, experiment: str, *flags: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "experiments" / f"{experiment}.py"), *flags],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "200", **QUICK_COMPILATION, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder: Path, experiment: str, *flags: str, **env: str) -> tuple[int, str]:
    process = start(folder, experiment, *flags, **env)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def kill_after_lines(process: subprocess.Popen, metrics: Path, lines: int) -> None:
    """`kill -9` as soon as the metrics have so many lines."""
    while process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= lines:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.communicate()


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
