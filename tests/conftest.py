"""Strict promotion and eight host devices for every test below."""

import jax
import pytest

import cases

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(params=cases.METHODS)
def method(request):
    return cases.METHODS[request.param]


@pytest.fixture(params=cases.TREES)
def case(request):
    return cases.TREES[request.param]()
