"""What test_triton*.py have their workers do: processes in which Triton interprets its kernels.

Triton chooses between compiling and interpreting when it is imported, so this stands in processes
of its own, which start with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import warnings

import torch
import triton.runtime.interpreter as triton_interpreter
from torch import Tensor

import regard.engines.second_pass.weigh
from cases import CASES, Case
from observer_truths import Truth, assert_seen_nearly, parts, watchers
from regard import (
    Causal,
    Entropy,
    First,
    Full,
    LogSumExp,
    Map,
    MaxScore,
    NormTopK,
    Padding,
    Received,
    Rows,
    TopK,
    Window,
    attention,
    observe,
)
from regard.call.checked import Call
from regard.call.geometry import Span
from regard.engines.second_pass.triton import read as reading

torch.set_num_threads(1)
warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, of inf · 0 where hidden

PATCHED: set[str] = set()  # modules of Triton's own functions


def call_device_function(self, *arguments, **named):
    """Triton looks through its whole language at every such call; once a module is enough.

    Half of the time of these tests. Kernels' own modules are done when a kernel starts.
    """
    module = self.fn.__module__
    if module not in PATCHED and not module.startswith("regard"):
        triton_interpreter._patch_lang(self.fn)
        PATCHED.add(module)
    return self.rewrite()(*arguments, **named)


triton_interpreter.InterpretedFunction.__call__ = call_device_function


def case_of(name: str) -> Case:
    """The shared case of that name."""
    return next(c for c in CASES if c.name == name)


def check(name: str, dtype: torch.dtype, observers: list | None, blocks: tuple[int, int]) -> str:
    """Each observer against the dense float64 weights; the refusal, if it is one."""
    return check_case(case_of(name), dtype, observers, blocks)


def check_case(
    case: Case, dtype: torch.dtype, observers: list | None, blocks: tuple[int, int]
) -> str:
    """As `check`, of any case."""
    call = Call.checked(*case.tensors(dtype=dtype), **case.request(dtype))
    if reading.why_not(call):
        return "; ".join(reading.why_not(call))
    truth = Truth(case, dtype)
    if observers is None:
        every = watchers(call.place.query_start)
        observers = [o for o in every if not reading.refuses(o)]
    found = reading.read(call, observers, truth.lse.float(), False, blocks)
    # NumPy's sums, not those of a GPU: by a fixed tolerance, huge scores by their rounding
    tolerance = 0.02 if case.magnitude > 100 else 1e-4
    for observer, tensors in zip(observers, found, strict=True):
        given = [(tuple(t.shape), t.dtype) for t in tensors]
        assert given == observer.shapes(call.place, call.working), observer
        result = observer.result(tensors, call.place)
        assert_seen_nearly(observer, result, truth, tolerance)
    return ""


def shards() -> None:
    """With the lse of all keys, a shard's weights are exp(score − lse), as in torch."""
    query, key, _ = case_of("causal").tensors(dtype=torch.float32)
    (lse,) = observe(query, key, observe=[LogSumExp()], mask=Causal())
    asked = [TopK(4), Received(), Entropy(), Map(8, 8), Rows([-1])]
    place = {"query_start": 80, "key_start": 60, "mask": Causal()}
    call = Call.checked(query, key[:, :, 60:130], None, **place)
    ours = reading.read(call, asked, lse.values, True, (32, 32))
    theirs = observe(query, key[:, :, 60:130], observe=asked, lse=lse.values, **place)
    for observer, tensors, wanted in zip(asked, ours, theirs, strict=True):
        for mine, truth in zip(
            tensors, parts(wanted).values(), strict=False
        ):  # fmt: skip
            torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-5, msg=str(observer))


def same_bits() -> None:
    """Again, and for each item of the batch alone."""
    query, key, _ = case_of("an item of padding").tensors(dtype=torch.float32)
    query, key = query[:, :1], key[:, :1]
    keep = torch.ones(2, 150, dtype=torch.bool)
    keep[1, :90] = False
    asked = [TopK(3), Received(), Entropy(), Map(4, 4)]
    call = Call.checked(query, key, None, mask=Padding(keep) & Window(40))
    _, lse = attention(query, key, key, mask=Padding(keep) & Window(40), return_lse=True)
    first, again = (reading.read(call, asked, lse, False, (32, 32)) for _ in range(2))
    alone = [
        reading.read(call.item(b), asked, lse[b : b + 1].clone(), False, (32, 32)) for b in (0, 1)
    ]
    for i in range(len(asked)):
        for n, tensor in enumerate(first[i]):
            assert torch.equal(tensor, again[i][n])
            assert torch.equal(tensor, torch.cat([a[i][n] for a in alone]))


