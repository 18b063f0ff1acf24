"""Plans of engines by the real compilers, for a TPU and an H100 that are not there.

JAX_PLATFORMS=cpu python -m pytest -n 0 -s tests/kernels/test_plan_serving_aot.py
"""

import pytest
from test_grouped_lora_aot import needs_cuda, needs_libtpu

from configs import llama8b
from experiments.harness import capacity, serving_ahead
from experiments.harness.serving_ahead import Load
from lora_jax.planning import chips

pytestmark = [pytest.mark.usefixtures("real_compilation"), pytest.mark.mixed_dtypes]


@pytest.mark.parametrize(
    "topology, quantize, mode",
    [
        pytest.param("v5e:1x1", "nf4", "single", marks=needs_libtpu),
        pytest.param("v5e:2x4", "none", "tensor", marks=needs_libtpu),
        pytest.param("h100:1", "none", "single", marks=needs_cuda),
    ],
)
def test_an_8b_engine_of_eight_adapters_and_requests(topology, quantize, mode):
    """Pages and bank stay where they are: a copy of the keys alone would be half of the pages. An
    H100's temporaries are attention's over the widest step, 0.51 GB beside 2.15 GB of pages."""
    config, where = llama8b.get_config(), chips.machine(topology)
    config.base.quantize, config.parallel.mode = quantize, mode
    found = capacity.measure(config, where, Load(), 8, 8)
    print(capacity.report(config, where, Load(), found, [8], 8))
    assert found.held.needed < where.chip.memory
    assert found.held.temporary < 8 * found.sizes.request / 3
    assert found.held.padding < found.sizes.standing(8, 8) / 100


@needs_libtpu
def test_8b_in_bfloat16_leaves_one_v5e_no_room_and_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(serving_ahead, "_compile", None)
    with pytest.raises(
        ValueError, match="8 adapters and 1 request do not fit v5e:1x1: .* too much"
    ):
        capacity.conduct(llama8b.get_config(), ["v5e:1x1"], Load(), [8], None)
