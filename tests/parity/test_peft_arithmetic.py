"""Weighted combinations of adapters as PEFT's add_weighted_adapter makes them."""

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.arithmetic import combine
from lora_jax.methods import LoRANode

peft = pytest.importorskip("peft", reason="needs requirements-parity.txt")
import torch  # noqa: E402

WEIGHTS = [0.7, -0.4]


def factors(seed, d_in=6, d_out=5, rank=2):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(rank, d_in)).astype("f"), draw.normal(size=(d_out, rank)).astype("f")


def theirs(**options):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"])
    model = peft.get_peft_model(model, config, adapter_name="one")
    model.add_adapter("two", config)
    layer = model.base_model.model[0]
    for i, name in enumerate(("one", "two")):
        a, b = factors(i)
        layer.lora_A[name].weight.data = torch.from_numpy(a)
        layer.lora_B[name].weight.data = torch.from_numpy(b)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "mixed", **options)
    return layer.get_delta_weight("mixed").detach().numpy().T


def ours(**options):
    deltas = [
        {"w": LoRANode(a=jnp.asarray(a.T), b=jnp.asarray(b.T),
                      scale=jnp.float32(1.5))}
        for a, b in map(factors, range(2))
    ]  # fmt: skip
    return np.asarray(combine(deltas, WEIGHTS, **options)["w"].update((6, 5)))


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({"how": "cat"}, {"combination_type": "cat"}),
        ({"how": "svd", "rank": 2}, {"combination_type": "svd", "svd_rank": 2}),
        (
            {"how": "ties", "rank": 3, "density": 0.5},
            {"combination_type": "ties_svd", "svd_rank": 3, "density": 0.5},
        ),
    ],
    ids=lambda options: options.get("how", ""),
)
def test_combinations(here, there):
    np.testing.assert_allclose(ours(**here), theirs(**there), rtol=1e-4, atol=1e-5)
