"""The second pass on a GPU beside cuDNN's unobserved forward, in about two minutes.

    python benchmarks/gpu_pass.py [--lengths 2048 8192 16384 32768] [--write docs/benchmarks-gpu.md]

bfloat16, batch 1, 32 heads, random numbers. Kernels are compiled first, by processes side by side.
Then medians of 5 calls by CUDA events, one untimed before; × is forward + second pass over the
forward, as `regard.attention(…, observe=…)` runs both; host: Python's time for one call of the
pass. Without a GPU: one sentence, exit code 2.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from regard import Causal, Entropy, Full, Map, Received, TopK
from regard.call.checked import Call
from regard.engines.second_pass.triton import read as reading

HEADS, TIMED = 32, 5
ASKED = {
    "Entropy": [Entropy()],
    "Received": [Received()],
    "TopK(8)": [TopK(8)],
    "Map(256, 256)": [Map(256, 256)],
    "all four": [TopK(8), Received(), Entropy(), Map(256, 256)],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384, 32768])
    parser.add_argument("--write", type=Path, help="write the table to this Markdown file, too")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA GPU is available here, and nothing else is measured.", file=sys.stderr)
        return 2
    workers = min(os.cpu_count() or 1, 16)
    forms = list(product(asked.lengths, (128, 64), (False, True)))
    if asked.worker is not None:
        for n, (form, name) in enumerate(product(forms, ASKED)):
            if n % workers == asked.worker:
                call, lse = _call(*form)
                reading.read(call, ASKED[name], lse, False)
        torch.cuda.synchronize()
        return 0
    lengths = [str(n) for n in asked.lengths]
    command = [sys.executable, __file__, "--lengths", *lengths, "--worker"]
    started = [subprocess.Popen([*command, str(n)]) for n in range(workers)]
    ended = [process.wait() for process in started]
    if any(ended):
        print("a kernel does not compile; see above", file=sys.stderr)
        return 1
    lines = [
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton {triton.__version__}",
        "",
        f"| tokens | dim | mask | cuDNN, ms | {' | '.join(ASKED)} | host, all four, ms |",
        "|---" * (5 + len(ASKED)) + "|",
    ]
    print("\n".join(lines), flush=True)
    for length, dim, causal in forms:
        call, lse = _call(length, dim, causal)
        query, key = call.query, call.key
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            forward = _timed(
                lambda q=query, k=key, c=causal: scaled_dot_product_attention(q, k, k, is_causal=c)
            )
        cells = []
        for observers in ASKED.values():

            def read(call: Call = call, observers: Any = observers, lse: Any = lse) -> Any:
                return reading.read(call, observers, lse, False)

            cells.append(f"× {1 + _timed(read) / forward:.2f}")
            begun = time.perf_counter()
            read()
            host = 1e3 * (time.perf_counter() - begun)
            torch.cuda.synchronize()
        mask = "causal" if causal else "full"
        lines.append(
            f"| {length} | {dim} | {mask} | {forward:.2f} | {' | '.join(cells)} | {host:.2f} |"
        )
        print(lines[-1], flush=True)
    if asked.write:
        asked.write.write_text("\n".join(lines) + "\n", "utf-8")
    return 0


def _call(length: int, dim: int, causal: bool) -> tuple[Call, torch.Tensor]:
    """A call, and its lse by flash."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, HEADS, length, dim, device="cuda", dtype=torch.bfloat16)
    lse = torch.ops.aten._scaled_dot_product_flash_attention(query, key, key, 0.0, causal)[1]
    return Call.checked(query, key, None, mask=Causal() if causal else Full()), lse


def _timed(run: Callable[[], Any]) -> float:
    """ms, the median."""
    run()
    torch.cuda.synchronize()
    times = []
    for _ in range(TIMED):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)


if __name__ == "__main__":
    sys.exit(main())
