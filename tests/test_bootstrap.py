"""Intervals over texts by the Poisson bootstrap; relations chosen and measured on two halves."""

import json
import math

import pytest
import torch

from regard.analysis.bootstrap import REPLICATES, Replicates, draws
from regard.analysis.relations import FARTHEST, HalvedTally, RelationTally

NAMES = ["one", "two"]


def tallied(values: torch.Tensor, start: int = 0, made: Replicates | None = None) -> Replicates:
    """values (texts, heads) of the score "one", the texts numbered from `start` on."""
    made = made or Replicates(NAMES, values.shape[1])
    for number, value in enumerate(values, start):
        made.add({"one": value}, draws(number))
    return made


def test_an_interval_is_that_of_the_replicates_means():
    """By the definition: every replicate's weighted mean, those that drew no value left out."""
    values = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)).double()
    values[1, 2] = torch.nan
    found = tallied(values)
    drawn = torch.stack([draws(n) for n in range(5)])
    assert (drawn == drawn.round()).all()
    for head in range(3):
        there = ~values[:, head].isnan()
        weights, column = drawn[there], values[there, head]
        used = weights.sum(0) > 0
        means = (weights * column[:, None]).sum(0)[used] / weights.sum(0)[used]
        wanted = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        assert found.interval("one", head) == pytest.approx(tuple(wanted.tolist()), rel=1e-12)
    assert found.interval("two", 0) is None


def test_over_many_texts_it_is_near_the_normal_one():
    """And the draws of a text do not depend on the others'."""
    values = torch.randn(800, 4, generator=torch.Generator().manual_seed(1)).double()
    found = tallied(values)
    for head in range(4):
        low, high = found.interval("one", head)
        mean, half = values[:, head].mean(), 1.96 * values[:, head].std() / math.sqrt(800)
        assert low == pytest.approx(float(mean - half), abs=0.35 * float(half))
        assert high == pytest.approx(float(mean + half), abs=0.35 * float(half))
    assert torch.equal(draws(7), draws(7))
    drawn = torch.stack([draws(n) for n in range(400)])
    assert float(drawn.mean()) == pytest.approx(1, abs=0.02)
    assert float(drawn.var()) == pytest.approx(1, abs=0.03)
    assert torch.corrcoef(drawn)[0, 1:].abs().max() < 5 / math.sqrt(REPLICATES)


def test_what_goes_on_from_a_file_is_the_same_to_the_bit():
    values = torch.rand(9, 2, generator=torch.Generator().manual_seed(2)).double()
    values[3, 1] = torch.nan
    half = json.loads(json.dumps(tallied(values[:4]).to_json()))
    resumed = tallied(values[4:], 4, Replicates.from_json(half, NAMES, 2))
    whole = tallied(values)
    assert torch.equal(resumed.sums, whole.sums)
    assert torch.equal(resumed.counts, whole.counts)
    for wrong in ({"sums": half["sums"]}, half | {"sums": "AAAA"}, half | {"counts": "!"}):
        with pytest.raises((KeyError, ValueError)):
            Replicates.from_json(wrong, NAMES, 2)
    with pytest.raises((ValueError, RuntimeError)):
        Replicates.from_json(half, NAMES, 3)


def half(pairs, hits, offsets) -> RelationTally:
    """pairs, hits of one head, and {offset: how often it is right}, by relation."""
    made = RelationTally(sentences=1)
    for name, count in pairs.items():
        made.pairs[name, "head"] = count
        made.hits[name, "head"] = [torch.tensor([hits[name]])]
        steps = torch.zeros(2 * FARTHEST + 1, dtype=torch.int64)
        for offset, right in offsets[name].items():
            steps[offset + FARTHEST] = right
        made.offsets[name, "head"] = steps
    return made


def test_what_is_chosen_on_one_half_is_measured_on_the_other():
    """Luck in the first half is not reported: neither the head's, nor the offset's."""
    chosen = half({"a": 30, "b": 30}, {"a": 27, "b": 20}, {"a": {1: 6, 2: 3}, "b": {-1: 6}})
    other = half({"a": 50, "b": 40}, {"a": 10, "b": 40}, {"a": {1: 5, 2: 45}, "b": {-1: 4}})
    best = HalvedTally([chosen, other]).best(0, 0)
    assert best == ("a", "head", 10 / 50, 5 / 50, 1, 50, 27 / 30)
    again = HalvedTally.from_json(json.loads(json.dumps(HalvedTally([chosen, other]).to_json())))
    assert again.best(0, 0) == best
    assert again.sentences == 2


def test_a_relation_needs_enough_pairs_in_both_halves():
    chosen = half({"a": 30, "b": 30}, {"a": 27, "b": 20}, {"a": {1: 6}, "b": {-1: 6}})
    other = half({"a": 19, "b": 20}, {"a": 19, "b": 2}, {"a": {1: 5}, "b": {-1: 4}})
    assert HalvedTally([chosen, other]).best(0, 0).name == "b"
    assert HalvedTally([chosen, RelationTally()]).best(0, 0) is None
