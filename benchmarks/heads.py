"""How long `regard.heads` takes on a long recording, by passes and row by row.

python benchmarks/heads.py [--tokens 16384] [--heads 2] [--names 2000]

One causal layer, dim 64, random q and k in bf16; tokens drawn from so many names, the n-th as often
as 1/n, as words of a text are. Row by row is what short texts take; both in turns, once each.
"""

from __future__ import annotations

import argparse
import time

import torch

import regard
from regard import Recording
from regard.analysis import head_sums
from regard.call.checked import Call
from regard.capture.recorded_layer import RecordedLayer


def made(tokens: int, heads: int, names: int) -> Recording:
    """The recording, in memory."""
    drawn = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, tokens, 64, generator=drawn).bfloat16() for _ in range(2))
    mask = regard.Causal()
    _, (lse,) = regard.attention(query, key, key, mask=mask, observe=[regard.LogSumExp()])
    layer = RecordedLayer("attention", 0, "self")
    layer.add(Call.checked(query, key, key, mask=mask), lse.values)
    often = 1 / torch.arange(1, names + 1)
    said = torch.multinomial(often, tokens, replacement=True, generator=drawn).tolist()
    return Recording([layer], {"tokens": [f"w{n}" if n else "." for n in said]})


def main() -> None:
    """Make, score twice, print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tokens", type=int, default=16_384)
    options.add_argument("--heads", type=int, default=2)
    options.add_argument("--names", type=int, default=2000)
    given = options.parse_args()
    recording = made(given.tokens, given.heads, given.names)
    least, found = head_sums.LEAST, []
    for name, bar in (("by passes", least), ("row by row", 2**62)):
        head_sums.LEAST = bar
        begun = time.perf_counter()
        found.append(regard.heads(recording)[0, 0].scores)
        print(f"{name}: {time.perf_counter() - begun:.2f} s")
    quick, whole = found
    off = max(abs(quick[n] - b) / max(b, 1e-3) for n, b in whole.items() if b is not None)
    print(f"largest relative difference of a score: {off:.1e}")


if __name__ == "__main__":
    main()
