import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture
def real_compilation():
    """As users compile; and no cache, which cannot load programs of devices that are not there."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
