"""METEOR 1.5, by the program of its authors.

The score needs its tables of synonyms and paraphrases and an alignment by beam search, and is
defined by that program, in Java; METEOR as other libraries have it is another number. So it runs
where `java` and the caption scorer's `meteor-1.5.jar` are, which the wheel `pycocoevalcap` holds
(the same file as the E2E scorer's, beside its 60 MB of paraphrases), and nowhere else.

Source: Denkowski and Lavie 2014.
"""

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

Text = Sequence[str]  # its words

_INSTALL = "pip install --no-deps pycocoevalcap"


def jar() -> Path | None:
    """`meteor-1.5.jar` of the installed `pycocoevalcap`, its paraphrases beside it."""
    spec = importlib.util.find_spec("pycocoevalcap")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "meteor" / "meteor-1.5.jar"
        if path.exists() and (path.parent / "data" / "paraphrase-en.gz").exists():
            return path
    return None


def missing() -> str | None:
    """Why METEOR cannot be had here, or None if it can."""
    if shutil.which("java") is None:
        return f"it is a Java program, and there is no `java` here; it also needs {_INSTALL}."
    if jar() is None:
        return f"its program meteor-1.5.jar is not installed: {_INSTALL} (104 MB)."
    return None


def meteor(outputs: Sequence[Text], references: Sequence[Sequence[Text]]) -> float:
    """METEOR of the corpus of tokenised texts: from statistics summed over items, from 0 to 1.

    Raises:
      RuntimeError: the program ends without a score.
    """
    path = jar()
    assert path is not None, missing()
    # The scorer's own options; which encoding Java takes for its pipes depends on the machine.
    command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", path.name]
    command += ["-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as errors:
        try:
            return _run(command, path.parent, errors, outputs, references)
        except (OSError, ValueError) as error:  # a broken pipe, or no number
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
            raise RuntimeError(f"{path.name} gave no score: {said or error}") from error


def _run(
    command: Sequence[str],
    folder: Path,
    errors: IO[bytes],
    outputs: Sequence[Text],
    references: Sequence[Sequence[Text]],
) -> float:
    with subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        encoding="utf-8",
    ) as process:
        assert process.stdin and process.stdout
        try:
            return _talk(process.stdin, process.stdout, outputs, references)
        except BaseException:
            process.kill()
            raise


def _talk(
    asked: IO[str],
    answered: IO[str],
    outputs: Sequence[Text],
    references: Sequence[Sequence[Text]],
) -> float:
    statistics = []
    for output, texts in zip(outputs, references, strict=True):
        hypothesis = " ".join(output).replace("|||", "").replace("  ", " ")
        known = [" ".join(text) for text in texts]
        _ask(asked, " ||| ".join(["SCORE", *known, hypothesis]))
        statistics.append(answered.readline().strip())
    _ask(asked, " ||| ".join(["EVAL", *statistics]))
    scores = [float(answered.readline()) for _ in range(len(statistics) + 1)]
    return scores[-1]  # of the corpus; the others are the items'


def _ask(pipe: IO[str], line: str) -> None:
    pipe.write(line + "\n")
    pipe.flush()
