"""A step of a model over a bank of adapters, compiled for a TPU and an H100 that are not there.

JAX_PLATFORMS=cpu python -m pytest -n 0 -s tests/kernels/test_served_aot.py
"""

import re

import jax
import jax.numpy as jnp
import pytest
from aot import on
from test_grouped_lora_aot import kernels_in, mesh, needs_cuda, needs_libtpu

from lora_jax import serving
from lora_jax.models import llama
from lora_jax.models.llama import LlamaConfig
from lora_jax.serving.packing import replaced

pytestmark = pytest.mark.usefixtures("real_compilation")
CONFIG = LlamaConfig(
    vocab_size=4096, hidden_size=1024, intermediate_size=2048, num_layers=4, num_heads=8,
    num_kv_heads=2, head_dim=128, context_length=8192, tie_embeddings=True,
)  # fmt: skip


def step(base, bank, rows, tokens, cache):
    weights = serving.bind(base, bank, rows)
    x, cache = llama.extend(weights, tokens, cache, CONFIG)
    return CONFIG.family.read_out(x, llama.output_head(weights), CONFIG), cache


def compiled(chip: str, platform: str, tokens: int, pages: int):
    """The program, and the bytes of the bank that it reads."""
    how = {"pages": pages, "slots": pages, "targets": ("all-linear", "embed"), "post": "all-linear"}
    base = jax.eval_shape(lambda: llama.init(CONFIG, key=jax.random.key(0), dtype=jnp.bfloat16))
    bank = jax.eval_shape(lambda: serving.make_bank(base, **how))
    rows = serving.Rows(
        jax.ShapeDtypeStruct((8, 2), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.int32)
    )
    cache = jax.eval_shape(lambda: llama.init_cache(CONFIG, 8, 128, jnp.bfloat16))
    given = base, bank, rows, jax.ShapeDtypeStruct((8, tokens), jnp.int32), cache
    placed = jax.tree.map(lambda leaf: on(mesh(chip), jax.P(), leaf), given)
    with jax.sharding.use_abstract_mesh(mesh(chip).abstract_mesh):
        program = jax.jit(step).trace(*placed).lower(lowering_platforms=(platform,)).compile()
    return program, bank.nbytes


@pytest.mark.parametrize(
    "chip, platform",
    [
        pytest.param("v5e", "tpu", marks=needs_libtpu),
        pytest.param("h100", "cuda", marks=needs_cuda),
    ],
)
def test_a_page_is_written_in_place(chip, platform):
    into = jax.ShapeDtypeStruct((4, 256, 8, 1024), jnp.bfloat16)
    page = jax.ShapeDtypeStruct((4, 8, 1024), jnp.bfloat16)
    given = into, page, jax.ShapeDtypeStruct((), jnp.int32)
    placed = [on(mesh(chip), jax.P(), leaf) for leaf in given]
    f = jax.jit(lambda *given: replaced(*given, axis=-3), donate_argnums=0)
    with jax.sharding.use_abstract_mesh(mesh(chip).abstract_mesh):
        program = f.trace(*placed).lower(lowering_platforms=(platform,)).compile()
    held = program.memory_analysis()
    assert held.alias_size_in_bytes >= 2 * into.size and held.temp_size_in_bytes < 2**17
    assert not re.search(r"= \w+\[4,256,8,1024\]\S* copy\(", program.as_text())


def assert_the_bank_stays_where_it_is(chip, platform, tokens):
    """Temporaries do not follow its size, nor do its pages take more memory than they hold."""
    few, few_bytes = compiled(chip, platform, tokens, 64)
    many, many_bytes = compiled(chip, platform, tokens, 256)
    held, held_by_many = (program.memory_analysis() for program in (few, many))
    grown = held_by_many.argument_size_in_bytes - held.argument_size_in_bytes
    added = many_bytes - few_bytes
    assert grown < 1.05 * added
    assert held_by_many.temp_size_in_bytes < held.temp_size_in_bytes + added / 100
    print(chip, tokens, held.temp_size_in_bytes, held_by_many.temp_size_in_bytes)
    return many


@needs_libtpu
@pytest.mark.parametrize("tokens", [1, 64])
def test_a_tpu_scans_layers_with_the_kernel_in_them(tokens):
    program = assert_the_bank_stays_where_it_is("v5e", "tpu", tokens)
    assert kernels_in(program) == 8  # seven in the scan, and the tied head


@needs_cuda
@pytest.mark.parametrize("tokens", [1, 64])
def test_an_h100_gathers_pages_alone(tokens):
    assert_the_bank_stays_where_it_is("h100", "cuda", tokens)
