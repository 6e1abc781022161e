"""README and docs: their Python runs as it stands and prints what stands below it, their commands
are commands, their links lead somewhere. What is not run says why, in a comment before the block.
"""

import contextlib
import importlib
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))) if path.exists()]
LINKED = [*PAGES, *sorted(ROOT.glob("C*.md"))]  # CHANGELOG, CONTRIBUTING
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
FENCED = re.compile(r"(?:^<!-- ([^>]*) -->\n+)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^(?:\w+=\S+ )*regard (.*)$", re.MULTILINE)
PROMPT = re.compile(r"^\$ regard ((?:.*\\\n)*.*)\n", re.MULTILINE)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@dataclass
class Block:
    """A fenced block: what kind, its text, and the remark before it ("not run: …", "needs …")."""

    kind: str
    text: str
    remark: str


def blocks(page):
    return [Block(kind, text, remark) for remark, kind, text in FENCED.findall(page.read_text())]


def has_python(page):
    return any(block.kind == "python" and not block.remark for block in blocks(page))


def needs_a_model(page):
    return any(map(_needs, blocks(page)))


def _needs(block):
    return block.remark.startswith("needs ")


def run(source, name, names):
    """Run a program; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source, name, "exec"), names)
    return out.getvalue()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder of its own to work in, and an end to whatever an example sets for all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["example"])
    drawn = torch.get_rng_state()
    yield tmp_path
    torch.set_rng_state(drawn)


def test_the_pages_are_there():
    if not (ROOT / "docs").is_dir():
        pytest.skip("the docs are not in a source distribution")
    assert len(PAGES) > 15
    assert sum(map(has_python, PAGES)) >= 12
    assert sum(block.remark.startswith("not run") for p in PAGES for block in blocks(p)) < 20


@pytest.mark.parametrize("page", filter(has_python, PAGES), ids=lambda page: page.name)
def test_python_runs_as_it_stands_and_prints_what_is_said(page, elsewhere):
    """The blocks of a page one after another, as a reader would paste them."""
    pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
    names, printed = {"__name__": "__main__"}, None
    for block in blocks(page):
        if block.kind == "python":
            assert not block.remark or re.match(r"(not run|needs \S+): ", block.remark)
            printed = None if block.remark else run(block.text, f"<{page.name}>", names)
        elif block.kind == "text" and printed is not None:
            assert printed == block.text
            printed = None


@pytest.mark.slow
@pytest.mark.parametrize("page", filter(needs_a_model, PAGES), ids=lambda page: page.name)
def test_what_needs_a_model_runs_where_it_is(page, shared, elsewhere, monkeypatch):
    """Blocks under "needs NAME": a model of the folder `shared`."""
    pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
    monkeypatch.chdir(shared / "models")
    found = blocks(page)
    for block in filter(_needs, found):
        after = found[found.index(block) + 1]
        printed = run(block.text, f"<{page.name}>", {"__name__": "__main__"})
        assert printed == (after.text if after.kind == "text" else "")


@pages
def test_commands_are_commands(page, elsewhere):
    """Each parses; those of blocks without a remark run."""
    pytest.importorskip("click", reason='needs pip install "regard[look]"')
    pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
    from click.testing import CliRunner

    from regard.cli import main

    for block in blocks(page):
        for said in COMMAND.findall(block.text) if block.kind == "sh" else ():
            arguments = shlex.split(said.partition(" | ")[0], comments=True)
            context = main.make_context("regard", list(arguments), resilient_parsing=False)
            name, command, rest = main.resolve_command(context, list(arguments))
            command.make_context(name, rest, parent=context)
            # Until Ctrl-C
            serves = name == "docs" or (name == "view" and "--export" not in arguments)
            if not block.remark and name != "bench" and not serves:  # bench measures for minutes
                done = CliRunner().invoke(main, arguments)
                assert done.exit_code == 0, (said, done.stderr)


def shown(page):
    """Commands with what is shown below them: at a prompt, or alone in a block of their own."""
    before = None
    for block in blocks(page):
        said = PROMPT.match(block.text)
        if block.remark or block.kind not in ("", "text", "sh"):
            before = None
        elif said:
            yield said[1].replace("\\\n", " "), block.text[said.end() :]
        elif block.kind == "sh":
            said = COMMAND.findall(block.text)
            before = said[0] if len(said) == 1 else None
        elif before is not None:
            yield before, block.text


@pytest.mark.parametrize(
    "command, lines", [one for page in PAGES for one in shown(page)], ids=lambda text: text[:60]
)
def test_a_command_prints_what_is_shown(command, lines, elsewhere):
    """Line by line; "…" stands for some that are left out."""
    pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
    from click.testing import CliRunner

    from regard.cli import main

    done = CliRunner().invoke(main, shlex.split(command))
    assert done.exit_code == 0, done.stderr
    printed = [line.rstrip() for line in done.stdout.splitlines()]
    missing = [line for line in lines.splitlines() if line not in ("…", *printed)]
    assert not missing, done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(example, elsewhere):
    pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
    source = example.read_text("utf-8")
    assert len(source.splitlines()) <= 40
    printed = run(source, str(example), {"__name__": "__main__"})
    assert printed
    assert "Error" not in printed


def test_the_readme_shows_the_first_screen(elsewhere, monkeypatch):
    """And pictures that are no burden. `python docs/refresh.py` takes all again."""
    pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
    if not (ROOT / "docs").is_dir():
        pytest.skip("the docs are not in a source distribution")
    monkeypatch.syspath_prepend(ROOT / "docs")
    refresh = importlib.import_module("refresh")
    assert f"```text\n{refresh.screen()}\n```" in (ROOT / "README.md").read_text("utf-8")
    for name in refresh.PICTURES:
        picture = (ROOT / "docs" / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < refresh.LARGEST


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    for link in filter(None, (one or other for one, other in links)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), f"{page.name}: {link} leads nowhere"
        assert not anchor or anchor in anchors(found), f"{page.name}: {link}: no such heading"


def anchors(page):
    """The names by which headings are linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
