"""`regard translate`: sentences through a translator of `regard train translate`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .common import given_text, progress, replace_unprintable

_JSON = """\b
--json, one object:
  model         the folder
  beams         as given
  translations  [{source, target}], a line of the text each
"""


@click.command(epilog=_JSON)
@click.argument("folder", type=Path)
@click.argument("text", metavar="TEXT|@FILE|-")
@click.option(
    "--beams",
    metavar="N",
    type=click.IntRange(1),
    default=5,
    help="Translations kept at each step; 1 is greedy.  [default: 5]",
)
@click.option("--json", "as_object", is_flag=True, help="Print one JSON object, as below.")
def translate(folder: Path, text: str, beams: int, as_object: bool) -> None:
    """Translate each line of TEXT, by the model that `regard train translate` left in FOLDER."""
    lines = given_text(text).splitlines()
    replace_unprintable()
    with progress() as told:
        told("loading the model", None)
        from ..lab.training import load_translator, translate_texts

        model, tokenizer = load_translator(folder)
        found = translate_texts(model, tokenizer, lines, beams=beams, told=told)
    if as_object:
        pairs = [{"source": a, "target": b} for a, b in zip(lines, found, strict=True)]
        said = {"model": str(folder), "beams": beams, "translations": pairs}
        click.echo(json.dumps(said))
        return
    for line in found:
        click.echo(line)
