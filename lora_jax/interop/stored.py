"""The digest and the formats of an export, read from its files without loading its weights."""

import math
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lora_jax.interop.digest import KEY, Digest
from lora_jax.interop.gguf_header import read_header

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "4 bits",
}  # fmt: skip


def read_digest(source: str | Path) -> Digest | None:
    """The digest of an adapter's folder, of a merged model's, or of a GGUF file; None if none.

    Raises:
      ValueError: it is damaged, or a file is.
    """
    source = Path(source)
    if source.suffix == ".gguf" and source.is_file():
        texts = [read_header(source).metadata.get(KEY)]
    else:
        texts = [(file.metadata() or {}).get(KEY) for file in _files(source)]
    found = next((text for text in texts if text is not None), None)
    return None if found is None else Digest.from_json(found, f"the digest of {source}")


def stored_formats(source: str | Path) -> str:
    """The dtypes and formats of a model's matrices in its files, as `formats_of` names a tree's."""
    source, names = Path(source), set()
    if source.suffix == ".gguf" and source.is_file():
        tensors = read_header(source).tensors.values()
        kinds = {tensor.kind.name for tensor in tensors if len(tensor.shape) > 1}
        return "+".join(sorted(_DTYPES.get(kind, kind) for kind in kinds))
    for file in _files(source):
        for name in file.keys():  # noqa: SIM118 - not a dict
            piece = file.get_slice(name)
            if len(piece.get_shape()) > 1 and math.prod(piece.get_shape()) > 1:
                names.add(_DTYPES.get(piece.get_dtype(), piece.get_dtype()))
    return "+".join(sorted(names)) or "none"


def _files(folder: Path) -> Iterator[safe_open]:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                yield file
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or corrupt ({error}); fetch it again.") from None
