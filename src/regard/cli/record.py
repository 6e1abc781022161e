"""`regard record`: a model's attention on a text, as a folder to read any part of later."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..analysis.generated import check_beams
from ..errors import RegardError
from .common import BEAMS, given_text, progress
from .ranks import over_ranks

if TYPE_CHECKING:
    from ..analysis.probe import Probe
    from ..analysis.text_model import TextModel

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "model": None}
_GENERATE = "Let the model add N tokens first; record what they read, too."
_DTYPE = "Of queries and keys as they are kept; model: its own.  [default: bf16]"
_VALUES = "Keep values too, for weights by the length of what they add."
_EFFECT = "Measure what cutting each edge would change: of the next token, or of --from."
_FROM = "With --effect: of WORD's final vector."
_BARE = "Leave out what is read beside: top, received, entropy, distances, maps."


@click.command()
@click.argument("arguments", metavar="MODEL [TEXT] FOLDER", nargs=-1, required=True)
@click.option("--file", metavar="FILE", type=Path, help="Read the text from a file.")
@click.option("--layer", "layers", metavar="L", type=int, multiple=True, help="Only layer L.")
@click.option("--generate", metavar="N", default=0, type=click.IntRange(0), help=_GENERATE)
@BEAMS
@click.option("--dtype", default="bf16", type=click.Choice(list(_DTYPES)), help=_DTYPE)
@click.option("--top", metavar="K", default=8, type=click.IntRange(1),
              help="Largest weights of each row to list.  [default: 8]")  # fmt: skip
@click.option("--values", is_flag=True, help=_VALUES)
@click.option("--effect", is_flag=True, help=_EFFECT)
@click.option("--from", "word", metavar="WORD", help=_FROM)
@click.option("--bare", is_flag=True, help=_BARE)
@click.option("--overwrite", is_flag=True, help="Replace an older recording.")
@over_ranks
def record(
    arguments: tuple[str, ...],
    file: Path | None,
    layers: tuple[int, ...],
    generate: int,
    beams: int,
    dtype: str,
    top: int,
    values: bool,
    effect: bool,
    word: str | None,
    bare: bool,
    overwrite: bool,
) -> None:
    """Record MODEL's attention on TEXT into FOLDER, layer by layer while the model runs.

    MODEL is a folder, or a name on the Hugging Face hub; TEXT is the text itself, @FILE, or - for
    standard input. Queries, keys and the log-sum-exp are kept, from which any weight is exact; in
    Python, regard.Recording.load(FOLDER) opens it. A run that is stopped leaves the layers that
    were whole.
    """
    if len(arguments) != (3 if file is None else 2):
        raise RegardError("give MODEL, TEXT and FOLDER, or MODEL and FOLDER with --file FILE")
    model, folder = arguments[0], Path(arguments[-1])
    if word is not None and not effect:
        raise RegardError("--from says what --effect is measured on; give both")
    if effect and generate:
        raise RegardError("--effect reads TEXT as it is; leave --generate out")
    check_beams(beams, generate)
    text = given_text(arguments[1] if file is None else f"@{file}")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with warnings.catch_warnings(), progress() as told:
        warnings.simplefilter("ignore")
        told("loading the model", None)
        import torch

        from ..analysis.text_model import load

        kept = _DTYPES[dtype]
        reader = load(model, generate=generate > 0, head=effect and word is None)
        target = _target(reader, text, word) if effect else None
        told("recording", None)
        try:
            made = reader.stream(
                text, folder, generate=generate, beams=beams, overwrite=overwrite, values=values,
                top=top, observe=not bare, layers=list(layers) or None,
                dtype=None if kept is None else getattr(torch, kept),
            )  # fmt: skip
            if target is not None:
                from ..analysis.effect import record_effects

                record_effects(
                    *target, made, folder, lambda share: told("measuring effects", share)
                )
        except OSError as error:
            raise RegardError(f"cannot write to {folder}: {error.strerror or error}") from error
    size = sum(path.stat().st_size for path in folder.iterdir())
    told_of = f"{len(made.layers)} layers, {len(made.about['tokens']):,} tokens"
    click.echo(f"recorded: {folder}, {told_of}, {size / 1e6:.1f} MB")


def _target(reader: TextModel, text: str, word: str | None) -> tuple[Probe, int | None]:
    """What effects are measured on, before anything is written. RegardError where it is nothing."""
    from ..analysis import over_ranks
    from ..analysis.probe import Probe
    from ..analysis.words import find

    over_ranks.alone("--effect")
    probe = Probe(reader, text)
    if word is None and not probe.writes:
        raise RegardError(f"{reader.name} names no next token; say whose final vector: --from WORD")
    return probe, None if word is None else find(probe.words, word).number
