"""The suites: what is timed against whom, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product

import torch
from torch import Tensor

from ...call.masks import Causal, Documents, First, Full, Window
from ...call.observers import Entropy, Map, Observer, Received, TopK
from ...call.sparse_masks import BlockSparse
from ...errors import RegardError
from .problems import TYPES, Problem

HALVES = ("fp32", "bf16", "fp16")
ALL_PEERS = ("sdpa", "eager", "flex", "onnxruntime")
SLOW = ("eager", "flex", "onnxruntime", "materialised")  # left out of --quick
BLOCK = 64  # side of the blocks of the block-sparse mask


@dataclass(frozen=True)
class Entry:
    """One line of a suite: a problem and its peers. quick: it is among those of --quick."""

    suite: str
    shape: str
    problem: Problem
    peers: tuple[str, ...] = ("sdpa",)
    quick: bool = False

    @property
    def name(self) -> str:
        """suite/shape."""
        return f"{self.suite}/{self.shape}"


def prefill() -> Iterator[Entry]:
    """every query sees every key"""
    yield from _square("prefill", Full())


def causal() -> Iterator[Entry]:
    """causal prefill"""
    yield from _square("causal", Causal())


def _square(suite: str, mask: Full | Causal) -> Iterator[Entry]:
    for type, dim, n in product(TYPES, (64, 128), (512, 2048, 4096, 8192)):
        yield Entry(
            suite,
            f"{type}/d{dim}/n{n}",
            Problem(type=type, q_len=n, k_len=n, dim=dim, mask=mask),
            ALL_PEERS if n == 2048 and type in HALVES else ("sdpa",),
            quick=n == 2048 and dim == 64 and type != "fp16",
        )


def gqa() -> Iterator[Entry]:
    """grouped heads, causal prefill"""
    for type, (heads, kv_heads), n in product(HALVES, ((32, 8), (32, 1)), (512, 2048)):
        yield Entry(
            "gqa",
            f"{type}/{heads}:{kv_heads}/n{n}",
            Problem(
                type=type, heads=heads, kv_heads=kv_heads, q_len=n, k_len=n, dim=128, mask=Causal()
            ),
            ALL_PEERS if n == 2048 and kv_heads == 8 else ("sdpa",),
            quick=n == 512 and kv_heads == 8 and type != "fp16",
        )


def decode() -> Iterator[Entry]:
    """one or a few queries after many keys, dim 128"""
    shapes = ((1, 1024), (1, 8192), (1, 32768), (4, 8192), (16, 8192))
    for type, kv_heads, (queries, keys) in product(HALVES, (32, 8), shapes):
        yield Entry(
            "decode",
            f"{type}/32:{kv_heads}/q{queries}/n{keys}",
            Problem(
                type=type, heads=32, kv_heads=kv_heads, q_len=queries, k_len=keys, dim=128,
                mask=Causal(),
            ),
            ALL_PEERS if (queries, keys) == (1, 8192) else ("sdpa",),
            quick=(queries, keys) == (1, 8192) and type != "fp16",
        )  # fmt: skip


def backward() -> Iterator[Entry]:
    """the backward pass alone"""
    masks = {"full": Full(), "causal": Causal()}
    for type, (dim, n), (name, mask) in product(HALVES, ((64, 2048), (128, 4096)), masks.items()):
        yield Entry(
            "backward",
            f"{type}/{name}/d{dim}/n{n}",
            Problem(type=type, q_len=n, k_len=n, dim=dim, mask=mask, backward=True),
            ("sdpa", "eager", "flex") if n == 2048 else ("sdpa",),
            quick=n == 2048 and name == "causal" and type != "fp16",
        )


def masks() -> Iterator[Entry]:
    """windows, sinks, documents, blocks; SDPA gets the mask as a tensor; causal: ours without"""
    window, n = Causal() & Window(1024), 16384
    for type in ("fp32", "bf16"):
        each = {
            f"window/n{n}": (n, window),
            f"sinks/n{n}": (n, Causal() & (Window(1024) | First(4))),
            "documents/n8192": (8192, Causal() & Documents.from_cu_seqlens(_packed(8192))),
            f"blocks-10%/n{n}": (n, Causal() & blocks(n)),
        }
        for shape, (size, mask) in each.items():
            problem = Problem(type=type, q_len=size, k_len=size, dim=64, mask=mask)
            yield Entry("masks", f"{type}/{shape}", problem, ("sdpa", "flex", "causal"))
        problem = Problem(type=type, q_len=4096, k_len=4096, dim=64, mask=window)
        yield Entry("masks", f"{type}/window/n4096", problem, ALL_PEERS, quick=True)


def _packed(total: int) -> Tensor:
    """Cumulative lengths of documents that double from 64 tokens on, again and again."""
    ends = [0]
    while ends[-1] < total:
        ends.append(min(ends[-1] + 64 * 2 ** ((len(ends) - 1) % 5), total))
    return torch.tensor(ends, dtype=torch.int64, device="cpu")


def blocks(n: int) -> BlockSparse:
    """A tenth of the blocks, scattered, and the diagonal."""
    at = torch.arange(n // BLOCK, dtype=torch.int64, device="cpu")
    row, col = at[:, None], at[None, :]
    return BlockSparse(((row * 7 + col * 13) % 10 == 0) | (row == col), BLOCK)


def observed() -> Iterator[Entry]:
    """causal forward with the weights in sight; cost: over ours without"""
    each: tuple[Observer, ...] = (TopK(8), Received(), Entropy(), Map(256, 256))
    for type, n in product(("fp32", "bf16"), (2048, 8192)):
        asked = {type_name(o): (o,) for o in each} | {"all": each}
        for name, observe in asked.items():
            problem = Problem(type=type, q_len=n, k_len=n, dim=64, mask=Causal(), observe=observe)
            dense = ("materialised",) if n == 2048 or name == "all" else ()
            quick = n == 2048 and name == "all"
            yield Entry(
                "observed", f"{type}/{name}/n{n}", problem, ("plain", "sdpa", *dense), quick
            )
    for type in ("fp32", "bf16"):
        problem = Problem(
            type=type, heads=2, kv_heads=2, q_len=32768, k_len=32768, dim=64, mask=Causal(),
            observe=each,
        )  # fmt: skip
        yield Entry("observed", f"{type}/all/n32768", problem, ("plain", "sdpa", "materialised"))


def type_name(observer: Observer) -> str:
    """An observer's kind, as a shape names it."""
    return type(observer).__name__.lower()


