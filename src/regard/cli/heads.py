"""`regard heads`: what every head of a model does."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import click

from ..errors import RegardError
from .common import ascii_only, given_text, progress, replace_unprintable

_JSON = """\b
--json prints one object:
  model        the model's name
  text         what was read
  tokens       how many
  sentences    of the CoNLL-U file that had dependencies
  definitions  {score: what it says}
  heads        [{layer, head, name, kind, behaviour, scores, relation}]: scores
               by name, null where no token reads what it asks about; behaviour
               is the share that takes half of the head's mass or more, or null;
               relation, with --conllu: {name, to, share, baseline, offset,
               pairs, chosen}, or null where no relation has enough pairs;
               it and the offset are chosen on half of the sentences, where
               the share is chosen; share, baseline, pairs are of the others
"""


@click.command(epilog=_JSON)
@click.argument("source", metavar="[MODEL|RECORDING]", required=False)
@click.option("--text", metavar="TEXT", help="What the model reads: itself, @FILE, or -.")
@click.option("--conllu", metavar="FILE", type=Path,
              help="Find the dependency relation that each head follows best.")  # fmt: skip
@click.option("--sentences", metavar="N", default=200, type=click.IntRange(1),
              help="Of FILE, so many.  [default: 200]")  # fmt: skip
@click.option("--json", "as_object", is_flag=True, help="Print one JSON object, as below.")
@click.option("--html", metavar="FILE", type=Path, help="Write the scores as one page.")
def heads(
    source: str | None,
    text: str | None,
    conllu: Path | None,
    sentences: int,
    as_object: bool,
    html: Path | None,
) -> None:
    """Show what every head does: which neighbours, copies and sinks it reads, and how widely.

    MODEL is a folder, or a name on the Hugging Face hub, by default all-MiniLM-L6-v2;
    RECORDING is a folder that `regard record` or `regard look --save` wrote. Without
    --text, a model reads a text of this package's.
    """
    said = None if text is None else given_text(text)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with warnings.catch_warnings(), progress() as told:
        warnings.simplefilter("ignore")
        told("loading", None)
        from ..analysis import heads as scoring
        from ..report.heads_html import write_heads
        from ..report.inline_page import check_html

        if html is not None:
            check_html(html)
        try:
            found = scoring.heads(source, said, conllu=conllu, sentences=sentences, progress=told)
        except OSError as error:
            raise RegardError(f"cannot read {source}: {error.strerror or error}") from error
        if html is not None:
            write_heads(found, html)
    replace_unprintable()
    if as_object:
        from ..report.heads_json import heads_json

        click.echo(heads_json(found, ascii_only()))
    elif html is None:
        from rich.console import Console

        from ..report.heads_terminal import print_heads

        print_heads(found, Console())
    if html is not None:
        click.echo(f"page: {html}", err=as_object)
