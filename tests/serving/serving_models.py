"""Small models with adapters, and a pool of them over a stack."""

import dataclasses
import functools

import cases
import jax
import jax.numpy as jnp

import lora_jax as lora
from lora_jax.data.tokenizer import byte_tokenizer
from lora_jax.interop import Pretrained
from lora_jax.models.gemma2 import Gemma2Config
from lora_jax.models.generate import generate
from lora_jax.models.llama import LlamaConfig
from lora_jax.serving import BankFull, Lease, Place
from lora_jax.serving.adapters import UnavailableError

VOCAB = 260
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    context_length=48,
    tie_embeddings=False,
)
LLAMA = LlamaConfig(**SHAPE, num_layers=2)
GEMMA = Gemma2Config(
    **SHAPE, num_layers=4, attention_scalar=3, attention_cap=1.5, windows=(5, None, 9, None)
)
PROMPT, ANSWER = 24, 16  # most tokens of each


def model_of(config, *, quantized=False) -> Pretrained:
    params = dict(cases.llama_params(config))
    if quantized:
        params = lora.quantize(params, "nf4", block_size=8)
    tokenizer = dataclasses.replace(byte_tokenizer(), eos_id=66)  # which these models do say
    return Pretrained(
        params=params, config=config, tokenizer=tokenizer, name="small", source="random"
    )


def adapters_of(model, count=3) -> dict[str, lora.transform.Delta]:
    """Of different ranks and targets, each far enough from the base to say something else."""
    deltas = {}
    for i in range(count):
        targets = ["all-linear", "attention", "all-linear"][i % 3]
        method = lora.LoRA(rank=1 + i, alpha=4)
        deltas[f"a{i}"] = cases.llama_delta(model.params, method, seed=i, targets=targets)
    return deltas


class StackPool:
    """Adapters by name, `lora.stack`ed, with one that changes nothing for the base."""

    widths = (1,)

    def __init__(self, deltas, slots=None):
        self.names = list(deltas)
        zero = jax.tree.map(jnp.zeros_like, next(iter(deltas.values())))
        self.bank = lora.stack([*deltas.values(), zero])
        self.slots, self.used = len(deltas) if slots is None else slots, {}
        self.versions = dict.fromkeys(deltas, 0)

    def __contains__(self, name):
        return name in self.versions

    def acquire(self, name):
        if name not in self.versions:
            raise UnavailableError(name)
        if name not in self.used and len(self.used) == self.slots:
            raise BankFull(name)
        self.used[name] = self.used.get(name, 0) + 1
        return Lease(name, Place((), self.names.index(name)), self.versions[name])

    def release(self, lease):
        name = lease.name
        self.used[name] -= 1
        if not self.used[name]:
            del self.used[name]

    def bind(self, base, bank, pages, slots):
        return lora.bind(base, bank, adapter_ids=jnp.where(slots < 0, len(self.names), slots))


@functools.cache
def _generate(config, tokens, eos_id):
    return jax.jit(functools.partial(generate, config=config, max_new_tokens=tokens, eos_id=eos_id))


class Alone:
    """What `generate` answers to a prompt with one adapter."""

    def __init__(self, model, deltas):
        self.model = model
        self.weights = {None: model.params} | {
            name: lora.bind(model.params, delta) for name, delta in deltas.items()
        }
        self.known = {}

    def __call__(self, tokens, adapter, count):
        if (tokens, adapter) not in self.known:
            prompt = jnp.array([list(tokens) + [0] * (PROMPT - len(tokens))], jnp.int32)
            eos_id = self.model.tokenizer.eos_id
            run = _generate(self.model.config, ANSWER, eos_id)
            answer = run(self.weights[adapter], prompt, jnp.array([len(tokens)]))[0].tolist()
            if eos_id in answer:
                answer = answer[: answer.index(eos_id) + 1]
            self.known[tokens, adapter] = answer
        return self.known[tokens, adapter][:count]
