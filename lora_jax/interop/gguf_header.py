"""The header of a GGUF file, read with every length checked against the file.

The `gguf` package's own reader trusts the lengths that it reads, makes one array view a token (five
seconds for a vocabulary of 49k), and names no file when it fails.

Source: the GGUF specification, version 3 (version 2 has the same layout).
"""

import dataclasses
import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?"}
_SCALARS |= {10: "u8", 11: "i8", 12: "f8"}
_MIN_BYTES = 24  # magic, version, two counts
_MAX_AXES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One entry of the tensor table: `shape` is row-major (out, in), `offset` from the file's
    start."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """The metadata and the tensor table of one GGUF file."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def read_header(path: str | os.PathLike) -> Header:
    """Reads the metadata and the tensor table of the GGUF file at `path`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not GGUF, is truncated, or contradicts itself.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a GGUF model.")
    if path.stat().st_size < _MIN_BYTES:
        raise ValueError(
            f"{path} is not a GGUF file: it has {path.stat().st_size} bytes, fewer than a header."
        )
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path)
        num_tensors, num_entries = _preamble(cursor)
        metadata = _metadata(cursor, num_entries)
        return Header(metadata=metadata, tensors=_tensor_table(cursor, num_tensors, metadata))


class _Cursor:
    """A position in the file that cannot leave it."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def corrupt(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path} is truncated or corrupt: {what} (file of {self.size} bytes). "
            "Delete it and fetch or convert it again."
        )

    def take(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if self.at > self.size:
            raise self.corrupt(f"the header asks for {count} bytes at byte {start}, past the end")
        return self.data[start : self.at]

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        start = self.at
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise self.corrupt(f"the text at byte {start} is not UTF-8") from None


def _preamble(cursor: _Cursor) -> tuple[int, int]:
    magic = cursor.take(4)
    if magic != b"GGUF":
        raise ValueError(
            f"{cursor.path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'."
        )
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(
            f"{cursor.path} is GGUF version {version}; versions 2 and 3 (little-endian) are read. "
            "Convert it again with a current llama.cpp."
        )
    return cursor.number("Q"), cursor.number("Q")


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text()
        if key in metadata:
            raise cursor.corrupt(f"the metadata key {key!r} appears twice")
        metadata[key] = _value(cursor, key, cursor.number("I"))
    return metadata


def _value(cursor: _Cursor, key: str, kind: int) -> Any:
    if kind == _STRING:
        return cursor.text()
    if kind in _SCALARS:
        return _scalars(cursor, kind, 1)[0].item()
    if kind != _ARRAY:
        raise cursor.corrupt(f"the metadata key {key!r} has the unknown type {kind}")
    item, length = cursor.number("I"), cursor.number("Q")
    if item == _STRING:
        if length * 8 > cursor.size - cursor.at:
            raise cursor.corrupt(f"the metadata key {key!r} claims {length} strings")
        return [cursor.text() for _ in range(length)]
    if item in _SCALARS:
        return _scalars(cursor, item, length).tolist()
    raise cursor.corrupt(f"the metadata key {key!r} is an array of the unknown type {item}")


def _scalars(cursor: _Cursor, kind: int, count: int) -> np.ndarray:
    dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
    return np.frombuffer(cursor.take(dtype.itemsize * count), dtype)


def _tensor_table(
    cursor: _Cursor, count: int, metadata: Mapping[str, Any]
) -> dict[str, TensorInfo]:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.corrupt(f"general.alignment is {alignment!r}, expected a power of two")
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for _ in range(count):
        name = cursor.text()
        if name in tensors:
            raise cursor.corrupt(f"the tensor {name!r} appears twice")
        tensors[name] = info = _tensor_info(cursor, name)
        # Writers write tensors end to end; anything else is a flipped bit in a shape or an offset.
        if info.offset != end:
            raise cursor.corrupt(f"the tensor {name!r} is at {info.offset}, expected {end}")
        end = _round_up(info.offset + info.num_bytes, alignment)
    start = _round_up(cursor.at, alignment)
    tensors = {
        name: dataclasses.replace(info, offset=start + info.offset)
        for name, info in tensors.items()
    }
    for name, info in tensors.items():
        if info.offset + info.num_bytes > cursor.size:
            raise cursor.corrupt(
                f"the tensor {name!r} ends at byte {info.offset + info.num_bytes}, past the end"
            )
    return tensors


def _tensor_info(cursor: _Cursor, name: str) -> TensorInfo:
    num_axes = cursor.number("I")
    if not 1 <= num_axes <= _MAX_AXES:
        raise cursor.corrupt(f"the tensor {name!r} claims {num_axes} axes")
    shape = tuple(reversed([cursor.number("Q") for _ in range(num_axes)]))
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in GGML_QUANT_SIZES:
        raise cursor.corrupt(f"the tensor {name!r} has the unknown type {kind}")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if shape[-1] % block:
        raise cursor.corrupt(f"the tensor {name!r}, {shape}, does not fill blocks of {block}")
    return TensorInfo(
        shape=shape,
        kind=GGMLQuantizationType(kind),
        offset=offset,
        num_bytes=math.prod(shape) // block * block_bytes,
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
