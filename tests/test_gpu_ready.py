"""benchmarks/gpu_ready.py without a GPU: what it says of what its parts have written."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def ready(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return __import__("gpu_ready")


def test_the_summary_says_all_that_is_not_well(ready, tmp_path):
    rows = {
        "pages": [{"wrong": "the output over pages: bfloat16"}],
        "memory": [{"name": "GiB", "value": 1.5, "met": False}, {"name": "more", "ms": 1.0}],
        "host": [
            {"name": "auto", "ms": 3.0, "ratio": 1.2, "bar": 1.05, "met": False},
            {"name": "torch", "ms": 2.5, "ratio": 1.0, "bar": 1.05, "met": True},
            {"failed": "all four: OutOfMemoryError"},
        ],
    }
    for name, each in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, each)))
    said = {"pages": "", "memory": "", "host": "ended with 1", "few queries": ""}
    parts = {name: ready.PARTS[name] for name in (*said, "watch")}
    assert ready.summary(tmp_path, said, parts) == [
        "host: ended with 1",
        "pages: wrong: the output over pages: bfloat16",
        "memory: missed: GiB: 1.5 (bar )",
        "host: missed: auto: 1.2 (bar 1.05)",
        "host: failed: all four: OutOfMemoryError",
        "watch: not reached",
    ]


def test_a_part_that_never_ends_is_stopped_and_others_run(ready, tmp_path, monkeypatch):
    runner = ready.Runner(tmp_path, 60, dry=False)
    begun = []

    def start(command, **options):
        begun.append(command[command.index("--part") + 1])
        text = "import signal; signal.pause()" if begun[-1] == "pages" else "raise SystemExit(3)"
        return popen([sys.executable, "-S", "-c", text], **options)

    popen = ready.subprocess.Popen
    monkeypatch.setattr(ready.subprocess, "Popen", start)
    stuck = ready.Part(lambda: iter(()), 0)
    monkeypatch.setitem(ready.PARTS, "pages", stuck)
    runner.all([("pages", False), ("memory", False)], 1)
    assert begun == ["pages", "memory"]
    assert runner.said == {"pages": "stopped at its time limit", "memory": "ended with 3"}


def test_parts_are_told_apart_by_their_names(ready):
    assert len(ready.PARTS) == len(ready.CHECKS) + len(ready.BARS)
    assert not [part for part in ready.CHECKS.values() if part.compiles]