def bad_numbers() -> None:
    """A NaN among the queries shows in its row and nowhere else."""
    query, key = torch.randn(1, 2, 20, 16), torch.randn(1, 2, 40, 16)
    query[0, 1, 7, 3] = torch.nan
    _, lse = attention(query, key, key, return_lse=True, engine="tiled")
    asked = [TopK(3), Received(), Entropy(), MaxScore(), Map(4, 4), Map(4, 4, "max")]
    call = Call.checked(query, key, None)
    top, received, entropy, score, pooled, most = reading.read(call, asked, lse, False)
    for rows in (top[1].isnan().all(-1), entropy[0].isnan(), score[0].isnan()):
        assert rows.nonzero().tolist() == [[0, 1, 7]]
    assert received[0].isnan().all(-1).nonzero().tolist() == [[0, 1]]
    for cells in (pooled[0], most[0]):
        assert cells.isnan().all(-1).nonzero().tolist() == [[0, 1, 1 if cells.shape[2] == 3 else 0]]


def hidden_numbers() -> None:
    """Whatever stands in a key that no row sees: the same bits."""
    query, key = torch.randn(2, 2, 40, 16), torch.randn(2, 2, 60, 16)
    asked = [TopK(3), Received(), Entropy(), MaxScore(), Map(4, 4), Rows([3])]
    hides = torch.zeros(40, 60).masked_fill(torch.arange(60) % 7 == 3, -torch.inf)
    masks = [{"mask": m} for m in (Padding(torch.arange(60) % 7 > 0), Window(9), ~Window(60, 3))]
    for request in (*masks, {"bias": hides}, {"bias": [torch.ones(40, 60), hides]}):
        call = Call.checked(query, key, None, **request)
        shown = call.program.visible(Span(0, 40, 0, 60))
        if call.biases:
            shown = (hides == 0)[None, None]
        unseen = ~shown.any(-2)[0, 0]
        assert unseen.any()
        found = []
        for bad in (0.5, torch.nan, torch.inf):
            given = key.masked_fill(unseen[:, None], bad)
            _, lse = attention(query, given, key, **request, return_lse=True, engine="tiled")
            call = Call.checked(query, given, None, **request)
            found.append([t for each in reading.read(call, asked, lse, False) for t in each])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def ties() -> None:
    """All scores 0: the first visible keys, whichever tile they stand in."""
    query, key = torch.zeros(1, 1, 20, 16), torch.randn(1, 1, 100, 16)
    for mask in (Causal(), Padding(torch.arange(100) % 3 > 0)):
        _, lse = attention(query, key, key, return_lse=True, mask=mask, query_start=80)
        call = Call.checked(query, key, None, mask=mask, query_start=80)
        ((names, *_),) = reading.read(call, [TopK(20)], lse, False, (16, 16))
        (wanted,) = observe(query, key, observe=[TopK(20)], mask=mask, query_start=80)
        assert torch.equal(names, wanted.indices)


def given_inaccurate() -> None:
    """Rows of large lse are divided by their own sum, in columns too: their lse is rounded."""
    for seed in range(5):
        torch.manual_seed(seed)
        query = torch.randn(1, 2, 40, 16) * 300
        key = torch.randn(1, 2, 50, 16)
        _, lse = attention(query.double(), key.double(), key.double(), return_lse=True)
        asked = [Received(), Map(2, 2), Map(8, 8), Entropy()]
        off = lse.float() * (1 + 3e-5)
        # Every row sees a key, whatever the mask is read from: a band, a program, a list of tiles
        for mask in (Full(), Window(60, 60), Causal() | First(50)):
            call = Call.checked(query, key, None, mask=mask)
            seen = reading.read(call, asked, off, False)
            forty = torch.full((1, 2), 40.0)
            torch.testing.assert_close(seen[0][0].sum(-1), forty)
            for cells in (seen[1][0], seen[2][0]):
                torch.testing.assert_close(cells.sum((-1, -2)), forty)


def inside_attention() -> None:
    """As `weigh` uses it on a GPU: the output untouched, what it cannot gather read in torch."""
    tensors = case_of("causal").tensors(dtype=torch.float32)
    asked = [NormTopK(2), TopK(3), TopK(100), Received(), TopK(3), Entropy()]
    request = {"mask": Causal(), "engine": "tiled"}
    alone = attention(*tensors, **request)
    _, wanted = attention(*tensors, observe=asked, **request)
    before = regard.engines.second_pass.weigh.kernel_refuses
    calls = []
    read = reading.read
    try:
        regard.engines.second_pass.weigh.kernel_refuses = reading.why_not
        reading.read = lambda call, observers, *rest: (
            calls.append(list(observers)) or read(call, observers, *rest)
        )
        out, seen = attention(*tensors, observe=asked, **request)
    finally:
        regard.engines.second_pass.weigh.kernel_refuses, reading.read = before, read
    assert calls == [[TopK(3), Received(), TopK(3), Entropy()]]
    assert torch.equal(out, alone)
    for mine, truth in zip(seen, wanted, strict=True):
        for a, b in zip(same_fields(mine), same_fields(truth), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def same_fields(result: object) -> list[Tensor]:
    """A result's tensors."""
    return list(parts(result).values())
