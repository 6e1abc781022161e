"""`regard view`: a page to walk through recordings."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import RegardError

if TYPE_CHECKING:
    from ..report.view.opened import By, Opened

_MEASURE = "What --export shows of each edge.  [default: weight]"
_ADDRESS = "What --export shows, as the page's address says it behind the #."


@click.command()
@click.argument("recordings", metavar="RECORDING...", nargs=-1, required=True, type=Path)
@click.option("--port", metavar="PORT", default=0, type=click.IntRange(0, 65535),
              help="Serve at this port.  [default: a free one]")  # fmt: skip
@click.option("--no-browser", is_flag=True, help="Print the address; open nothing.")
@click.option("--export", "file", metavar="FILE", type=Path,
              help="Write one head as a page that needs no server, and end.")  # fmt: skip
@click.option("--head", metavar="L.H", help="The head of --export.  [default: 0.0]")
@click.option("--from", "word", metavar="WORD", help="The token that --export opens on.")
@click.option("--measure", type=click.Choice(["weight", "value", "effect"]), help=_MEASURE)
@click.option("--address", metavar="TEXT", help=_ADDRESS)
def view(
    recordings: tuple[Path, ...],
    port: int,
    no_browser: bool,
    file: Path | None,
    head: str | None,
    word: str | None,
    measure: By | None,
    address: str | None,
) -> None:
    """Walk through recordings: layers and heads, each head's map, the text.

    RECORDING is a folder that `regard look --save` or `recording.save` wrote; with
    two, the page compares them. The page is served on 127.0.0.1 to this machine
    alone, until Ctrl-C.
    """
    asked = {"--head": head, "--from": word, "--measure": measure, "--address": address}
    for option, given in asked.items():
        if given is not None and file is None:
            raise RegardError(f"{option} says what --export writes; give both")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from ..report.view.first_answers import first_answers
            from ..report.view.server import HOST, listen, serve
        except ImportError as error:
            raise RegardError(f'the page needs {error.name}: pip install "regard[view]"') from error

        def load() -> list[Opened]:
            from ..report.view.opened import Opened

            return [Opened.load(folder.expanduser()) for folder in recordings]

        # What is no recording is said before anything opens
        plain = all(any(folder.expanduser().glob("*.json")) for folder in recordings)
        early = load() if file is not None or not plain else None
    if early is not None and file is not None:
        _export(early, file, head, word, measure, address)
        click.echo(f"page: {file}")
        return
    sock = listen(port)
    served = f"http://{HOST}:{sock.getsockname()[1]}/"
    names = ", ".join(folder.name for folder in recordings)
    click.echo(f"regard view of {names}: {served}  (Ctrl-C ends it)")
    if not no_browser:
        import webbrowser

        webbrowser.open(served)  # the socket listens: the page is answered once serving begins
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        serve(load, sock, first_answers([folder.expanduser() for folder in recordings]))


def _export(
    opened: list[Opened], file: Path, head: str | None, word: str | None, measure: By | None,
    address: str | None,
) -> None:  # fmt: skip
    """Write the page."""
    from ..call.numbers import named_head
    from ..report.inline_page import check_html
    from ..report.view.export import write_export
    from ..report.view.in_view import address_of

    check_html(file, "--export")
    if address is not None:
        if (head, word, measure) != (None, None, None):
            raise RegardError("--address says all; leave out --head, --from and --measure")
        write_export(opened, file, address)
        return
    if len(opened) > 1:
        raise RegardError("--export of two recordings needs --address, as the page shows it")
    named = named_head("0.0" if head is None else head, "--head")
    if isinstance(named, int):
        raise RegardError(f"--head {head!r}: give layer and head, as 3.1")
    write_export(opened, file, address_of(opened[0], named, word, measure or "weight"))
