"""2, 3 and 4 processes give what one gives: forward, gradients and observers, over all cases."""

import pytest
import torch

from cases import CASES, FEW
from distributed_jobs import BY_NAME, EFFECTS, OBSERVERS, numbers_of, tensors_of, whole
from ranks import Ranks

NEAR = {"rtol": 1e-9, "atol": 1e-11}
WAYS = ("heads", "gather", "ring")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


def runs(case, how: str, size: int) -> bool:
    """Whether this way can run it at all; what is refused is tested by itself."""
    request = case.request()
    return how != "heads" or (case.sizes.kv_heads % size == 0 and "dropout" not in request)


def check(mine, exact) -> None:
    """out, lse, gradients and results of both."""
    for name, a, b in zip(("out", "lse"), mine, exact, strict=False):
        torch.testing.assert_close(a, b, **NEAR, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    for i, (a, b) in enumerate(zip(mine[2], exact[2], strict=True)):
        torch.testing.assert_close(a, b, **NEAR, msg=lambda m, n=i: f"gradient {n}: {m}")
    for a, b in zip(mine[3], exact[3], strict=True):
        assert numbers_of(a) == numbers_of(b)
        theirs = tensors_of(b)
        for name, t in tensors_of(a).items():
            said = f"{type(b).__name__}.{name}"
            torch.testing.assert_close(t, theirs[name], **NEAR, msg=lambda m, s=said: f"{s}: {m}")


@pytest.mark.sample(1)
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("size", (2, 3, 4))
@pytest.mark.parametrize("case", FEW, ids=str)
def test_several_processes_equal_one(ranks, case, size, how):
    if not runs(case, how, size):
        how = "gather"
    observe = OBSERVERS if how == "ring" else EFFECTS
    mine = ranks.run(size, "distributed_jobs.together", case.name, how, torch.float64, "zigzag",
                     observe)  # fmt: skip
    check(mine, whole(case.name, observe=observe))
