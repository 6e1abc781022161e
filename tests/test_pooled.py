"""Tiles of a map, pooled from q, k and lse: torch and the kernel against float64 weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cases import CASES, FEW, Case, assert_within, at, plain
from regard import Causal, Documents, Full, RegardError, Window
from regard.call.checked import Call
from regard.call.pages import Pages
from regard.engines import reference
from regard.engines.second_pass.pooled import Rectangle, tiles_in_torch
from regard.ops.pooled import kernel_refuses, pooled_tiles

# (zoom, row, col): whole and cut cells, tiles that begin before the call, in it, and reach beyond
PLACES = [
    (0, 0, 0), (0, -3, 5), (1, -5, 3), (2, 1, 0), (3, 7, -1), (4, -70, -90), (5, 0, 33), (6, 0, 0),
    (7, -100, -9), (9, 1, 2), (20, 0, -1000000), (0, 500, 0), (3, -1024, 0),
]  # fmt: skip
REDUCE = ("sum", "max")


def tiles_of(call: Call) -> list[Rectangle]:
    """A tile at each place, of the call's heads and items in turn."""
    place = call.place
    return [Rectangle(n % place.heads, *where, n % place.batch) for n, where in enumerate(PLACES)]


def pooled(weights: Tensor, tiles: list[Rectangle], reduce: str) -> Tensor:
    """The definition, weight by weight. weights (batch, heads, q_len, k_len)."""
    out = torch.zeros(len(tiles), 128 * 128, dtype=torch.float64)
    rows, cols = (torch.arange(n) for n in weights.shape[-2:])
    for tile, cells in zip(tiles, out, strict=True):
        row = ((rows - tile.row) >> tile.zoom)[:, None].expand(weights.shape[-2:])
        col = ((cols - tile.col) >> tile.zoom)[None].expand(weights.shape[-2:])
        inside = (row >= 0) & (row < 128) & (col >= 0) & (col < 128)
        own = weights[tile.batch, tile.head][inside].double()
        how = "sum" if reduce == "sum" else "amax"
        cells.scatter_reduce_(0, (row * 128 + col)[inside], own, how)
    return out.view(-1, 128, 128)


