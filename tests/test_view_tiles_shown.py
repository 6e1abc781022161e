"""The map of `regard view` shows what is there: tiles that are kept already, too."""

import pytest

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')
pytest.importorskip("selenium", reason='needs pip install "regard[dev]"')

from test_view_page import ViewPage
from viewing import recording, served

VISIBLE = """
const frame = document.querySelector('.map').getBoundingClientRect();
return [...document.querySelectorAll('.map canvas')].filter((tile) => {
  const box = tile.getBoundingClientRect();
  const style = getComputedStyle(tile);
  return style.visibility === 'visible' && Number(style.opacity) === 1 && box.right > frame.left
    && box.left < frame.right && box.bottom > frame.top && box.top < frame.bottom;
}).length
"""


@pytest.mark.slow
def test_a_head_that_was_seen_before_is_drawn_again(browser, tmp_path):
    recording(300).save(tmp_path / "one")
    with served(tmp_path / "one") as (address, _):
        page = ViewPage(browser, f"{address}#head=0.0").exact()
        first = page.run(VISIBLE)
        assert first
        for head in ("0.1", "0.0"):
            page.find(f"#grid [data-head='{head}']").click()
            page.settled().exact()
            assert page.run(VISIBLE) == first, head
        page.is_clean()
