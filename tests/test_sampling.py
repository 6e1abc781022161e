"""The default run's sample of a test's cases shows what it says, and is small."""

from itertools import combinations, product

import pytest

from sampling import covering

SIZES = {"make": 4, "sizes": 6, "request": 9}
CASES = [dict(zip(SIZES, values, strict=True)) for values in product(*map(range, SIZES.values()))]


@pytest.mark.parametrize("strength, most", [(0, 1), (1, 9), (2, 70)])
def test_every_combination_is_shown(strength, most):
    kept = [CASES[n] for n in covering(CASES, strength)]
    for names in combinations(SIZES, strength):
        shown = {tuple(case[name] for name in names) for case in kept}
        assert shown == set(product(*(range(SIZES[name]) for name in names)))
    assert len(kept) <= most
