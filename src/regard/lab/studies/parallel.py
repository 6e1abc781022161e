"""How fast attention and recurrences train over the length, and what must wait for what."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .learning import Batch, integers, loss_of, small_lm
from .measuring import seconds
from .study import Cell, Panel, Result, Setting, Study, Verdict

MIXERS = ("softmax", "linear", "delta", "lstm", "gru", "rnn")
CHUNK = 64  # tokens that linear attention computes at once (ops/linear)


def waiting(mixer: str, length: int) -> int:
    """Steps of one layer that must wait for each other: what cannot be computed side by side."""
    if mixer == "softmax":
        return 1
    return -(-length // CHUNK) if mixer in ("linear", "delta") else length


def run(at: Setting) -> Result:
    size = at.size
    speeds: dict[str, list[float]] = {mixer: [] for mixer in MIXERS}
    for place, length in enumerate(size.lengths):
        batch = max(1, size.tokens // length)
        ids = integers(0, 64, (batch, length + 1), at.generator())
        given: Batch = (ids[:, :-1], ids[:, 1:])
        for mixer in MIXERS:
            at.told(f"{mixer} at {length}", place / len(size.lengths))
            torch.manual_seed(at.seed)
            model = small_lm(64, size.dim, 2, 2, mixer=mixer)
            taken = seconds(partial(_step, model, given), size.enough)
            speeds[mixer].append(batch * length / taken)
    last = size.lengths[-1]
    rows: list[tuple[Cell, ...]] = [
        (mixer, found[0], found[-1], found[-1] / found[0], waiting(mixer, last))
        for mixer, found in speeds.items()
    ]
    kept = {mixer: found[-1] / found[0] for mixer, found in speeds.items()}
    slow = [m for m in ("lstm", "gru", "rnn") if speeds[m][-1] >= speeds["softmax"][-1]]
    verdicts = [
        Verdict("attention trains faster than every recurrence at every length here",
                all(speeds["softmax"][i] > speeds[m][i] for m in ("lstm", "gru", "rnn")
                    for i in range(len(size.lengths))),
                f"at {last:,} tokens softmax {speeds['softmax'][-1]:,.0f} tokens/s, " +
                ", ".join(f"{m} {speeds[m][-1]:,.0f}" for m in ("lstm", "gru", "rnn"))
                + (f"; faster there: {', '.join(slow)}" if slow else ""), True),
        Verdict("attention's tokens/s fall with the length (its work is N²), a recurrence's do not "
                "(by half at most)", kept["softmax"] < 0.5 <= kept["lstm"],
                f"from {size.lengths[0]} to {last:,} tokens softmax keeps {kept['softmax']:.0%}, "
                f"LSTM {kept['lstm']:.0%}", True),
        Verdict("an LSTM's steps wait for each other, attention's do not",
                waiting("softmax", last) == 1 and waiting("lstm", last) == last,
                f"{waiting('LSTM', last):,} steps of a layer against 1; linear "
                f"{waiting('linear', last):,} chunks"),
    ]  # fmt: skip
    columns = ("mixer", f"tokens/s at {size.lengths[0]}", f"at {last}", "kept", "must wait")
    panel = Panel("training", "tokens in a sequence", "tokens/s",
                  {m: (size.lengths, s) for m, s in speeds.items()}, "xy", clock=True)  # fmt: skip
    return Result(columns, rows, verdicts, [panel], columns[1:4], [
        f"Forward and backward of two blocks of width {size.dim}, 2 heads, float32; "
        f"{size.tokens:,} tokens a batch at every length, so the longest has "
        f"{max(1, size.tokens // last)} sequences. must wait: steps of one layer that depend on "
        f"each other. On {torch.get_num_threads()} CPU threads there is little to do side by side: "
        "a GPU rewards it more."
    ])  # fmt: skip


def _step(model: Any, given: Batch) -> None:
    loss_of(model, given).backward()


STUDY = Study(
    "parallel",
    "Attention trains in parallel: a recurrence must compute one token after the other.",
    "Tokens per second of training steps with equally many tokens in a batch, in sequences of "
    "growing length.",
    run,
    tiny=dict(lengths=[16, 32], tokens=64, dim=16, enough=0.0),
    quick=dict(lengths=[64, 256, 1024], tokens=2048, dim=64, enough=0.0),
    full=dict(lengths=[64, 256, 1024, 4096], tokens=8192, dim=128, enough=1.0),
)
