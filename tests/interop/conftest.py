import pytest

from lora_jax.interop import Pretrained, load_gguf
from lora_jax.interop.fetch import fetch, model_cache


@pytest.fixture(scope="session")
def smollm2() -> Pretrained:
    """The pinned default model, fetched at the first run."""
    try:
        path = fetch(model_cache())
    except ValueError as error:
        pytest.skip(f"the default model cannot be fetched: {error}")
    return load_gguf(path)
