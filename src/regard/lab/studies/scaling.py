"""Loss against parameters and tokens: power laws, and the best size for a budget (IsoFLOP)."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch

from .learning import fit, loss_of, small_lm
from .positions import characters, drawn
from .stats import Interval, exponent, joint_power_law, with_floor
from .study import Cell, Panel, Result, Setting, Study, Verdict

DRAWS = 300  # of the fit over parameters and tokens


class Trained(NamedTuple):
    """One run: parameters without the embedding, tokens read, operations 6 · N · D, loss."""

    parameters: int
    tokens: int
    budget: float
    loss: float


def run(at: Setting) -> Result:
    size = at.size
    ids, vocabulary = characters(at)
    cut = len(ids) * 9 // 10
    test = drawn(ids[cut:], size.length, size.tests, at.generator(2))
    runs: list[Trained] = []
    done = 0
    for budget in size.budgets:
        for dim in size.dims:
            torch.manual_seed(at.seed)
            model = small_lm(vocabulary, dim, 2, 2)
            parameters = sum(
                p.numel() for n, p in model.named_parameters() if not n.startswith("embedding")
            )
            steps = round(budget / (6 * parameters * size.batch * size.length))
            done += 1
            if not size.least <= steps <= size.most:
                continue
            draw = partial(drawn, ids[:cut], size.length, size.batch, at.generator(1))
            of = len(size.budgets) * len(size.dims)
            fit(model, draw, steps, each=at.training(f"width {dim}", done - 1, of, steps))
            with torch.no_grad():
                loss = float(loss_of(model, test))
            runs.append(Trained(parameters, steps * size.batch * size.length, budget, loss))
    return _result(at, runs)


def _result(at: Setting, runs: list[Trained]) -> Result:
    size = at.size
    by_budget = {b: list(some) for b, some in groupby(runs, lambda one: one.budget)}
    best = [min(some, key=lambda one: one.loss) for some in by_budget.values()]
    of_budget, of_size, of_data = (
        _interval(at, [(one.budget, getattr(one, what)) for one in best])
        for what in ("loss", "parameters", "tokens")
    )
    by_size, by_data = _joint(at, runs)
    largest = by_budget[max(by_budget)]
    inner = largest[0].loss > best[-1].loss < largest[-1].loss if len(largest) > 2 else False
    grows = best[-1].parameters > best[0].parameters
    floor = with_floor([b.budget for b in best], [b.loss for b in best])
    rows: list[tuple[Cell, ...]] = [
        (f"{one.budget:.1e}", one.parameters, one.tokens, one.loss, "best" if one in best else "")
        for one in runs
    ]
    verdicts = [
        Verdict("the loss falls with the budget as a power law (exponent below 0)",
                of_budget.high < 0, f"best loss ~ budget^{of_budget}"),
        Verdict("for each budget there is a best size between smaller and larger ones",
                inner, f"at {max(by_budget):.1e} operations {best[-1].parameters:,} of "
                f"{largest[0].parameters:,} … {largest[-1].parameters:,} parameters"),
        Verdict("the best size grows with the budget", grows,
                f"{best[0].parameters:,} → {best[-1].parameters:,} parameters: parameters ~ "
                f"budget^{of_size}, tokens ~ budget^{of_data}"),
        Verdict("the loss falls with parameters and with tokens, each as a power law (exponents "
                "below 0)", by_size.high < 0 and by_data.high < 0,
                f"loss = E + A · parameters^{by_size} + B · tokens^{by_data}"),
    ]  # fmt: skip
    panels = [
        Panel("IsoFLOP", "parameters", "loss", {
            f"{b:.0e}": ([one.parameters for one in some], [one.loss for one in some])
            for b, some in by_budget.items()}, "x"),
        Panel("loss over what was read", "tokens", "loss", {
            f"{size:,} parameters": ([one.tokens for one in some], [one.loss for one in some])
            for size, some in by_size_of(runs).items()}, "x"),
        Panel("best loss", "operations", "loss",
              {"best": ([one.budget for one in best], [one.loss for one in best])}, "xy"),
    ]  # fmt: skip
    columns = ("budget", "parameters", "tokens", "loss", "")
    return Result(columns, rows, verdicts, panels, notes=[
        f"Characters of Tiny Shakespeare, two blocks, widths {', '.join(map(str, size.dims))}; "
        f"budget: 6 · parameters (without the embedding) · tokens; loss of held-out text in nats a "
        f"character. A width that a budget gives fewer than {size.least} or more than "
        f"{size.most:,} steps is left out. Intervals of exponents over the budget draw the budgets "
        f"anew 1,000 times; with so few of them they are wide. Those over parameters and tokens "
        f"(Hoffmann et al. 2022, approach 3; in steps of 0.05) draw the runs anew {DRAWS} times."
    ], more={"exponent": list(of_budget), "with floor": list(floor),
             "best parameters": list(of_size), "best tokens": list(of_data),
             "by parameters": list(by_size), "by tokens": list(by_data)})  # fmt: skip


def by_size_of(runs: list[Trained]) -> dict[int, list[Trained]]:
    """The runs of each number of parameters."""
    found: dict[int, list[Trained]] = {}
    for one in runs:
        found.setdefault(one.parameters, []).append(one)
    return found


def _joint(at: Setting, runs: list[Trained]) -> tuple[Interval, Interval]:
    """The exponents over parameters and over tokens, with bootstrap intervals."""

    def fitted(some: list[Trained]) -> tuple[float, float]:
        n, d, _, losses = zip(*some, strict=True)
        a, b = joint_power_law(n, d, losses)
        return -a, -b

    rng = at.random("joint")
    draws = [fitted(rng.choices(runs, k=len(runs))) for _ in range(DRAWS)]
    made = []
    for value, drawn_ones in zip(fitted(runs), zip(*draws, strict=True), strict=True):
        # A draw of too few different runs fits nothing
        found = sorted(one for one in drawn_ones if one == one) or [float("nan")]
        low, high = (found[int(share * (len(found) - 1))] for share in (0.025, 0.975))
        made.append(Interval(value, low, high))
    return made[0], made[1]


def _interval(at: Setting, points: list[tuple[float, float]]) -> Interval:
    """The exponent and its bootstrap interval; draws of a single budget are drawn again."""
    rng = at.random("bootstrap")
    if len(points) < 2:
        return Interval(float("nan"), float("nan"), float("nan"))
    found: list[float] = []
    while len(found) < 1000:
        some = rng.choices(points, k=len(points))
        if len(set(some)) > 1:
            found.append(exponent(*zip(*some, strict=True)))
    found.sort()
    return Interval(exponent(*zip(*points, strict=True)), found[25], found[974])


STUDY = Study(
    "scaling",
    "Loss falls as a power law of the budget, and each budget has its best size.",
    "Models of several widths are trained on as many characters as each budget allows "
    "(Hoffmann et al. 2022, approach 2).",
    run,
    tiny=dict(text=4000, length=16, batch=4, tests=4, dims=[8, 16], budgets=[2e7, 4e7], least=2,
              most=5000),
    quick=dict(text=300_000, length=64, batch=8, tests=64, dims=[16, 32, 64],
               budgets=[3e10, 1e11], least=10, most=10_000),
    full=dict(text=1_100_000, length=128, batch=16, tests=128, dims=[16, 32, 64, 128],
              budgets=[3e10, 1e11, 3e11, 1e12], least=20, most=5000),
)  # fmt: skip
