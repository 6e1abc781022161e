"""The documentation site: every page has its place in it, `regard docs` opens it, and it builds."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("click", reason='needs pip install "regard[look]"')

from click.testing import CliRunner

import regard
from regard.cli import docs, main

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "mkdocs.yml"
pytestmark = pytest.mark.skipif(not SITE.exists(), reason="not in a source distribution")


def test_every_page_is_in_the_navigation():
    navigation = SITE.read_text("utf-8").partition("\nnav:\n")[2]
    named = [line.rsplit(": ", 1)[-1] for line in navigation.splitlines() if line.endswith(".md")]
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(named) == sorted(pages)


def test_every_public_name_is_in_the_reference():
    reference = "".join(page.read_text("utf-8") for page in (ROOT / "docs/reference").glob("*.md"))
    named = {line.removeprefix("::: ") for line in reference.splitlines() if line[:4] == "::: "}
    names = {f"regard.public.{name}" for name in dir(regard) if name in regard.public.__all__}
    for space in ("cache", "context", "huggingface", "linear", "nn", "sparse"):
        if space == "huggingface":
            pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
        names |= {f"regard.{space}.{name}" for name in getattr(regard, space).__all__}
    assert names <= named


def test_docs_says_where_the_site_is_or_how_to_build_it(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "built", lambda: None)
    result = CliRunner().invoke(main, ["docs", "--no-browser"])
    assert result.exit_code == 2
    assert result.stderr.startswith("regard: this installation holds no documentation; in a clone")
    page = tmp_path / "index.html"
    monkeypatch.setattr(docs, "built", lambda: page)
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert CliRunner().invoke(main, ["docs"]).stdout == f"{page}\n"
    assert opened == [page.as_uri()]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_for_nothing_elsewhere(tmp_path):
    if shutil.which("zensical") is None:
        pytest.skip('needs pip install "regard[docs]"')
    for name in ("docs", "src"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(SITE, tmp_path)
    done = subprocess.run(
        ["zensical", "build", "--strict"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text("utf-8")
        for asked in ('src="http', 'href="http://fonts', "fonts.googleapis", "unpkg.com"):
            assert asked not in text, (page.name, asked)
    reference = (tmp_path / "site/reference/observers.html").read_text("utf-8")
    assert "TopK" in reference
    assert "The k largest weights of each row" in reference
