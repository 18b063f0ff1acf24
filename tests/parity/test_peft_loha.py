"""LoHa as files that go between PEFT and us, in both directions, with equal logits."""

import cases
import chex
import jax
import numpy as np
import pytest
from test_peft_corners import (
    BIASED,
    TIED,
    UNTIED,
    base,
    load,
    our_logits,
    their_adapter,
    their_base,
)

import lora_jax as lora
from lora_jax.interop import peft as ours
from lora_jax.models import llama

peft = pytest.importorskip("peft", reason="needs requirements-parity.txt")
from family_cases import TOKENS  # noqa: E402
from logits import relative, their_logits  # noqa: E402

pytestmark = [pytest.mark.mixed_dtypes, pytest.mark.filterwarnings("ignore")]


def loha_of(*targets, **more):
    return "LoHaConfig", {"r": 2, "alpha": 3, "target_modules": list(targets), **more}


# Of each: the model, PEFT's config, and whether our base must be untied for it.
THEIRS = {
    "two": (UNTIED, loha_of("q_proj", "down_proj"), False),
    "all-linear": (UNTIED, ("LoHaConfig", {"r": 3, "target_modules": "all-linear"}), False),
    "patterns": (UNTIED, loha_of(
        "q_proj", "v_proj", rank_pattern={r"layers\.0\..*": 4, "v_proj": 3},
        alpha_pattern={"v_proj": 7}), False),
    "a layer": (UNTIED, loha_of("q_proj", layers_to_transform=[1]), False),
    "dropouts": (UNTIED, loha_of("k_proj", rank_dropout=0.5, module_dropout=0.5), False),
    "convolutions": (UNTIED, loha_of("k_proj", use_effective_conv2d=True), False),
    "excluded": (UNTIED, loha_of("q_proj", exclude_modules=r".*\.0\..*"), False),
    "saved modules": (BIASED, loha_of("q_proj", modules_to_save=["norm", "k_proj"]), False),
    "head": (TIED, loha_of("lm_head", "q_proj"), True),
    "saved head": (TIED, loha_of("q_proj", modules_to_save=["lm_head"]), True),
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_loads_here_and_ours_goes_back(name, tmp_path):
    variant, (kind, arguments), untied = THEIRS[name]
    model = their_adapter(variant, kind, arguments).eval()
    model.save_pretrained(tmp_path / "a")
    expected = their_logits(model, TOKENS)
    if untied:
        with pytest.raises(ValueError, match="untie"):
            load(tmp_path / "a", variant)
    delta, params, config = load(tmp_path / "a", variant, untied)
    assert relative(our_logits(lora.bind(params, delta), config), expected) < 1e-5
    assert relative(our_logits(lora.merge(params, delta), config), expected) < 1e-4
    ours.save_adapter(tmp_path / "b", delta, params, ours.model_names(config))
    again = peft.PeftModel.from_pretrained(their_base(variant), tmp_path / "b")
    assert relative(their_logits(again, TOKENS), expected) < 1e-5


OURS = {
    "one": {"q_proj|o_proj": lora.LoHa(rank=3, alpha=5)},
    "two": {"attention": lora.LoHa(rank=2), "mlp": lora.LoHa(rank=4, alpha=1)},
    "a head": {"lm_head": lora.LoHa(rank=2)},
    "norms": {"q_proj": lora.LoHa(rank=2), ".*norm": lora.Full(), "k_bias": lora.Full()},
}


@pytest.mark.parametrize("name", OURS)
def test_ours_loads_there(name, tmp_path):
    params, config = base(BIASED)
    params, config = llama.untie(params, config)
    names = ours.model_names(config)
    delta = cases.llama_delta(params, OURS[name])
    ours.save_adapter(tmp_path / "a", delta, params, names)
    expected = our_logits(lora.bind(params, delta), config)
    theirs = peft.PeftModel.from_pretrained(their_base(BIASED), tmp_path / "a")
    assert relative(their_logits(theirs, TOKENS), expected) < 1e-5
    theirs.save_pretrained(tmp_path / "b")
    first, back = (ours.load_adapter(tmp_path / f, params, names) for f in "ab")
    chex.assert_trees_all_equal(back, first)


def test_its_init_is_theirs():
    """Uniform on the same ranges, with zeros in the same factor."""
    params, config = base(UNTIED)
    _, delta = lora.lora_transform(
        params, lora.LoHa(rank=2), targets="q_proj", key=jax.random.key(0)
    )
    node = delta["layers"]["attn"]["q_proj"]
    layer = peft.get_peft_model(
        their_base(UNTIED), peft.LoHaConfig(r=2, target_modules=["q_proj"])
    ).base_model.model.model.layers[0].self_attn.q_proj  # fmt: skip
    pairs = {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"}
    for leaf, name in pairs.items():
        mine, other = np.asarray(getattr(node, leaf)[0]), getattr(layer, name)["default"]
        assert mine.T.shape == tuple(other.shape)
        widest = float(other.abs().max())
        np.testing.assert_allclose(np.abs(mine).max(), widest, rtol=0.1, atol=0)
