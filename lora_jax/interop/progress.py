"""Bars that count bytes on a terminal."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def byte_progress(*, only_on_terminal: bool = False) -> Progress:
    """A bar on stderr. Where that is not a terminal it prints its last line, or nothing."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=only_on_terminal,
        disable=only_on_terminal and not console.is_terminal,
    )
