"""One job of two processes with two devices each, as a user starts it."""

import json
import re
import shutil
import signal

import command
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import tiny
from experiments.harness import setup
from lora_jax import interop

SWEEP = (
    *command.QUICK,
    "--config.data.batch_size=4",
    "--config.train.steps=24",
    "--config.train.eval_every=12",
    "--config.train.checkpoint_every=4",
    "--config.parallel.mode=fsdp",
    "--config.sweep.ranks=(1, 3)",
    "--workdir=run",
)
TWO = {"JAX_NUM_CPU_DEVICES": "2", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
ALONE = {**TWO, "JAX_NUM_CPU_DEVICES": "4"}
# What the processes' transport says at its start; both print it in pieces, between each other's.
GLOO = re.compile(
    r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+"
)
SLOW = pytest.mark.slow
pytestmark = pytest.mark.xdist_group("several_processes")  # they share finished runs


def steps(folder):
    """What each step of each arm came to, whatever the time it took."""
    records = command.metrics(folder / "run")
    return [(r["arm"], r["step"], r.get("loss"), r.get("val_loss")) for r in records]


def assert_close(ours, theirs):
    assert [step[:2] for step in ours] == [step[:2] for step in theirs]
    numbers = [[x for step in run for x in step[2:] if x is not None] for run in (ours, theirs)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return {"LORA_JAX_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The sweep over a checkpoint, of which each process reads and quantises its slices."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    interop.save_huggingface(folder, setup.load_model(tiny.get_config()))
    quantized = "--config.base.quantize=nf4", "--config.base.block_size=8"
    return (*SWEEP, *quantized, f"--config.model.source={folder}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache, sweep):
    folder = tmp_path_factory.mktemp("alone")
    command.write_talk(folder)
    code, output = command.run(folder, "rank_sweep", *sweep, **ALONE, **cache)
    assert code == 0, output
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory, cache, sweep):
    folder = tmp_path_factory.mktemp("pair")
    command.write_talk(folder)
    ends = command.finish(command.start_two(folder, "rank_sweep", *sweep, **TWO, **cache))
    assert [code for code, _ in ends] == [0, 0], ends
    return folder, [output for _, output in ends]


def test_processes_that_disagree_end_with_one_error_each(tmp_path):
    """The cheapest job there is: processes find each other, exchange what they have, and end."""
    second = ("--config.train.steps=25", "--config.lora.targets=qv")
    ends = command.finish(command.start_two(tmp_path, "rank_sweep", *SWEEP, second=second, **TWO))
    for code, output in ends:
        assert code == 1 and "Traceback" not in output, output
        assert "disagree on lora.targets ('all-linear' on process 0, 'qv' on process 1), " in output
        assert "train.steps (24 on process 0, 25 on process 1). Start all of them" in output
    assert not (tmp_path / "run").exists()


@SLOW
def test_two_processes_have_the_losses_of_one(alone, pair):
    folder, (first, second) = pair
    assert_close(steps(folder), steps(alone))
    assert "2 processes, 4 devices" in first and "results.json" in first
    assert not GLOO.sub("", second).strip(), second
    ours, theirs = (json.loads((f / "run/results.json").read_text()) for f in (folder, alone))
    assert ours["samples"] == theirs["samples"]
    for path in (alone / "run/adapters").rglob("adapter_config.json"):
        assert (folder / path.relative_to(alone)).read_text() == path.read_text()


@SLOW
def test_a_killed_process_ends_the_job_and_the_same_commands_continue(pair, tmp_path, cache, sweep):
    """Process 0 waits for the one that is gone until JAX's heartbeat says so."""
    command.write_talk(tmp_path)
    job = command.start_two(tmp_path, "rank_sweep", *sweep, **TWO, **cache)
    command.kill_after_lines(job[1], tmp_path / "run/metrics.jsonl", 12)
    (code, output), _ = command.finish(job)
    assert code != 0 and "If one process dies, the others end within 30 s" in output
    assert "another task died" in output
    assert not (tmp_path / "run/results.json").exists()
    (code, output), _ = command.finish(
        command.start_two(tmp_path, "rank_sweep", *sweep, **TWO, **cache)
    )
    assert code == 0 and "continuing after step" in output, output
    assert steps(tmp_path) == steps(pair[0])


@SLOW
def test_preempted_jobs_go_on_with_other_numbers_of_processes(alone, tmp_path, cache, sweep):
    """Two processes, then one, then two; each saves when it is told to end."""
    command.write_talk(tmp_path)
    path = tmp_path / "run/metrics.jsonl"
    job = command.start_two(tmp_path, "rank_sweep", *sweep, **TWO, **cache)
    command.signal_after_lines(job[1], path, 4, signal.SIGTERM)
    for code, output in command.finish(job):
        assert code == 1 and "which is saved; the same command continues" in output, output
    saved = max(step for _, step, _, _ in steps(tmp_path))
    job = [command.start(tmp_path, "rank_sweep", *sweep, **ALONE, **cache)]
    command.signal_after_lines(job[0], path, 2 * saved + 4, signal.SIGTERM)
    [(code, output)] = command.finish(job)
    assert code == 1 and "which is saved; the same command continues" in output, output
    assert f"continuing after step {saved} of 24" in output
    ends = command.finish(command.start_two(tmp_path, "rank_sweep", *sweep, **TWO, **cache))
    assert [code for code, _ in ends] == [0, 0], ends
    assert_close(steps(tmp_path), steps(alone))


@SLOW
def test_what_one_process_cannot_quantise_ends_both(tmp_path, sweep):
    """A last row or column, whichever is split, is the second process's."""
    command.write_talk(tmp_path)
    *flags, source = sweep
    folder = tmp_path / "model"
    shutil.copytree(source.partition("=")[2], folder)
    [file] = folder.glob("*.safetensors")
    tensors = dict(load_file(file))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][-1, -1] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})
    flags = (*flags, f"--config.model.source={folder}")
    ends = command.finish(command.start_two(tmp_path, "rank_sweep", *flags, **TWO))
    told = "another process cannot quantise its part", "it holds NaN or infinity"
    for (code, output), why in zip(ends, told, strict=True):
        assert code == 1 and "Traceback" not in output, output
        assert f"layers/mlp/up_proj: {why}" in output, output


@SLOW
def test_pmap_over_processes(alone, tmp_path, cache, sweep):
    command.write_talk(tmp_path)
    flags = (*sweep, "--config.parallel.mode=pmap")
    ends = command.finish(command.start_two(tmp_path, "rank_sweep", *flags, **TWO, **cache))
    assert [code for code, _ in ends] == [0, 0], ends
    assert_close(steps(tmp_path), steps(alone))


@SLOW
def test_slurm_describes_the_job(tmp_path):
    """JAX reads what `srun` gives each of its tasks."""
    port = str(command.free_port())
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    tasks = [{"SLURM_PROCID": task, "SLURM_LOCALID": task} for task in ("0", "1")]
    ends = command.finish(
        [
            command.start(
                *(tmp_path, "rank_sweep", *SWEEP, "--distributed"),
                f"--config.data.seed={task['SLURM_PROCID']}",
                **{**TWO, **job, **task, "JAX_COORDINATOR_PORT": port},
            )
            for task in tasks
        ]
    )
    for code, output in ends:
        assert code == 1 and "data.seed (0 on process 0, 1 on process 1)" in output, output


@SLOW
def test_a_job_that_nobody_describes(tmp_path):
    code, output = command.run(tmp_path, "rank_sweep", *SWEEP, "--distributed")
    assert code == 1 and "give --coordinator_address, --num_processes and --process_id" in output
