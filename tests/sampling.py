"""Which cases of a parametrised test the default run has: `@pytest.mark.sample(strength)`.

strength 0: the first case; 1: as many as show every value of every parameter; 2: every pair of
values. `sample(every=n)`: each n-th of one long list. The others are slow: they run with
`pytest -m "slow or not slow"`, and in CI.
"""

from collections import Counter
from heapq import heapify, heappop, heapreplace
from itertools import combinations

import pytest


def mark_others_slow(items) -> None:
    """Each case that its test's sample leaves out is marked."""
    tests: dict[str, list] = {}
    for item in items:
        if item.get_closest_marker("sample"):
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    for cases in tests.values():
        kept = _sample(cases, cases[0].get_closest_marker("sample"))
        for n, item in enumerate(cases):
            if n not in kept:
                item.add_marker(pytest.mark.slow)


def _sample(cases: list, marker: pytest.Mark) -> set[int]:
    if "every" in marker.kwargs:
        return set(range(0, len(cases), marker.kwargs["every"]))
    return covering([_values(item.callspec.params) for item in cases], *marker.args)


def _values(params: dict[str, object]) -> dict[str, int]:
    """A parameter's values are told apart by which objects of its list they are."""
    return {name: id(value) for name, value in params.items()}


def covering(cases: list[dict[str, int]], strength: int) -> set[int]:
    """Greedily: the case that shows most of what is still to be shown, of values seldom taken.

    Neither its worth nor its rarity ever rises: only what comes to a heap's top is weighed again.
    """
    shown = [_combinations(case, strength) for case in cases]
    left, kept, taken = set().union(*shown), set(), Counter()

    def cost(n: int) -> tuple[int, int, int]:
        return -len(shown[n] & left), sum(taken[v] for v in cases[n].items()), n

    heap = [cost(n) for n in range(len(cases))]
    heapify(heap)
    while left or not kept:
        best = heap[0][-1]
        now = cost(best)
        if now != heap[0]:
            heapreplace(heap, now)
            continue
        kept.add(heappop(heap)[-1])
        left -= shown[best]
        taken.update(cases[best].items())
    return kept


def _combinations(case: dict[str, int], strength: int) -> set[tuple]:
    """The values together, `strength` parameters at a time; none for 0, all of fewer parameters."""
    return set(combinations(case.items(), min(strength, len(case)))) if strength else set()
