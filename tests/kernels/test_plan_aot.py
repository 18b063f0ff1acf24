"""Plans by the real compiler, for TPUs that are not there.

JAX_PLATFORMS=cpu python -m pytest -n 0 -s tests/kernels/test_plan_aot.py
"""

import importlib.util

import pytest

from configs import llama8b
from experiments.harness import ahead, budget
from lora_jax.planning import chips

pytestmark = [
    pytest.mark.usefixtures("real_compilation"),
    pytest.mark.mixed_dtypes,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="no libtpu: see requirements-aot.txt"
    ),
]
ONE_ROW = {"data.batch_size": 1, "data.seq_len": 4096, "sweep.ranks": (16,)}


def planned(topology, **settings):
    config, where = llama8b.get_config(), chips.machine(topology)
    config.update_from_flattened_dict(settings)
    step = ahead.compile_step(config, where)
    print(budget.report(config, where, step))
    return step, where.chip


def test_8b_in_bfloat16_is_too_much_for_one_v5e_and_the_compiler_says_by_how_much():
    step, chip = planned("v5e:1x1", **ONE_ROW)
    assert not budget.fits(step, chip)
    assert sum(step.sizes.values()) + 1e9 < step.needed < sum(step.sizes.values()) + 8e9


def test_8b_in_nf4_trains_on_4096_tokens_on_one_v5e():
    step, chip = planned("v5e:1x1", **ONE_ROW, **{"base.quantize": "nf4"})
    assert budget.fits(step, chip) and step.sizes["weights"] < 6e9


def test_over_chips_weights_are_split_and_gathered():
    step, chip = planned("v5e:4x4", **{"model.shape": "smollm2-135m"})
    weights = 2 * 134_515_008
    assert budget.fits(step, chip) and step.sizes["weights"] < weights / 16 * 1.1
    sent = sum(each.bytes for each in step.collectives)
    assert weights < sent < 16 * weights
