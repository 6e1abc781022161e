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


@pytest.mark.skipif(not DOCS.is_dir(), reason="not in a source tree")
def test_a_list_begins_after_a_blank_line():
    """After a block it would be a paragraph on the site."""
    parted = re.compile(r"^```\n(- |\d+\. |\|)", re.MULTILINE)
    assert not [page.name for page in DOCS.rglob("*.md") if parted.search(page.read_text("utf-8"))]
