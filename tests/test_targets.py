"""Rules over paths."""

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.targets import PRESETS, match_rules, rule_matcher

HF = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tree(*paths: str):
    """A nested dict of 4 x 4 matrices."""
    root: dict = {}
    for path in paths:
        *parents, last = path.split("/")
        node = root
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = np.ones((4, 4), np.float32)
    return root


def picked(params, targets, method=None):
    """The paths that a delta adapts."""
    method = method or lora.LoRA(rank=2)
    base, delta = lora.lora_transform(params, method, targets=targets, key=jax.random.key(0))
    return {row.path for row in lora.describe(base, delta).rows}


LLAMA = tree(
    "embed", "lm_head", *[f"layers/attn/{n}" for n in HF[:4]], *[f"layers/mlp/{n}" for n in HF[4:]]
)


@pytest.mark.parametrize(
    ("preset", "names"),
    [("qv", ["q_proj", "v_proj"]), ("attention", HF[:4]), ("mlp", HF[4:]), ("all-linear", HF)],
)
def test_presets_on_a_llama(preset, names):
    assert {path.split("/")[-1] for path in picked(LLAMA, preset)} == set(names)


@pytest.mark.parametrize(
    ("path", "presets"),
    [
        ("h/0/attn/c_attn", {"attention", "all-linear"}),
        ("h/0/mlp/c_fc", {"mlp", "all-linear"}),
        ("layers/0/attention/wq", {"qv", "attention", "all-linear"}),
        ("layers/0/feed_forward/w1", {"mlp", "all-linear"}),
        ("params/SelfAttention_0/query/kernel", {"qv", "attention", "all-linear"}),
        ("wte", set()),
        ("params/token_embedder/embedding", set()),
        ("params/output/kernel", set()),
        ("attn/output/dense", {"attention", "all-linear"}),
        ("model/head", set()),
    ],
)
def test_presets_on_other_naming(path, presets):
    assert {preset for preset in PRESETS if rule_matcher(preset)(path)} == presets


@pytest.mark.parametrize("name", ["attn_norm/scale", "ln_1/weight", "mlp/bias", "norm"])
def test_all_linear_leaves_norms_and_biases_alone(name):
    """Stacked over layers they have two axes, but are no matrices."""
    assert picked(tree(f"layers/{name}", "layers/up_proj"), "all-linear") == {"layers/up_proj"}


def test_vectors_are_left_alone():
    params = tree("up_proj") | {"extra": np.ones(4, np.float32)}
    assert picked(params, "all-linear") == {"up_proj"}


@pytest.mark.parametrize(
    ("rule", "path", "matches"),
    [
        ("q_proj", "layers/attn/q_proj", True),
        ("q_proj", "layers/q_proj/kernel", True),
        ("q_proj", "layers/my_q_proj", False),
        ("q_proj", "layers/q_proj_old", False),
        ("(q|v)_proj", "v_proj", True),
        ("layers/attn/.*", "layers/attn/q_proj", True),
        ("layers/attn/.*", "model/layers/attn/q_proj", True),
        ("attn", "layers/attn/q_proj", True),
        ("a|b", "c/b/d", True),
        ("a|b", "ab", False),
        ("layers/[01]/.*", "layers/1/q_proj", True),
        ("layers/[01]/.*", "layers/11/q_proj", False),
    ],
)
def test_rules_match_whole_components(rule, path, matches):
    assert rule_matcher(rule)(path) is matches


def test_a_rule_can_name_the_embedding_and_the_head():
    assert picked(LLAMA, ["embed", "lm_head"]) == {"embed", "lm_head"}


def test_several_targets_take_the_union():
    assert picked(LLAMA, ["q_proj", "mlp"]) == picked(LLAMA, "q_proj") | picked(LLAMA, "mlp")


def test_full_adapts_leaves_of_any_shape():
    params = {"norm": np.ones(4, np.float32), "up_proj": np.ones((4, 4), np.float32)}
    assert picked(params, ".*", lora.Full()) == {"norm", "up_proj"}


def test_matches_keep_tree_order():
    leaves = dict.fromkeys("cad", np.ones((4, 4), np.float32))
    matches = match_rules(leaves, {"[ad]": lora.LoRA(rank=1), "c": lora.LoRA(rank=2)})
    assert [match.path for match in matches] == ["c", "a", "d"]


def refused(match, *args, params=LLAMA, **kwargs):
    with pytest.raises(ValueError, match=match):
        lora.lora_transform(params, *args, key=jax.random.key(0), **kwargs)


RANK2 = lora.LoRA(rank=2)


def test_rule_that_matches_nothing_names_the_nearest_paths():
    refused("target 'q_porj' matches nothing. The nearest paths are: layers/attn/q_proj", RANK2,
            targets="q_porj")  # fmt: skip


def test_one_of_several_rules_matches_nothing():
    refused("target 'wq' matches nothing", RANK2, targets=["q_proj", "wq"])


def test_misspelt_preset_lists_the_presets():
    refused("'all_linear' matches nothing.*Presets are qv, attention, mlp, all-linear", RANK2,
            targets="all_linear")  # fmt: skip


def test_preset_without_a_match_asks_for_the_trees_own_paths():
    refused("'qv' matches nothing.*your tree's own paths", RANK2, targets="qv",
            params=tree("dense/kernel"))  # fmt: skip


def test_exclusion_that_matches_nothing():
    refused("'z_proj' matches nothing", {"z_proj": None, "all-linear": RANK2})


def test_shadowed_rule():
    refused("'q_proj' adds nothing.*already taken by 'attention'",
            {"attention": RANK2, "q_proj": lora.LoRA(rank=4)})  # fmt: skip


def test_targets_beside_a_mapping():
    refused("targets='qv' was given beside a mapping", {"q_proj": RANK2}, targets="qv")


@pytest.mark.parametrize("kwargs", [{"method": {}}, {"method": RANK2, "targets": []}])
def test_no_target(kwargs):
    refused("there is no target", **kwargs)


def test_invalid_regular_expression():
    refused(r"target '\(q_proj' is not a valid regular expression", RANK2, targets="(q_proj")


def test_lora_on_leaves_that_are_no_matrices():
    params = tree("up_proj") | {"norm": np.ones(4, np.float32)}
    refused("'norm' matches norm, but LoRA adapts matrices.*use Full", RANK2, targets="norm",
            params=params)  # fmt: skip


WIDE = {"up_proj": np.ones((6, 6), np.float32), "wide": {
    name: np.ones((20, 2), np.float32) for name in "cd"
}}  # fmt: skip


def test_a_preset_passes_over_what_the_rank_does_not_fit():
    for method in (lora.LoRA(rank=3), lora.AdaLoRA(rank=3, target_rank=1, total_steps=9)):
        assert picked(WIDE, "all-linear", method) == {"up_proj"}


def test_an_explicit_target_names_all_that_the_rank_does_not_fit():
    message = r"^wide/c: LoRA\(rank=3\) exceeds .* 20 x 2 (.|\n)*\nwide/d: LoRA\(rank=3\) exceeds"
    refused(message, lora.LoRA(rank=3), targets="wide/.*", params=WIDE)


def test_a_preset_of_which_nothing_fits():
    refused(r"wide/c: LoRA\(rank=3\) exceeds", lora.LoRA(rank=3), params={"wide": WIDE["wide"]})
