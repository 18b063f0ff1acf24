import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from absl import flags

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


@pytest.fixture(scope="module")
def script(request) -> Iterator[ModuleType]:
    """The module of `scripts/` that a test module names as `SCRIPT`; its flags go with it."""
    path = Path(__file__).parents[2] / "scripts" / request.module.SCRIPT
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module, before = importlib.util.module_from_spec(spec), set(flags.FLAGS)
    spec.loader.exec_module(module)
    yield module
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


@pytest.fixture(autouse=True)
def float32_kernels_of_bitsandbytes(monkeypatch):
    """On a CPU with AVX512-BF16 its 4-bit layers compute in bfloat16 instead."""
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes.nn.modules

        monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
