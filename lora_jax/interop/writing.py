"""Files and folders that appear only when complete, and never overwrite."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for a file or a folder that becomes `path` at the end.

    On an error, the file or folder of the temporary name is removed.

    Raises:
      ValueError: `path` exists, other than as an empty folder.
    """
    if path.is_symlink() or path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path} exists already and is never overwritten; choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        temporary.rename(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def cast(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`tensor` as `dtype`.

    Raises:
      ValueError: a value is, or becomes, NaN or infinite.
    """
    with np.errstate(over="ignore"):
        narrow = tensor.astype(dtype, copy=False)
    if not np.isfinite(narrow).all():
        raise ValueError(
            f"{name} holds values that {dtype.name} cannot: the largest is "
            f"{float(np.abs(tensor).max()):.4g}. Save it with a wider range, as bfloat16 or "
            "float32; where it is NaN or infinite already, training has diverged."
        )
    return narrow