def truth(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weights, lse) in float64 of what the dtype holds."""
    tensors, request = case.exactly(dtype)
    call = Call.checked(*tensors, **request).gathered()
    scores = reference.scores(call)
    return reference.softmax(scores, call.sinks), reference.log_sum_exp(scores, call.sinks)


def plain_weights(case: Case, dtype: torch.dtype) -> Tensor:
    """The weights by plain torch, wholly in the dtype: its output where the values are 1."""
    query, key, _ = case.tensors(dtype=dtype)
    ones = torch.eye(key.shape[2], dtype=dtype).expand(*key.shape[:2], -1, -1)
    request = {n: v for n, v in case.request(dtype).items() if n != "dropout"}
    return plain(query, key, ones, **request)[0]


def check(case: Case, dtype: torch.dtype, compute, roundings: int = 1) -> None:
    """compute(call, lse, tiles, reduce) against the pooled float64 weights, by the shared bar.

    roundings: 2 where the lse is rounded once more, in units of a power of two. Of exp(score − lse)
    each weighs as much as its argument's terms are large (the condition of exp): nothing divides
    by a row's own sum here, which would take that out again.
    """
    query, key, _ = case.tensors(dtype=dtype)
    call = Call.checked(query, key, None, **case.request(dtype))
    if not call.place.batch:
        return
    # The definition is exp(score − lse) with the lse that is given, as rounded
    tensors, request = case.exactly(dtype)
    scores = reference.scores(Call.checked(*tensors, **request).gathered())
    lse = truth(case, dtype)[1].to(call.working)
    shift = lse.masked_fill(lse == -torch.inf, 0)[..., None]
    exact = (scores - shift.double()).exp()
    if dtype in (torch.bfloat16, torch.float16):
        theirs = plain_weights(case, dtype)
    else:
        single = Call.checked(*case.tensors(dtype=torch.float32), **case.request(torch.float32))
        theirs = (reference.scores(single) - shift.float()).exp()
    finite = lse[lse.isfinite()].abs()
    roundings *= 1 + int(finite.max() if len(finite) else 0)
    tiles = tiles_of(call)
    for reduce in REDUCE:
        ours = compute(call, lse.to(call.working), tiles, reduce)
        assert ours.dtype == torch.float32
        for mine, other, wanted in zip(
            ours, pooled(theirs, tiles, reduce), pooled(exact, tiles, reduce), strict=True
        ):
            assert_within(mine, other.to(theirs.dtype), wanted, roundings=roundings)


def in_torch(call: Call, lse: Tensor, tiles: list[Rectangle], reduce: str) -> Tensor:
    return tiles_in_torch(call, lse, tiles, reduce == "max")


@pytest.mark.sample(every=5, most=1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_torch_pools_the_exact_weights(case, dtype):
    check(case, dtype, in_torch)


@pytest.mark.sample(every=5, most=1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_pools_the_exact_weights(case, dtype):
    query, key, _ = case.tensors(dtype=dtype)
    assert not kernel_refuses(Call.checked(query, key, None, **case.request(dtype)))
    check(case, dtype, pooled_tiles, roundings=2)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_less_precision_where_it_is_asked_for(precision):
    """On tiles of bf16, which the level amx has, and avx512bf16 for "medium"."""
    case = Case("", at(300, 400, dim=40), lambda s, g: {"mask": Causal()})
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        call = Call.checked(*case.tensors(dtype=torch.float32), mask=Causal())
        exact, lse = truth(case, torch.float32)
        tiles = tiles_of(call)
        for reduce in REDUCE:
            ours = pooled_tiles(call, lse.float(), tiles, reduce)
            wanted = pooled(exact, tiles, reduce)
            near = 3e-2 if precision == "medium" else 2e-4
            torch.testing.assert_close(ours.double(), wanted, rtol=near, atol=near)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "mask", [Full(), Causal() & Window(700), Documents(torch.arange(2500) // 400)], ids=str
)
def test_same_bits_on_any_threads_and_beside_any_tiles(mask, dtype):
    query, key = torch.randn(1, 2, 2500, 24).to(dtype), torch.randn(1, 1, 2500, 24).to(dtype)
    call = Call.checked(query, key, None, mask=mask)
    lse = torch.randn(1, 2, 2500) + 4
    tiles = [
        Rectangle(h, z, r, c) for h in (0, 1) for z, r, c in ((0, 900, 850), (3, 0, 7), (4, -9, 0))
    ]
    for reduce in REDUCE:
        alone = [pooled_tiles(call, lse, [t], reduce) for t in tiles]
        threads = torch.get_num_threads()
        try:
            for n in (1, 2, 5):
                torch.set_num_threads(n)
                assert torch.equal(pooled_tiles(call, lse, tiles, reduce), torch.cat(alone))
                again = pooled_tiles(call, lse, tiles[::-1], reduce)
                assert torch.equal(again.flip(0), torch.cat(alone))
        finally:
            torch.set_num_threads(threads)


def test_a_cell_pools_the_cells_inside_it():
    """Each zoom from the one below; and a tile from a call of its own rows and keys."""
    query, key = torch.randn(1, 1, 1500, 32), torch.randn(1, 1, 1500, 32)
    lse = torch.full((1, 1, 1500), 7.0)
    call = Call.checked(query, key, None, mask=Causal())
    for zoom in range(1, 4):
        row, col = 300, 5
        whole = pooled_tiles(call, lse, [Rectangle(0, zoom, row, col)])[0]
        half = 64 << zoom
        parts = [
            Rectangle(0, zoom - 1, row + half * r, col + half * c) for r in (0, 1) for c in (0, 1)
        ]
        finer = pooled_tiles(call, lse, parts).view(2, 2, 128, 128).transpose(1, 2)
        finer = finer.reshape(128, 2, 128, 2).sum((1, 3))
        torch.testing.assert_close(whole, finer, rtol=1e-6, atol=1e-7)


def odd_call(dtype: torch.dtype, place: tuple[int, ...], value: float, which: str) -> Call:
    query, key = torch.randn(2, 1, 1, 200, 32).to(dtype).unbind()
    {"query": query, "key": key}[which][place] = value
    return Call.checked(query, key, None, mask=Causal() & Window(90))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["query", "key"])
@pytest.mark.parametrize("compute", [in_torch, pooled_tiles], ids=["torch", "kernel"])
def test_bad_numbers_surface_where_they_are_seen_and_nowhere_else(compute, which, value, dtype):
    call = odd_call(dtype, (0, 0, 100, 3), value, which)
    scores = reference.scores(call)
    lse = reference.log_sum_exp(scores, None)
    shown = scores != -torch.inf
    odd = lse.isnan() | (lse == torch.inf)
    expected = (odd[..., None] & shown).float()
    assert expected.any()
    tiles = [Rectangle(0, z, r, c) for z, r, c in ((0, 64, 40), (0, 90, 90), (1, 0, 0), (4, -5, 0))]
    for reduce in REDUCE:
        found = compute(call, lse, tiles, reduce)
        wanted = pooled(expected, tiles, "max") > 0
        assert torch.equal(found.isnan(), wanted)
        clean = pooled(
            torch.where(odd[..., None], 0, scores.sub(lse[..., None]).exp()), tiles, reduce
        )
        torch.testing.assert_close(found[~wanted].double(), clean[~wanted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_hidden_changes_no_bit(dtype):
    found = []
    for bad in (0.5, torch.nan, torch.inf):
        torch.manual_seed(3)
        query, key = torch.randn(2, 1, 2, 200, 32).to(dtype).unbind()
        key[:, :, 50] = bad
        ids = torch.zeros(200, dtype=torch.int64)
        ids[50] = -1
        query[:, :, 50] = 1
        call = Call.checked(query, key, None, mask=Documents(ids))
        tiles = [Rectangle(1, z, 0, 0) for z in (0, 1, 4)]
        found.append(pooled_tiles(call, torch.ones(1, 2, 200), tiles))
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_keys_in_pages():
    query, key = torch.randn(2, 2, 30, 16), torch.randn(7, 1, 16, 16)
    table = torch.tensor([[3, 0, 5], [1, 6, 2]])
    pages = Pages(table, torch.tensor([48, 33]))
    call = Call.checked(query, key, None, mask=Causal(), pages=pages)
    lse = torch.full((2, 2, 30), 3.0)
    tiles = [Rectangle(1, z, 0, 0, b) for z in (0, 2, 9) for b in (0, 1)]
    for reduce in REDUCE:
        ours = pooled_tiles(call, lse, tiles, reduce)
        theirs = in_torch(call.gathered(), lse, tiles, reduce)
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_are_not_asked_for():
    query = torch.randn(1, 1, 9, 8, requires_grad=True)
    found = pooled_tiles(
        Call.checked(query, query, None), torch.ones(1, 1, 9), [Rectangle(0, 0, 0, 0)]
    )
    assert not found.requires_grad


def test_no_tile_and_a_tile_of_nothing():
    call = Call.checked(torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8), None)
    lse = torch.ones(1, 1, 9)
    assert pooled_tiles(call, lse, []).shape == (0, 128, 128)
    assert not pooled_tiles(call, lse, [Rectangle(0, 2, 9, 0), Rectangle(0, 0, 0, -128)]).any()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"tiles": [(2, 0, 0, 0)]}, "head is 2; the call has 2"),
        ({"tiles": [(0, 0, 0, 0, 1)]}, "batch is 1; the call has 1"),
        ({"tiles": [(0, -1, 0, 0)]}, "zoom is -1"),
        ({"tiles": [(0, 25, 0, 0)]}, r"zoom is 25; give 0 \(a cell is one weight\) to 24"),
        ({"tiles": [(0, 0, 2**40, 0)]}, "within ± 2³¹"),
        ({"tiles": [(0, 0.5, 0, 0)]}, "give integers"),
        ({"tiles": [(0, 0)]}, "give integers"),
        ({"reduce": "mean"}, "reduce is 'mean'; give 'sum' or 'max'"),
        ({"lse": torch.ones(1, 2, 8)}, r"lse is \(1, 2, 8\); this call needs .* \(1, 2, 9\)"),
    ],
)
def test_says_what_does_not_fit(change, said):
    call = Call.checked(torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8), None)
    given = {"lse": torch.ones(1, 2, 9), "tiles": [(0, 0, 0, 0)]} | change
    with pytest.raises(RegardError, match=said):
        pooled_tiles(call, **given)


def test_a_wide_head():
    """Queries and keys of 256 dims, several hundred rows."""
    case = replace(Case("", at(600, 700, batch=1, dim=256)), magnitude=0.3)
    check(case, torch.bfloat16, pooled_tiles, roundings=2)
