"""Fits of studies: a law in two sizes at once, and what recall measures beside its table."""

import math

import pytest

from regard.lab.studies import study_named
from regard.lab.studies.recall import MIXERS, by_state, over_distances, state_size
from regard.lab.studies.stats import joint_power_law
from regard.lab.studies.study import Setting

SIZES = [(n, d) for n in (1e3, 4e3, 2e4, 1e5) for d in (1e4, 1e5, 1e6)]


def test_a_law_of_parameters_and_tokens_is_found_again():
    losses = [1.5 + 40 * n**-0.45 + 90 * d**-0.3 for n, d in SIZES]
    found = joint_power_law(*zip(*SIZES, strict=True), losses)
    assert found == pytest.approx((0.45, 0.3))
    rising = [n**0.2 * d**0.2 for n, d in SIZES]
    assert all(map(math.isnan, joint_power_law(*zip(*SIZES, strict=True), [-x for x in rising])))


def test_recall_is_measured_over_states_and_distances():
    tiny = Setting(study_named("recall").sizes("tiny"), 0, "tiny")
    size = tiny.size
    states = by_state(tiny)
    assert set(states) == {"linear", "delta", "lstm", "gru"}
    for mixer, (sizes, shares) in states.items():
        given = (size.length, size.widths[0], size.depth, size.heads, size.window)
        assert sizes == [state_size(mixer, *given)]
        assert all(0 <= share <= 1 for share in shares)
    apart = over_distances(tiny)
    assert set(apart) == set(MIXERS)
    assert all(xs == size.distances and len(ys) == len(xs) for xs, ys in apart.values())
    assert over_distances(tiny) == apart
