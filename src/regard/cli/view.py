"""`regard view`: a page to walk through recordings."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import click

from ..errors import RegardError


@click.command()
@click.argument("recordings", metavar="RECORDING...", nargs=-1, required=True, type=Path)
@click.option("--port", metavar="PORT", default=0, type=click.IntRange(0, 65535),
              help="Serve at this port.  [default: a free one]")  # fmt: skip
@click.option("--no-browser", is_flag=True, help="Print the address; open nothing.")
def view(recordings: tuple[Path, ...], port: int, no_browser: bool) -> None:
    """Walk through recordings: layers and heads, each head's map, the text.

    RECORDING is a folder that `regard look --save` or `recording.save` wrote; with
    two, the page compares them. The page is served on 127.0.0.1 to this machine
    alone, until Ctrl-C.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from ..report.view.server import HOST, listen, serve
        except ImportError as error:
            raise RegardError(f'the page needs {error.name}: pip install "regard[view]"') from error
        from ..report.view.opened import Opened

    opened = [Opened.load(folder.expanduser()) for folder in recordings]
    sock = listen(port)
    address = f"http://{HOST}:{sock.getsockname()[1]}/"
    names = ", ".join(one.folder.name for one in opened)
    click.echo(f"regard view of {names}: {address}  (Ctrl-C ends it)")
    if not no_browser:
        import webbrowser

        webbrowser.open(address)  # the socket listens: the page is answered once serving begins
    serve(opened, sock)
