"""`regard scan`: what every head of a model does in the texts of a corpus."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import click

from ..errors import RegardError
from .common import ascii_only, progress, replace_unprintable

_JSON = """\b
--json and DIR/scan.json, one object:
  model, corpus  their names
  texts          read; skipped: too long for the model; sentences: that had
                 dependencies, of a CoNLL-U file
  definitions    {score: what it says}
  ranked         {score: heads as "layer.head", the largest mean first}
  heads          [{layer, head, name, kind, behaviour, scores, relation,
                 intervals, texts, examples}]: scores are means over texts,
                 intervals [low, high] of 95 % by a bootstrap over texts, texts
                 how many had the score; examples are [{weight, text, word,
                 read, where, token, reads}]: text and token are numbers, reads
                 is [number, token, weight] of what the token reads most
"""


@click.command(epilog=_JSON)
@click.argument("model")
@click.argument("corpus", type=Path)
@click.option("--out", metavar="DIR", type=Path, help="Keep state and result here; goes on there.")
@click.option("--texts", metavar="N", type=click.IntRange(1), help="Read at most N texts.")
@click.option("--json-heads", "heads", metavar="DIR", type=Path,
              help="Write a file for each head, L3H1.json, and heads.json into DIR.")  # fmt: skip
@click.option("--json", "as_object", is_flag=True, help="Print one JSON object, as below.")
def scan(
    model: str,
    corpus: Path,
    out: Path | None,
    texts: int | None,
    heads: Path | None,
    as_object: bool,
) -> None:
    """Score every head of MODEL over the texts of CORPUS, with intervals and examples.

    CORPUS is a .jsonl with "text" on each line, a .conllu, or a text file: paragraphs
    where blank lines stand between them, else one text a line. With --out, a run that
    is stopped or killed goes on where it was when the same command is given again.
    """
    if heads is not None and heads.exists() and not heads.is_dir():
        raise RegardError(f"{heads} is a file; --json-heads names a folder")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with warnings.catch_warnings(), progress() as told:
        warnings.simplefilter("ignore")
        told("loading", None)
        from ..analysis import scan as scanning
        from ..report.inline_page import write_page
        from ..report.scan_json import scan_json

        try:
            found = scanning.scan(model, corpus, out, texts=texts, progress=told)
        except OSError as error:
            raise RegardError(f"cannot write to {out}: {error.strerror or error}") from error
        if out is not None:
            write_page(out / "scan.json", scan_json(found))
        if heads is not None:
            from ..report.scan_heads import write_heads

            write_heads(found, heads)
    replace_unprintable()
    if as_object:
        click.echo(scan_json(found, ascii_only()))
        return
    from rich.console import Console

    from ..report.scan_terminal import print_scan

    print_scan(found, Console())
