"""Plans of tiny steps on simulated devices, and what a plan says of steps that do not fit."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from configs import llama8b, tiny
from experiments.harness import ahead, budget
from lora_jax.models import SHAPES
from lora_jax.planning import chips, cost

pytestmark = pytest.mark.mixed_dtypes  # Adam promotes

ROWS, LENGTH, RANK = 8, 64, 4
SHAPE = SHAPES["tiny"]
KV = SHAPE.num_kv_heads * SHAPE.head_dim
D, F, V, L = SHAPE.hidden_size, SHAPE.intermediate_size, SHAPE.vocab_size, SHAPE.num_layers
LINEAR = L * (2 * D * D + 2 * D * KV + 3 * D * F)
DELTA = RANK * L * (2 * (D + D) + 2 * (D + KV) + 3 * (D + F))


def config(**settings):
    made = tiny.get_config()
    quick = {"data.batch_size": ROWS, "data.seq_len": LENGTH, "model.remat": "none"}
    made.update_from_flattened_dict({**quick, "sweep.ranks": (RANK,), **settings})
    return made


def test_a_plan_for_one_cpu(capsys):
    budget.conduct(config(), ["cpu"], None)
    output = capsys.readouterr().out
    shown = [" ".join(line.split()) for line in output.splitlines()]
    assert f"weights {budget.amount(4 * (LINEAR + V * D + (2 * L + 1) * D))}" in shown
    assert f"delta {budget.amount(4 * (DELTA + 7 * L))}" in shown  # with a scale for each matrix
    for text in ("activations and temporaries", "TFLOP", "main memory", "nothing was run"):
        assert text in output
    assert "No limit of memory is known" in output and "No peak figures are known" in output


def test_a_plan_over_eight_devices(capsys):
    """Weights split, gathered in each layer forward and backward; two arms that wait their turn."""
    where = chips.machine("cpu:8")
    settings = config(**{"parallel.mode": "fsdp", "sweep.ranks": (1, 2, RANK)})
    step = ahead.compile_step(settings, where)
    norms = 4 * (2 * L + 1) * D
    assert step.sizes["weights"] == 4 * (LINEAR + V * D) // 8 + norms
    assert step.sizes["waiting arms"] == 2 * (step.sizes["delta"] + step.sizes["optimizer"])
    assert step.needed > sum(step.sizes.values()) and step.tokens == ROWS * LENGTH
    kinds = {each.kind: each for each in step.collectives}
    gathered = kinds["all-gather"]
    assert gathered.group == 8 and gathered.bytes >= 2 * 4 * LINEAR
    assert kinds["all-reduce"].bytes >= 4 * DELTA / 2  # at least the gradients of what lies whole
    assert "all-gather" in budget.report(settings, where, step)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_products_are_those_of_the_formula(quantize):
    """4N a token for linear layers, forward and backward to activations; 6N for what trains; of
    attention three times the forward; the head as a linear layer."""
    step = ahead.abstract_step(config(**{"base.quantize": quantize}), chips.machine("cpu"))
    jaxpr, _ = ahead.lowered(step, "cpu")
    tokens, attention = ROWS * LENGTH, 4 * LENGTH * D * L
    a_token = 4 * LINEAR + 6 * DELTA + 3 * attention + 4 * V * D
    assert cost.flops(jaxpr) == a_token * tokens


def test_a_plan_of_a_pmap():
    """Each device computes its share, and sums gradients and the loss once over all."""
    settings, where = config(**{"parallel.mode": "pmap"}), chips.machine("cpu:8")
    step = ahead.compile_step(settings, where)
    attention = 4 * LENGTH * D * L
    a_token = 4 * LINEAR + 6 * DELTA + 3 * attention + 4 * V * D
    assert step.flops == a_token * ROWS * LENGTH / 8
    [summed] = step.collectives
    assert (summed.kind, summed.group) == ("all-reduce", 8) and summed.bytes >= 4 * DELTA
    assert "mode pmap" in budget.report(settings, where, step)


def test_what_a_knob_cannot_do_is_said_in_its_row(monkeypatch):
    def abstract(config, where):
        ahead.abstract_step(config, where)
        return LARGE

    monkeypatch.setattr(budget, "compile_step", abstract)
    settings = config(**{"parallel.mode": "fsdp", "data.batch_size": 4})
    table = budget.savings(settings, chips.machine("cpu:4"), LARGE)
    [row] = [line for line in table.splitlines() if "--config.train.accumulate=2" in line]
    assert "4 rows cannot be split over config.train.accumulate=2 and fsdp=4" in row


def test_a_pmap_holds_the_base_on_each_device():
    step = ahead.abstract_step(config(**{"parallel.mode": "pmap"}), chips.machine("cpu:8"))
    one = ahead.abstract_step(config(), chips.machine("cpu"))
    (sizes, _), (whole, _) = ahead.sizes(step), ahead.sizes(one)
    assert sizes["weights"] == whole["weights"] and sizes["batch"] < whole["batch"]


def test_moments_on_the_host_are_counted_there():
    step = ahead.abstract_step(
        config(**{"train.optimizer_memory": "pinned_host"}), chips.machine("cpu")
    )
    sizes, host = ahead.sizes(step)
    assert host == 8 * DELTA and sizes["optimizer"] < 100  # counters alone


@pytest.mark.parametrize(
    ("topologies", "settings", "message"),
    [
        (["cpu:3"], {}, r"no topology 'cpu:3' is known: expected one of cpu:1, cpu:2, .*cpu:16"),
        (["cpu", "cpu:8"], {}, "--topology=cpu,cpu:8: name one, or --search=topology"),
        (["cpu:8"], {"parallel.mode": "pipeline"}, "mode 'pipeline': expected one of single, pmap"),
        (["cpu:8"], {"parallel.mode": "pmap", "data.batch_size": 12}, "12 rows cannot be split"),
        (["cpu:8"], {"parallel.mode": "fsdp", "data.batch_size": 4}, "4 rows cannot be split over"),
        (
            ["cpu:4"],
            {"parallel.mode": "fsdp", "train.accumulate": 4},
            "batch_size: 8 rows cannot be split over config.train.accumulate=4 and fsdp=4. Choose "
            "a multiple of 16",
        ),
        (
            ["cpu:8"],
            {"parallel.mode": "pmap", "train.accumulate": 2},
            "8 rows cannot be split over config.train.accumulate=2 and devices=8",
        ),
        (
            ["cpu:8"],
            {"parallel.mode": "fsdp", "parallel.arms": 2, "sweep.ranks": (1, 4),
             "sweep.full": True, "sweep.mode": "batched"},
            "config.parallel.arms=2 does not divide the arms .* together, 1 in number: full",
        ),
        (["cpu:8"], {"parallel.mode": "fsdp+tensor", "parallel.tensor": 3}, "not divide 8 devices"),
        (["cpu"], {"sweep.mode": "parallel"}, "expected one of auto, batched, in_turn"),
        (["gpu"], {}, "no chip 'gpu' is known: expected one of v4, v5e, .*, h200, cpu"),
    ],
)  # fmt: skip
def test_wrong_input_gets_one_clear_sentence(topologies, settings, message):
    with pytest.raises(ValueError, match=message):
        budget.conduct(config(**settings), topologies, None)


GIB = chips.GIB
# What a compiler might say of 8B on one chip and on more: 20 GiB and 1.5 a row, spread by halves.
LARGE = ahead.Compiled(
    sizes={"weights": 16 * GIB, "waiting arms": 0}, host=0, devices=1, tokens=1, needed=0, flops=1
)


def standing(config, where):
    weights = (5 if config.base.quantize == "nf4" else 20) * GIB
    return weights / (where.chips if config.parallel.mode == "fsdp" else 1)


def pretended(config, where):
    rows = config.data.batch_size / config.train.accumulate
    split = where.chips if config.parallel.mode == "fsdp" else 1
    needed = standing(config, where) + 1.5 * GIB * rows / split
    refused = needed > where.chip.memory
    return dataclasses.replace(LARGE, needed=needed, temporary=None if refused else GIB)


@pytest.fixture
def pretend(monkeypatch):
    def machine(name):
        kind, count = chips.CHIPS[name.partition(":")[0]], chips.chip_count(name)
        return chips.Machine(name, kind, [None] * count * kind.cores)

    monkeypatch.setattr(budget, "compile_step", pretended)
    monkeypatch.setattr(budget, "abstract_step", lambda config, where: (config, where))
    monkeypatch.setattr(budget, "sizes", lambda step: ({"weights": standing(*step)}, 0))
    monkeypatch.setattr(budget, "machine", machine)


def large(**settings):
    made = llama8b.get_config()
    base = {"base.quantize": "none", "data.batch_size": 8, "parallel.mode": "fsdp"}
    made.update_from_flattened_dict({**base, **settings})
    return made


def test_too_little_memory_says_by_how_much_and_what_would_save_it(pretend, capsys):
    with pytest.raises(
        ValueError, match=r"does not fit: 17.45 GB too much on each device"
    ) as error:
        budget.conduct(large(), ["v5e:1x1"], None)
    rows = {line.split()[0]: line for line in str(error.value).splitlines() if line[:2] == "--"}
    assert rows["--config.base.quantize=nf4"].endswith("has 1.34 GB too much")
    assert rows["--config.train.accumulate=2"].split()[1:3] == ["6.44", "GB"]
    assert rows["--config.data.batch_size=4"].endswith("has 11.01 GB too much")
    assert rows["--topology=v5e:2x2"].endswith("fits")
    assert "--config.train.optimizer_memory=pinned_host" in rows
    assert "--config.model.remat=offload" in rows
    assert "the device has" in capsys.readouterr().out


def test_the_search_takes_the_fewest_chips_that_fit(pretend, capsys):
    budget.conduct(large(), ["v5e", "v6e"], "topology")
    output = capsys.readouterr().out
    assert "v5e:1x1: 21.47 GB of weights and states" in output
    assert "v6e:1x1: It does not fit: 0.82 GB too much" in output
    assert "llama8b on v5e:2x2" in output
    with pytest.raises(ValueError, match="fits none of v5e:1x1, v5e:2x2"):
        budget.conduct(large(**{"parallel.mode": "single"}), ["v5e"], "topology")


def test_the_search_takes_the_largest_batch_that_fits(pretend, capsys):
    budget.conduct(large(), ["v5e:2x2"], "batch")
    assert "28 x 1024 tokens" in capsys.readouterr().out  # (15.75 * 4 - 20) / 1.5, by fours
    with pytest.raises(ValueError, match="does not fit v5e:1x1, even with 1 rows"):
        budget.conduct(large(), ["v5e:1x1"], "batch")
    with pytest.raises(ValueError, match="no limit of memory is known of it, so any batch fits"):
        budget.conduct(large(), ["cpu:1"], "batch")


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("most", [0, 3, 8, 13, 100])
def test_the_largest_batch_is_found(unit, most):
    assert budget.largest_batch(lambda rows: rows <= most, unit) == most // unit * unit


def test_a_bound_is_the_longest_of_its_parts():
    chip = chips.CHIPS["v5e"]
    sent = cost.Collective("all-gather", 4, 1, 8, int(chip.links))
    step = dataclasses.replace(
        LARGE,
        flops=chip.flops * 3,
        traffic=int(chip.bandwidth * 2),
        collectives=(sent,),
        tokens=600,
    )
    assert [least for _, least in budget.seconds(chip, step).values()] == [3, 2, 1]
    assert "At most 200 tokens/s" in budget.speed_table(chip, step)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "failed", "text"),
    [
        (["--config.data.batch_size=1"], 0, "tiny on cpu: tiny, base float32, mode single"),
        (["--topology=v5e:3x3"], 1, "plan: no topology 'v5e:3x3' is known: expected one of"),
        (["--config.data.rows=1"], 1, "rows"),
    ],
)  # fmt: skip
def test_the_command_line(tmp_path, flags, failed, text):
    root = Path(__file__).parents[2]
    command = [sys.executable, f"{root}/scripts/plan.py", f"--config={root}/configs/tiny.py"]
    ended = subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert bool(ended.returncode) == failed and text in ended.stdout + ended.stderr
    assert not text.startswith("plan:") or "Traceback" not in ended.stderr
