"""Which links matter to a target: the edges of a whole model, ranked by `Effect`, as words.

The target is the final vector of a word, or the log-probability of a causal model's next token.
Of a vector's change only the length counts: √(Σ effect² · width / R) over the effects on R
directions at right angles. With R = width, as in short texts, it is exact to first order; in
longer ones the directions are random and it is an estimate, off by about √(2 / R).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..call.edge_results import NormTopKSeen
from ..call.observers import Effect, NormTopK, Observer
from ..capture.by_effect import EdgeEffects
from ..capture.recording import Recording
from ..capture.stored_effect import EDGES, join_effects
from ..errors import RegardError
from .probe import ModelRun, Probe
from .words import from_word

LEAST = 32  # directions of a vector target, in a text of any length
_WORK = 8192  # directions × tokens, where that gives more
_TOKENS = 2048  # that copies of a text may have together
_SEED = 0


class Influence(NamedTuple):
    """One word reading another in one head, with what its removal would do to the target.

    effect: to first order: signed for a log-probability (nats), a length for a vector. weight: the
    word weight. value: weight · ‖W_O v‖ (Kobayashi et al. 2020); None where W_O was not found.
    """

    layer: int
    head: int
    source: int
    target: int
    effect: float
    weight: float
    value: float | None


@dataclass(frozen=True)
class Effects:
    """The links of largest effect, largest first; words are numbers in the text's words.

    word: whose final vector is the target, or None; then token, the next one, is, with its
    probability. size: the length of that vector, or the log-probability. directions: how many the
    length was estimated from, `width` being all. edges: how many were kept of each query.
    """

    model: str
    links: tuple[Influence, ...]
    word: int | None
    token: str | None
    size: float
    directions: int
    width: int
    edges: int


class EffectTable(NamedTuple):
    """The edges of one layer: indices, effect and weights (heads, q_len, k), and the norms
    ‖W_O v‖ (heads, k_len), NaN where unknown; None where W_O was not found."""

    indices: Tensor
    effect: Tensor
    weights: Tensor
    norms: Tensor | None


def effects(
    probe: Probe,
    word: int | None = None,
    *,
    top: int = 8,
    shown: Callable[[int, int, int], bool] = lambda layer, head, target: True,
    directions: int | None = None,
    progress: Callable[[float], object] = lambda share: None,
    save: tuple[Recording, Path] | None = None,
) -> Effects:
    """The ``top`` links by effect on the final vector of ``word``; None: on the next token.

    shown (layer, head, target): whether a link is listed. save: a recording of the text and its
    folder, to which the edges are added. Memory O(N · (k + directions)), never N × N. RegardError
    for the next token of a model that writes none.
    """
    kept = min(EDGES, len(probe))
    layers, target = _measured(probe, word, directions, progress)
    if save is not None:
        _save(probe, word, layers, target, *save)
    recording = target.run.recording
    assert recording is not None
    best: list[Influence] = []
    for number, edges in layers.items():
        best += _linked(probe, number, edges, top, shown)
        best = sorted(best, key=lambda link: (-abs(link.effect), *link[:4]))[:top]
    links = tuple(_weighed(probe, recording, link) for link in best)
    return Effects(
        probe.reader.name, links, word, target.token, target.size, target.directions,
        target.width, kept,
    )  # fmt: skip


def edges(
    probe: Probe, word: int, *, kept: int | None = None, directions: int | None = None
) -> dict[int, EffectTable]:
    """The edges themselves, by layer, of the effect on a word's final vector."""
    with probe.differentiable():
        return _on_vector(probe, word, kept or len(probe), directions, lambda share: None)[0]


def record_effects(
    probe: Probe, word: int | None, recording: Recording, folder: Path,
    progress: Callable[[float], object] = lambda share: None,
) -> None:  # fmt: skip
    """Measure the edges' effect on the target, as `effects`, and add it to a recording."""
    layers, target = _measured(probe, word, None, progress)
    _save(probe, word, layers, target, recording, folder)


def _measured(
    probe: Probe, word: int | None, directions: int | None, progress: Callable[[float], object]
) -> tuple[dict[int, EffectTable], _Target]:
    """The edges by layer, and what they were measured on."""
    if word is None and not probe.writes:
        raise RegardError(
            f"{probe.reader.name} names no next token; say whose final vector is meant (--from)"
        )
    with probe.differentiable():
        ran = _on_vector if word is not None else _on_token
        return ran(probe, word or 0, min(EDGES, len(probe)), directions, progress)


def _save(
    probe: Probe, word: int | None, layers: dict[int, EffectTable], target: _Target,
    recording: Recording, folder: Path,
) -> None:  # fmt: skip
    """Add the edges to a recording, whose layers may be some of those that ran."""
    ran = {number: target.run.layers[number].name for number in layers}
    found = {}
    for place, layer in enumerate(recording.layers):
        for number, name in ran.items():  # with a head that writes, names begin with the base's
            if name == layer.name or name.endswith(f".{layer.name}"):
                table = layers[number]
                own = (table.indices, table.effect, table.weights)
                found[place] = EdgeEffects(*(t[None] for t in own))
    on = f"final vector of {probe.words[word].text!r}" if word is not None else (
        f"log-probability of the next token {target.token!r}"
    )  # fmt: skip
    said = {"target": on, "edges": min(EDGES, len(probe))}
    join_effects(recording.layers, folder, found, said)
    recording.about = recording.about | {"effect": said}


