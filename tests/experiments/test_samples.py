"""What is shown of an answer."""

import types

import jax
import jax.numpy as jnp

from experiments.harness.samples import said
from lora_jax.models import SHAPES, llama
from lora_jax.models.generate import generate

LETTERS = types.SimpleNamespace(
    decode=lambda ids, skip_special_tokens: "".join(chr(97 + i % 26) for i in ids) + " "
)


def test_an_answer_of_logits_that_are_no_numbers_says_so():
    config = SHAPES["tiny"]
    params = llama.init(config, key=jax.random.key(0))
    broken = {**params, "norm": jnp.full_like(params["norm"], jnp.nan)}
    prompt, lengths = jnp.array([[1, 2]]), jnp.array([2])
    for weights, is_text in ((params, True), (broken, False)):
        row = generate(weights, prompt, lengths, config, max_new_tokens=2, eos_id=0)[0].tolist()
        assert said(LETTERS, row).isalpha() == is_text
    assert said(LETTERS, row) == "(its logits are not numbers)"
