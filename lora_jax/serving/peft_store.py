"""Adapters in PEFT's folders, for a pool over one base."""

from pathlib import Path
from typing import Any, Protocol

from lora_jax.interop import peft
from lora_jax.interop.model import Pretrained


class Pool(Protocol):
    """Adapters by name on the host, put on the device as requests need them."""

    def put(self, name: str, delta: Any) -> None:
        """Raises ValueError for what no server computes, with the way out."""
        ...

    def drop(self, name: str) -> None: ...


class PeftStore:
    """A `catalog.Store`."""

    def __init__(self, model: Pretrained, pool: Pool):
        self._model, self._pool = model, pool
        self._names = peft.model_names(model.config)

    def read(self, folder: Path) -> Any:
        return peft.load_adapter(folder, self._model.params, self._names)

    def put(self, name: str, adapter: Any) -> None:
        self._pool.put(name, adapter)

    def drop(self, name: str) -> None:
        self._pool.drop(name)
