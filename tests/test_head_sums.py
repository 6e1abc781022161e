"""The scores of long calls by compiled passes: those of the weights, row by row, in float64."""

import pytest
import torch

import regard
from cases import Case, at
from regard import ALiBi, Causal, Full, Padding, Window
from regard.analysis import head_sums
from regard.analysis.head_sums import tally
from test_record import ids, tiny
from test_recording import computed, recorded

N = 150
DRAWN = torch.Generator().manual_seed(5)
DENSE = torch.randn(1, 4, N, N, generator=DRAWN)
TOKENS = [f"w{int(n)}" for n in torch.randint(0, 30, (N,), generator=DRAWN)]
TOKENS[7] = TOKENS[40] = TOKENS[41] = "."
ABOUT = {"tokens": TOKENS, "special": [n in (0, 60, N - 1) for n in range(N)]}
REQUESTS = {
    "full": {"mask": Full()},
    "causal": {"mask": Causal()},
    "window": {"mask": Causal() & Window(9)},
    "ahead": {"mask": Window(20, ahead=5)},
    "alibi and softcap": {"mask": Causal(), "bias": ALiBi(), "softcap": 3.0},
    "dense bias": {"mask": Full(), "bias": DENSE},
    "sinks": {"mask": Causal(), "sinks": torch.arange(4.0)},
    "sinks, both ways": {"mask": Full(), "sinks": torch.arange(4.0)},
}


def layers(query, key, kind="self", **request):
    """The same numbers in float64, and in float32."""
    for numbers in ((query.double(), key.double()), (query, key)):
        yield recorded(computed(*numbers, **request)[:2], kind=kind)


def both(exact, layer, about, monkeypatch):
    """The scores by strips of a layer's weights, those of another by passes, and what passed."""
    exact, used = tally(exact, about, about).means(), []

    def added(*given):
        used.append(given)
        add(*given)

    add = head_sums.add
    monkeypatch.setattr(head_sums, "LEAST", 0)
    monkeypatch.setattr(head_sums, "add", added)
    return exact, tally(layer, about, about).means(), used


def assert_same(exact, quick):
    assert set(exact) == set(quick)
    for name, values in exact.items():
        torch.testing.assert_close(
            quick[name], values, rtol=2e-5, atol=2e-6, equal_nan=True, msg=lambda s, n=name: n + s
        )


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_they_are_those_of_the_weights(request_, monkeypatch):
    query, key, _ = Case("", at(N)).tensors(dtype=torch.float32)
    exact, quick, used = both(*layers(query, key, **request_), ABOUT, monkeypatch)
    assert used
    assert_same(exact, quick)


def test_a_cross_layer_and_a_text_without_tokens(monkeypatch):
    query, key, _ = Case("", at(90, N)).tensors(dtype=torch.float32)
    pair = tuple(layers(query, key, kind="cross"))
    exact, quick, used = both(*pair, ABOUT, monkeypatch)
    assert used
    assert_same(exact, quick)
    monkeypatch.undo()
    exact, quick, used = both(*pair, {}, monkeypatch)
    assert_same(exact, quick)


def test_a_mask_with_gaps_is_read_row_by_row(monkeypatch):
    query, key, _ = Case("", at(N)).tensors(dtype=torch.float32)
    keep = torch.ones(1, N, dtype=torch.bool)
    keep[:, 50:60] = False
    pair = layers(query, key, mask=Causal() & Padding(keep))
    exact, quick, used = both(*pair, ABOUT, monkeypatch)
    assert not used
    assert_same(exact, quick)


@pytest.mark.parametrize("observe", [True, False])
def test_of_a_recorded_model_in_chunks(observe, tmp_path, monkeypatch):
    """bf16 as recorded, entropy from there where it was."""
    model, given = tiny(), ids(N)

    def run():
        cache = model(given[:, :100]).past_key_values
        model(given[:, 100:], past_key_values=cache)

    recording = regard.record(model, run, tmp_path / "r", observe=observe)
    for layer in recording.layers:
        exact, quick, used = both(layer, layer, ABOUT, monkeypatch)
        assert used
        assert_same(exact, quick)
        monkeypatch.undo()
