"""Plans of engines that serve: a tiny one compiled, and what is said of sizes that do not fit."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import llama8b, tiny
from experiments.harness import capacity, serving_ahead
from experiments.harness.budget import amount
from experiments.harness.serving_ahead import Held, Load, Sizes
from lora_jax import models, serving
from lora_jax.models import SHAPES
from lora_jax.planning import chips
from lora_jax.serving.paged_cache import init_pages

SHAPE = SHAPES["tiny"]
KV = SHAPE.num_kv_heads * SHAPE.head_dim
D, F, V, L = SHAPE.hidden_size, SHAPE.intermediate_size, SHAPE.vocab_size, SHAPE.num_layers
LINEAR = L * (2 * D * D + 2 * D * KV + 3 * D * F)
RANK = L * (2 * (D + D) + 2 * (D + KV) + 3 * (D + F))  # of an adapter on all linear weights
LOAD = Load(rank=12, length=33)  # 2 pages of 8 ranks, 2 of 16 positions


def shown(capsys):
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_the_tables_sum_to_what_the_compiled_step_takes(capsys):
    adapters, requests = 3, 5
    where, config = chips.machine("cpu"), tiny.get_config()
    found = capacity.measure(config, where, LOAD, adapters, requests)
    each, held = found.sizes, found.held
    assert each.weights == 4 * (LINEAR + V * D + (2 * L + 1) * D)
    assert each.adapter == 4 * 16 * RANK
    assert each.request == 4 * 2 * 2 * 16 * L * KV
    batch = 4 * requests * (1 + 1 + 1 + 3 + 2)  # tokens, counts, lengths, table, adapter's pages
    assert held.padding == batch and held.programs == 2 * (2 + 3) + 3
    parts = each.standing(adapters, requests) + held.padding + held.temporary + held.code
    assert held.needed == parts == found.needed(adapters, requests)
    capsys.readouterr()
    print(capacity.report(config, where, LOAD, found, [adapters, 30], requests))
    lines = shown(capsys)
    assert f"all of it {amount(held.needed)}" in lines
    assert f"30 {amount(30 * each.adapter)} 5 {amount(5 * each.request)} no limit known" in lines
    assert_the_engine_takes_as_much(each, adapters, requests)


def assert_the_engine_takes_as_much(each, adapters, requests):
    params = models.init(SHAPE, key=jax.random.key(0))
    bank = serving.make_bank(params, pages=2 * adapters, slots=adapters, widest=12)
    assert bank.nbytes == adapters * each.adapter
    pages = init_pages(SHAPE, 2 * requests, 16, params["embed"].dtype)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pages)) == requests * each.request


def test_four_bits_and_several_devices_make_the_base_smaller():
    config, where = tiny.get_config(), chips.machine("cpu:2")
    plain = serving_ahead.sizes(config, where, LOAD)
    config.base.quantize = "nf4"
    four_bits = serving_ahead.sizes(config, where, LOAD)
    assert four_bits.weights < plain.weights - 3 * LINEAR
    assert (four_bits.adapter, four_bits.request) == (plain.adapter, plain.request)
    config.base.quantize, config.parallel.mode = "none", "tensor"
    split = serving_ahead.sizes(config, where, LOAD)
    assert split.weights < 0.6 * plain.weights and split.request == plain.request // 2
    assert plain.adapter / 2 < split.adapter < plain.adapter  # one factor of two is split


MEMORY = chips.CHIPS["v5e"].memory
EACH = Sizes(weights=int(0.4 * MEMORY), adapter=int(MEMORY / 400), request=int(MEMORY / 100))


def pretend(monkeypatch, each=EACH, on_top=lambda requests: 2e8 + 1e7 * requests):
    """A machine whose compiler says `on_top` of what stands, and the engines that were compiled."""
    compiled = []

    def compile_engine(config, where, load, *, adapters, requests):
        compiled.append((adapters, requests))
        needed = each.standing(adapters, requests) + on_top(requests)
        temporary = None if needed > where.chip.memory else int(on_top(requests))
        return Held(adapters, requests, 40, needed, temporary)

    where = chips.Machine("v5e:1x1", chips.CHIPS["v5e"], [None])
    monkeypatch.setattr(capacity, "compile_engine", compile_engine)
    monkeypatch.setattr(capacity, "sizes", lambda *given: each)
    monkeypatch.setattr(capacity, "machine", lambda name: where)
    return where, compiled


@pytest.mark.parametrize("fixed", [0, 1e8, 1e9])
@pytest.mark.parametrize("per_request", [0, 1e7, 3e8])
@pytest.mark.parametrize("adapters", [1, 40, 190])
def test_as_many_requests_as_fit_are_compiled(monkeypatch, fixed, per_request, adapters):
    def on_top(requests):
        return fixed + per_request * requests

    def most(adapters):
        free = MEMORY - EACH.standing(adapters, 0) - fixed
        return max(0, free // (EACH.request + per_request))

    where, compiled = pretend(monkeypatch, on_top=on_top)
    found = capacity.measure(llama8b.get_config(), where, LOAD, adapters, None)
    assert found.held.requests == most(adapters) and (adapters, most(adapters)) in compiled
    assert len(compiled) <= capacity.MOST_ENGINES
    for more in (adapters + 5, adapters + 30, 300):
        assert abs(found.most_requests(more, MEMORY) - most(more)) <= 1  # by rounding


def test_steps_that_grow_by_leaps_end_with_one_that_fits(monkeypatch):
    """As programs do, one more for each doubling of the rows."""
    where, compiled = pretend(monkeypatch, on_top=lambda n: 3e8 * math.ceil(math.log2(n + 1)))
    found = capacity.measure(llama8b.get_config(), where, LOAD, 8, None)
    assert found.held.needed <= MEMORY and found.held.temporary is not None
    assert found.held.requests > 30 and len(compiled) <= capacity.MOST_ENGINES


def test_the_table_trades_adapters_for_requests(monkeypatch, capsys):
    _, compiled = pretend(monkeypatch)
    capacity.conduct(llama8b.get_config(), ["v5e:1x1"], LOAD, [8, 128, 400], None)
    lines = shown(capsys)
    start = lines.index("adapters resident bank requests pages left")
    rows = [line.split() for line in lines[start + 1 : start + 4]]
    assert [row[0] for row in rows] == ["8", "128", "400"]
    assert int(rows[0][3]) == compiled[-1][1] > int(rows[1][3]) > int(rows[2][3]) == 0
    assert "lacks" in rows[2] and "lacks" not in rows[0] + rows[1]
    assert any("one request, 4.0 adapters" in line for line in lines)
    assert capacity.COPIED not in lines


def test_steps_that_copy_the_pages_are_told_of(monkeypatch, capsys):
    pretend(monkeypatch, on_top=lambda requests: requests * EACH.request)
    capacity.conduct(llama8b.get_config(), ["v5e:1x1"], LOAD, [8], None)
    assert " ".join(capacity.COPIED.split()) in " ".join(shown(capsys))


@pytest.mark.parametrize(
    ("adapters", "requests", "on_top", "compiles", "lacking"),
    [
        (400, None, 0, 0, 0.4 + 1 + 0.01 - 1),  # what stands is too much
        (8, 70, 0, 0, 0.4 + 0.02 + 0.7 - 1),
        (8, 1, 0.7, 1, 0.4 + 0.02 + 0.01 + 0.7 - 1),  # what steps make is
        (8, None, 0.7, 2, 0.4 + 0.02 + 0.01 + 0.7 - 1),
    ],
)
def test_what_does_not_fit_says_how_much_is_missing(
    monkeypatch, adapters, requests, on_top, compiles, lacking
):
    _, compiled = pretend(monkeypatch, on_top=lambda requests: on_top * MEMORY)
    with pytest.raises(ValueError, match="do not fit v5e:1x1") as error:
        capacity.conduct(llama8b.get_config(), ["v5e:1x1"], LOAD, [adapters], requests)
    assert f"{amount(lacking * MEMORY)} too much on each device" in str(error.value)
    assert "--config.base.quantize=nf4" in str(error.value) and len(compiled) == compiles


@pytest.mark.parametrize(
    ("load", "settings", "topologies", "adapters", "requests", "message"),
    [
        (Load(length=10**6), {}, ["cpu"], [8], 1, "requests of 1000000 tokens exceed"),
        (LOAD, {"parallel.mode": "pmap"}, ["cpu"], [8], 1, "an engine runs on one mesh"),
        (LOAD, {}, ["cpu", "cpu:2"], [8], 1, "name one, with --serve"),
        (LOAD, {}, ["cpu"], [], 1, "--adapters= and --requests=1: expected at least 1"),
        (LOAD, {}, ["cpu"], [0, 8], 1, "expected at least 1 of each"),
        (LOAD, {}, ["cpu"], [8], 0, "--requests=0: expected at least 1 of each"),
        (Load(targets="layers/no", length=33), {}, ["cpu"], [8], 1, "layers/no"),
        (LOAD, {}, ["tpu"], [8], 1, "no chip 'tpu' is known"),
    ],
)
def test_wrong_input_gets_one_clear_sentence(
    load, settings, topologies, adapters, requests, message
):
    config = tiny.get_config()
    config.update_from_flattened_dict(settings)
    with pytest.raises(ValueError, match=message):
        capacity.conduct(config, topologies, load, adapters, requests)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"length": 1}])
def test_a_load_has_sizes(wrong):
    with pytest.raises(ValueError, match="expected at least"):
        Load(**wrong)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_compilers_it_says_where_they_are():
    with pytest.raises(ValueError, match=r"pip install -r requirements-aot.txt"):
        capacity.conduct(llama8b.get_config(), ["v5e:1x1"], LOAD, [8], None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "failed", "text"),
    [
        (["--serve", "--length=64", "--adapters=4"], 0, "pages of 8 requests"),
        (
            ["--serve", "--length=64", "--config.parallel.mode=tensor", "--topology=cpu:2"],
            0,
            "The numbers of both are for all devices together.",
        ),
        (["--serve", "--adapters=few"], 1, "plan: --adapters=few: expected numbers"),
        (["--serve", "--search=batch"], 1, "plan: --search is of a training step"),
        (["--rank=3"], 1, "plan: --rank is of a server: give --serve as well"),
    ],
)
def test_the_command_line(tmp_path, flags, failed, text):
    root = Path(__file__).parents[2]
    command = [sys.executable, f"{root}/scripts/plan.py", f"--config={root}/configs/tiny.py"]
    ended = subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert bool(ended.returncode) == failed and text in ended.stdout + ended.stderr
