"""Leaves are read one at a time, in slices where they are sharded, and handed to a hook."""

import collections
import dataclasses
import math
import tracemalloc
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_checkpoints
import small_llamas
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax import parallel
from lora_jax.interop import StoredLeaf, load, load_gguf, load_huggingface, sharded
from lora_jax.paths import flatten
from lora_jax.weights import is_weight

MESH = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))


def sharding(path: str) -> NamedSharding:
    """Output columns over four devices (a head of two lies on two of them), and layers over two."""
    if path == "embed":
        return NamedSharding(MESH, PartitionSpec("model"))
    if path.endswith("_proj"):
        return NamedSharding(MESH, PartitionSpec("data", None, "model"))
    return NamedSharding(MESH, PartitionSpec())


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root, small = tmp_path_factory.mktemp("placing"), small_checkpoints.small("llama3_1")
    folder = small_checkpoints.write_huggingface(root / "folder", *small, shards=2)
    return {"folder": folder, "gguf": small_checkpoints.write_gguf(root / "m.gguf", *small)}


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_sharded_leaves_are_read_once_each(sources, kind):
    read = collections.Counter()

    def place(path: str, leaf: StoredLeaf):
        def count(amount):
            read[path] += amount

        return sharded(lambda path, leaf: sharding(path))(
            path, dataclasses.replace(leaf, on_read=count)
        )

    placed = flatten(load(sources[kind], place=place).params)
    expected = flatten(load(sources[kind]).params)
    assert placed.keys() == expected.keys()
    for path, leaf in expected.items():
        assert placed[path].sharding.is_equivalent_to(sharding(path), leaf.ndim), path
        np.testing.assert_array_equal(placed[path], leaf)
        assert read[path] == leaf.nbytes, path  # eight devices, and replicas among them


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_any_slice_is_that_of_the_whole(sources, kind):
    random = np.random.default_rng(0)

    def place(path: str, leaf: StoredLeaf):
        whole = leaf.read()
        for _ in range(3):
            starts = [int(random.integers(size)) for size in leaf.shape]
            stops = [
                int(random.integers(start, size)) + 1
                for start, size in zip(starts, leaf.shape, strict=True)
            ]
            index = tuple(map(slice, starts, stops))
            np.testing.assert_array_equal(leaf.read(index), whole[index])
        return path

    params = load(sources[kind], place=place).params
    assert flatten(params) == {path: path for path in flatten(params)}


def test_quantised_as_they_are_read(sources):
    finish = lora.quant.quantizer("nf4", targets="attention")
    loaded = load(sources["gguf"], place=lambda path, leaf: finish(path, leaf.read()))
    expected = lora.quantize(load(sources["gguf"]).params, "nf4", targets="attention")
    assert jax.tree.structure(loaded.params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A model whose rows, over four devices, still fill blocks of 32."""
    config = small_llamas.VARIANTS["llama3_1"] | {"hidden_size": 128, "intermediate_size": 128}
    weights = small_llamas.draw_weights(config)
    return small_checkpoints.write_huggingface(
        tmp_path_factory.mktemp("wide") / "folder", config, weights
    )


@pytest.mark.parametrize(
    ("format", "double_quant"), [("nf4", True), *((format, False) for format in cases.STORAGES)]
)
@pytest.mark.parametrize("spec", [("data", "model", None), ("data", None, "model"), (None,) * 3])
def test_quantised_in_parts_as_the_whole_would_be(wide, spec, format, double_quant):
    read = collections.Counter()
    how = {"targets": "mlp", **cases.format_options(format, 8, double_quant)}

    def lying(path, leaf):
        axes = spec if path.endswith("up_proj") else (None,) * len(leaf.shape)
        return parallel.leaf_sharding(MESH, path, leaf, PartitionSpec(*axes))

    def place(path: str, leaf: StoredLeaf):
        def count(amount):
            read[path] += amount

        counted = dataclasses.replace(leaf, on_read=count)
        finish = lora.quant.quantizer(format, **how)
        return parallel.quantized_in_parts(lying, finish, sharded(lying))(path, counted)

    placed = load(wide, place=place).params
    expected = lora.quantize(load(wide).params, format, **how)
    assert jax.tree.structure(placed) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, placed, expected)
    for path, leaf in flatten(expected, is_leaf=is_weight).items():
        assert read[path] == math.prod(leaf.shape) * 4, path  # each part once
    codes = placed["layers"]["mlp"]["up_proj"].codes
    assert codes.sharding.is_equivalent_to(NamedSharding(MESH, PartitionSpec(*spec)), 3)


def test_peak_of_host_memory(tmp_path):
    """One leaf, one tensor of it, and what is placed; never the model."""
    config = small_llamas.VARIANTS["llama2"] | {"intermediate_size": 640, "num_hidden_layers": 8}
    weights = small_llamas.draw_weights(config)
    half = {name: weight.astype(ml_dtypes.bfloat16) for name, weight in weights.items()}
    folder = small_checkpoints.write_huggingface(tmp_path / "small", config, half)
    del weights, half
    peaks, sizes, tensors = {}, {}, {}

    def place(path: str, leaf: StoredLeaf):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        kept = leaf.read().astype(ml_dtypes.bfloat16)[..., :1]  # a quantiser, so to say
        peaks[path] = tracemalloc.get_traced_memory()[1] - before
        sizes[path], tensors[path] = leaf.nbytes, leaf.nbytes // len(leaf.tensors)
        return kept

    tracemalloc.start()
    try:
        load_huggingface(folder, dtype=jnp.float32, place=place)
        whole = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest = max(sizes, key=sizes.get)
    for path, peak in peaks.items():
        # As float32 beside the quantiser's own bfloat16.
        assert peak <= 1.5 * sizes[path] + tensors[path] + 20_000, path
    assert whole <= 1.5 * sizes[largest] + tensors[largest] + 500_000 < sum(sizes.values()) / 1.5


def test_loading_prints_nothing_where_nobody_looks(sources, capfd):
    load_gguf(sources["gguf"])
    assert capfd.readouterr() == ("", "")


def test_progress_counts_every_byte(sources, monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    model = load_gguf(sources["gguf"])
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert f"{total / 1000:.1f}/{total / 1000:.1f} kB" in capfd.readouterr().err
