"""Adapters of every served method over small Llamas."""

import cases

import lora_jax as lora
from lora_jax import serving
from lora_jax.serving import make_bank

HEADS = ("all-linear", "embed", "lm_head")


def model(*, tied=False, nf4=False):
    """Config, base and tokens; a base of NF4 has matrices that hold whole blocks."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "head_dim": 16}
    config, params, tokens = cases.llama_case(
        tie_embeddings=tied, num_layers=2, vocab_size=64, **shape
    )
    base = lora.quantize(params, "nf4") if nf4 else params
    return config, base, tokens


METHODS = {
    "lora q/v, rank 1": (lora.LoRA(rank=1, alpha=3.0), "qv"),
    "rslora all-linear, rank 13": (lora.LoRA(rank=13, scaling="rslora", dropout=0.5), "all-linear"),
    "lora, rank 64": (lora.LoRA(rank=64), "down_proj"),
    "ranks by layer": (lora.LoRA(rank=(0, 9)), "up_proj|k_proj"),
    "dora": (lora.DoRA(rank=4, dropout=0.5), "all-linear"),
    "ia3": (
        {"k_proj|v_proj": lora.IA3(), "down_proj": lora.IA3(scales="input")},
        "all-linear",
    ),
    "ia3 beside lora": ({"k_proj": lora.IA3(), "q_proj": lora.LoRA(rank=3)}, "all-linear"),
    "pissa": (lora.LoRA(rank=5, init="pissa"), "attention"),
    "adalora": (lora.AdaLoRA(rank=6, target_rank=2, total_steps=10), "mlp"),
    "vera": (lora.VeRA(rank=20), "qv"),
    "loha": (lora.LoHa(rank=3), "o_proj"),
    "embedding": (lora.LoRA(rank=9), "embed"),
}
UNTIED = {
    "head": (lora.LoRA(rank=10), "lm_head"),
    "embedding, head and dora": (
        {"embed": lora.LoRA(rank=2), "lm_head": lora.DoRA(rank=2), "q_proj": lora.LoRA(rank=2)},
        "all-linear",
    ),
}


def deltas(base, *, tied=False):
    """One of each, after some training."""
    made = METHODS if tied else METHODS | UNTIED
    return {
        name: cases.llama_delta(base, method, seed=i, targets=targets)
        for i, (name, (method, targets)) in enumerate(made.items())
    }


def bank_for(base, *, tied=False, pages=60, slots=16, **changes):
    scaled = "all-linear" if tied else ("all-linear", "lm_head")
    return make_bank(
        base,
        pages=pages,
        slots=slots,
        targets=HEADS[:2] if tied else HEADS,
        pre="down_proj",
        post=scaled,
        **changes,
    )


def rows(*places, width=8):
    return serving.rows_of(places, width=width)
