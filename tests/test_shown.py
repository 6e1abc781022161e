"""In a notebook results, layers, recordings and masks show themselves: escaped, compact, in SVG."""

import xml.etree.ElementTree as ET

import pytest
import torch
from torch import nn

import regard
from regard import (
    Causal,
    Dense,
    Distances,
    Documents,
    Edges,
    Effect,
    Entropy,
    First,
    Full,
    Heads,
    LogSumExp,
    Map,
    MaxScore,
    NormTopK,
    Padding,
    Predicate,
    Received,
    Rows,
    TopK,
    Window,
)
from regard.call.display.mask_picture import Sizes
from regard.call.results import EntropySeen
from regard.sparse import (
    BigBird,
    BlockSparse,
    Chunks,
    Dilated,
    Fixed,
    Longformer,
    Strided,
    TopBlocks,
)

OBSERVERS = [
    TopK(3), Received(), Entropy(), Map(64, 64), Distances(), Rows([3, -1]), NormTopK(2),
    MaxScore(), LogSumExp(), Effect(2),
]  # fmt: skip
MASKS = [
    Full(), Causal(), ~Causal(), Causal() & (Window(1024) | First(64)), Longformer(8, [3, 9]),
    BigBird(16), Strided(4), Fixed(8, 2), Dilated(5, 3), Chunks(30, 7),
    Documents(torch.arange(50) // 11), Padding(torch.arange(20)[None] < 15),
    Edges([(3, 1), (10, 4)]), Heads([2]) & Causal(), Dense(torch.rand(2, 1, 6, 9) > 0.5),
    BlockSparse(torch.rand(3, 4) > 0.5, 8), Predicate(lambda b, h, i, j: (i - j) % 3 == 0),
]  # fmt: skip
ATTACK = "<img src=x onerror=window.pwned=1>&\"'"


class Two(nn.Module):
    """Attention twice."""

    def forward(self, q):
        return [nn.functional.scaled_dot_product_attention(q, q, q) for _ in range(2)]


def watched(*observers):
    torch.manual_seed(0)
    model = Two()
    with regard.watch(model, observe=observers, keep_qk=True) as seen:
        model(torch.randn(1, 2, 7, 8))
    return seen


def parsed(value, most=20_000):
    """What it shows, well-formed and not long."""
    shown = value._repr_html_()
    assert len(shown) < most
    return ET.fromstring(shown)


def cells(root):
    """How many cells of the first picture are shaded, and its size."""
    svg = next(root.iter("svg"))
    width, height = map(int, svg.get("viewBox").split()[2:])
    runs = [run for path in svg.iter("path") for run in path.get("d").split("M")[1:]]
    return sum(int(run.split("h")[1].split("v")[0]) for run in runs), (height, width)


def every_result(n):
    torch.manual_seed(0)
    q = torch.randn(1, 3, n, 8, requires_grad=True)
    out, seen = regard.attention(q, q, q, mask=Causal(), observe=OBSERVERS)
    out.sum().backward()
    assert seen[-1].effects is not None
    return seen


def test_results_show_a_small_picture():
    for n in (5, 500):
        for result in every_result(n):
            root = parsed(result)
            assert repr(result) in "".join(root.itertext())
            shaded, (rows, cols) = cells(root)
            assert 0 < shaded <= rows * cols
            assert rows <= 32
            assert cols <= 64


def test_a_result_without_numbers_shows_its_words():
    for values in (torch.rand(1, 2, 0), torch.empty(1, 2, 5, device="meta")):
        assert not list(parsed(EntropySeen(values)).iter("svg"))
    unmeasured = regard.call.edge_results.EffectSeen()
    assert "no backward() yet" in "".join(parsed(unmeasured).itertext())


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_mask_shows_what_it_lets_see(mask):
    place = Sizes.of(mask).place()
    visible = (
        mask.lower(place)
        .visible(regard.call.geometry.Span(0, place.q_len, 0, place.k_len))
        .expand(place.batch, place.heads, -1, -1)
    )
    item = visible.flatten(0, 1)
    one = item[int(item.flatten(1).any(1).nonzero()[0])]
    rows, cols = (-(-n // 32) for n in one.shape)
    pads = (0, -one.shape[1] % cols, 0, -one.shape[0] % rows)
    pooled = nn.functional.pad(one, pads).unflatten(0, (-1, rows)).unflatten(2, (-1, cols))
    root = parsed(mask)
    if place.q_len * place.k_len <= 2**20:
        assert cells(root) == (int(pooled.any(3).any(1).sum()), pooled.shape[::2])
    assert str(mask) in "".join(root.itertext())


def test_a_mask_without_a_picture_says_why():
    def fails(b, h, i, j):
        raise ValueError(ATTACK)

    said = "".join(parsed(Predicate(fails)).itertext())
    assert f"no picture: {ATTACK}" in said
    assert "no picture: " in "".join(parsed(TopBlocks(2, 16)).itertext())
    assert cells(parsed(Causal() & ~Causal()))[0] == 0


def test_layers_and_recordings_list_what_they_hold():
    seen = watched(TopK(2), Entropy())
    root = parsed(seen)
    assert len(list(root.iter("svg"))) == 2  # a grid of heads an observer
    assert cells(root)[1] == (2, 2)
    assert len(list(parsed(seen[0]).iter("svg"))) == 2
    recording = seen.recording(text=ATTACK, model=ATTACK)
    assert len(list(parsed(recording).iter("tr"))) == 3
    assert "<img" not in recording._repr_html_()
    model = Two()
    with regard.watch(model) as nothing:
        assert "0 layers so far" in "".join(parsed(nothing).itertext())


def test_a_browser_draws_it_light_and_dark(browser, tmp_path):
    """In sight on both, nothing of a text is run, and the console stays empty."""
    seen = watched(TopK(2), Entropy())
    shown = [seen, seen[0], seen.recording(text=ATTACK, model=ATTACK), *MASKS, *every_result(60)]
    body = "".join(value._repr_html_() for value in shown)
    for colours in ("background:#fff;color:#222", "background:#111;color:#ddd"):
        page = tmp_path / "notebook.html"
        page.write_text(f'<!doctype html><meta charset=utf-8><body style="{colours}">{body}')
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get(page.as_uri())
        sizes = browser.execute_script(
            "return [...document.querySelectorAll('svg')].map(s => {"
            "const b = s.getBoundingClientRect(); return [b.width, b.height]})"
        )
        assert len(sizes) >= len(shown)
        assert all(4 <= w <= 320 and 4 <= h <= 320 for w, h in sizes)
        assert browser.execute_script("return document.querySelectorAll('img').length") == 0
        assert browser.execute_script("return window.pwned") is None
        assert [entry["message"] for entry in browser.get_log("browser")] == []
