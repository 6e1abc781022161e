"""The table of where PyTorch's kernel is faster: what `auto` does with it, and says of it."""

import pytest
import torch

import regard
from regard import Causal, Received
from regard.call.checked import Call
from regard.engines import select
from regard.engines.cpu import measured, native

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason="built without the compiled kernels")


def at(monkeypatch, level: str, without_amx: bool = False) -> None:
    """As on a processor whose best level is this one; nothing is computed there."""
    monkeypatch.setattr(native, "LEVEL", native.LEVELS.index(level))
    monkeypatch.setattr(native, "WITHOUT_AMX", without_amx)


def qkv(n: int, dtype: torch.dtype = torch.bfloat16, keys: int | None = None):
    return [torch.zeros(1, 2, m, 8, dtype=dtype) for m in (n, keys or n, keys or n)]


def engine(*tensors, **request) -> str:
    return select(Call.checked(*tensors, **request)).name


@pytest.mark.parametrize(
    "level, without_amx, tensors, first",
    [
        ("portable", False, qkv(17, torch.float32), "sdpa"),
        ("portable", False, qkv(16, torch.float32), "cpu"),
        ("avx2", False, qkv(64), "cpu"),
        ("avx512bf16", False, qkv(64), "cpu"),
        ("avx512", True, qkv(64), "sdpa"),
        ("avx512", True, qkv(64, torch.float32), "cpu"),
        ("amx", False, qkv(128), "sdpa"),
        ("amx", False, qkv(129), "cpu"),
        ("amx", False, qkv(64, keys=500), "cpu"),
        ("amx", False, qkv(64, torch.float32), "cpu"),
    ],
)
def test_auto_takes_what_was_measured_to_be_faster(monkeypatch, level, without_amx, tensors, first):
    at(monkeypatch, level, without_amx)
    said = regard.explain(*tensors)
    assert engine(*tensors) == first
    assert next(iter(said)) == first
    assert ("order" in said) == (first == "sdpa")


def test_the_reason_tells_shape_level_and_ratio(monkeypatch):
    at(monkeypatch, "amx")
    (reason,) = regard.explain(*qkv(64))["order"]
    assert reason == (
        "sdpa is tried before cpu: for 17 to 128 queries and up to 128 keys in bfloat16 its time "
        "over that of level amx is 0.85–0.91, measured on an Intel Xeon with AMX: 32 × 12 heads of "
        "64, forward"
    )


def test_what_pytorch_cannot_do_stays_ours(monkeypatch):
    """Observers, a cap, and gradients where only its forward is faster."""
    at(monkeypatch, "amx")
    assert engine(*qkv(64), mask=Causal()) == "sdpa"
    assert engine(*qkv(64), observe=[Received()]) == "cpu"
    assert engine(*qkv(64), softcap=5.0) == "cpu"
    query, key, value = qkv(64)
    assert engine(query.requires_grad_(), key, value) == "cpu"


def test_rows_are_of_levels_that_exist():
    for row in measured.TABLE:
        assert set(row.levels) <= set(native.LEVELS)
        assert row.ratio
        assert row.where
