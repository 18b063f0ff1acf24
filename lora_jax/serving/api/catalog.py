"""The adapters that a server knows by name, loaded and unloaded while it runs."""

import asyncio
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from lora_jax.serving.api.driver import Driver
from lora_jax.serving.api.errors import ApiError, invalid, model_not_found, not_recorded, shown
from lora_jax.serving.api.loaded_file import LoadedFile

CONFIG = "adapter_config.json"


class Store(Protocol):
    """Where adapters are kept for an engine."""

    def read(self, folder: Path) -> Any:
        """The adapter in a folder, ready for `put`. Called from any thread, several at once.

        Raises:
          OSError, ValueError: the folder cannot be served, with the reason.
        """

    def put(self, name: str, adapter: Any) -> None:
        """Adds an adapter. Called in the engine's thread. Raises ValueError with the reason."""

    def drop(self, name: str) -> None:
        """Removes one that no request uses. Called in the engine's thread."""


@dataclasses.dataclass(frozen=True)
class Known:
    """One adapter: where it was read, and when."""

    name: str
    folder: Path
    created: int


class Catalog:
    """The adapters' names. Used in the event loop's thread, but for `take_in`.

    What is loaded and unloaded while the engine runs is written to `loaded`, if there is one,
    before the client has its answer.
    """

    def __init__(self, base: str, store: Store, loaded: LoadedFile | None = None):
        self.base = base
        self.created = int(time.time())
        self._store, self._loaded = store, loaded
        self._known: dict[str, Known] = {}
        self._moving: set[str] = set()
        self._reading = asyncio.Lock()  # one folder at a time, beside prompts that are tokenized

    def __iter__(self) -> Iterator[Known]:
        return iter(list(self._known.values()))

    def __len__(self) -> int:
        return len(self._known)

    def get(self, name: str) -> Known | None:
        return self._known.get(name)

    def chosen(self, model: str) -> str | None:
        """The adapter that a request's `model` means; None for the base. Raises ApiError 404."""
        if model == self.base:
            return None
        if model not in self._known:
            raise model_not_found(model)
        return model

    def take_in(self, name: str, folder: Path) -> None:
        """Adds an adapter before the engine runs. Raises OSError or ValueError with the reason."""
        check_name(name, self.base)
        self._store.put(name, self._store.read(folder))
        self.add(name, folder)

    async def load(self, name: str, folder: Path, driver: Driver) -> None:
        """Adds an adapter while the engine runs. Raises ApiError with the field and the reason."""
        folder = Path(os.path.abspath(folder))  # links stay: what they lead to may change
        try:
            check_name(name, self.base)
        except ValueError as error:
            raise invalid("lora_name", str(error)) from None
        if name in self._known or name in self._moving:
            message = f"The adapter {shown(name)} is loaded, or about to be: unload it first."
            raise invalid("lora_name", message, "adapter_exists")
        if not os.path.isfile(folder / CONFIG):  # False too for what is no path at all
            message = f"{shown(str(folder))} holds no {CONFIG}: no adapter's folder on the server."
            raise ApiError(404, message, param="lora_path", code="adapter_not_found")
        self._moving.add(name)
        try:
            async with self._reading:
                adapter = await asyncio.to_thread(self._store.read, folder)
            await driver.run(lambda: self._store.put(name, adapter))
            await self._record_loaded(name, folder, driver)
            self.add(name, folder)
        except (OSError, ValueError) as error:
            raise invalid("lora_path", str(error), "adapter_not_served") from None
        finally:
            self._moving.discard(name)

    async def unload(self, name: str, driver: Driver) -> None:
        """Removes a name at once, and the adapter's arrays when its last request has ended."""
        if name not in self._known:
            message = f"The adapter {shown(name)} is not loaded."
            raise ApiError(404, message, param="lora_name", code="adapter_not_found")
        known = self._known.pop(name)
        self._moving.add(name)
        try:
            await self._record_unloaded(known)
            while not await driver.run(lambda: self._dropped(name, driver)):
                await asyncio.sleep(0.02)
        finally:
            self._moving.discard(name)

    async def _record_loaded(self, name: str, folder: Path, driver: Driver) -> None:
        if self._loaded is None:
            return
        try:
            await asyncio.to_thread(self._loaded.add, name, folder)
        except (OSError, ValueError) as error:
            await driver.run(lambda: self._store.drop(name))
            raise not_recorded(f"{shown(name)} was not loaded", error) from None

    async def _record_unloaded(self, known: Known) -> None:
        if self._loaded is None:
            return
        try:
            await asyncio.to_thread(self._loaded.remove, known.name)
        except (OSError, ValueError) as error:
            self._known[known.name] = known
            raise not_recorded(f"{shown(known.name)} is still loaded", error) from None

    def _dropped(self, name: str, driver: Driver) -> bool:
        if driver.in_use(name):
            return False
        self._store.drop(name)
        return True

    def add(self, name: str, folder: Path) -> None:
        self._known[name] = Known(name, folder, int(time.time()))


def check_name(name: str, base: str) -> None:
    """Raises ValueError where an adapter cannot have this name."""
    if name == base:
        raise ValueError(f"{shown(name)} is the base's own name: rename the adapter.")
    if len(name) > 200 or not name.isprintable():
        raise ValueError(f"{shown(name)} is no name: at most 200 printable characters.")


def folders(parent: Path) -> dict[str, Path]:
    """The folders in `parent` that hold an adapter's config, by name."""
    return {path.name: path for path in sorted(parent.iterdir()) if (path / CONFIG).is_file()}
