"""2, 3 and 4 processes give what one gives: forward, gradients and observers, over all cases."""

import pytest
import torch

from cases import FEW, assert_within
from distributed_jobs import (
    BY_NAME,
    EFFECTS,
    OBSERVERS,
    numbers_of,
    plainly,
    tensors_of,
    whole,
)

NEAR = {"rtol": 1e-9, "atol": 1e-11}
JOBS = "distributed_jobs"
WAYS = ("heads", "gather", "ring")


def runs(case, how: str, size: int) -> bool:
    """Whether this way can run it at all; what is refused is tested by itself."""
    request = case.request()
    return how != "heads" or (case.sizes.kv_heads % size == 0 and "dropout" not in request)


def check(mine, exact) -> None:
    """out, lse, gradients and results of both.

    Keys whose weight is 0, as exp has nothing smaller, are listed in any order.
    """
    for name, a, b in zip(("out", "lse"), mine, exact, strict=False):
        torch.testing.assert_close(a, b, **NEAR, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    for i, (a, b) in enumerate(zip(mine[2], exact[2], strict=True)):
        torch.testing.assert_close(a, b, **NEAR, msg=lambda m, n=i: f"gradient {n}: {m}")
    for a, b in zip(mine[3], exact[3], strict=True):
        assert numbers_of(a) == numbers_of(b)
        theirs = tensors_of(b)
        for name, t in tensors_of(a).items():
            said = f"{type(b).__name__}.{name}"
            if name == "indices":
                t = t.where(theirs["weights"] > 0, theirs[name])
            torch.testing.assert_close(t, theirs[name], **NEAR, msg=lambda m, s=said: f"{s}: {m}")


# Of each kind one; the others are slow
DEFAULT = (
    "causal",
    "documents",
    "left padding",
    "predicate by head",
    "top blocks and others",
    "three biases",
    "dropout of a window",
    "all at once",
)


def cases():
    """Each case on one number of ranks: 2, 3 and 4 in turn."""
    for n, case in enumerate(FEW):
        marks = () if case.name in DEFAULT else pytest.mark.slow
        yield pytest.param(case, (2, 3, 4)[n % 3], marks=marks, id=f"{case}-{(2, 3, 4)[n % 3]}")


@pytest.mark.parametrize("case, size", cases())
def test_several_processes_equal_one(ranks, case, size):
    for how in WAYS:
        if runs(case, how, size):
            # Of weights next to 1 the effect, by 1 − p, is rounding alone
            observe = EFFECTS if case.magnitude < 100 else OBSERVERS
            exact = whole(case.name, observe=observe)
            mine = ranks.run(
                size, f"{JOBS}.together", case.name, how, torch.float64, "zigzag", observe
            )
            check(mine, exact)


@pytest.mark.sample(1)
@pytest.mark.parametrize("order", ["plain", ((1, 2, 5), (0, 3), (4,))], ids=["plain", "mixed"])
@pytest.mark.parametrize("how", ["gather", "ring"])
def test_every_order_gives_the_same(ranks, how, order):
    name = "all at once"
    check(
        ranks.run(3, f"{JOBS}.together", name, how, torch.float64, order),
        whole(name),
    )


def test_heads_gathered_one_by_one_give_the_same(ranks):
    for name in ("three biases", "predicate by head", "sinks"):
        mine = ranks.run(3, f"{JOBS}.together", name, "gather", torch.float64, "zigzag", EFFECTS, 1)
        check(mine, whole(name, observe=EFFECTS))


@pytest.mark.sample(1)
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_within_the_bar(ranks, how, dtype):
    """Merging and gradients in the dtype itself, rather than in float32, would not be."""
    name = "causal"
    mine = ranks.run(2, f"{JOBS}.together", name, how, dtype, "zigzag", ())
    plain = plainly(BY_NAME[name], dtype)
    rounded = plainly(BY_NAME[name], dtype, torch.float64)
    for a, p, e in zip((mine[0], *mine[2]), plain, rounded, strict=True):
        assert_within(a, p, e)


@pytest.mark.sample(0)
@pytest.mark.parametrize("how", WAYS)
def test_the_same_bits_from_run_to_run(ranks, how):
    first, again = (
        ranks.run(3 if how != "heads" else 2, f"{JOBS}.together", "alibi", how, torch.float32)
        for _ in range(2)
    )
    for a, b in zip((*first[:2], *first[2]), (*again[:2], *again[2]), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first[3], again[3], strict=True):
        assert all(torch.equal(t, u) for t, u in zip(
            tensors_of(a).values(), tensors_of(b).values(), strict=True))  # fmt: skip


@pytest.mark.parametrize("how", ["gather", "ring"])
def test_two_layers_go_back_by_their_own_keys(ranks, how):
    """Not by those that a buffer holds last (diffusers #14265), nor a D of their own block."""
    for mine, exact in ranks.run(2, f"{JOBS}.two_layers", how):
        torch.testing.assert_close(mine, exact, **NEAR)