def short() -> Iterator[Entry]:
    """32 short sequences, 12 heads"""
    for type, n in product(HALVES, (64, 96, 128)):
        yield Entry(
            "short",
            f"{type}/n{n}",
            Problem(type=type, batch=32, heads=12, kv_heads=12, q_len=n, k_len=n, dim=64),
            ALL_PEERS if n == 128 else ("sdpa", "onnxruntime"),
            quick=n == 128 and type != "fp16",
        )


def threads() -> Iterator[Entry]:
    """causal prefill on 1 thread … all"""
    most = torch.get_num_threads()
    counts = sorted({*(2**b for b in range(most.bit_length()) if 2**b <= most), most})
    for type, count in product(("fp32", "bf16"), counts):
        problem = Problem(type=type, q_len=2048, k_len=2048, dim=64, mask=Causal(), threads=count)
        yield Entry("threads", f"{type}/{count}", problem, quick=True)


def linear() -> Iterator[Entry]:
    """causal linear attention; causal: ours, exact; half: linear over half of the tokens"""

    def entry(type: str, form: str, n: int, *peers: str, quick: bool = False) -> Entry:
        problem = Problem(
            type=type, form=form, heads=2, kv_heads=2, q_len=n, k_len=n, dim=64, mask=Causal()
        )
        return Entry("linear", f"{type}/{form}/n{n}", problem, peers, quick)

    for n in (2**b for b in range(9, 16)):
        yield entry("fp32", "elu", n, "causal", quick=n == 4096)
    for n in (2**b for b in range(16, 21)):
        yield entry("fp32", "elu", n, "half", quick=n == 65536)
    for type, form in (
        ("bf16", "elu"), ("fp32", "retention"), ("fp32", "gla"), ("fp32", "delta")
    ):  # fmt: skip
        yield entry(type, form, 4096, "causal")
        yield entry(type, form, 65536, "half")


SUITES: dict[str, Callable[[], Iterator[Entry]]] = {
    s.__name__: s
    for s in (prefill, causal, gqa, decode, backward, masks, observed, short, threads, linear)
}


def _quick(peers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(peer for peer in peers if peer not in SLOW)


def chosen(suites: Sequence[str] = (), only: str | None = None, quick: bool = False) -> list[Entry]:
    """The entries of the named suites (all without), those that match a pattern, or the quick ones.

    quick: without the peers that compile, or that take long.

    only: a glob over suite/shape, such as "causal/*/d64*"; without * ? [ a part of the name.
    RegardError where a name is unknown or nothing is left.
    """
    for name in suites:
        if name not in SUITES:
            raise RegardError(f"no suite is named {name!r}; there are {', '.join(SUITES)}")
    found = [e for name, make in SUITES.items() if not suites or name in suites for e in make()]
    if only is not None:
        pattern = only if set(only) & set("*?[") else f"*{only}*"
        found = [e for e in found if fnmatchcase(e.name, pattern)]
    if quick:
        found = [replace(e, peers=_quick(e.peers)) for e in found if e.quick]
    if not found:
        raise RegardError(
            f"no shape{' of --quick' * quick} matches {only!r}; regard bench --list shows all"
        )
    return found
