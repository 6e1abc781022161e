"""The page of `regard view` on a recording that two ranks wrote: read across their borders."""

import pytest

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')
pytest.importorskip("selenium", reason='needs pip install "regard[dev]"')

from distributed_recordings import LENGTH
from regard.capture.recording import Recording
from regard.ops.distributed.layout import Layout, named
from test_view_page import ViewPage
from viewing import served

pytestmark = pytest.mark.slow
LAYER, HEAD = 1, 2


def test_cells_at_the_border_of_two_ranks_are_exact(browser, ranks, tmp_path):
    folder = tmp_path / "recording"
    more = {"tokens": [f"word{i}" for i in range(LENGTH)]}
    ranks.run(2, "distributed_recordings.record", folder, "ring", 2**30, LENGTH, more)
    assert len(list(folder.glob("layer-*.rank1of2.*"))) == 2
    weights = Recording.load(folder).weights(LAYER, HEAD)
    ((_, first), (row, _)) = Layout(LENGTH, named("zigzag", 2)).spans(0)  # rank 1 holds the middle
    with served(folder) as (address, _):
        for query, key in ((row, first), (first, first), (row, row - 1)):
            page = ViewPage(browser, f"{address}#head={LAYER}.{HEAD}&at=7.00,{query},{key}").exact()
            for up, left in ((0, 0), (1, 0), (0, 1), (1, 1)):  # each side of both borders
                page.over(".map", 8 - 64 * left, 8 - 64 * up)
                at = query - up, key - left
                assert f"query {at[0]} → key {at[1]}" in page.text("#note")
                shown = float(page.find("#headline").get_attribute("data-weight"))
                assert shown == pytest.approx(float(weights[at]), abs=1e-7)
        whole = ViewPage(browser, f"{address}#head={LAYER}.{HEAD}").exact()
        assert whole.find(".map").is_displayed()
        whole.is_clean()
