"""Which way wins where: docs/distributed.md's formulas on 8 and 64 GPUs, to 10M tokens, on paper.

    python benchmarks/distributed_paper.py --tflops 330

Nothing is run. One causal layer, forward, 32 heads of 128, 8 of keys, bfloat16, batch 1. Compute is
4 · H · N² / 2 · d / P floating-point operations at the rate given (a measured kernel's; see
docs/benchmarks-gpu.md); sending takes bytes / bandwidth: 450 GB/s each way for NVLink 4 of 8 GPUs,
50 GB/s a GPU (one 400 Gb/s adapter) for InfiniBand between them, the makers' figures. By ring and
gather sending hides behind compute as far as it can; the all-to-alls of heads do not.
"""

import argparse

from regard.ops.distributed import formulas

HEADS, KV_HEADS, DIM = 32, 8, 128
NVLINK, INFINIBAND = 450e9, 50e9
LENGTHS = (131_072, 1_048_576, 10_485_760)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tflops", type=float, required=True, help="of the forward kernel")
    parser.add_argument("--memory", type=float, default=16, help="GiB for gathered keys and values")
    asked = parser.parse_args()
    print(
        "| GPUs | tokens | compute | heads | gather | ring | least |\n|---|---|---|---|---|---|---|"
    )
    for size in (8, 64):
        for length in LENGTHS:
            print(row(size, length, asked.tflops * 1e12, asked.memory * 2**30))


def row(size: int, length: int, rate: float, memory: float) -> str:
    """One line of the table: seconds of each way, and the ways that are least."""
    sizes = formulas.Sizes(size, 1, HEADS, KV_HEADS, length, length, DIM, DIM, 2)
    band = NVLINK if size <= 8 else INFINIBAND
    compute = 2 * HEADS * length**2 * DIM / size / rate
    times: dict[str, float] = {}
    if KV_HEADS % size == 0:
        times["heads"] = compute + formulas.forward("heads", sizes) / band
    travel = formulas.forward("gather", sizes) / band
    group = length * 2 * DIM * 2  # of one kv head
    if 2 * group <= memory:  # one is computed while the next comes
        # The first group is waited for, the last hides nothing
        rest = (KV_HEADS - 1) * max(compute, travel) / KV_HEADS
        times["gather"] = travel / KV_HEADS + rest + compute / KV_HEADS
    step = compute / size
    times["ring"] = (size - 1) * max(step, travel / (size - 1)) + step
    least = min(times.values())
    best = ", ".join(how for how, t in times.items() if t <= 1.01 * least)
    said = " | ".join(
        short(times[how]) if how in times else "—" for how in ("heads", "gather", "ring")
    )
    return f"| {size} | {length:,} | {short(compute)} | {said} | {best} |"


def short(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


if __name__ == "__main__":
    main()