class _Target(NamedTuple):
    run: ModelRun
    token: str | None
    size: float
    directions: int
    width: int


def _observers(probe: Probe, effect: Effect, kept: int) -> list[Observer]:
    """Effect, and NormTopK where the model's output projections can be found."""
    try:
        with torch.no_grad(), probe.running(observe=[NormTopK(1)]):
            pass
    except RegardError:
        return [effect]
    return [effect, NormTopK(kept)]


def _on_token(
    probe: Probe, word: int, kept: int, directions: int | None, progress: Callable[[float], object]
) -> tuple[dict[int, EffectTable], _Target]:
    observers = _observers(probe, Effect(kept), kept)
    with probe.running(observe=observers, keep_qk=True) as run:
        assert run.logits is not None
        logs = run.logits[0].log_softmax(-1)
        likeliest = int(logs.argmax())
        logs[likeliest].backward()
    size = float(logs[likeliest].detach())
    return _layers(run, 1.0), _Target(run, probe.token(likeliest), size, 1, 1)


def _on_vector(
    probe: Probe, word: int, kept: int, directions: int | None, progress: Callable[[float], object]
) -> tuple[dict[int, EffectTable], _Target]:
    width = int(probe.model.config.get_text_config().hidden_size)
    directions = max(1, min(directions or max(LEAST, _WORK // len(probe)), width))
    copies = max(1, min(directions, _TOKENS // len(probe)))
    observers = _observers(probe, Effect(kept, norm=True), kept)
    with probe.running(copies, observe=observers, keep_qk=True) as run:
        vector = probe.vector(run.final, word)
        rounds = list(_directions(vector, directions))
        for number, some in enumerate(rounds):
            last = number == len(rounds) - 1
            vector.backward(some, retain_graph=not last)
            progress((number + 1) / len(rounds))
    scale = (width / directions) ** 0.5
    size = float(vector[0].detach().norm())
    return _layers(run, scale), _Target(run, None, size, directions, width)


def _directions(vector: Tensor, count: int) -> Iterator[Tensor]:
    """Orthonormal directions, ``count`` in all, as many at a time as copies; the rest are 0."""
    copies, width = vector.shape
    rng = torch.Generator().manual_seed(_SEED)
    drawn = torch.randn(width, count, generator=rng, dtype=torch.float64, device="cpu")
    basis = torch.linalg.qr(drawn).Q.T.to(vector)
    for some in basis.split(copies):
        yield torch.cat([some, some.new_zeros(copies - len(some), width)])


def _layers(run: ModelRun, scale: float) -> dict[int, EffectTable]:
    """What each layer with a pattern saw, by its number among all."""
    found = {}
    for number, layer in enumerate(run.layers):
        if not layer.pattern:
            continue
        effect, *norm = layer.seen
        norms = _norms(norm[0], layer.k_len) if norm else None
        if effect.ready:
            tensors = (effect.indices[0], effect.effects[0] * scale, effect.weights[0])
            found[number] = EffectTable(*tensors, norms)
    return found


def _norms(seen: NormTopKSeen, k_len: int) -> Tensor:
    """‖W_O v‖ (heads, k_len) of every key that any query lists; NaN for others."""
    ratio = (seen.norms[0] / seen.weights[0]).flatten(1)
    usable = (seen.indices[0] >= 0).flatten(1) & ratio.isfinite()
    keys = seen.indices[0].flatten(1).long().clamp(min=0)
    table = ratio.new_full((len(ratio), k_len), -1.0)
    table.scatter_reduce_(1, keys, ratio.masked_fill(~usable, -1.0), "amax")
    return table.masked_fill(table < 0, torch.nan)


def _linked(
    probe: Probe, layer: int, edges: EffectTable, top: int, shown: Callable[[int, int, int], bool]
) -> list[Influence]:
    """The links of one layer: edges summed over the tokens of both words."""
    words = probe.words
    heads, q_len, _ = edges.indices.shape
    keys = edges.indices.long()
    source = words.of_token[:q_len, None].expand(q_len, keys.shape[-1])
    target = words.of_token[keys.clamp(min=0)]
    head = torch.arange(heads, dtype=torch.int64, device="cpu")[:, None, None]
    place = (head * len(words) + source) * len(words) + target
    listed = keys >= 0
    places, back = place[listed].unique(return_inverse=True)
    sums = edges.effect.new_zeros(len(places)).index_add_(0, back, edges.effect[listed])
    values = None
    if edges.norms is not None:
        each = edges.weights * edges.norms.gather(1, keys.clamp(min=0).flatten(1)).view_as(
            edges.weights
        )
        values = each.new_zeros(len(places)).index_add_(0, back, each[listed])
        values /= words.sizes[places // len(words) % len(words)]
    found: list[Influence] = []
    for at in sums.abs().argsort(descending=True, stable=True).tolist():
        number, reads = divmod(int(places[at]), len(words))
        number, reader = divmod(number, len(words))
        if shown(layer, number, reads):
            value = None if values is None or values[at].isnan() else float(values[at])
            found.append(Influence(layer, number, reader, reads, float(sums[at]), 0.0, value))
        if len(found) == top:
            break
    return found


def _weighed(probe: Probe, recording: Recording, link: Influence) -> Influence:
    """The link with its exact word weight."""
    words = probe.words
    row = from_word(recording, link.layer, words[link.source], words, [link.head])
    return link._replace(weight=float(row[0, link.target]))
