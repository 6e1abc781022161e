"""`regard generate`: a language model of `regard train lm` goes on with a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .common import given_text, progress, replace_unprintable

_JSON = """\b
--json, one object:
  model    the folder
  text     as given
  written  what the model wrote behind it
  count, temperature, top_k, seed  as given
"""


@click.command(epilog=_JSON)
@click.argument("folder", type=Path)
@click.argument("text", metavar="TEXT|@FILE|-")
@click.option(
    "--count",
    metavar="N",
    type=click.IntRange(1),
    default=100,
    help="How many tokens to write.  [default: 100]",
)
@click.option(
    "--temperature",
    metavar="T",
    type=click.FloatRange(0),
    default=0.8,
    help="0 writes the likeliest; higher is bolder.  [default: 0.8]",
)
@click.option("--top-k", metavar="K", type=click.IntRange(1), help="Draw from the K likeliest.")
@click.option("--seed", type=int, default=0, help="Of what is drawn.  [default: 0]")
@click.option("--json", "as_object", is_flag=True, help="Print one JSON object, as below.")
def generate(folder: Path, text: str, as_object: bool, **how: Any) -> None:
    """Go on with TEXT, by the language model that `regard train lm` left in FOLDER."""
    text = given_text(text)
    replace_unprintable()
    with progress() as told:
        told("loading the model", None)
        from ..lab.training import continue_text, load_writer

        model, tokenizer = load_writer(folder)
        written = continue_text(model, tokenizer, text, told=told, **how)
    if as_object:
        click.echo(json.dumps({"model": str(folder), "text": text, "written": written} | how))
    else:
        click.echo(text + written)
