"""What GitHub and the documentation site read differently does not stand in the docs."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.skipif(not DOCS.is_dir(), reason="not in a source tree")
def test_no_block_stands_inside_a_list():
    """The site ends the list there, and the next item is 1 again."""
    inside = re.compile(r"^ {1,3}(```|<!--)", re.MULTILINE)
    assert not [page.name for page in DOCS.rglob("*.md") if inside.search(page.read_text("utf-8"))]
