"""`regard bench` as a command: its table, JSON and page, and what it refuses."""

import json
import subprocess
import sys

import pytest
import torch

for package in ("click", "rich"):
    pytest.importorskip(package, reason='needs pip install "regard[bench]"')

from click.testing import CliRunner  # noqa: E402
from rich.cells import cell_len  # noqa: E402

import regard.cli.bench as command  # noqa: E402
from regard.cli import main  # noqa: E402
from regard.lab.bench import machine, peers  # noqa: E402
from regard.lab.bench import runner as running  # noqa: E402
from regard.lab.bench.timing import Clock  # noqa: E402
from test_bench import failing  # noqa: E402
from test_bench_peers import OBSERVED  # noqa: E402


def bench(*arguments, **env):
    result = CliRunner().invoke(
        main,
        ["bench", *map(str, arguments)],
        env={"OMP_PROC_BIND": "true", "COLUMNS": "80"} | env,
    )
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments) -> str:
    result = bench(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    return lines[0].removeprefix("regard: ")


def test_the_table(small_suites):
    result = bench("--rounds", 2)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert max(map(cell_len, lines)) <= 80
    rows = [line.split() for line in lines]
    assert ["short", "ours", "engine", "peer", "time", "ratio", "range"] in rows
    assert ["observed", "ours", "engine", "peer", "time", "ratio", "range"] in rows
    first = next(row for row in rows if row[:2] == ["fp32", "n96"])
    assert first[5] == "sdpa"
    assert any(row and row[0] == "eager" for row in rows)
    bf16 = next(row for row in rows if row[:2] == ["bf16", "n96"])
    assert bf16[-3:] == ["onnxruntime", "refused", "[1]"]
    assert next(row for row in rows if "unobserved" in row)[-2].startswith("×")
    text = " ".join(" ".join(rows[i]) for i in range(len(rows)))
    assert "[1] its CPU operators take float32 and float16" in text or "not installed" in text
    assert "0 of 6 rounds discarded: other load." in text
    assert f"torch {torch.__version__}" in text


def test_json(small_suites):
    result = bench("--json", "--rounds", 2, "--engine", "tiled")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert set(found) == {"machine", "engine", "rounds", "entries", "overtaken", "below"}
    assert (found["engine"], found["rounds"]) == ("tiled", 2)
    names = [entry["name"] for entry in found["entries"]]
    assert names == ["short/fp32/n96", "short/bf16/n96", "observed/fp32/all/n96"]
    entry = found["entries"][0]
    assert set(entry) == {
        "suite", "name", "problem", "engine", "seconds", "rounds", "refused", "wrong", "discarded",
        "busy", "peers",
    }  # fmt: skip
    assert entry["engine"] == "tiled"
    assert len(entry["rounds"]) == 2
    assert min(entry["rounds"]) <= entry["seconds"] <= max(entry["rounds"])
    assert entry["problem"]["dtype"] == "float32"
    assert [entry["refused"], entry["wrong"], entry["busy"], entry["discarded"]] == [
        None, None, None, 0,
    ]  # fmt: skip
    sdpa, eager = entry["peers"]
    assert set(sdpa) == {"name", "seconds", "rounds", "refused", "wrong", "ratio"}
    assert (sdpa["name"], eager["name"]) == ("sdpa", "eager")
    assert set(sdpa["ratio"]) == {"median", "low", "high"}
    (onnx,) = found["entries"][1]["peers"]
    assert (onnx["seconds"], onnx["rounds"], onnx["ratio"]) == (None, [], None)
    assert onnx["refused"]
    assert found["entries"][2]["problem"]["observe"] == [str(o) for o in OBSERVED]
    assert set(found["machine"]) == set(machine.describe())


def test_a_wrong_result_is_told_and_the_exit_code_is_1(small_suites, monkeypatch):
    monkeypatch.setattr(running, "ours", failing())
    result = bench("short", "--rounds", 1)
    assert result.exit_code == 1
    row = next(line for line in result.stdout.splitlines() if line.startswith("fp32 n96"))
    assert "wrong: out is off by 1.0e+00" in row
    assert "sdpa" not in row
    found = json.loads(bench("short", "--rounds", 1, "--json").stdout)["entries"][0]
    assert "out is off by" in found["wrong"]
    assert found["seconds"] is None
    assert [peer["seconds"] for peer in found["peers"]] == [None, None]


def test_the_page(small_suites, tmp_path, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "eager", failing())
    page = tmp_path / "benchmarks.md"
    result = bench("short", "observed", "--rounds", 2, "--out", page)
    assert result.exit_code == 0
    text = page.read_text("utf-8")
    assert f"`regard bench short observed --rounds 2 --out {page}`" in text
    assert "## short: tiny ones" in text
    assert "| shape | ours | engine | sdpa | eager | onnxruntime |" in text
    assert "| shape | ours | engine | unobserved | sdpa |" in text
    assert "wrong [1]" in text
    assert "[1] out is off by" in text
    assert machine.describe()["date"] in text
    tables = [line for line in text.splitlines() if line.startswith("| fp32 n96 ")]
    assert len(tables) == 1
    assert tables[0].count("|") == 7


def test_the_list(small_suites):
    result = bench("--list", OMP_PROC_BIND=None)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "short: tiny ones",
        "  · short/fp32/n96                     sdpa, eager",
        "  · short/bf16/n96                     onnxruntime",
        "observed: with the weights in sight",
        "  · observed/fp32/all/n96              unobserved, sdpa",
        "· is among those of --quick",
    ]


def test_too_many_threads(small_suites):
    before = torch.get_num_threads()
    assert refused("--threads", 3) == "--threads 3: this process may use 2 cores"
    assert torch.get_num_threads() == before
    found = json.loads(bench("short", "--threads", 2, "--rounds", 1, "--json").stdout)
    assert found["machine"]["threads"] == 2
    assert torch.get_num_threads() == before


def test_never_quiet_is_one_sentence(small_suites, monkeypatch):
    used = iter(range(10**6))
    busy = Clock(lambda: float(next(used)), 2, sleep=lambda seconds: None)
    monkeypatch.setattr(machine, "clock", lambda: busy)
    result = bench("short", "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    said = result.stderr
    assert said.startswith("regard: the machine is not quiet: other processes used ")
    assert said.endswith(" of short/fp32/n96; stop them and run again\n")


def test_it_runs_in_a_process_that_is_bound(monkeypatch):
    ran = []

    def spy(arguments, env, check):
        ran.append((arguments, env))
        return subprocess.CompletedProcess(arguments, 1)

    monkeypatch.setattr(command.subprocess, "run", spy)
    result = bench("short", "--only", "fp32/n64", "--rounds", "1", OMP_PROC_BIND=None)
    assert result.exit_code == 1
    ((arguments, env),) = ran
    assert arguments[:3] == [sys.executable, "-m", "regard.cli"]
    assert arguments[3:] == ["bench", "short", "--only", "fp32/n64", "--rounds", "1"]
    assert (env["OMP_PROC_BIND"], env["OMP_PLACES"]) == ("true", "cores")


def test_the_bound_process(capfd):
    assert command._bound(["--list", "short"], machine.BOUND) == 0
    assert capfd.readouterr().out.startswith("short: 32 short sequences, 12 heads\n")
