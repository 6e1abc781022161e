"""`regard docs`: the documentation, from this installation."""

from __future__ import annotations

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click

from ..errors import RegardError


@click.command()
@click.option("--port", metavar="PORT", default=0, type=click.IntRange(0, 65535),
              help="Serve at this port.  [default: a free one]")  # fmt: skip
@click.option("--no-browser", is_flag=True, help="Print the address; open nothing.")
def docs(port: int, no_browser: bool) -> None:
    """Open the documentation in the browser, without a network.

    Released wheels hold it; in a clone it stands once `zensical build` has run. It is served on
    127.0.0.1 to this machine alone, until Ctrl-C: its search does not work from a file.
    """
    page = built()
    if page is None:
        raise RegardError(
            'this installation holds no documentation; in a clone: pip install ".[docs]" '
            "and zensical build"
        )
    with served(page.parent, port) as server:
        address = f"http://127.0.0.1:{server.server_port}/"
        click.echo(f"regard docs: {address}  (Ctrl-C ends it)")
        if not no_browser:
            import webbrowser

            webbrowser.open(address)  # the socket listens: it is answered once serving begins
        server.serve_forever()


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


def served(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of a folder's files, on loopback; RegardError where the port is not free."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Silent, directory=str(folder)))
    except OSError as error:
        raise RegardError(f"port {port} is not free: {error.strerror or error}") from error


def built() -> Path | None:
    """The first page of the site: in the package, or in the clone that the package lies in."""
    here = Path(__file__).resolve()
    places = [here.parents[1] / "site"]
    if (here.parents[3] / "mkdocs.yml").is_file():
        places.append(here.parents[3] / "site")
    return next((p / "index.html" for p in places if (p / "index.html").is_file()), None)
