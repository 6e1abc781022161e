"""Dropout: Philox's known answers, and one mask whatever computes it."""

import pytest
import torch
from torch import Tensor

import regard.engines.second_pass.strips
from cases import Case, at
from regard import Causal, Dropout, Window, attention
from regard.call.dropout import philox
from regard.call.geometry import Place, Span

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
ONES = (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2
KNOWN = {  # Random123's kat_vectors, philox4x32 of 10 rounds
    "zeros": ((0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": (*ONES, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": (*PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
}
FULL = Case("", at(70, 150))


def place(
    batch: int = 2, heads: int = 3, q_len: int = 40, k_len: int = 60, starts=(20, 0)
) -> Place:
    return Place(batch, heads, heads, q_len, k_len, *starts, torch.device("cpu"))


def factors(dropout: Dropout, where: Place, span: Span | None = None) -> Tensor:
    whole = Span(0, where.q_len, 0, where.k_len)
    return Dropout.given(dropout).factor(span or whole, where, torch.float64)


@pytest.mark.parametrize("counter, key, answer", KNOWN.values(), ids=KNOWN)
def test_philox_known_answers(counter, key, answer):
    words = philox(tuple(torch.tensor(c) for c in counter), key)
    assert " ".join(f"{int(w):08x}" for w in words) == answer


def test_philox_of_many_is_that_of_each():
    counter = torch.tensor([PI[0], (0,) * 4, ONES[0]])
    for i, row in enumerate(counter):
        alone = philox(tuple(row), (1, 2))
        together = philox(tuple(counter.T), (1, 2))
        assert [int(w[i]) for w in together] == [int(w) for w in alone]


def naive(p: float, seed: int, row: int, query: int, key: int) -> float:
    """One factor, from the definition, in Python's own integers."""
    words, (k0, k1) = [key // 4, query, row, 0], (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    for _ in range(10):
        a, b = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [b >> 32 ^ words[1] ^ k0, b & 0xFFFFFFFF, a >> 32 ^ words[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return 0.0 if words[key % 4] < p * 2**32 else 1 / (1 - p)


@pytest.mark.parametrize("starts", [(20, 0), (7, 5), (0, 2)], ids=str)
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, -5, 2**63 - 1])
def test_the_mask_is_its_definition(seed, starts):
    where = place(2, 2, 5, 9, starts)
    wanted = [
        [
            [[naive(0.3, seed, 2 * b + h, i + starts[0], j + starts[1]) for j in range(9)]
             for i in range(5)]
            for h in range(2)
        ]
        for b in range(2)
    ]  # fmt: skip
    assert factors(Dropout(0.3, seed), where).tolist() == wanted


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_keep_rate(p):
    factor = factors(Dropout(p, 1), place(4, 8, 128, 256))
    n = factor.numel()
    kept = (factor > 0).double()
    assert abs(kept.mean() - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5
    assert set(factor.unique().tolist()) == {0.0, 1 / (1 - p)}
    for dim in range(4):  # no row, column, head or item is like another
        assert not torch.equal(*kept.narrow(dim, 0, 2).split(1, dim))


@pytest.mark.parametrize(
    "span", [Span(0, 40, 0, 60), Span(3, 4, 1, 2), Span(5, 40, 17, 58)], ids=str
)
@pytest.mark.parametrize("starts", [(20, 0), (5, 3)], ids=str)
def test_a_tile_is_cut_from_the_whole(span, starts):
    where = place(starts=starts)
    whole = factors(Dropout(0.4, 9), where)
    tile = whole[:, :, span.q0 : span.q1, span.k0 : span.k1]
    assert torch.equal(factors(Dropout(0.4, 9), where, span), tile)
    some = Span(span.q0, span.q1, span.k0, span.k1, slice(1, 2), slice(1, 3))
    assert torch.equal(factors(Dropout(0.4, 9), where, some), tile[1:2, 1:3])


def test_a_place_in_the_sequence_has_one_mask():
    """A later chunk of queries, a shard of keys: the same factors as within the whole."""
    whole = factors(Dropout(0.4, 9), place(2, 3, 60, 60, (0, 0)))
    part = factors(Dropout(0.4, 9), place(2, 3, 10, 30, (50, 13)))
    assert torch.equal(part, whole[:, :, 50:, 13:43])


@pytest.mark.parametrize("budget", [regard.engines.second_pass.strips.BUDGET, 2**11])
def test_engines_and_tilings_agree(budget, monkeypatch):
    monkeypatch.setattr(regard.engines.second_pass.strips, "BUDGET", budget)
    request = {"mask": Causal() & Window(90), "dropout": Dropout(0.5, 3)}
    answers = [attention(*FULL.tensors(), **request, engine=e) for e in ("reference", "tiled")]
    torch.testing.assert_close(*answers, rtol=1e-12, atol=1e-12)


def test_weights_are_dropped_and_scaled():
    """out = (weights · factor) v, the denominator untouched; lse and observers before dropout."""
    query, key, value = FULL.tensors()
    eye = torch.eye(150, dtype=value.dtype).expand(2, 2, -1, -1)
    plain, lse = attention(query, key, eye, engine="tiled", return_lse=True)
    dropped, same = attention(
        query, key, eye, engine="tiled", return_lse=True, dropout=Dropout(0.25, 8)
    )
    where = place(2, 4, 70, 150, (80, 0))
    torch.testing.assert_close(dropped, plain * factors(Dropout(0.25, 8), where))
    assert torch.equal(lse, same)
    asked = [regard.TopK(4), regard.Received(), regard.Rows([100])]
    seen, unseen = (
        attention(query, key, value, engine="tiled", observe=asked, dropout=d)[1]
        for d in (None, Dropout(0.25, 8))
    )
    for one, other in zip(seen, unseen, strict=True):
        tensors = [v for v in vars(one).values() if isinstance(v, Tensor)]
        others = [v for v in vars(other).values() if isinstance(v, Tensor)]
        assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def test_manual_seed_makes_it_again():
    tensors = FULL.tensors()

    def run(dropout) -> Tensor:
        return attention(*tensors, dropout=dropout)

    torch.manual_seed(4)
    first, second = run(0.3), run(Dropout(0.3))
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert torch.equal(run(0.3), first)
    assert torch.equal(run(0.3), second)
    assert torch.equal(run(Dropout(0.3, 5)), run(Dropout(0.3, torch.tensor(5))))
    assert not torch.equal(run(Dropout(0.3, 5)), run(Dropout(0.3, 6)))


def test_nothing_dropped_draws_no_seed():
    tensors = FULL.tensors()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    for dropout in (None, 0.0, Dropout(0.0)):
        assert torch.equal(attention(*tensors, dropout=dropout), attention(*tensors))
    attention(*tensors, dropout=Dropout(0.5, 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_backward_drops_what_forward_dropped():
    """The gradient of v is the transposed, dropped weights."""
    query, key, _ = FULL.tensors()
    value = torch.eye(150, dtype=torch.float64).expand(2, 2, -1, -1).clone().requires_grad_()
    torch.manual_seed(0)
    out = attention(query, key, value, dropout=0.5, engine="tiled")
    (grad,) = torch.autograd.grad(out[0, 0, 13].sum(), value)
    torch.testing.assert_close(grad[0, 0, :, 0], out[0, 0, 13])
