"""Strict promotion, eight host devices and quick compilation for every test below."""

import gc
import os
from pathlib import Path

import jax

# Read when XLA starts: `cases` does. Two workers leave no core to compile parts of a module on.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_parallel_codegen_split_count=1"]
)
if jax.__version_info__ < (0, 11):  # later ones lack the flag, and compile faster
    # Emitting fusions by way of MLIR is most of a compilation.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import cases
import chex
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # also while tests are collected

# Compiling is most of the time: xdist's workers share what they compile, and later runs find it.
jax.config.update(
    "jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# Where in our source an operation was written concerns a reader of HLO; finding out takes time.
jax.config.update("jax_traceback_in_locations_limit", 0)


LONGEST = {"test_adapt_generated", "test_readme", "test_rank_sweep", "test_several_processes"}


def pytest_collection_finish():
    """What was imported stays: the collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_configure(config):
    config.addinivalue_line("markers", "mixed_dtypes: runs code of jax or optax that promotes")
    config.addinivalue_line("markers", "optimized: compiles with all of XLA's optimisations")
    config.addinivalue_line("markers", "sampled: one case in four by default, the others are slow")


@pytest.fixture(autouse=True)
def strict_dtypes(request):
    """No implicit promotion of dtypes, but in optax's Adam and jax's bf16 attention."""
    trains = {"training", "experiments"} & set(request.path.parts)
    if trains or request.node.get_closest_marker("mixed_dtypes"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """Small models compile for longer than they run; a model of real size is worth optimizing."""
    optimized = "smollm2" in request.fixturenames or request.node.get_closest_marker("optimized")
    jax.config.update("jax_disable_most_optimizations", not optimized)


@pytest.fixture(autouse=True)
def counted_traces():
    """`chex.assert_max_traces` counts within a test."""
    chex.clear_trace_counter()


@pytest.fixture(autouse=True)
def verified_exports(request, monkeypatch):
    """Every adapter that a test exports is verified, where its base and its model are at hand."""
    if not {"interop", "parity"} & set(request.path.parts) or request.path.stem.endswith("verify"):
        return  # which plants what verify finds
    from lora_jax.interop import peft, verify
    from lora_jax.interop.digest import can_run
    from lora_jax.interop.peft.names import ModelNames

    save = peft.save_adapter

    def save_and_verify(folder, delta, params, names, **kwargs):
        save(folder, delta, params, names, **kwargs)
        if can_run(params) and isinstance(names, ModelNames):
            report = verify(folder, params, names, forms=())
            assert report.ok and report.digest == "agrees", report
            assert report.matched == report.tensors, report

    monkeypatch.setattr(peft, "save_adapter", save_and_verify)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A test that takes both a case and a method runs over `cases.PAIRS`; what remains of a
    `sampled` one is cut to a sample.

    The tests of a file run in one worker: apart, both would compile what they share, at one time.
    Of the longest files each test may run where there is room, and before all others.
    """

    def wanted(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        pair = params.get("case"), params.get("method", params.get("mergeable"))
        return None in pair or pair in cases.PAIRS

    items[:] = [item for item in items if wanted(item)]
    sampled: dict = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            sampled.setdefault((item.path, item.originalname), []).append(item)
    for group in sampled.values():
        for item in outside_of_the_sample(group):
            item.add_marker(pytest.mark.slow)
    for item in items:
        if item.path.stem not in LONGEST and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def outside_of_the_sample(group):
    """All but one in four and at least two, evenly spread: the cases of one test share its path
    through the code."""
    count = max(2, -(-len(group) // 4))
    kept = {round(i * (len(group) - 1) / (count - 1)) for i in range(count)}
    return [item for place, item in enumerate(group) if place not in kept]


@pytest.fixture(params=cases.METHODS)
def method(request):
    return cases.METHODS[request.param]


@pytest.fixture(params=cases.MERGEABLE)
def mergeable(request):
    return cases.METHODS[request.param]


@pytest.fixture(params=cases.TREES)
def case(request):
    return cases.TREES[request.param]()
