"""README and docs: their Python runs as it stands and prints what stands below it, their commands
are commands, their links lead somewhere. What is not run says why, in a comment before the block.
"""

import contextlib
import functools
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
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
# What may stand before a block, and what comes of it then
REMARKS = (
    "not run: ",  # nothing: why not
    "needs ",  # run where the folder `shared` has that model
    "torchrun: ",  # the page's blocks of that kind are one script, run by two processes
    "one machine's: ",  # what is shown is compared in form, not in numbers
)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@dataclass
class Block:
    """A fenced block: what kind, its text, and the remark before it (a key of REMARKS)."""

    kind: str
    text: str
    remark: str


def blocks(page):
    return [Block(kind, text, remark) for remark, kind, text in FENCED.findall(page.read_text())]


def has_python(page):
    return any(block.kind == "python" and not block.remark for block in blocks(page))


def remarked(page, kind):
    """The blocks under one of REMARKS."""
    return [block for block in blocks(page) if block.remark.startswith(kind)]


def having(kind):
    return pytest.mark.parametrize(
        "page", [page for page in PAGES if remarked(page, kind)], ids=lambda page: page.name
    )


def run(source, name, names):
    """Run a program; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source, name, "exec"), names)
    return out.getvalue()


def command(said):
    """What a command of ours prints, line by line."""
    from click.testing import CliRunner

    from regard.cli import main

    done = CliRunner().invoke(main, shlex.split(said))
    assert done.exit_code == 0, (said, done.stderr)
    return [line.rstrip() for line in done.stdout.splitlines()]


def missing(shown, printed):
    """Lines that are shown and not printed; "…" stands for some that are left out."""
    return [line for line in shown.splitlines() if line not in ("…", *printed)]


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
    assert sum(len(remarked(page, "not run: ")) for page in PAGES) < 15


@pages
def test_a_remark_is_one_of_those_there_are(page):
    """Before what could be run: a remark before anything else may say what it likes."""
    for block in blocks(page):
        ran = block.kind in ("python", "sh") or PROMPT.match(block.text)
        assert not (ran and block.remark) or block.remark.startswith(REMARKS), block.remark


@pytest.mark.sample(every=4)
@pytest.mark.parametrize("page", filter(has_python, PAGES), ids=lambda page: page.name)
def test_python_runs_as_it_stands_and_prints_what_is_said(page, elsewhere):
    """The blocks of a page one after another, as a reader would paste them."""
    pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
    names, printed = {"__name__": "__main__"}, None
    for block in blocks(page):
        if block.kind == "python":
            printed = None if block.remark else run(block.text, f"<{page.name}>", names)
        elif block.kind == "text" and printed is not None:
            assert printed == block.text
            printed = None


@pytest.mark.slow
@having("needs ")
def test_what_needs_a_model_runs_where_it_is(page, shared, elsewhere, monkeypatch):
    """Blocks under "needs NAME": a model of the folder `shared`."""
    pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
    monkeypatch.chdir(shared / "models")
    found = blocks(page)
    for block in remarked(page, "needs "):
        after = found[found.index(block) + 1]
        if block.kind == "sh":
            (said,) = COMMAND.findall(block.text)
            lines = command(said)
            assert not missing(after.text, lines), lines
        else:
            printed = run(block.text, f"<{page.name}>", {"__name__": "__main__"})
            assert printed == (after.text if after.kind == "text" else "")


@pytest.mark.slow
@having("torchrun: ")
def test_what_ranks_run_is_run_by_two(page, elsewhere):
    """A page's blocks one after another in each, as torchrun would start what a reader pastes."""
    pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
    script = elsewhere / "script.py"
    script.write_text("".join(block.text for block in remarked(page, "torchrun: ")))
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*started, "--nproc-per-node", "2", str(script)], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@having("one machine's: ")
def test_what_one_machine_printed_has_the_form_of_what_this_one_does(page, elsewhere):
    """Which lines there are, by the name that each begins with."""
    pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
    for block in remarked(page, "one machine's: "):
        said = PROMPT.match(block.text)
        printed, lines = command(said[1]), block.text[said.end() :].splitlines()
        assert names(lines) == names(printed)


def names(lines):
    """What stands in the first column, once each: a name may have several lines."""
    return list(dict.fromkeys(re.split(" {2,}", line)[0] for line in lines))


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


@functools.cache
def printed_by(said):
    """What stands on several pages is asked once."""
    return command(said)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize(
    "said, lines", [one for page in PAGES for one in shown(page)], ids=lambda text: text[:60]
)
def test_a_command_prints_what_is_shown(said, lines, elsewhere):
    pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
    printed = printed_by(said)
    assert not missing(lines, printed), printed


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
