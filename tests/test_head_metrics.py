"""Each head's means over all queries, from what was read while recording, against the weights."""

import pytest
import torch

import regard
from cases import assert_within
from recorded_truths import kept
from regard.report.view import overview
from test_record import ids, tiny


def defined(weights) -> dict[str, torch.Tensor]:
    """(heads, n, n) of a self-attention: each metric by its definition."""
    n = weights.shape[1]
    at = torch.arange(n)
    return {
        "sink": weights[:, :, 0].mean(1),
        "largest": weights.amax(-1).mean(1),
        "entropy": torch.special.entr(weights).sum(-1).mean(1),
        "itself": weights.diagonal(0, 1, 2).mean(1),
        "before": weights.diagonal(-1, 1, 2).sum(1) / n,
        "distance": (weights * (at[:, None] - at).abs()).sum(-1).mean(1),
    }


@pytest.mark.parametrize("ends", [[300], [200, 290, 300]], ids=["at once", "in chunks"])
def test_they_are_the_means_over_all_queries(ends, tmp_path):
    """And what the page shows is these, not a sample."""
    model, given = tiny(), ids(300, 2)

    def run():
        cache = None
        for start, end in zip([0, *ends], ends, strict=False):
            cache = model(given[:, start:end], past_key_values=cache).past_key_values

    recording = regard.record(model, run, tmp_path / "r")
    for layer, held in enumerate(recording.layers):
        for batch in (0, 1):
            found = recording.head_metrics(layer, batch)
            plain, wanted = (defined(of.weights[batch]) for of in reversed(kept(held)))
            assert set(found) == set(wanted) == set(overview.METRICS)
            shown = overview.layer_metrics(recording, layer, batch)
            assert shown["sampled"] == []
            for name, values in wanted.items():
                # Four numbers, each a sum of hundreds of rows: a chance of their own
                assert_within(found[name], plain[name], values, roundings=4)
                # The page rounds
                assert shown[name] == pytest.approx(values.tolist(), rel=1e-4, abs=2e-5)


def test_nothing_is_said_of_what_was_not_recorded(tmp_path):
    recording = regard.record(tiny(), ids(40), tmp_path / "r", observe=False)
    assert recording.head_metrics(0) == {}
    shown = overview.layer_metrics(recording, 0, 0)
    assert set(shown) == {*overview.METRICS, "sampled"}
    assert set(shown["sampled"]) == set(overview.METRICS)
