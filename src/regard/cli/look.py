"""`regard look`: where a model's heads read."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import RegardError

if TYPE_CHECKING:
    from ..recording import Recording

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

_TOP = "Words, links or heads to list.  [default: 8]"
_GENERATE = "Let the model add N tokens, greedily; show what they read too."
_VERSUS = "Compare with TEXT2: what each head reads in both."
_CUT = 'Run without an edge ("3.1: it->trophy", "3: it->trophy") or a head ("3.1").'
_EFFECT = "Rank links by what cutting them would change."
_HTML = "Write what was found as one page, to be opened in a browser."
_SAVE = "Save q, k and lse, from which any tile is computed exactly."


@click.command(epilog=_JSON)
@click.argument("text")
@click.option(
    "--model",
    metavar="NAME|PATH",
    help="A folder, or a name on the Hugging Face hub.  [default: all-MiniLM-L6-v2]",
)
@click.option("--from", "readers", metavar="WORD", multiple=True, help="Show what WORD reads.")
@click.option("--layer", "layers", metavar="L", type=int, multiple=True, help="Only layer L.")
@click.option("--head", "heads", metavar="H", type=int, multiple=True, help="Only head H.")
@click.option("--top", metavar="K", default=8, type=click.IntRange(1), help=_TOP)
@click.option("--no-special", is_flag=True, help="Leave out special tokens such as [CLS].")
@click.option("--generate", metavar="N", default=0, type=click.IntRange(0), help=_GENERATE)
@click.option("--versus", "text2", metavar="TEXT2", help=_VERSUS)
@click.option("--versus-model", "model2", metavar="NAME", help="Compare with another model.")
@click.option("--cut", "cuts", metavar="SPEC", multiple=True, help=_CUT)
@click.option("--effect", is_flag=True, help=_EFFECT)
@click.option("--json", "as_object", is_flag=True, help="Print one JSON object, as below.")
@click.option("--html", metavar="FILE", type=Path, help=_HTML)
@click.option("--save", metavar="FOLDER", type=Path, help=_SAVE)
def look(
    text: str,
    model: str | None,
    readers: tuple[str, ...],
    layers: tuple[int, ...],
    heads: tuple[int, ...],
    top: int,
    no_special: bool,
    text2: str | None,
    model2: str | None,
    cuts: tuple[str, ...],
    effect: bool,
    as_object: bool,
    html: Path | None,
    save: Path | None,
    generate: int,
) -> None:
    """Show where a model's heads read in TEXT, in words: by how much, and in which heads.

    TEXT is the text itself, @FILE, or - for standard input. --from, --layer and --head may be
    given several times. "it#2" is the second "it"; layers and heads count from 0.

    --cut and --effect say what a link does. The effect is to first order, on the
    final vector of the --from word, or, without --from, on the log-probability of a
    causal model's likeliest next token. It stands beside the weight (where a head
    reads) and weight * |W_O v| (how long a vector the link adds). None of the
    columns is truer than another: they answer different questions.
    """
    text, text2 = _text(text), None if text2 is None else _text(text2)
    if save is not None and save.exists():
        raise RegardError(f"{save} is there already; --save writes a new folder")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with warnings.catch_warnings(), _progress() as progress:
        warnings.simplefilter("ignore")
        progress("loading the model", None)
        from ..loading import load
        from ..report.asking import Question
        from ..report.html import check_html, write_html
        from ..report.looking import look as gather

        if html is not None:
            check_html(html)
        question = Question.parse(text2, model2, cuts, effect, generate)
        reader = load(model, generate=generate > 0, head=question.runs)
        progress("reading", None)
        made = 0

        def wrote(tokens: int) -> None:
            nonlocal made
            made += tokens
            progress("generating", made / generate)

        recording = reader.record(text, generate=generate, step=wrote)
        found = gather(
            recording,
            readers=readers,
            layers=layers,
            heads=heads,
            top=top,
            special=not no_special,
            progress=lambda share: progress("weighing words", share),
        )
        other = question.answer(found, reader, recording, readers, layers, heads, progress)
        if html is not None:
            write_html(
                found,
                recording,
                html,
                other=other,
                progress=lambda share: progress("writing the page", share),
            )
        if save is not None:
            progress("saving", None)
            _save(recording, save)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what the terminal cannot show is no failure
    if as_object:
        from ..report.as_json import as_json

        click.echo(as_json(found, ascii_only="utf" not in (sys.stdout.encoding or "").lower()))
    else:
        from rich.console import Console

        from ..report.asked_terminal import print_asked
        from ..report.terminal import print_look

        (print_asked if found.asked else print_look)(found, Console())


def _text(given: str) -> str:
    """The text that the argument names, checked to be one."""
    if given == "-":
        data, name = sys.stdin.buffer.read(), "standard input"
    elif given.startswith("@"):
        name = given[1:]
        try:
            data = Path(name).expanduser().read_bytes()
        except OSError as error:
            raise RegardError(f"cannot read the file {name!r}: {error.strerror}") from error
    else:
        data, name = given.encode("utf-8", "surrogatepass"), "the argument"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RegardError(f"{name} is not text: byte {error.start} is not UTF-8") from error
    if "\0" in text:
        raise RegardError(f"{name} is not text: it has a zero byte")
    if not text.strip():
        said = "the text" if name == "the argument" else name
        raise RegardError(f"{said} is empty; there is nothing to look at")
    return text if name == "the argument" else text.removesuffix("\n")


def _save(recording: Recording, folder: Path) -> None:
    """Write the recording; under another name until it is whole."""
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    try:
        recording.save(part)
        part.rename(folder)
    except OSError as error:
        raise RegardError(f"cannot save to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _progress() -> Iterator[Callable[[str, float | None], None]]:
    """A bar on stderr while this is open, where stderr is a terminal: told what, how far."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError as error:
        raise RegardError('printing needs rich: pip install "regard[look]"') from error
    console = Console(stderr=True)
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        yield lambda what, share: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(32), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)

        def show(what: str, share: float | None) -> None:
            total = None if share is None else 1.0
            bars.update(task, description=what, total=total, completed=share or 0.0)

        yield show
