"""Which cases of a parametrised test the default run has: `@pytest.mark.sample(strength)`.

strength 0: the first case; 1: as many as show every value of every parameter; 2: every pair of
values. The others are slow: they run with `pytest -m "slow or not slow"`, and in CI.
"""

from collections import Counter
from itertools import combinations

import pytest


def mark_others_slow(items) -> None:
    """Each case that its test's sample leaves out is marked."""
    tests: dict[str, list] = {}
    for item in items:
        if item.get_closest_marker("sample"):
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    for cases in tests.values():
        (strength,) = cases[0].get_closest_marker("sample").args
        kept = covering([_values(item.callspec.params) for item in cases], strength)
        for n, item in enumerate(cases):
            if n not in kept:
                item.add_marker(pytest.mark.slow)


def _values(params: dict[str, object]) -> dict[str, int]:
    """A parameter's values are told apart by which objects of its list they are."""
    return {name: id(value) for name, value in params.items()}


def covering(cases: list[dict[str, int]], strength: int) -> set[int]:
    """Greedily: the case that shows most of what is still to be shown, of values seldom taken."""
    shown = [_combinations(case, strength) for case in cases]
    left, kept, taken = set().union(*shown), set(), Counter()
    while left or not kept:
        best = max(
            range(len(cases)),
            key=lambda n: (len(shown[n] & left), -sum(taken[v] for v in cases[n].items()), -n),
        )
        kept.add(best)
        left -= shown[best]
        taken.update(cases[best].items())
    return kept


def _combinations(case: dict[str, int], strength: int) -> set[tuple]:
    """The values together, `strength` parameters at a time; none for 0, all of fewer parameters."""
    return set(combinations(case.items(), min(strength, len(case)))) if strength else set()
