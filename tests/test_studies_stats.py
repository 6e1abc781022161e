"""The definitions that studies stand on: fits, intervals, tasks, alignments, what a seed fixes."""

import json
import math
import random

import numpy as np
import pytest
import torch

from regard.errors import RegardError
from regard.lab.studies import NAMES, study_named
from regard.lab.studies.alignment import Aligned, counts, diagonal, error_rate, read_alignments
from regard.lab.studies.coreference import dpr, gap, winobias
from regard.lab.studies.learning import IGNORED
from regard.lab.studies.links import Item, chosen, first, nearest, tokens
from regard.lab.studies.recall import state_size
from regard.lab.studies.recall_tasks import associative, copying
from regard.lab.studies.stats import auc, bootstrap, exponent, mean_interval, power_law, with_floor
from regard.lab.studies.study import Panel, Result, Verdict, reproducible

XS = [10.0, 20.0, 50.0, 100.0, 400.0]


def test_a_power_law_is_found_again():
    a, b = power_law(XS, [3 * x**-0.7 for x in XS])
    assert (a, b) == pytest.approx((3, -0.7))
    assert exponent(XS, [x**2 for x in XS]) == pytest.approx(2)


def test_a_power_law_of_what_is_not_positive_is_none():
    assert math.isnan(exponent([1, 2], [1, 0]))
    assert math.isnan(exponent([1], [1]))


def test_a_floor_is_found_below_a_power_law():
    floor, a, b = with_floor(XS, [1.5 + 4 * x**-0.5 for x in XS])
    assert floor == pytest.approx(1.5, rel=0.02)
    assert (a, b) == pytest.approx((4, -0.5), rel=0.05)


def test_a_bootstrap_interval_is_that_of_the_normal_law_and_of_its_seed():
    values = np.random.default_rng(0).normal(5, 2, 400).tolist()
    found = mean_interval(values, random.Random(1))
    error = 1.96 * np.std(values) / 20
    assert found.value == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx(
        (found.value - error, found.value + error), abs=error / 5
    )
    assert found == mean_interval(values, random.Random(1))
    assert bootstrap([1.0], max, random.Random(0)) == (1, 1, 1)


def test_the_area_under_a_curve_counts_ties_half():
    assert auc([1, 2], [0, 1]) == (2 + 1.5) / 4


def test_every_key_that_is_asked_again_has_its_value_as_target():
    ids, targets = associative(50, 3, 20, 17, torch.Generator().manual_seed(0))
    assert ids.shape == targets.shape == (50, 20)
    assert (targets != IGNORED).sum(1).tolist() == [3] * 50
    for row, asked in zip(ids.tolist(), targets.tolist(), strict=True):
        known = dict(zip(row[0:6:2], row[1:6:2], strict=True))
        assert len(known) == 3
        assert set(known) <= set(range(1, 9))
        assert set(known.values()) <= set(range(9, 17))
        assert asked[:6] == [IGNORED] * 6
        assert {k: v for k, v in zip(row[6:], asked[6:], strict=True) if v != IGNORED} == known
        assert sorted(filter(None, row[6:])) == sorted(known)
    with pytest.raises(ValueError, match="3 pairs need"):
        associative(1, 3, 11, 17, torch.Generator())


def test_what_is_copied_is_asked_in_order_after_the_pause():
    ids, targets = copying(4, 3, 5, 9, torch.Generator().manual_seed(0))
    assert ids.shape == (4, 11)
    assert (ids[:, 3:8] == 0).all()
    assert (ids[:, 8:] == 1).all()
    assert (targets[:, 8:] == ids[:, :3]).all()
    assert (targets[:, :8] == IGNORED).all()
    assert int(ids[:, :3].min()) >= 2


def test_the_state_of_attention_grows_and_others_do_not():
    def size(mixer, length):
        return state_size(mixer, length, 32, 2, 2, 8)

    assert size("softmax", 20) == 2 * size("softmax", 10) == 2 * 2 * 20 * 32
    for mixer in ("window", "linear", "delta", "lstm", "gru"):
        assert size(mixer, 100) == size(mixer, 10)
    assert size("lstm, equal memory", 20) == size("softmax", 20)


def test_the_alignment_error_rate_is_och_and_neys():
    pair = Aligned(["a", "b"], ["x", "y"], frozenset({(0, 0)}), frozenset({(0, 0), (1, 1)}))
    assert error_rate([counts([(0, 0), (1, 1)], pair)]) == 0
    assert error_rate([counts([(0, 1), (1, 0)], pair)]) == 1
    # Of two links one is sure and possible, one neither: 1 − (1 + 1) / (2 + 1)
    assert error_rate([counts([(0, 0), (1, 0)], pair)]) == pytest.approx(1 / 3)
    assert diagonal(pair) == [(0, 0), (1, 1)]


