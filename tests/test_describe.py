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
    assert lines[3].split() == ["frozen", "reason", "leaves", "share"]
    assert lines[4].split() == ["block/bias", "a", "vector", "1", "5.26%"]
    assert lines[-1] == found.summary() and len(lines) == 6


SIZES = {
    "a": {"up_proj": (6, 6)},
    "blocks": {str(i): {"wide": (40, 2), "scale": (2,)} for i in range(2)},
    "ids": (3,),
    "lm_head": (6, 6),
    "skipped": (6, 6),
}


def mixed():
    params = jax.tree.map(jnp.ones, SIZES, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return params | {"ids": jnp.ones(3, jnp.int32)}


def test_what_stays_frozen_has_its_reason_and_its_share():
    rules = {"skipped": None, "all-linear": lora.LoRA(rank=3)}
    base, delta = lora.lora_transform(mixed(), rules, key=jax.random.key(0))
    found = lora.describe(base, delta, rules)
    reasons = {row.path: row.reason for row in found.frozen}
    assert reasons.pop("blocks/0/wide").startswith("LoRA(rank=3) exceeds the smaller side of a 40")
    assert reasons["skipped"] == "'skipped' is mapped to None"
    assert reasons["ids"] == "holds int32" and reasons["blocks/0/scale"] == "a vector"
    assert reasons["lm_head"] == "an embedding or the output head, by its name"
    trained = sum(row.trainable for row in found.rows)
    adapted = sum(6 * 6 for _ in found.rows)
    assert sum(row.params for row in found.frozen) + trained + adapted == found.all_params
    lines = str(found).splitlines()
    (line,) = [line for line in lines if line.startswith("blocks/*/wide")]
    assert line.split()[-2:] == ["2", f"{160 / found.all_params:.2%}"]


def test_a_preset_that_reaches_less_than_half_of_the_matrices_warns():
    method = lora.LoRA(rank=3)
    base, delta = lora.lora_transform(mixed(), method, key=jax.random.key(0))
    (warning,) = lora.describe(base, delta, method).warnings  # 72 of 72 + 160
    assert warning.startswith("warning: 'all-linear' reaches 31.0% of the 232 parameters")
    assert warning in str(lora.describe(base, delta, method))
    small = lora.LoRA(rank=2)
    base, delta = lora.lora_transform(mixed(), small, key=jax.random.key(0))
    assert not lora.describe(base, delta, small).warnings
    assert not lora.describe(base, delta).warnings


def test_reasons_and_lines_of_a_trace():
    def run(params, ids):
        x = params["table"][ids] * params["gain"][None]
        return x @ params["up_proj"]

    params = {"table": jnp.ones((9, 6)), "gain": jnp.ones(6), "up_proj": jnp.ones((6, 6))}
    layouts = lora.infer_layouts(run, params, jnp.array([1, 2]))
    method = lora.LoRA(rank=2)
    base, delta = lora.lora_transform(params, method, key=jax.random.key(0), layouts=layouts)
    found = {
        row.path: row.reason for row in lora.describe(base, delta, method, layouts=layouts).frozen
    }
    assert found["table"] == "an embedding: rows of it are looked up"
    assert f"(mul at {__file__}:" in found["gain"]
