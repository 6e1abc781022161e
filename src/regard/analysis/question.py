"""What `regard look` is asked beyond the plain look: --versus, --cut and --effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..capture.recording import Recording
from ..errors import RegardError
from .cut import Edge, cut
from .effect import effects
from .generated import check_beams
from .look import Look
from .probe import Probe
from .text_model import TextModel, load
from .versus import add_versus


@dataclass(frozen=True)
class Question:
    """The options, read: another text and model (None: the same), the cuts, whether effects,
    tokens to generate and by how many beams."""

    text: str | None
    model: str | None
    cuts: tuple[Edge, ...]
    effect: bool
    generate: int
    beams: int = 1

    @classmethod
    def parse(
        cls,
        text: str | None,
        model: str | None,
        cuts: Sequence[str],
        effect: bool,
        generate: int,
        beams: int = 1,
    ) -> Question:
        """RegardError for what cannot be asked."""
        if generate and (cuts or effect):
            raise RegardError("--cut and --effect read TEXT as it is; leave --generate out")
        check_beams(beams, generate)
        return cls(text, model, tuple(map(Edge.parse, cuts)), effect, generate, beams)

    @property
    def runs(self) -> bool:
        """Whether the model is run beyond the recording."""
        return bool(self.cuts) or self.effect

    def answer(
        self,
        found: Look,
        reader: TextModel,
        recording: Recording,
        readers: Sequence[str],
        layers: Sequence[int],
        heads: Sequence[int | tuple[int, int]],
        progress: Callable[[str, float | None], object],
        second: TextModel | None = None,
        save: Path | None = None,
    ) -> Recording | None:
        """Fill in ``found``; returns the recording of the other text or model, if there is one.

        second: the other model, where it is loaded already. save: the recording's folder, to which
        effects are added.
        """
        other = None
        if self.text is not None or self.model is not None or second is not None:
            progress("reading the second", None)
            if self.model is not None:
                second = load(self.model, generate=self.generate > 0)
            second = reader if second is None else second
            second.pieces = reader.pieces
            text = found.sides[0].text if self.text is None else self.text
            if self.text is None and self.generate:
                text = str(recording.about["text"])[: _given(recording)]
            other = second.record(text, generate=self.generate, beams=self.beams)
            add_versus(found, recording, other, layers=layers, heads=heads)
        if self.runs:
            probe = Probe(reader, found.sides[0].text)
            if self.cuts:
                progress("cutting", None)
                found.cut = cut(probe, self.cuts, readers, found.top)
            if self.effect:
                self._effects(found, probe, progress, None if save is None else (recording, save))
        return other

    def _effects(
        self, found: Look, probe: Probe, progress: Callable[[str, float | None], object],
        save: tuple[Recording, Path] | None,
    ) -> None:  # fmt: skip
        numbers = {pair for part in found.parts for pair in part.heads}

        def shown(layer: int, head: int, target: int) -> bool:
            hidden = not found.special and found.words[target].special
            return (layer, head) in numbers and not hidden

        targets: list[int | None] = [focus.found.number for focus in found.focuses]
        if save is not None and len(targets) > 1:
            raise RegardError("a recording keeps the effect on one target; give one --from")
        for word in targets or [None]:
            found.effects.append(
                effects(
                    probe,
                    word,
                    top=found.top,
                    shown=shown,
                    progress=lambda share: progress("measuring effects", share),
                    save=save,
                )
            )


def _given(recording: Recording) -> int:
    """Where the text that was given ends and what a causal model generated begins."""
    begun = recording.about.get("generated")
    offsets = recording.about["offsets"]
    if begun is None or begun >= len(offsets):
        return len(recording.about["text"])
    return int(offsets[begun][0])
