"""Strict promotion and eight host devices for every test below."""

import cases
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    config.addinivalue_line("markers", "optax: runs an optimizer, whose own code mixes dtypes")


@pytest.fixture(autouse=True)
def strict_dtypes(request):
    """No implicit promotion of dtypes, but where optax's Adam divides floats by integers."""
    trains = {"training", "experiments"} & set(request.path.parts)
    if trains or request.node.get_closest_marker("optax"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(params=cases.METHODS)
def method(request):
    return cases.METHODS[request.param]


@pytest.fixture(params=cases.TREES)
def case(request):
    return cases.TREES[request.param]()
