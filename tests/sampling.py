"""Which cases of a parametrised test the default run has: `@pytest.mark.sample(strength)`.

strength 0: the first case; 1: as many as show every value of every parameter; 2: every pair of
values. `sample(every=n)`: each n-th of one long list. The others are slow: they run with
`pytest -m "slow or not slow"`, and in CI. `sample(strength, most=n)`: of a full product, in CI too,
only as many as show every n values together. The others run nowhere: a fault that takes more than n
values at once may slip through.
"""

import random
from itertools import combinations

import pytest


def mark_others_slow(items) -> list:
    """Mark each case that its test's sample leaves out; return those that run nowhere."""
    tests: dict[str, list] = {}
    for item in items:
        if item.get_closest_marker("sample"):
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    nowhere = []
    for cases in tests.values():
        marker = cases[0].get_closest_marker("sample")
        if "most" in marker.kwargs:
            most = covering(
                [_values(item.callspec.params) for item in cases], marker.kwargs["most"]
            )
            nowhere += [item for n, item in enumerate(cases) if n not in most]
            cases = [item for n, item in enumerate(cases) if n in most]
        kept = _sample(cases, marker)
        for n, item in enumerate(cases):
            if n not in kept:
                item.add_marker(pytest.mark.slow)
    return nowhere


def _sample(cases: list, marker: pytest.Mark) -> set[int]:
    if "every" in marker.kwargs:
        return set(range(0, len(cases), marker.kwargs["every"]))
    return covering([_values(item.callspec.params) for item in cases], *marker.args)


def _values(params: dict[str, object]) -> dict[str, int]:
    """A parameter's values are told apart by which objects of its list they are."""
    return {name: id(value) for name, value in params.items()}


def covering(cases: list[dict[str, int]], strength: int) -> set[int]:
    """Greedily: first the cases that show most of what is still to be shown, then what shows less.

    In one shuffled order, so that a value that may be any is not always the first of its list.
    """
    shown = [_combinations(case, strength) for case in cases]
    left, kept = set().union(*shown), set()
    order = list(range(len(cases)))
    random.Random(0).shuffle(order)
    # What a case still shows never grows: one pass for each number finds all that show so many
    for many in range(max(map(len, shown)), 0, -1):
        for n in order:
            if len(shown[n] & left) == many:
                kept.add(n)
                left -= shown[n]
    return kept or {0}


def _combinations(case: dict[str, int], strength: int) -> set[tuple]:
    """The values together, `strength` parameters at a time; none for 0, all of fewer parameters."""
    return set(combinations(case.items(), min(strength, len(case)))) if strength else set()
