"""Strict promotion and eight host devices for every test below."""

import cases
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    config.addinivalue_line("markers", "mixed_dtypes: runs code of jax or optax that promotes")
    config.addinivalue_line("markers", "optimized: reads the program that XLA makes")


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
    """Small models compile for longer than they run; a test that reads what XLA made of them, or
    runs a model of real size, wants the optimized program."""
    wants_optimized = {"interop", "experiments"} & set(request.path.parts)
    if wants_optimized or request.node.get_closest_marker("optimized"):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(params=cases.METHODS)
def method(request):
    return cases.METHODS[request.param]


@pytest.fixture(params=cases.TREES)
def case(request):
    return cases.TREES[request.param]()
