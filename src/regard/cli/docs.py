"""`regard docs`: the documentation, from this installation."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import click

from ..errors import RegardError


@click.command()
@click.option("--no-browser", is_flag=True, help="Print where it lies; open nothing.")
def docs(no_browser: bool) -> None:
    """Open the documentation in the browser, without a network.

    The wheels hold it; in a clone it stands once `zensical build` has built it.
    """
    page = built()
    if page is None:
        raise RegardError(
            'this installation holds no documentation; in a clone: pip install ".[docs]" '
            "and zensical build"
        )
    click.echo(page)
    if not no_browser:
        import webbrowser

        webbrowser.open(page.as_uri())


def built() -> Path | None:
    """The first page of the site: in the package, or in the clone that the package lies in."""
    package = Path(str(files("regard")))
    here = Path(__file__).resolve()
    places = [package / "site", here.parents[1] / "site"]
    if (here.parents[3] / "mkdocs.yml").is_file():
        places.append(here.parents[3] / "site")
    return next((p / "index.html" for p in places if (p / "index.html").is_file()), None)
