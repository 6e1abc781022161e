"""What a window, truncation and chunks lose on long documents."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...analysis.context_loss import unseen, unseen_recorded
from ...analysis.text_model import TextModel, load, quiet
from ...call.geometry import Place, Span
from ...call.masks import Causal, First, Mask, Window
from ...call.sparse_masks import Chunks
from ...capture.watching import watch
from .stats import mean_interval
from .study import Cell, Panel, Result, Setting, Study, Verdict


def masks(length: int, most: int, asked: int) -> dict[str, Mask]:
    """What each way lets a token see. Truncation: the last tokens alone are read.

    Chunks and the truncated text begin with the text's first token, as this model expects.
    """
    half, start = most // 2, First(1)
    return {
        "whole": Causal(),
        f"window {most}": Causal() & Window(most),
        f"window {most}, 4 sinks": Causal() & (Window(most) | First(4)),
        f"chunks of {most}": Causal() & (Chunks(most) | start),
        f"chunks of {most}, half shared": Causal() & (Chunks(most, half) | start),
        f"truncated to {most + asked}": Causal() & (start | ~First(length - most - asked)),
    }


def run(at: Setting) -> Result:
    size = at.size
    reader = load(str(at.model("minimind2-small")), head=True)
    pieces = _pieces(at, reader)
    ways = masks(size.length, size.window, size.asked)
    losses: dict[str, list[float]] = {name: [] for name in ways}
    mass: dict[str, list[float]] = {name: [] for name in ways}
    for number, ids in enumerate(pieces):
        at.told("documents", number / len(pieces))
        with torch.no_grad(), quiet():
            with watch(reader.model, observe=[], keep_qk=True) as seen:
                reader.model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
            recording = seen.recording()
            for name, mask in ways.items():
                losses[name].append(_loss(reader, ids, mask, size.asked))
                mass[name].append(_mass(recording, mask))
    rng = at.random("intervals")
    rows: list[tuple[Cell, ...]] = []
    lost: dict[str, Any] = {}
    for name, mask in ways.items():
        more = [a - b for a, b in zip(losses[name], losses["whole"], strict=True)]
        lost[name] = mean_interval(more, rng)
        hidden = unseen(mask, size.length).share
        rows.append((name, sum(losses[name]) / len(pieces), *lost[name], hidden,
                     sum(mass[name]) / len(pieces)))  # fmt: skip
    window, sinks, chunks, shared, truncated = list(ways)[1:]
    fell = lost[sinks].value - lost[window].value
    verdicts = [
        Verdict("a window loses what lies beyond it: the loss rises", lost[window].low > 0,
                f"{lost[window]} nats a token"),
        Verdict("four sink tokens give most of that back (StreamingLLM)",
                -fell > 0.5 * lost[window].value, f"{lost[sinks]} nats with sinks"),
        Verdict("chunks lose more than a window with sinks of the same size",
                lost[chunks].value > lost[sinks].value, f"{lost[chunks]}; half shared "
                f"{lost[shared]}"),
        Verdict("truncation to the last tokens loses something too", lost[truncated].low > 0,
                f"{lost[truncated]} nats a token"),
    ]  # fmt: skip
    columns = ("reads", "loss", "more", "low", "high", "pairs hidden", "mass hidden")
    names = list(ways)[1:]
    panel = Panel("loss above the whole context", "", "nats a token",
                  {"more": (names, [lost[n].value for n in names])}, bars=True)  # fmt: skip
    return Result(columns, rows, verdicts, [panel], notes=[
        f"minimind2-small on {len(pieces)} pieces of {size.length:,} tokens of WikiText-2 (test); "
        f"loss of the last {size.asked} tokens in nats, `more` against the whole context with "
        "95 % bootstrap intervals. mass hidden: the share of the attention of the whole context "
        "that falls on pairs that the mask hides, all layers and heads. Chunks and the truncated "
        "text keep the first token, <|im_start|>; the plain window does not."
    ])  # fmt: skip


def _pieces(at: Setting, reader: TextModel) -> list[Tensor]:
    text = at.file("wikitext2/wiki.test.raw").read_text("utf-8")[: at.size.text]
    with quiet():  # that the whole text is longer than the model reads: pieces of it are read
        ids = reader.tokenizer(text, add_special_tokens=False)["input_ids"]
    start = reader.tokenizer("<|im_start|>", add_special_tokens=False)["input_ids"]
    step = at.size.length - len(start)
    pieces = [start + ids[i : i + step] for i in range(0, len(ids) - step, step)]
    chosen = at.random("pieces").sample(pieces, min(at.size.documents, len(pieces)))
    return [torch.tensor(one, dtype=torch.int64, device="cpu") for one in chosen]


def _loss(reader: TextModel, ids: Tensor, mask: Mask, asked: int) -> float:
    """Mean loss of the last tokens, where every layer sees what the mask shows."""
    length = len(ids)
    place = Place(1, 1, 1, length, length, 0, 0, ids.device)
    shown = mask.lower(place).visible(Span(0, length, 0, length)).reshape(1, 1, length, length)
    given = torch.zeros(shown.shape, dtype=torch.float32, device="cpu")
    # A row that sees nothing (before what truncation keeps) reads itself; no later row sees it
    given.masked_fill_(~(shown | torch.eye(length, dtype=torch.bool, device="cpu")), -1e30)
    logits = reader.model(
        input_ids=ids[None], attention_mask=given, use_cache=False, logits_to_keep=asked + 1
    ).logits
    return float(F.cross_entropy(logits[0, :-1], ids[-asked:]))


def _mass(recording: Any, mask: Mask) -> float:
    found = [unseen_recorded(mask, layer).low for layer in recording.layers]
    return float(torch.stack([one for one in found if one is not None]).mean())


STUDY = Study(
    "window",
    "A model that reads through a window, in chunks or truncated loses what it no longer sees.",
    "Every layer of a language model is given the mask of each way; the loss of the last tokens "
    "of long documents is compared with that of the whole context.",
    run,
    tiny=dict(length=48, window=16, asked=8, documents=1, text=4000),
    quick=dict(length=512, window=64, asked=64, documents=6, text=60_000),
    full=dict(length=1024, window=128, asked=128, documents=10, text=2_000_000),
)
