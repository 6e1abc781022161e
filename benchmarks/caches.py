"""What a cache costs beside the attention that reads it: decode steps, and tokens of `generate()`.

    python benchmarks/caches.py [--model FOLDER] [--held 8192] [--prompt 1024] [--new 10]

Decode: `cache.attend` of one new token after --held tokens, beside `regard.attention` on keys and
values of that length that lie ready. Generate, with --model: milliseconds per token after a prompt
of --prompt tokens (each side goes on by --new tokens in its turn), for the full cache and for
caches that keep a quarter of it. The sides take turns, medians; bind the threads:
OMP_PROC_BIND=true OMP_PLACES=cores.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch

import regard
from regard.cache import H2O, TOVA, KVCache, PagedCache, SnapKV, WindowCache
from regard.ops.cache import Cache

Run = Callable[[], object]
HEADS = ((32, 32, 128), (32, 8, 128), (8, 2, 64))  # heads, kv heads, dim


def seconds(run: Run, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def turns(sides: dict[str, Run], rounds: int, count: int) -> dict[str, list[float]]:
    """Seconds of each side in each round; every other round goes backwards.

    Each begins its turn with a call that does not count: what it reads is then as near as it gets.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            sides[name]()
            found[name].append(seconds(sides[name], count))
    return found


def rows(found: dict[str, list[float]], title: str) -> Iterable[str]:
    """Milliseconds, and over the first side: the median of the rounds' ratios, and their range."""
    first = next(iter(found.values()))
    for name, times in found.items():
        ratios = sorted(t / f for t, f in zip(times, first, strict=True))
        yield (
            f"| {title} | {name} | {statistics.median(times) * 1e3:.2f} | "
            f"{statistics.median(ratios):.2f} | {ratios[0]:.2f}–{ratios[-1]:.2f} |"
        )


def decode(heads: tuple[int, int, int], dtype: torch.dtype, held: int, rounds: int) -> list[str]:
    """One step after `held` tokens, for the caches that keep them all."""
    h, kv, dim = heads
    given = [torch.randn(1, n, held, dim, dtype=dtype) for n in (kv, kv)]
    step = [torch.randn(1, n, 1, dim, dtype=dtype) for n in (h, kv, kv)]
    sides: dict[str, Run] = {"attention alone": lambda: regard.attention(step[0], *given)}
    # Room for every step, as after the buffers have grown
    for name, make in {
        "KVCache": lambda: KVCache(capacity=2 * held),
        "PagedCache": lambda: PagedCache(page_size=16),
    }.items():
        cache: Cache = make()
        cache.attend(torch.randn(1, h, held - 1, dim, dtype=dtype), *(t[:, :, 1:] for t in given))

        def attend(cache: Cache = cache) -> None:
            cache.attend(*step)

        sides[name] = attend
    with torch.no_grad():
        found = turns(sides, rounds, 5)
    kind = str(dtype).removeprefix("torch.")
    return list(rows(found, f"{h}/{kv} heads, dim {dim}, {kind}"))


class Clock:
    """A streamer of transformers that notes when each token comes; the prompt is the first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(folder: str, prompt: int, new: int, rounds: int) -> list[str]:
    """Tokens of a model after a prompt: what eviction adds to each, or saves."""
    import transformers

    regard.huggingface.generation_cache()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="regard"
    ).eval()
    ids = torch.randint(100, 5000, (1, prompt), generator=torch.Generator().manual_seed(0))
    budget = prompt // 4
    makes: dict[str, Callable[[], Cache]] = {
        "full": KVCache,
        "window, first 4": lambda: WindowCache(budget - 3, first=4),
        "H2O": lambda: KVCache(evict=H2O(budget)),
        "SnapKV": lambda: KVCache(evict=SnapKV(budget)),
        "TOVA": lambda: KVCache(evict=TOVA(budget)),
    }

    sides = {
        name: (regard.huggingface.generation_cache(make), [ids]) for name, make in makes.items()
    }

    def token(name: str) -> float:
        """Seconds from token to token, the median over some more of them."""
        clock, (cache, texts) = Clock(), sides[name]
        text = model.generate(
            texts[-1], max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
            past_key_values=cache, streamer=clock,
        )  # fmt: skip
        texts.append(text)
        return statistics.median(b - a for a, b in pairwise(clock.times[1:]))

    found: dict[str, list[float]] = {name: [] for name in makes}
    for number in range(rounds + 1):  # the first reads the prompt
        for name in list(makes)[:: -1 if number % 2 else 1]:
            took = token(name)
            if number:
                found[name].append(took)
    return list(rows(found, f"a token of generate(), after {prompt}"))


def main() -> None:
    """Print one table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--held", type=int, default=8192)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads; regard {regard.__version__}, "
        f"torch {torch.__version__}"
    )
    print("| | | ms | × the first | range |\n|---|---|---|---|---|")
    for heads in HEADS:
        for dtype in (torch.float32, torch.bfloat16):
            print("\n".join(decode(heads, dtype, args.held, args.rounds)), flush=True)
    if args.model:
        print("\n".join(generate(args.model, args.prompt, args.new, 3 * args.rounds)))


if __name__ == "__main__":
    main()
