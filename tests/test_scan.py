"""`regard scan`: means over texts, and a run that is killed goes on to the same result."""

import json
import os
import signal
import subprocess
import sys

import pytest

import regard
from regard import RegardError
from regard.analysis.corpus import sentences_of
from regard.analysis.scan import EXAMPLES, STATE, scan
from regard.report.scan_json import scan_json
from test_heads import CONLLU

pytest.importorskip("regard_minilm", reason="needs packages/regard-minilm")
TEXTS = ["The cat sat on the mat.", "A dog barked; a dog ran.", "Rain fell all day.",
         "word " * 600, "She read the letter twice."]  # fmt: skip


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS))
    return path


@pytest.mark.slow
def test_means_are_those_of_each_text(corpus):
    found = scan(None, corpus)
    assert (found.texts, found.skipped) == (4, 1)
    each = [regard.heads(text=text) for n, text in enumerate(TEXTS) if n != 3]
    for one in found.heads[:12]:
        for name in ("previous", "entropy", "duplicate"):
            values = [
                value for text in each
                if (value := text[one.head.layer, one.head.head].scores[name]) is not None
            ]  # fmt: skip
            assert one.texts[name] == len(values)
            assert one.head.scores[name] == pytest.approx(sum(values) / len(values), abs=1e-9)
            assert (one.intervals[name] is None) is (len(values) < 2)
            if len(values) > 1:
                low, high = one.intervals[name]
                assert min(values) <= low <= high <= max(values)
        assert len(one.examples) == EXAMPLES
    assert found.ranked("previous")[0].head.layer == 0
    best = found.ranked("previous")[0].examples[0]
    assert f"{best.read} {best.word}" in TEXTS[best.text]


KILLED = """
import os, signal, sys
from regard.analysis.scan import scan
def told(what, share):
    if what == "text 3":
        os.kill(os.getpid(), signal.SIGKILL)
scan(None, sys.argv[1], sys.argv[2], progress=told, saved_every=0)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_result(tmp_path):
    """To the bit, on as many threads (the tests run on one)."""
    path, out = tmp_path / "texts.conllu", tmp_path / "out"
    path.write_text("\n".join([CONLLU, CONLLU.replace("old", "new"), CONLLU, CONLLU]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, path, out], check=False, env=env)
    assert done.returncode == -signal.SIGKILL
    assert json.loads((out / STATE).read_text())["done"] == 2
    read = []
    resumed = scan(None, path, out, progress=lambda what, share: read.append(what))
    assert [what for what in read if what.startswith("text")] == ["text 3", "text 4"]
    assert (resumed.texts, resumed.sentences) == (4, 4)
    assert scan_json(resumed) == scan_json(scan(None, path))
    assert scan_json(scan(None, path, out)) == scan_json(resumed)  # all done: of the state


def test_forms_of_a_corpus(tmp_path):
    lines, paragraphs, fields = (tmp_path / name for name in ("a.txt", "b.txt", "c.jsonl"))
    lines.write_text("one\ntwo\n")
    paragraphs.write_text("one\nmore\n\n\ntwo\n")
    fields.write_text('{"text": "one"}\n\n{"text": " two "}\n')
    assert [s.text for s in sentences_of(lines)] == ["one", "two"]
    assert [s.text for s in sentences_of(paragraphs)] == ["one\nmore", "two"]
    assert [s.text for s in sentences_of(fields)] == ["one", "two"]


def run(*arguments):
    from click.testing import CliRunner

    from regard.cli import main

    return CliRunner().invoke(main, ["scan", *map(str, arguments)])


def test_the_command(tmp_path, corpus):
    done = run("all-MiniLM-L6-v2", corpus, "--out", tmp_path / "out", "--texts", 2)
    assert done.exit_code == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "all-MiniLM-L6-v2 on texts.txt: 2 texts" in done.stdout
    found = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert found["ranked"]["previous"][0] == "0.2"
    again = run("all-MiniLM-L6-v2", corpus, "--out", tmp_path / "out", "--texts", 2,
                "--json-heads", tmp_path / "heads")  # fmt: skip
    assert again.exit_code == 0, again.stderr
    index = json.loads((tmp_path / "heads" / "heads.json").read_text())
    assert len(index["heads"]) == 72
    (one,) = [e for e in found["heads"] if (e["layer"], e["head"]) == (0, 2)]
    written = json.loads((tmp_path / "heads" / "L0H2.json").read_text())
    assert written["scores"] == one["scores"]
    assert written["intervals"] == one["intervals"]
    assert written["examples"] == one["examples"]
    best = written["examples"][0]
    assert best["reads"][0][2] == pytest.approx(best["weight"])
    (tmp_path / "file").write_text("")
    refused = run("all-MiniLM-L6-v2", corpus, "--json-heads", tmp_path / "file")
    assert (refused.exit_code, refused.stderr.strip()) == (
        2, f"regard: {tmp_path}/file is a file; --json-heads names a folder",
    )  # fmt: skip


def test_a_folder_of_another_scan(tmp_path, corpus):
    out = tmp_path / "out"
    out.mkdir()
    (out / STATE).write_text('{"digest": "of another"}')
    done = run("all-MiniLM-L6-v2", corpus, "--out", out)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "is of another scan: its digest differs" in line
    (out / STATE).write_text("{")
    with pytest.raises(RegardError, match="is damaged; delete it"):
        scan(None, corpus, out)
