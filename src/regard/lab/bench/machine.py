"""The machine that is measured: its cores, who else uses them, and what it is.

Linux only: it reads /proc.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ...engines.cpu import native
from ...errors import RegardError
from .timing import Clock

PROC = Path("/proc")
BOUND = {
    # Unbound, torch's threads now and then meet on one core: 15 ms for a call of 1 ms
    "OMP_PROC_BIND": "true",
    "OMP_PLACES": "cores",
    # FlexAttention's compiler would else start processes of its own, while others are timed
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
"""The environment to measure in: torch reads it when it is imported."""
_ISA = (
    "avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "amx_int8",
    "asimd", "bf16", "sve",
)  # fmt: skip


def clock() -> Clock:
    """The real one. RegardError where there is no /proc to read."""
    if not (PROC / "stat").exists():
        raise RegardError(
            "regard bench tells by /proc whether the machine is quiet; it runs on Linux"
        )
    mine = cores()

    def others() -> float:
        return busy((PROC / "stat").read_text(), mine) - time.process_time()

    return Clock(others, len(mine))


def busy(stat: str, cores: frozenset[int]) -> float:
    """CPU-seconds in which these cores were not idle, stolen time included. proc(5), /proc/stat."""
    ticks = 0
    for line in stat.splitlines():
        name, *counts = line.split()
        if name.startswith("cpu") and name != "cpu" and int(name[3:]) in cores:
            user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, counts)
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def cores() -> frozenset[int]:
    """The cores that this process may use: those of all its threads.

    The binding pins the main thread, at the import of torch, to one core.
    """
    torch.ones(2**20, dtype=torch.float32, device="cpu").add_(1)  # starts torch's threads
    found = os.sched_getaffinity(0)
    tasks = PROC / "self/task"
    for task in tasks.iterdir() if tasks.is_dir() else ():  # a chroot may be without /proc
        found |= os.sched_getaffinity(int(task.name))
    return frozenset(found)


@contextmanager
def everywhere(mine: frozenset[int]) -> Iterator[None]:
    """While this is open the main thread may run on all the cores, and so may threads it starts.

    A thread inherits the cores of the one that starts it: another library's would otherwise all
    stand on the core that the binding gave to the main thread.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, mine)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def available_bytes() -> int:
    """Memory that can be had without swapping. proc(5), /proc/meminfo."""
    return int(_fields((PROC / "meminfo").read_text())["MemAvailable"].split()[0]) * 1024


def describe() -> dict[str, object]:
    """The machine and the versions, fit for JSON. kernels: the instruction set that ours use."""
    info = _fields((PROC / "cpuinfo").read_text())
    flags = info.get("flags", info.get("Features", "")).split()
    return {
        "processor": info.get("model name", platform.machine()),
        "cores": len(cores()),
        "isa": [name for name in _ISA if name in flags],
        "kernels": native.LEVELS[native.level()] if native.library() is not None else None,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "bound": os.environ.get("OMP_PROC_BIND", "false"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "regard": _version("regard"),
        "torch": torch.__version__,
        "onnxruntime": _version("onnxruntime"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _fields(text: str) -> Mapping[str, str]:
    """`name : value` lines; of several processors, the first."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
