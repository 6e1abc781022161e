"""What the commands that read a text share: the text, progress, the output."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

import click

from ..errors import RegardError

MODEL = click.option(
    "--model",
    metavar="NAME|PATH",
    help="A folder, or a name on the Hugging Face hub.  [default: all-MiniLM-L6-v2]",
)
BEAMS = click.option(
    "--beams", metavar="B", default=1, type=click.IntRange(1),
    help="With --generate: by a search with B beams; the best is read.  [default: 1]",
)  # fmt: skip
TOKENS = click.option("--tokens", is_flag=True, help="Show the model's tokens instead of words.")


def given_text(given: str) -> str:
    """The text that the argument names, checked to be one."""
    if given == "-":
        data, name = sys.stdin.buffer.read(), "standard input"
    elif given.startswith("@"):
        name = given[1:]
        try:
            data = Path(name).expanduser().read_bytes()
        except OSError as error:
            raise RegardError(f"cannot read the file {name!r}: {error.strerror}") from error
    else:
        if os.path.isfile(given):
            click.echo(
                f"{given!r} is read as a text; @{given} reads the file of that name", err=True
            )
        data, name = given.encode("utf-8", "surrogatepass"), "the argument"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RegardError(f"{name} is not text: byte {error.start} is not UTF-8") from error
    if "\0" in text:
        raise RegardError(f"{name} is not text: it has a zero byte")
    if not text.strip():
        said = "the text" if name == "the argument" else name
        raise RegardError(f"{said} is empty; there is nothing to look at")
    return text if name == "the argument" else text.removesuffix("\n")


def replace_unprintable() -> None:
    """What the terminal's encoding cannot show is no failure."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def ascii_only() -> bool:
    """Whether the output shows no more than ASCII."""
    return "utf" not in (sys.stdout.encoding or "").lower()


@contextmanager
def progress() -> Iterator[Callable[[str, float | None], None]]:
    """A bar on stderr while this is open, where stderr is a terminal: told what, how far."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError as error:
        raise RegardError('printing needs rich: pip install "regard[look]"') from error
    console = Console(stderr=True)
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        yield lambda what, share: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(32), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)

        def show(what: str, share: float | None) -> None:
            total = None if share is None else 1.0
            bars.update(task, description=what, total=total, completed=share or 0.0)

        yield show
