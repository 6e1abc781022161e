"""How long a tile of a map takes: 128 × 128 cells, exact, from q, k and lse.

    python benchmarks/tiles.py [--tokens 131072] [--dim 64] [--most 1024] [--seconds 1]

One head under a causal mask, random q and k. A tile lies at the map's lower left, where the mask
shows all of it, or as much as there is; with cells of so many tokens that it covers the map, it is
half hidden. `regard.ops.pooled.pooled_tiles` on one thread and on two, plain torch (the strips that
define it) and `regard.observe(…, Map)` of the rectangle on one: the median of as many runs as take
`seconds` (at least one), in turns. What takes longer than `limit` seconds is not run again for
larger cells: a dash.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from regard import Causal, Map, observe
from regard.call.checked import Call
from regard.engines.second_pass.pooled import SIDE, Rectangle, tiles_in_torch
from regard.ops.pooled import kernel_refuses, pooled_tiles

RIVALS = ("1 thread", "2 threads", "max, 1", "max, 2", "torch, 1", "Map, 1")


def ways(call: Call, lse: Tensor, tile: Rectangle) -> dict[str, tuple[int, Callable[[], object]]]:
    """Threads, and what to run, by their name."""
    end, last = (min(at + (SIDE << tile.zoom), call.place.k_len) for at in (tile.row, tile.col))
    rows, cols = slice(tile.row, end), slice(tile.col, last)

    def by_map() -> object:
        return observe(
            call.query[:, :, rows], call.key[:, :, cols], lse=lse[:, :, rows], mask=Causal(),
            query_start=tile.row, key_start=tile.col, observe=[Map(SIDE, SIDE)],
        )  # fmt: skip

    ours = {
        name: (threads, lambda reduce=reduce: pooled_tiles(call, lse, [tile], reduce))
        for name, threads, reduce in zip(
            RIVALS[:4], (1, 2, 1, 2), ("sum", "sum", "max", "max"), strict=True
        )
    }
    return ours | {
        "torch, 1": (1, lambda: tiles_in_torch(call, lse, [tile], False)),
        "Map, 1": (1, by_map),
    }


def timed(threads: int, run: Callable[[], object]) -> float:
    """Seconds of one run."""
    torch.set_num_threads(threads)
    start = perf_counter()
    run()
    return perf_counter() - start


def measure(
    call: Call, lse: Tensor, tile: Rectangle, left: set[str], seconds: float
) -> dict[str, float]:
    """The median seconds of each way that is left, in turns."""
    here = {n: way for n, way in ways(call, lse, tile).items() if n in left}
    for threads, run in here.values():
        if tile.zoom < 6:  # pages and threads, once
            timed(threads, run)
    found: dict[str, list[float]] = {name: [] for name in here}
    while any(sum(times) < seconds and len(times) < 200 for times in found.values()):
        for name, (threads, run) in here.items():
            if sum(found[name]) < seconds:
                found[name].append(timed(threads, run))
    return {name: median(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--most", type=int, default=1024, help="tokens of the largest cells")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--limit", type=float, default=2.0)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    asked = parser.parse_args()
    n = asked.tokens
    rng = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, n, asked.dim, generator=rng) for _ in range(2))
    # Scores of random q and k have variance 1, so that row i's lse is near log(i + 1) + 1/2
    lse = (torch.arange(1, n + 1).log() + 0.5).view(1, 1, n)
    for name in asked.dtypes:
        dtype = getattr(torch, name)
        call = Call.checked(query.to(dtype), key.to(dtype), None, mask=Causal())
        assert not kernel_refuses(call)
        print(f"\n{n:,} tokens, dim {asked.dim}, {name}; ms a tile of {SIDE} × {SIDE} cells")
        print("tokens a cell  " + "".join(f"{r:>11}" for r in RIVALS))
        left = set(RIVALS)
        for zoom in range(asked.most.bit_length()):
            tile = Rectangle(0, zoom, max(n - (SIDE << zoom), 0), 0)
            found = measure(call, lse, tile, left, asked.seconds)
            shown = (f"{found[r] * 1e3:11.2f}" if r in found else f"{'–':>11}" for r in RIVALS)
            print(f"{1 << zoom:13,}  " + "".join(shown), flush=True)
            # A cell twice as wide takes four times as long
            left -= {r for r in found if found[r] * 4 > asked.limit and r in ("torch, 1", "Map, 1")}
            left -= {r for r in found if found[r] * 4 > 5 * asked.limit}


if __name__ == "__main__":
    main()
