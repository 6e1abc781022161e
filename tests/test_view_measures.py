"""Names and numbers on the page: of queries that keys stand before; of lengths and effects."""

import pytest
import torch

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')
pytest.importorskip("selenium", reason='needs pip install "regard[dev]"')

import regard
from regard.call.checked import Call
from regard.capture.recorded_layer import RecordedLayer
from regard.capture.recording import Recording
from test_view_page import ViewPage
from viewing import served


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    """20 keys stand before the first of 40 queries; keys add vectors of lengths 0.001 … 1,000."""
    drawn = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 40, 16, generator=drawn)
    key = torch.randn(1, 2, 60, 16, generator=drawn)
    query[0, 0] += 0.8 * key[0, 0, 19:-1]  # each reads the token before it
    _, (lse,) = regard.attention(
        query, key, key, mask=regard.Causal(), observe=[regard.LogSumExp()]
    )
    layer = RecordedLayer("layers.0.attention", 0, "self")
    layer.add(Call.checked(query, key, key, mask=regard.Causal()), lse.values)
    layer.norms = [
        (0, torch.logspace(-3, 3, 60)[torch.randperm(60, generator=drawn)].expand(1, 2, 60))
    ]
    layer.values = [(0, torch.zeros(1, 2, 60, 16))]
    recording = Recording([layer], {"model": "small", "tokens": [f" word{i}" for i in range(60)]})
    folder = tmp_path_factory.mktemp("measures") / "r"
    recording.save(folder)
    return folder


@pytest.mark.slow
def test_a_query_has_the_name_of_its_token(browser, later):
    weights = Recording.load(later).weights(0, 0)
    with served(later) as (address, _):
        page = ViewPage(browser, f"{address}#head=0.0&word=10&at=6.00,10,30").exact()
        page.until("document.querySelector('#list tbody tr')")
        best = int(weights[10].argmax())
        assert page.text("#headline").startswith(f"word30 reads word{best} ")
        assert page.text("#list caption") == "word30 reads, head 0.0"
        cells = page.cells(f"#list tbody tr[data-key='{best}']")[0]
        assert cells[3:] == [str(best), str(abs(30 - best))]
        page.over(".map", 8, 8)
        page.until("document.getElementById('headline').dataset.weight")
        assert page.text("#headline").startswith("word30 reads word30 ")
        page.press("t")
        page.until("document.querySelector('.word.locked')?.dataset.word === '30'")
        page.run("document.querySelector(\"#way [data-way='in']\").click()")
        page.until("document.querySelector('#list caption').innerText.includes('is read by')")
        reader = int(weights[:, 10].argmax())
        assert page.text("#list tbody tr .name") == f"word{reader + 20}"
        page.is_clean()


@pytest.mark.slow
def test_lengths_of_any_size_are_said(browser, later):
    """At words, in chips, in the list and the headline: never as if they were weights."""
    lengths = Recording.load(later).norm_weights(0, 1, [39])[0]
    with served(later) as (address, _):
        page = ViewPage(browser, f"{address}#head=0.1&view=text&word=39&measure=value&share=100")
        page.until("document.querySelector('#list tbody tr')")
        shown = page.all("#list tbody tr", "[Number(e.dataset.key), e.cells[2].innerText]")
        for key, said in shown:
            assert float(said.replace(",", "")) == pytest.approx(float(lengths[key]), rel=6e-3)
        best = float(lengths.max())
        words = page.all(".word[data-label]", "[Number(e.dataset.word), e.dataset.label]")
        assert len(words) > 2
        for key, said in words:
            assert lengths[key] >= 0.02 * best
            assert float(said.replace(",", "")) == pytest.approx(float(lengths[key]), rel=0.06)
        widths = page.all(".fan path", "Number(e.getAttribute('stroke-width'))")
        assert 1 < max(widths) <= 6
        assert f"{float(lengths.max()):.3g} added" in page.text("#headline").replace(",", "")
        page.is_clean()
