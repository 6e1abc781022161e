"""`regard look`: where a model's heads read."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..call.numbers import named_head
from ..errors import RegardError
from .common import (
    BEAMS,
    MODEL,
    TOKENS,
    ascii_only,
    given_text,
    progress,
    replace_unprintable,
)
from .ranks import over_ranks

if TYPE_CHECKING:
    from ..capture.recording import Recording

_JSON = """\b
--json prints one object:
  model       the model's name
  words       the words read; special tokens are among them
  links       [{layer, head, from, to, from_index, to_index, weight}]:
              with --from the K strongest of each head, from each such word;
              without, the K strongest over all heads between neighbouring
              words and the K strongest between others, sinks and special
              tokens apart; with --generate also the K of each new word.
              Indices are into words
  pairs       without --from, the strongest links by pair of words: [{from, to,
              from_index, to_index, kind, heads: [{layer, head, weight}]}];
              kind is what is read: a content, function or neighbour word
  heads       [{layer, head, kind, name, sinks, apart, behaviour}]: sinks are
              [{word, index, weight, queries}], weight the column mean over so
              many queries; apart is the share of the mass on sinks and special
              tokens; behaviour, without --from, the place that takes half of
              it or more: previous, next, self, first, separator, else null
  shown_mass  the share of the mass of all rows read that links hold
  generated   with --generate: {text, words: [{index, word, probability}]}: of a
              word the product over its tokens, each given all before it; null:
              a decoder's first. With --beams also beams: [{text, score}], the
              best first, which is what is read: score is the mean
              log-probability of its tokens
  versus      with --versus or --versus-model, of each --from word (without, the
              K words whose reading moved most): {from, kind, models,
              words: of both, aligned: [[index, index2]] (null: none), moved,
              means: of both for each pair, links: the K of each head that
              change most: [{layer, head, to, to_index, to_index2, weight,
              weight2}], flips: [{layer, head, to, to2, ... weight, weight2}]}
  cut         with --cut: {cuts: [{layer, head, from_index, to_index, weights:
              by head}], words: [{word, index, change, cosine}], reads: as
              versus, before and after, next: {kl, tokens: [{token, before,
              after}]} of a causal model, else null}
  effect      with --effect: [{target, word, index, size, directions, width,
              edges, links: [{layer, head, from, to, from_index, to_index,
              effect, weight, value}]}]: value is weight * |W_O v|
