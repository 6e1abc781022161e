"""The documentation site: every page has its place in it, `regard docs` opens it, and it builds."""

import shutil
import socket
import subprocess
import threading
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

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
    for space in (*regard.public.NAMESPACES, "huggingface"):
        if space == "huggingface":
            pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
        names |= {f"regard.{space}.{name}" for name in getattr(regard, space).__all__}
    assert names <= named


def test_docs_says_how_to_build_the_site(monkeypatch):
    monkeypatch.setattr(docs, "built", lambda: None)
    result = CliRunner().invoke(main, ["docs", "--no-browser"])
    assert result.exit_code == 2
    assert result.stderr.startswith("regard: this installation holds no documentation; in a clone")


def test_docs_serves_the_site_and_nothing_beside_it(tmp_path, monkeypatch):
    (tmp_path / "secret.txt").write_text("secret")
    page = tmp_path / "site" / "index.html"
    page.parent.mkdir()
    page.write_text("the first page")
    monkeypatch.setattr(docs, "built", lambda: page)
    found, servers, served = [], [], docs.served

    def kept(folder, port):
        servers.append(served(folder, port))
        return servers[-1]

    monkeypatch.setattr(docs, "served", kept)

    def ask(address):
        """As the browser would, from its own thread: the command serves until Ctrl-C."""

        def asked():
            for path in ("", "../secret.txt", "%2e%2e/secret.txt"):
                try:
                    found.append(urlopen(f"{address}{path}", timeout=30).read())
                except HTTPError as error:
                    found.append(error.code)
            servers[0].shutdown()

        threading.Thread(target=asked).start()

    monkeypatch.setattr("webbrowser.open", ask)
    result = CliRunner().invoke(main, ["docs"])
    assert result.stdout.startswith("regard docs: http://127.0.0.1:")
    assert found == [b"the first page", 404, 404]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["docs", "--port", port])
    assert (result.exit_code, result.stderr[:20]) == (2, f"regard: port {port} is"[:20])


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
