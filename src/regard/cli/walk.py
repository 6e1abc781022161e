"""`regard walk`: how one head's output for a word comes about, with the model's numbers."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import click

from ..call.numbers import named_head
from ..errors import RegardError
from .common import (
    MODEL,
    TOKENS,
    ascii_only,
    given_text,
    progress,
    replace_unprintable,
)

_JSON = """\b
--json prints one object:
  model, layer, head, module, kind
  chosen      without --head: {to, weight}, the link that chose the head
  token       {index, word, token, id, special}: what reads
  embedded    [{kind, row, vector}]: word, position, type
  entered     the vector that entered the first layer
  x, normed   the vector before this layer; after its norm, where one
              comes before the attention
  query       as the attention received it; scale, softcap: of q.k
  read        the K tokens with the largest weights: [{index, word,
              token, id, special, dot, scaled, capped, bias, score, exp,
              weight, key, value}]; exp is exp(score - shift)
  shift, exp_sum
  others      {count, exp, weight}: of the tokens not in read
  masked      the number of tokens hidden from this one
  sink        {logit, weight} of a learned sink
  weights     of every token read; weight_sum, with the sink's
  mixed       the sum of weight * value: the head's output
  heads       [{head, length, share}]: what each head adds through W_O,
              share along their sum
  written     what this head adds; bias: of W_O; attention: their sum
  residual    with the vector added that came in, where the model does
  handed_on   what the layer hands to the next
  checks      [{what, difference, largest, agrees}]: the largest
              difference from the model's own, and the largest number
"""

_HEAD = "Layer and head, as 3.1; or the head alone.  [default: that with WORD's strongest link]"
_LAYER = "The layer, where --head names none."
_TARGET = "What an encoder-decoder's decoder reads; WORD may be in it."
_GENERATE = "Let the model add N tokens first; WORD may be one of them."
_STEP = "Wait for a key at each step; q ends."
_HTML = "Write it as one page that needs no network."


@click.command(epilog=_JSON)
@click.argument("text")
@click.option("--from", "word", metavar="WORD", required=True, help="The word that reads.")
@click.option("--head", metavar="L.H", help=_HEAD)
@click.option(
    "--layer", metavar="L", type=click.IntRange(0), help="The layer, where --head has none."
)
@MODEL
@click.option("--top", metavar="K", default=3, type=click.IntRange(1),
              help="Words to name, the most read first.  [default: 3]")  # fmt: skip
@TOKENS
@click.option("--target", metavar="TEXT", help=_TARGET)
@click.option("--generate", metavar="N", default=0, type=click.IntRange(0), help=_GENERATE)
@click.option("--step", is_flag=True, help=_STEP)
@click.option("--html", metavar="FILE", type=Path, help=_HTML)
@click.option("--json", "as_object", is_flag=True, help="Print one JSON object, as below.")
def walk(
    text: str,
    word: str,
    head: str | None,
    layer: int | None,
    model: str | None,
    top: int,
    tokens: bool,
    target: str | None,
    generate: int,
    step: bool,
    html: Path | None,
    as_object: bool,
) -> None:
    """Walk through what WORD computes in one head, step by step, with the model's numbers.

    TEXT is the text itself, @FILE, or - for standard input. "it#2" is the second "it"; layers
    and heads count from 0, an encoder-decoder's decoder after its encoder. Of a word of several
    tokens the last walks. The end is compared with the model's own run; where it does not
    agree, the exit code is 1.
    """
    text = given_text(text)
    named = None if head is None else named_head(head, "--head")
    if isinstance(named, tuple) and layer not in (None, named[0]):
        raise RegardError(f"--head {head} is in layer {named[0]}, not in layer {layer}")
    if step and (as_object or html):
        raise RegardError("--step waits for keys; --json and --html write everything at once")
    if step and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise RegardError("--step waits for keys, so it needs a terminal")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with warnings.catch_warnings(), progress() as told:
        warnings.simplefilter("ignore")
        told("loading the model", None)
        if html is not None:
            from ..report.inline_page import check_html

            check_html(html)
        from ..analysis.text_model import load
        from ..analysis.walk import walk as compute

        reader = load(model, generate=generate > 0)
        reader.pieces = tokens
        told("walking", None)
        found = compute(
            reader, text, word, head=named, layer=layer, generate=generate, target=target
        )
    replace_unprintable()
    if html is not None:
        from ..report.walk_html import write_walk

        write_walk(found, html, top)
        click.echo(f"page: {html}", err=as_object)
    if as_object:
        from ..report.walk_steps import as_json

        click.echo(as_json(found, top, ascii_only()))
    elif html is None:
        from rich.console import Console

        from ..report.walk_terminal import print_walk

        print_walk(found, Console(), top, _wait if step else None)
    if not all(check.fine for check in found.checks):
        raise click.exceptions.Exit(1)


def _wait() -> None:
    """Wait for a key, with a word on it below that goes again; q or Escape ends."""
    said = "any key: the next step · q: the end"
    click.echo(said, nl=False, err=True)
    try:
        key = click.getchar()
    finally:
        click.echo("\r" + " " * len(said) + "\r", nl=False, err=True)
    if key in ("q", "Q", "\x1b", "\x04"):
        raise click.exceptions.Exit(0)
