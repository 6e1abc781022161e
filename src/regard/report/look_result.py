"""`regard.look`: what `regard look` shows, in Python: an object that prints and shows itself.

What it needs beyond torch (transformers, rich) is imported when it is called.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..call.brief import shortened
from ..call.display.frame import needed
from ..call.numbers import at_least, named_head, whole, wholes
from ..errors import RegardError

if TYPE_CHECKING:
    from pandas import DataFrame

    from ..analysis.look import Look
    from ..analysis.question import Question
    from ..analysis.words import Link
    from ..capture.recording import Recording

_FRAME = 'width="100%" height="{height}" style="border:0" sandbox="allow-scripts"'


class LookResult:
    """What a model's heads read in a text. Print it, or leave it as the last line of a cell.

    words: the words read. links: the strongest links (layer, head, source, target, weight), source
    and target being numbers of words. recording: from which any weight is exact.
    """

    found: Look
    recording: Recording
    other: Recording | None

    def __init__(self, found: Look, recording: Recording, other: Recording | None) -> None:
        self.found, self.recording, self.other = found, recording, other

    @property
    def words(self) -> list[str]:
        """The words read, special tokens among them; a decoder's follow the encoder's."""
        return [word.text for word in self.found.words]

    @property
    def links(self) -> list[Link]:
        """The strongest links, as `--json` lists them."""
        return list(self.found.links)

    def to_pandas(self) -> DataFrame:
        """The links: one row each, by layer, head, source and target (numbers of words).

        The words stand beside the weight. RegardError where pandas is missing.
        """
        rows = [
            (link.layer, link.head, link.source, link.target, self.words[link.source],
             self.words[link.target], link.weight)
            for link in self.links
        ]  # fmt: skip
        index = ["layer", "head", "source", "target"]
        columns = [*index, "source_word", "target_word", "weight"]
        return needed().DataFrame(rows, columns=columns).set_index(index)

    def as_dict(self) -> dict[str, Any]:
        """What `json()` writes, as an object; `regard look --help` says what each field means."""
        from .look_json import as_dict

        return as_dict(self.found)

    def json(self) -> str:
        """One JSON object in one line: what `regard look --json` prints."""
        from .look_json import as_json

        return as_json(self.found)

    def html(self, file: str | Path) -> Path:
        """Write the page of `regard look --html`, which needs nothing but itself; returns its path.

        RegardError where it cannot be written.
        """
        from .look_html import write_html

        if not isinstance(file, str | Path):
            raise RegardError(f"html writes a file; {shortened(repr(file), 60)} is no path")
        path = Path(file).expanduser()
        write_html(self.found, self.recording, path, other=self.other)
        return path

    def text(self, width: int = 80) -> str:
        """What `regard look` prints, in so many columns (40 to 100), without colours."""
        try:
            from rich.console import Console
        except ImportError as error:
            raise RegardError('printing needs rich: pip install "regard[look]"') from error
        from .answers_terminal import print_asked
        from .look_terminal import print_look

        written = io.StringIO()
        console = Console(
            file=written, width=whole(width, "width"), color_system=None,
            force_jupyter=False,  # in a notebook it would be displayed, not written
        )  # fmt: skip
        (print_asked if self.found.asked else print_look)(self.found, console)
        return "\n".join(line.rstrip() for line in written.getvalue().splitlines())

    def __repr__(self) -> str:
        return self.text(shutil.get_terminal_size((80, 24)).columns)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, which may run its script and nothing else."""
        from html import escape

        from .look_html import as_html

        page = as_html(self.found, self.recording, other=self.other)
        return f'<iframe {_FRAME.format(height=720)} srcdoc="{escape(page)}"></iframe>'


def look(
    model: Any,
    text: str,
    *,
    from_words: str | Sequence[str] = (),
    layers: int | str | Sequence[int | str] = (),
    heads: int | str | Sequence[int | str] = (),
    top: int = 8,
    special: bool = True,
    tokens: bool = False,
    generate: int = 0,
    beams: int = 1,
    versus: str | None = None,
    versus_model: Any = None,
    cuts: str | Sequence[str] = (),
    effect: bool = False,
) -> LookResult:
    """Where a model's heads read in a text, in words: by how much, and in which heads.

        regard.look("all-MiniLM-L6-v2", "The trophy didn't fit in the suitcase because it was big.")

    model: a folder, a name on the Hugging Face hub, None for the packaged all-MiniLM-L6-v2; or a
        loaded (model, tokenizer), or an object that has both (a pipeline, a sentence encoder), on
        the CPU.
    from_words: what these words read ("it#2" is the second "it"). layers, heads: only these; a
        head is of every layer, or as "3.1", head 1 of layer 3. top: how many links to list.
        special: whether to list special tokens. tokens: the model's tokens instead of words.
        generate: tokens that the model adds first; beams: by a search with so many, of which the
        best is read. versus, versus_model: another text, another model, to compare with. cuts:
        edges or heads to run without ("3.1: it->trophy", "3.1"). effect: what cutting each link
        would change. Each as the option of `regard look` that is named like it.

    Nothing of a loaded model is changed. RegardError in one line for what cannot be looked at.
    """
    from ..analysis.question import Question

    _check_text(text, "text")
    if versus is not None:
        _check_text(versus, "versus")
    shown = _layers(layers), _heads(heads)
    words, edges = _strings(from_words, "from_words"), _strings(cuts, "cuts")
    top, generate = at_least(1, top, "top"), at_least(0, generate, "generate")
    beams = at_least(1, beams, "beams")
    if generate and (edges or effect):
        raise RegardError("cuts and effect read the text as it is; leave generate out")
    _check_model(model)
    question = Question.parse(versus, None, edges, bool(effect), generate, beams)
    return answered(
        model, text, question, words=words, layers=shown[0], heads=shown[1], top=top,
        special=bool(special), tokens=bool(tokens), versus_model=versus_model,
    )  # fmt: skip


