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


SHORT = measured.Faster(
    ("amx",),
    measured.BF16,
    (17, 128),
    (1, 128),
    False,
    False,
    "0.8–0.9",
    "a processor of this test",
)
"""A row that is limited in every way, as those of the table need not be."""


def with_short(monkeypatch) -> None:
    monkeypatch.setattr(measured, "TABLE", (*measured.TABLE, SHORT))
    at(monkeypatch, "amx")


def qkv(n: int, dtype: torch.dtype = torch.bfloat16, keys: int | None = None):
    return [torch.zeros(1, 2, m, 8, dtype=dtype) for m in (n, keys or n, keys or n)]


def engine(*tensors, **request) -> str:
    return select(Call.checked(*tensors, **request)).name


@pytest.mark.parametrize(
    "level, without_amx, tensors, first",
    [
        ("portable", False, qkv(17, torch.float32), "sdpa"),
        ("portable", False, qkv(16, torch.float32), "cpu"),
        ("neonbf16", False, qkv(17), "sdpa"),
        ("neonbf16", False, qkv(16), "cpu"),
        ("avx2", False, qkv(64), "cpu"),
        ("avx512bf16", False, qkv(64), "cpu"),
        ("avx512", True, qkv(64), "sdpa"),
        ("avx512", True, qkv(64, torch.float32), "cpu"),
        ("amx", False, qkv(64), "cpu"),
    ],
)
def test_auto_takes_what_was_measured_to_be_faster(monkeypatch, level, without_amx, tensors, first):
    at(monkeypatch, level, without_amx)
    said = regard.explain(*tensors)
    assert engine(*tensors) == first
    assert next(iter(said)) == first
    assert ("order" in said) == (first == "sdpa")


@pytest.mark.parametrize(
    "tensors, first",
    [
        (qkv(128), "sdpa"),
        (qkv(129), "cpu"),
        (qkv(64, keys=500), "cpu"),
        (qkv(64, torch.float32), "cpu"),
    ],
)
def test_a_row_holds_within_its_limits(monkeypatch, tensors, first):
    with_short(monkeypatch)
    assert engine(*tensors) == first


def test_the_reason_tells_shape_level_and_ratio(monkeypatch):
    with_short(monkeypatch)
    (reason,) = regard.explain(*qkv(64))["order"]
    assert reason == (
        "sdpa is tried before cpu: for 17 to 128 queries and up to 128 keys in bfloat16 its time "
        "over that of level amx is 0.8–0.9, measured on a processor of this test"
    )


def test_what_pytorch_cannot_do_stays_ours(monkeypatch):
    """Observers, a cap, and gradients where only its forward is faster."""
    with_short(monkeypatch)
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
