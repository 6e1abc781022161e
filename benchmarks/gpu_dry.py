"""In the place of a GPU, so that every line of the scripts for one has run before one is at hand.

Triton's kernels are interpreted on the CPU, as in the tests, whose stand-ins for PyTorch's kernels
are taken; times are those of the processor, and mean nothing. Needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_linear
import torch
from torch.nn.attention import flex_attention

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


class Event:
    """A CUDA event by the clock."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


class Graph:
    """A CUDA graph that holds nothing."""

    def replay(self) -> None:
        pass


def stand_in() -> AbstractContextManager[None]:
    """Within it a CPU stands in for the GPU."""
    import interpreted_hidden
    import interpreted_linear  # noqa: F401  the interpreter multiplies bfloat16
    from regard.engines import flex, sdpa_cuda
    from regard.engines.decode import engine as decode
    from regard.engines.second_pass import weigh
    from regard.engines.second_pass.triton import read

    card = {"L2_cache_size": 0, "name": "no GPU", "total_memory": 0, "multi_processor_count": 1}
    cuda: Any = torch.cuda
    cuda.Event, cuda.CUDAGraph = Event, Graph
    cuda.graph = lambda graph: nullcontext()
    cuda.synchronize = cuda.reset_peak_memory_stats = lambda: None
    cuda.memory_allocated = cuda.max_memory_allocated = lambda: 0
    cuda.get_device_properties = lambda device: SimpleNamespace(**card)
    torch_flex: Any = flex_attention
    torch_flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    patched: Any = flex
    patched.why_not, patched._compiled = flex.refuses, lambda: flex_attention.flex_attention
    linear: Any = gpu_linear
    linear.peer = lambda form: lambda q, *others: q
    weigh.kernel_refuses, decode.why_not = read.why_not, decode.refusals
    for name in ("FLASH", "CUDNN"):
        kernel = getattr(sdpa_cuda, name)
        by_torch = {"forward": interpreted_hidden._forward}
        setattr(sdpa_cuda, name, type(kernel)(**{**vars(kernel), **by_torch}))
    return interpreted_hidden.on_gpu()