def answered(
    model: Any,
    text: str,
    question: Question,
    *,
    words: Sequence[str],
    layers: Sequence[int],
    heads: Sequence[int | tuple[int, int]],
    top: int,
    special: bool,
    tokens: bool,
    versus_model: Any = None,
    save: Path | None = None,
    progress: Callable[[str, float | None], object] = lambda what, share: None,
) -> LookResult:
    """What `look` and the command answer: arguments that are checked, and who is told how far.

    versus_model: a loaded one, where the question names none. save: a new folder, into which the
    recording is streamed while the model runs; it is there once all is answered.
    """
    from ..analysis.look import look as gather
    from ..analysis.look_model import read_as, reading

    generate, made = question.generate, 0

    def wrote(count: int) -> None:
        nonlocal made
        made += count
        progress("generating", made / generate)

    adds: dict[str, Any] = {"generate": generate, "beams": question.beams, "step": wrote}
    reader = read_as(model, generate=generate > 0, head=question.runs)
    reader.pieces = tokens
    second = None if versus_model is None else read_as(versus_model, generate=generate > 0)
    progress("reading", None)
    with reading(reader), reading(second), _into(save) as folder:
        if folder is None:
            recording = reader.record(text, **adds)
        else:
            recording = reader.stream(text, folder, dtype=None, **adds)
        found = gather(
            recording, readers=words, layers=layers, heads=heads, top=top, special=special,
            progress=lambda share: progress("weighing words", share),
        )  # fmt: skip
        other = question.answer(
            found, reader, recording, words, layers, heads, progress, second=second, save=folder
        )
    if save is not None:
        recording.folder = save
    return LookResult(found, recording, other)


def of_recording(
    folder: Path,
    *,
    words: Sequence[str],
    layers: Sequence[int],
    heads: Sequence[int | tuple[int, int]],
    top: int,
    special: bool,
    tokens: bool,
    progress: Callable[[str, float | None], object] = lambda what, share: None,
) -> LookResult:
    """The same of a recording's folder: what was written is read, no model runs."""
    from ..analysis.look import look as gather
    from ..capture.recording import Recording

    recording = Recording.load(folder)
    if tokens:
        recording.about = recording.about | {"pieces": True}
    found = gather(
        recording, readers=words, layers=layers, heads=heads, top=top, special=special,
        progress=lambda share: progress("weighing words", share),
    )  # fmt: skip
    return LookResult(found, recording, None)


@contextlib.contextmanager
def _into(save: Path | None) -> Iterator[Path | None]:
    """A folder that becomes `save` once all is answered. RegardError where it cannot be written."""
    if save is None:
        yield None
        return
    from ..capture.index_file import INDEX
    from ..capture.saved_files import whole_folder

    try:
        with whole_folder(save, INDEX, overwrite=False) as part:
            yield part
    except OSError as error:
        raise RegardError(f"cannot save to {save}: {error.strerror or error}") from error


def _check_model(model: Any) -> None:
    """RegardError where text and model have changed places."""
    if isinstance(model, str) and len(model.split()) > 1 and not Path(model).exists():
        said = shortened(model, 40)
        raise RegardError(f"there is no model {said!r}; look takes the model, then the text")


def _check_text(text: Any, name: str) -> None:
    """RegardError where it is no text that a model can read."""
    if not isinstance(text, str):
        raise RegardError(f"{name} is {shortened(repr(text), 60)}; give one string")
    if not text.strip():
        raise RegardError(f"{name} is empty; there is nothing to look at")
    if "\0" in text:
        raise RegardError(f"{name} has a zero byte, so it is no text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        said = f"{name} is no text: character {error.start} is half of a surrogate pair"
        raise RegardError(said) from error


def _layers(given: Any) -> tuple[int, ...]:
    """One layer or several, each a number, also in a string."""
    several = _several(given, "layers")
    return wholes([int(one) if _digits(one) else one for one in several], "layers")


def _heads(given: Any) -> tuple[int | tuple[int, int], ...]:
    """One head or several: of every layer, as 1, or of one, as "3.1"."""
    return tuple(
        named_head(one, "heads") if isinstance(one, str) else whole(one, "heads")
        for one in _several(given, "heads")
    )


def _several(given: Any, name: str) -> tuple[Any, ...]:
    if isinstance(given, int | str):
        return (given,)
    try:
        return tuple(given)
    except TypeError:
        said = shortened(repr(given), 60)
        raise RegardError(f"{name} is {said}; give a whole number, or a list of them") from None


def _digits(given: Any) -> bool:
    return isinstance(given, str) and given.isascii() and given.isdigit()


def _strings(given: Any, name: str) -> tuple[str, ...]:
    """One string or several, as several."""
    several = (given,) if isinstance(given, str) else given
    if not isinstance(several, list | tuple) or not all(isinstance(one, str) for one in several):
        raise RegardError(
            f"{name} is {shortened(repr(given), 60)}; give a string, or a list of them"
        )
    return tuple(several)