"""

_HEAD = "Only head H of each layer, or, as 3.1, head 1 of layer 3."
_TOP = "Words, links or heads to list.  [default: 8]"
_GENERATE = "Let the model add N tokens, greedily; show what they read too."
_VERSUS = "Compare with TEXT2: what each head reads in both."
_CUT = 'Run without an edge ("3.1: it->trophy", "3: it->trophy") or a head ("3.1").'
_EFFECT = "Rank links by what cutting them would change."
_HTML = "Write what was found as one page, to be opened in a browser."
_SAVE = "Save q, k and lse, from which any tile is computed exactly."


@click.command(epilog=_JSON)
@click.argument("text")
@MODEL
@click.option("--from", "readers", metavar="WORD", multiple=True, help="Show what WORD reads.")
@click.option("--layer", "layers", metavar="L", type=int, multiple=True, help="Only layer L.")
@click.option("--head", "heads", metavar="H|L.H", multiple=True, help=_HEAD)
@click.option("--top", metavar="K", default=8, type=click.IntRange(1), help=_TOP)
@TOKENS
@click.option("--no-special", is_flag=True, help="Leave out special tokens such as [CLS].")
@click.option("--generate", metavar="N", default=0, type=click.IntRange(0), help=_GENERATE)
@BEAMS
@click.option("--versus", "text2", metavar="TEXT2", help=_VERSUS)
@click.option("--versus-model", "model2", metavar="NAME", help="Compare with another model.")
@click.option("--cut", "cuts", metavar="SPEC", multiple=True, help=_CUT)
@click.option("--effect", is_flag=True, help=_EFFECT)
@click.option("--json", "as_object", is_flag=True, help="Print one JSON object, as below.")
@click.option("--html", metavar="FILE", type=Path, help=_HTML)
@click.option("--save", metavar="FOLDER", type=Path, help=_SAVE)
@over_ranks
def look(
    text: str,
    model: str | None,
    readers: tuple[str, ...],
    layers: tuple[int, ...],
    heads: tuple[str, ...],
    top: int,
    tokens: bool,
    no_special: bool,
    text2: str | None,
    model2: str | None,
    cuts: tuple[str, ...],
    effect: bool,
    as_object: bool,
    html: Path | None,
    save: Path | None,
    generate: int,
    beams: int,
) -> None:
    """Show where a model's heads read in TEXT, in words: by how much, and in which heads.

    TEXT is the text itself, @FILE, or - for standard input; or the folder of a
    recording, which is read without running a model. --from, --layer and --head may be
    given several times. "it#2" is the second "it"; layers and heads count from 0.

    --cut and --effect say what a link does. The effect is to first order, on the
    final vector of the --from word, or, without --from, on the log-probability of a
    causal model's likeliest next token. It stands beside the weight (where a head
    reads) and weight * |W_O v| (how long a vector the link adds). None of the
    columns is truer than another: they answer different questions.
    """
    text, text2 = given_text(text), None if text2 is None else given_text(text2)
    recorded = _is_recording(text)
    if recorded:
        asked = {
            "--model": model, "--generate": generate, "--beams": beams > 1, "--versus": text2,
            "--cut": cuts, "--versus-model": model2, "--effect": effect, "--save": save,
        }  # fmt: skip
        for option, given in asked.items():
            if given:
                raise RegardError(f"{text} is a recording of one text; leave out {option}")
    chosen = [named_head(name, "--head") for name in heads]
    if save is not None and save.exists():
        raise RegardError(f"{save} is there already; --save writes a new folder")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with warnings.catch_warnings(), progress() as told:
        warnings.simplefilter("ignore")
        told("opening the recording" if recorded else "loading the model", None)
        from ..analysis.question import Question
        from ..report.inline_page import check_html
        from ..report.look_html import write_html
        from ..report.look_result import answered, of_recording

        if html is not None:
            check_html(html)
        shown: Any = {
            "words": readers, "layers": layers, "heads": chosen, "top": top,
            "special": not no_special, "tokens": tokens, "progress": told,
        }  # fmt: skip
        if recorded:
            result = of_recording(Path(text), **shown)
        else:
            question = Question.parse(text2, model2, cuts, effect, generate, beams)
            result = answered(model, text, question, save=save, **shown)
        found, recording = result.found, result.recording
        if html is not None:
            write_html(
                found,
                recording,
                html,
                other=result.other,
                progress=lambda share: told("writing the page", share),
            )
        saved = "" if save is None else _size(recording, save)
    replace_unprintable()
    if as_object:
        from ..report.look_json import as_json

        click.echo(as_json(found, ascii_only()))
    elif html is None:
        from rich.console import Console

        from ..report.answers_terminal import print_asked
        from ..report.look_terminal import print_look

        (print_asked if found.asked else print_look)(found, Console())
        if save is not None:
            click.echo()
    if html is not None:
        click.echo(f"page: {html}", err=as_object)
    if save is not None:
        click.echo(f"saved: {save}, {saved}", err=as_object)


def _is_recording(text: str) -> bool:
    """Whether a text is the name of a recording's folder."""
    return os.path.isfile(os.path.join(text, "recording.json"))


def _size(recording: Recording, folder: Path) -> str:
    """What was written."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    kept, tokens = len(recording.layers), len(recording.about["tokens"])
    return f"q, k and lse of {kept} layers and {tokens:,} tokens, {size / 1e6:.1f} MB"
