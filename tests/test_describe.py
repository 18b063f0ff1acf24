"""The counts that published tables give, from abstract trees."""

import cases
import jax
import jax.numpy as jnp
import pytest

import lora_jax as lora
from lora_jax.models import llama
from lora_jax.models.llama import LlamaConfig

LLAMA3_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, context_length=8192, rope_theta=500_000.0,
)  # fmt: skip
LLAMA3_70B = LlamaConfig(
    vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64,
    num_kv_heads=8, head_dim=128, context_length=8192, rope_theta=500_000.0,
)  # fmt: skip
PER_RANK = {"qv": 425_984, "attention": 851_968, "mlp": 1_769_472, "all-linear": 2_621_440}


def described(config, method, targets="all-linear"):
    """Described by shapes alone: 16 GB of weights are never allocated."""

    def make():
        params = llama.init(config, key=jax.random.key(0), dtype=jnp.bfloat16)
        return lora.lora_transform(params, method, targets=targets, key=jax.random.key(0))

    base, delta = jax.eval_shape(make)
    return lora.describe(base, delta, method, targets=targets)


@pytest.mark.parametrize("targets", PER_RANK)
@pytest.mark.parametrize("rank", [1, 16])
def test_llama3_8b(targets, rank):
    found = described(LLAMA3_8B, lora.LoRA(rank=rank), targets)
    assert found.trainable_params == rank * PER_RANK[targets]
    assert found.all_params == 8_030_261_248 + found.trainable_params


def test_70b():
    found = described(LLAMA3_70B, lora.LoRA(rank=1), "qv")
    assert found.all_params - found.trainable_params == 70_553_706_496


def test_full_trains_everything():
    found = described(LLAMA3_8B, lora.Full(), ".*")
    assert found.trainable_params == 8_030_261_248


def test_summary_is_the_line_that_peft_prints():
    assert described(LLAMA3_8B, lora.LoRA(rank=16), "qv").summary() == (
        "trainable params: 6,815,744 || all params: 8,037,076,992 || trainable%: 0.0848"
    )


def test_rows_name_path_rule_shape_and_rank():
    base, delta = cases.transform(cases.nested(), lora.LoRA(rank=2))
    rules = {"q_proj": lora.LoRA(rank=2), "mlp": lora.LoRA(rank=2)}
    row = lora.describe(base, delta, rules).rows[0]
    assert (row.path, row.rule, row.kind) == ("block/q_proj", "q_proj", "LoRANode")
    assert (row.shape, row.rank, row.trainable) == ((6, 5), 2, 22)
    assert [row.rule for row in lora.describe(base, delta, rules).rows] == ["q_proj", "mlp"]
    assert [row.rule for row in lora.describe(base, delta).rows] == ["", ""]


def test_rule_column_with_an_exclusion():
    case = cases.nested()
    rules = {"q_proj": None, "all-linear": lora.LoRA(rank=2)}
    base, delta = cases.transform(case, rules)
    assert [(r.path, r.rule) for r in lora.describe(base, delta, rules).rows] == [
        ("out/down_proj", "all-linear")
    ]


def test_layouts_pick_what_they_picked_in_the_transform():
    params = {"mixer": {"b": jnp.ones((6, 5))}}  # a matrix by its layout, a bias by its name
    method, layouts = lora.LoRA(rank=2), {"mixer/b": lora.Layout()}
    base, delta = lora.lora_transform(params, method, key=jax.random.key(0), layouts=layouts)
    (row,) = lora.describe(base, delta, method, layouts=layouts).rows
    assert (row.path, row.rule) == ("mixer/b", "all-linear")
    with pytest.raises(ValueError, match="all-linear"):
        lora.describe(base, delta, method)


def test_table_has_a_line_for_each_row_and_the_summary():
    base, delta = cases.transform(cases.nested(), lora.LoRA(rank=2))
    found = lora.describe(base, delta, lora.LoRA(rank=2))
    lines = str(found).splitlines()
    assert lines[0].split() == ["path", "rule", "delta", "weight", "rank", "trainable"]
    assert lines[1].split() == ["block/q_proj", "all-linear", "LoRANode", "6x5", "2", "22"]
    assert lines[-1] == found.summary() and len(lines) == 4
