"""The adapters that were loaded at run time, in a file: a restart serves them too."""

import contextlib
import json
import os
import threading
from pathlib import Path

NAME = "loaded_adapters.json"


class LoadedFile:
    """`{name: folder}` in DIR/loaded_adapters.json, beside the folders of adapters.

    A change is on the disk when `add` or `remove` returns, and a crash leaves the former file or
    the new one. One server at a time writes it.
    """

    def __init__(self, parent: Path):
        self.path = parent / NAME
        self._changing = threading.Lock()

    def read(self) -> dict[str, Path]:
        """The adapters in the order in which they were loaded; none where there is no file.

        Raises:
          ValueError: for a file that is not such an object.
          OSError: for one that cannot be read.
        """
        try:
            found = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:  # not UTF-8, or not JSON
            raise ValueError(self._broken(str(error))) from None
        if not isinstance(found, dict) or not all(_is_folder(value) for value in found.values()):
            raise ValueError(self._broken("it is no object of absolute paths by name"))
        return {name: Path(folder) for name, folder in found.items()}

    def add(self, name: str, folder: Path) -> None:
        with self._changing:
            self._write({**self.read(), name: folder})

    def remove(self, name: str) -> None:
        """Nothing happens where the file has no such name."""
        with self._changing:
            loaded = self.read()
            if loaded.pop(name, None) is not None:
                self._write(loaded)

    def _write(self, loaded: dict[str, Path]) -> None:
        text = json.dumps({name: str(folder) for name, folder in loaded.items()}, indent=2)
        new = self.path.with_name(f".{NAME}.new")
        with new.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)
        _sync_folder(self.path.parent)

    def _broken(self, why: str) -> str:
        return (
            f"{self.path} lists the adapters that a server loaded while it ran, and cannot be "
            f"read: {why}. Mend it, or remove it and load them again."
        )


def _is_folder(value: object) -> bool:
    return isinstance(value, str) and os.path.isabs(value) and "\0" not in value


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