def test_alignments_are_read_from_0_and_sure_ones_are_possible(tmp_path):
    (tmp_path / "text").write_text("a b  ||| x y z \n")
    (tmp_path / "gold").write_text("1-1 2p3\n")
    (pair,) = read_alignments(tmp_path / "text", tmp_path / "gold")
    assert pair.source == ["a", "b"]
    assert pair.target == ["x", "y", "z"]
    assert pair.sure == {(0, 0)}
    assert pair.possible == {(0, 0), (1, 2)}


def said(item):
    return (
        item.text[slice(*item.reader)],
        [item.text[slice(*span)] for span in item.candidates],
        item.right,
    )


def test_pronouns_are_read_with_both_candidates(tmp_path):
    (tmp_path / "a.txt.dev").write_text(
        "1 [The developer] argued with the designer because [he] did not like the design.\n"
        "2 The developer argued with [the designer] because [her] idea cannot be implemented.\n"
    )
    both = winobias(tmp_path, "dev")
    assert [said(item) for item in both] == [
        ("he", ["developer", "designer"], 0),
        ("her", ["developer", "designer"], 1),
    ]
    assert [nearest(item) for item in both] == [False, True]
    assert [first(item) for item in both] == [True, False]

    (tmp_path / "dpr").write_text(
        "The bee landed on the flower because it had pollen.\n"
        "it\nThe bee,the flower\nthe flower\n\n"
        "The bee landed on the flower because it wanted pollen.\nit\nThe bee,the flower\nThe bee\n"
    )
    pair = dpr(tmp_path / "dpr")
    assert [said(item) for item in pair] == [
        ("it", ["bee", "flower"], 1),
        ("it", ["bee", "flower"], 0),
    ]
    assert {item.pair for item in pair} == {0}

    (tmp_path / "gap.tsv").write_text(
        "ID\tText\tPronoun\tPronoun-offset\tA\tA-offset\tA-coref\tB\tB-offset\tB-coref\tURL\n"
        "1\tAnn saw Eve when she left.\tshe\t17\tAnn\t0\tFALSE\tEve\t8\tTRUE\tx\n"
        "2\tAnn saw Eve when she left.\tshe\t17\tAnn\t0\tFALSE\tEve\t8\tFALSE\tx\n"
    )
    assert [said(item) for item in gap(tmp_path / "gap.tsv")] == [("she", ["Ann", "Eve"], 1)]


def test_a_head_is_chosen_on_one_part_and_reported_on_the_other():
    items = [Item("", (0, 1), ((2, 3),), 0, pair) for pair in (0, 0, 1, 1)]
    dev = torch.tensor([[[1, 0]], [[1, 1]], [[1, 0]]], dtype=torch.bool)
    test = torch.tensor([[[1, 1]], [[1, 1]], [[0, 1]], [[1, 1]]], dtype=torch.bool)
    found = chosen(dev, test, items, random.Random(0))
    assert (found.layer, found.head, found.share.value, found.pairs) == (0, 0, 0.75, 0.5)


def test_a_words_tokens_are_those_that_share_characters():
    assert tokens([(0, 0), (0, 3), (4, 6), (6, 9)], (4, 9)) == [2, 3]


def test_what_a_seed_does_not_fix_is_left_out(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = Result(
        ("way", "ms"), [("a", 1.5)],
        [Verdict("x", True, "1"), Verdict("y", True, "2 ms", clock=True)],
        [Panel("t", "x", "y", {"a": ([1], [2.0])}, clock=True)], ("ms",),
    )  # fmt: skip
    from regard.lab.studies.study import Measured

    run = Measured(study_named("equal"), result, "full", 3, 1.2345, {"processor": "p"}, True)
    found = run.to_json()
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == (
        "OMP_NUM_THREADS=1 regard study equal --seed 3 --data ../shared/data"
    )
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert run.command == "regard study equal --seed 3 --data ../shared/data"
    kept = reproducible(found)
    assert kept["rows"] == [["a"]]
    assert [one["claim"] for one in kept["verdicts"]] == ["x"]
    assert kept["panels"] == []
    assert "seconds" not in kept
    assert "machine" not in kept


@pytest.mark.parametrize("name", NAMES)
def test_every_study_says_what_it_claims_in_a_line(name):
    study = study_named(name)
    assert study.name == name
    assert len(study.claim) < 100
    assert study.claim.endswith(".")
    assert set(study.tiny) == set(study.quick) == set(study.full)


def test_a_study_that_is_not_there_is_said():
    with pytest.raises(RegardError, match="no study 'costs'; there are cost, recall"):
        study_named("costs")
