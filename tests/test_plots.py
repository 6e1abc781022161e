"""Plots: what they show, their labels, and that they stay small however long the sequence is."""

from itertools import pairwise

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

import regard
from regard import (
    Causal,
    Distances,
    Entropy,
    Map,
    MaxScore,
    NormTopK,
    Received,
    RegardError,
    Rows,
    TopK,
)
from regard.call.edge_results import EffectSeen, TopKSeen
from regard.call.results import EntropySeen, ReceivedSeen

OBSERVERS = [
    TopK(3), Received(), Entropy(), Map(64, 64), Distances(8), Rows([3, -1]), NormTopK(2),
    MaxScore(),
]  # fmt: skip
AXES = [
    ("key", "query"), ("key", "head"), ("query", "head"), ("key", "query"), ("distance", "head"),
    ("key", "query"), ("key", "query"), ("query", "head"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def seen(n=12):
    torch.manual_seed(0)
    q = torch.randn(2, 3, n, 8)
    return regard.attention(q, q, q, mask=Causal(), observe=OBSERVERS)[1]


@pytest.mark.parametrize("at", range(len(OBSERVERS)), ids=lambda at: str(OBSERVERS[at]))
@pytest.mark.parametrize("head", [None, 1], ids=["heads", "head"])
def test_each_says_what_it_shows(at, head):
    ax = plt.subplots()[1]
    result = seen()[at]
    assert result.plot(ax, batch=1, head=head) is ax
    x, y = AXES[at]
    assert ax.get_xlabel().startswith(x)
    assert "batch 1" in ax.get_title()
    unit = ax.figure.axes[-1].get_ylabel()  # of the bar of colours, or of the line
    assert unit
    if head is None or y == "query":
        assert ax.get_ylabel().startswith(y)
        assert len(ax.figure.axes) == 2
    assert ("head 1" in ax.get_title()) == (head == 1)


def test_the_numbers_are_the_results_own():
    top, received, entropy, pooled, *_ = seen()
    shown = entropy.plot().images[0].get_array()
    np.testing.assert_allclose(shown, entropy.values[0])
    np.testing.assert_allclose(received.plot().images[0].get_array(), received.mean[0])
    image = pooled.plot(head=2).images[0]
    np.testing.assert_allclose(image.get_array().filled(0), pooled.weights[0, 2], rtol=1e-6)
    assert image.get_extent() == [-0.5, 11.5, 11.5, -0.5]
    edges = top.plot(head=1).images[0].get_array()
    assert float(edges[5, int(top.indices[0, 1, 5, 0])]) == float(top.weights[0, 1, 5, 0])
    assert (~edges.mask).sum() == (top.indices[0, 1] >= 0).sum()
    line = entropy.plot(head=1).patches[0]
    np.testing.assert_allclose(line.get_data().values, entropy.values[0, 1])


def test_an_effect_keeps_its_sign():
    effect = EffectSeen()
    indices = torch.arange(4, dtype=torch.int32).view(1, 1, 4, 1)
    effect.fill(
        indices, torch.tensor([1.0, -3.0, 2.0, 0.5]).view(1, 1, 4, 1), torch.ones(1, 1, 4, 1)
    )
    image = effect.plot().images[0]
    assert (image.norm.vmin, image.norm.vmax) == (-3, 3)
    assert float(image.get_array()[1, 1]) == -3
    plain = EffectSeen()
    with pytest.raises(RegardError, match="no effect yet"):
        plain.plot()


def test_131072_tokens_are_drawn_in_cells():
    """In no more than a picture has; a lone large weight stays in sight."""
    n = 131_072
    indices = (torch.rand(1, 1, n, 2) * torch.arange(1, n + 1).view(-1, 1)).int()
    weights = torch.full((1, 1, n, 2), 0.01)
    indices[0, 0, 100_000, 0], weights[0, 0, 100_000, 0] = 7, 0.9
    top = TopKSeen(indices, weights, weights[..., 0], weights[..., 0])
    image = top.plot().images[0].get_array()
    assert max(image.shape) <= 512
    assert float(image[100_000 // 256, 0]) == pytest.approx(0.9)
    columns = torch.full((1, 4, n), 0.001)
    columns[0, 2, 77_777] = 0.5
    received = ReceivedSeen(columns, torch.ones(1, 4, n, dtype=torch.int32), n, 0)
    shown = received.plot().images[0].get_array()
    assert shown.shape == (4, 1024)
    assert float(shown[2, 77_777 // 128]) == 0.5
    ax = EntropySeen(torch.rand(1, 1, n)).plot()
    assert len(ax.patches[0].get_data().values) == 1024
    assert "largest of each cell" in ax.get_ylabel()


TOKENS = [
    "The", "$x$", "\n", "a_very_long_token_of_a_text", "<b>", "it", "", "ü", ".", "and", "so", "on",
]  # fmt: skip


@pytest.mark.sample(1)
@pytest.mark.parametrize("size", [(2.5, 2), (10, 7)], ids=str)
@pytest.mark.parametrize("n", [12, 300])
def test_labels_never_overlap(n, size):
    tokens = (TOKENS * 25)[:n]
    for result in seen(n)[:2]:
        for given in (tokens, None):
            figure, ax = plt.subplots(figsize=size, layout="constrained")
            result.plot(ax, tokens=given)
            figure.canvas.draw()
            for axis in (ax.xaxis, ax.yaxis):
                labels = [t.label1 for t in axis.get_major_ticks() if t.label1.get_text()]
                boxes = [label.get_window_extent() for label in labels]
                assert not any(a.overlaps(b) for a, b in pairwise(boxes))
            plt.close(figure)


def test_tokens_name_their_positions():
    figure, ax = plt.subplots(figsize=(8, 8))
    seen()[0].plot(ax, tokens=TOKENS)
    figure.canvas.draw()
    said = [t.get_text() for t in ax.get_xticklabels()]
    assert said[:5] == ["The", r"\$x\$", "↵", "a_very_long_t…", "<b>"]
    assert len(said) == 12


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_it_takes_the_style_that_is_set(style):
    with plt.style.context(style):
        ax = seen()[1].plot()
        assert ax.get_facecolor() == matplotlib.colors.to_rgba(plt.rcParams["axes.facecolor"])
        assert ax.xaxis.label.get_color() == plt.rcParams["axes.labelcolor"]


@pytest.mark.parametrize(
    "given, said",
    [
        ({"head": 3}, "head is 3; the result has 3"),
        ({"batch": 2}, "batch is 2; the result has 2"),
        ({"tokens": ["a"]}, "1 tokens, and a query at position 11"),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused(given, said):
    with pytest.raises(RegardError, match=said):
        seen()[0].plot(**given)


def test_nothing_to_draw_is_drawn_empty():
    q = torch.randn(1, 2, 0, 8)
    _, found = regard.attention(q, q, q, observe=[Entropy(), TopK(2), Map(4, 4), Received()])
    for result in found:
        assert result.plot().get_xlabel()


WATCHED = [o for o in OBSERVERS if not isinstance(o, NormTopK)]  # which needs a projection


class Two(nn.Module):
    """Attention twice, the second sharper."""

    def forward(self, q):
        return [nn.functional.scaled_dot_product_attention(q * s, q, q) for s in (1, 4)]


def test_a_watched_models_heads_and_those_of_its_recording():
    torch.manual_seed(0)
    model = Two()
    with regard.watch(model, observe=WATCHED, keep_qk=True) as watched:
        model(torch.randn(2, 3, 12, 8))
    ax = watched.plot("entropy", batch=1)
    shown = ax.images[0].get_array()
    wanted = torch.stack([layer[Entropy].values[1].mean(-1) for layer in watched])
    np.testing.assert_allclose(shown, wanted, rtol=1e-5)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("head", "layer")
    assert "nats" in ax.figure.axes[-1].get_ylabel()
    again = watched.recording().plot(Entropy(), batch=1).images[0].get_array()
    np.testing.assert_allclose(again, wanted, rtol=1e-4)
    for which in ("topk", Received, MaxScore(), 3, "distances", "rows", "max_score"):
        assert watched.plot(which).images[0].get_array().shape == (2, 3)
    with pytest.raises(RegardError, match="batch is 2; the result has 2"):
        watched.plot("entropy", batch=2)
