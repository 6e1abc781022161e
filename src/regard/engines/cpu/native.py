"""The compiled CPU kernels: where the library lies, and which instruction sets it may use here.

The library speaks plain C (engines/cpu/csrc/abi.h) and is loaded by ctypes: one build serves every
Python. `REGARD_ISA` names the highest instruction set to use (`LEVELS`); `REGARD_KERNELS` another
build of the library, as tests make it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache

import torch

from ...errors import RegardError
from .structs import EVERY

NAMES = ("kernels.so", "kernels.dll")
"""What the library is called; it holds nothing of a Python's, so it bears none in its name."""

LEVELS = ("portable", "avx2", "avx512", "avx512bf16", "amx", "neonbf16")


@cache
def path() -> str | None:
    """Where the library lies; None if this installation was built without it."""
    if other := os.environ.get("REGARD_KERNELS"):
        return other
    found = importlib.util.find_spec("regard.engines.cpu")
    # Beside this file; of an editable installation, where that put what it built
    folders = (found and found.submodule_search_locations) or []
    places = (os.path.join(folder, name) for folder in folders for name in NAMES)
    return next(filter(os.path.isfile, places), None)


AVAILABLE = path() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The library, loaded; None if this installation was built without it."""
    where = path()
    if where is None:
        return None
    loaded = ctypes.CDLL(where)
    _compare(loaded, where)
    loaded.regard_forward.argtypes = [ctypes.c_void_p]  # bytes, or an address
    loaded.regard_evict.argtypes = [ctypes.c_void_p]
    loaded.regard_use_openmp.argtypes = [ctypes.c_void_p]
    loaded.regard_parts.argtypes = [ctypes.c_void_p]
    loaded.regard_error.argtypes = [ctypes.c_int]
    loaded.regard_error.restype = ctypes.c_char_p
    loaded.regard_use_openmp(_torch_threads())
    return loaded


def _compare(loaded: ctypes.CDLL, where: str) -> None:
    """RegardError where the library was built for other structs than Python packs."""
    sizes = (ctypes.c_int64 * len(EVERY))()
    count = loaded.regard_sizes(sizes, len(EVERY)) if hasattr(loaded, "regard_sizes") else 0
    for mine, size in zip(EVERY, sizes, strict=True):
        if count != len(EVERY) or size != mine.size:
            raise RegardError(
                f"{where} was built from other sources than these (Regard{mine.name} has {size} "
                f"bytes there, {mine.size} here): install regard again to build it"
            )


def _torch_threads() -> int | None:
    """`GOMP_parallel` of the OpenMP that torch is linked to: kernels then run in its threads.

    Looked up through torch: scikit-learn, say, may have loaded another copy, with its own threads.
    """
    try:
        linked = ctypes.CDLL(torch._C.__file__)
        return ctypes.cast(linked.GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


def built() -> tuple[str, ...]:
    """The instruction sets for which the library holds kernels; () if there is no library."""
    loaded = library()
    return _named(0 if loaded is None else loaded.regard_built())


def levels() -> tuple[str, ...]:
    """The instruction sets that library, processor and system have, the best last."""
    loaded = library()
    return _named(0 if loaded is None else loaded.regard_levels())


PARTS = ("packing", "scores", "softmax", "mix", "observers", "rest")


def cycles() -> tuple[int, dict[str, int]] | None:
    """Since the last call: how many tiles forwards went over, and their cycles by `PARTS`.

    None if the library was not built to count them: CMake's option REGARD_PARTS.
    """
    loaded, counts = library(), (ctypes.c_int64 * (1 + len(PARTS)))()
    if loaded is None or not loaded.regard_parts(ctypes.addressof(counts)):
        return None
    return counts[0], dict(zip(PARTS, counts[1:], strict=True))


def _named(bits: int) -> tuple[str, ...]:
    return tuple(name for i, name in enumerate(LEVELS) if bits >> i & 1)


def _chosen() -> tuple[int, str]:
    """The number of the instruction set to use, and what is wrong with `REGARD_ISA`."""
    here, wanted = levels(), os.environ.get("REGARD_ISA")
    if wanted in (*here, None):
        return LEVELS.index(wanted or here[-1]), ""
    return -1, f"REGARD_ISA is {wanted!r}; give one that runs here: {', '.join(here)}"


# Constants, as torch.compile reads them
LEVEL, WRONG = _chosen() if AVAILABLE else (-1, "")
WITHOUT_AMX: bool = torch.cpu._is_amx_tile_supported() and LEVELS[LEVEL] != "amx"


def level() -> int:
    """The number of the instruction set to use: the best, or what `REGARD_ISA` names."""
    if WRONG:
        raise RegardError(WRONG)
    return LEVEL
