"""What a model adds to a text: the tokens chosen, their probabilities, what other beams wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import RegardError


@dataclass
class Generated:
    """New tokens, and the probability of each, given all before it.

    beams: of a beam search, what each beam wrote: {"text", "score"}, the best first, whose tokens
    these are; score: the mean log-probability of its tokens, as transformers ranks them.
    """

    ids: list[int]
    probabilities: list[float]
    beams: list[dict[str, Any]] = field(default_factory=list)


def check_beams(beams: int, generate: int) -> None:
    """RegardError where there is nothing to search for."""
    if beams > 1 and not generate:
        raise RegardError("beams are for what a model adds: let it generate some tokens, too")


def beams_of(about: dict[str, Any]) -> list[dict[str, Any]]:
    """What each beam wrote, as a recording says it; what is not said so is left out."""
    given = about.get("beams")
    return [
        beam
        for beam in (given if isinstance(given, list) else [])
        if isinstance(beam, dict)
        and isinstance(beam.get("text"), str)
        and isinstance(beam.get("score"), float)
    ]


class Steps:
    """A transformers logits processor that changes nothing: it counts, and keeps what the likeliest
    of the first row has."""

    def __init__(self, step: Callable[[int], object] | None) -> None:
        self._step = step
        self.likeliest: list[float] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self._step:
            self._step(1)
        self.likeliest.append(float(scores[0].double().softmax(-1).max()))
        return scores


def searched(
    model: Any, settings: dict[str, Any], started: int, decoded: Callable[[Sequence[int]], str]
) -> Generated:
    """The best of a beam search, and all of its beams. started: where a row's new tokens begin."""
    out = model.generate(
        **settings, num_return_sequences=settings["num_beams"], return_dict_in_generate=True,
        output_scores=True,
    )  # fmt: skip
    chances = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    # Rows that ended early are filled up to the longest; -1 is the beam of what fills them
    lengths = (out.beam_indices >= 0).sum(1).tolist()
    given = out.sequences.shape[1] - chances.shape[1]
    rows = [
        row[:given + length].tolist() for row, length in zip(out.sequences, lengths, strict=True)
    ]  # fmt: skip
    texts = [decoded(row[given:]) for row in rows]
    beams = [
        {"text": text, "score": float(score)}
        for text, score in zip(texts, out.sequences_scores, strict=True)
    ]
    return Generated(rows[0][started:], chances[0, : lengths[0]].exp().tolist(), beams)
