"""Served on several devices: the tokens of one."""

import dataclasses

import cases
import jax
import pytest
import serving_models
from test_engine import run, tokens_of

import lora_jax as lora
from lora_jax import parallel
from lora_jax.serving import Engine, Request
from lora_jax.serving.normal_form import normal_form
from lora_jax.serving.peft_store import make_pool
from lora_jax.serving.placement import Placement

CONFIG = dataclasses.replace(serving_models.LLAMA, hidden_size=32, intermediate_size=32, head_dim=8)
SIZES = dict(rows=4, readers=1, page_size=4, pages=40, chunk=8, max_length=40)


def adapters_of(model):
    """LoRA of three ranks, and DoRA, which reads the base."""
    targets = ["q_proj", "down_proj"]
    dora = cases.llama_delta(model.params, lora.DoRA(rank=3), seed=5, targets=targets)
    return serving_models.adapters_of(model) | {"dora": dora}


def parts_of(tree):
    """The shape of what one device holds of each array."""
    return [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(tree)]


def answers(model, deltas, placement):
    """The tokens of ten requests over the base and more adapters than the bank has room for."""
    forms = {name: normal_form(model.params, delta) for name, delta in deltas.items()}
    pool = make_pool(
        model.params, [*forms.values()], rows=4, slots=2, max_rank=8, placement=placement
    )
    parts = parts_of(pool.bank)
    for name, form in forms.items():
        pool.add_forms(name, form)
    engine = Engine(model, pool, **SIZES, mesh=placement and placement.mesh)
    names = [None, *deltas]
    tickets = [
        engine.submit(
            Request(
                tokens=(i, 7, *range(i, 3 * i)),
                adapter=names[i % len(names)],
                max_new_tokens=8,
                ignore_eos=True,
            )
        )
        for i in range(1, 11)
    ]
    events = run(engine)
    assert parts_of(pool.bank) == parts  # whatever came and went
    return [tokens_of(events[ticket]) for ticket in tickets], pool.bank


@pytest.mark.parametrize(
    "devices, quantized",
    [(2, True)] + [pytest.param(*case, marks=pytest.mark.slow) for case in [(2, False), (4, True)]],
)
def test_adapters_in_mode_tensor_answer_as_on_one_device(devices, quantized):
    model = serving_models.model_of(CONFIG, quantized=quantized)
    deltas = adapters_of(model)
    alone, _ = answers(model, deltas, None)
    mesh = parallel.mesh_of("tensor", devices=jax.devices()[:devices])
    placement = Placement(mesh, CONFIG.family.sharding)
    placed = dataclasses.replace(model, params=placement.params(model.params))
    together, bank = answers(placed, deltas, placement)
    assert together == alone
    assert len(set(map(tuple, alone))) > 6
    down = bank.targets["layers/mlp/down_proj"]
    assert down.a.sharding.shard_shape(down.a.shape)[-1] == down.a.shape[-1] // devices
