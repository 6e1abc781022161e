"""The default run's sample of a test's cases shows what it says, and is small."""

from itertools import combinations, product
from types import SimpleNamespace

import pytest

from sampling import covering, mark_others_slow

SIZES = {"make": 4, "sizes": 6, "request": 9}
CASES = [dict(zip(SIZES, values, strict=True)) for values in product(*map(range, SIZES.values()))]


@pytest.mark.parametrize("strength, most", [(0, 1), (1, 9), (2, 70)])
def test_every_combination_is_shown(strength, most):
    kept = [CASES[n] for n in covering(CASES, strength)]
    for names in combinations(SIZES, strength):
        shown = {tuple(case[name] for name in names) for case in kept}
        assert shown == set(product(*(range(SIZES[name]) for name in names)))
    assert len(kept) <= most


class Item:
    """What of pytest's items is asked."""

    def __init__(self, params, marker) -> None:
        self.nodeid, self.callspec, self.slow = "test[…]", SimpleNamespace(params=params), False
        self.get_closest_marker = {"sample": marker}.get

    def add_marker(self, marker) -> None:
        self.slow = True


def test_of_a_full_product_some_run_by_default_more_in_ci_and_the_rest_nowhere():
    values = {name: [object() for _ in range(n)] for name, n in SIZES.items()}
    marker = pytest.mark.sample(1, most=2).mark
    items = [
        Item(dict(zip(values, each, strict=True)), marker) for each in product(*values.values())
    ]
    nowhere = mark_others_slow(items)
    left = [item for item in items if item not in nowhere]
    for kept, strength in ((left, 2), ([item for item in left if not item.slow], 1)):
        for names in combinations(values, strength):
            shown = {tuple(item.callspec.params[name] for name in names) for item in kept}
            assert shown == set(product(*(values[name] for name in names)))
    assert 9 <= sum(not item.slow for item in left) < len(left) <= 70 < len(items)
    assert not any(item.slow for item in nowhere)
