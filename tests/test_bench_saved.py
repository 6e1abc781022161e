"""`regard bench`: --save and what is below the saved run, --quick's minute, --parts; no times."""

import json

import pytest

for package in ("click", "rich"):
    pytest.importorskip(package, reason='needs pip install "regard[bench]"')

from regard import Causal, Received, attention  # noqa: E402
from regard.engines.cpu import native  # noqa: E402
from regard.lab.bench import chosen, cycles, run, saved, suites  # noqa: E402
from regard.lab.bench import tables as written  # noqa: E402
from regard.lab.bench.runner import Outcome, Settings  # noqa: E402
from regard.lab.bench.timing import Clock, Timing  # noqa: E402
from test_bench import tiny  # noqa: E402
from test_bench_command import bench, refused  # noqa: E402
from test_bench_peers import problem  # noqa: E402

HERE = {"processor": "p", "cores": 2, "threads": 2, "bound": "true", "kernels": "avx2",
        "torch": "2", "date": "2026-01-01"}  # fmt: skip
NAME = "short/fp32/n96"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "regard" / "bench.json"


def outcome(*sdpa: float, name: str = "fp32/n96") -> Outcome:
    """Ours takes a second, SDPA so many in each round."""
    timing = Timing({"ours": [1.0] * len(sdpa), "sdpa": list(sdpa)}, 0)
    return Outcome(tiny("short", name, "sdpa"), "cpu", timing)


def kept(*outcomes: Outcome) -> dict:
    return json.loads(json.dumps(written.as_dict(outcomes, HERE, Settings())))


@pytest.mark.parametrize(
    "now, found", [((0.9, 1.0), 1), ((0.9, 1.3), 0), ((1.3, 1.4), 0), ((2.0, 2.1), 0)]
)
def test_below_is_beyond_the_spread_of_both(now, found):
    before = kept(outcome(1.2, 1.5))
    (pair,) = saved.paired([outcome(*now), outcome(0.1, name="fp32/n64")], before)
    assert pair.below is bool(found)
    assert pair.above is (min(now) > 1.5)


def test_what_is_below_is_told():
    before = kept(outcome(1.2, 1.5))
    assert list(written.fallen([outcome(0.9, 1.0)], HERE, before, 3)) == [
        "2 shapes left out, as the minute is over: name suites to time them.",
        "1 of 1 figure below the last saved run, of 2026-01-01:",
        f"  {NAME} sdpa 0.95 (0.90–1.00), was 1.35 (1.20–1.50)",
    ]
    (below,) = written.below([outcome(0.9, 1.0)], HERE, before)["below"]
    assert (below["name"], below["peer"]) == (NAME, "sdpa")
    assert below["now"] == {"median": 0.95, "low": 0.9, "high": 1.0}
    (said,) = written.fallen([outcome(1.6)], HERE, before, 1)
    assert said == "0 of 1 figure below the last saved run, of 2026-01-01."


def test_another_machine_is_not_compared():
    before, here = kept(outcome(1.2)), HERE | {"kernels": "amx"}
    (said,) = written.fallen([outcome(0.9)], here, before, 1)
    assert said == "Not compared with the saved run, which had kernels avx2."
    assert written.below([outcome(0.9)], here, before) == {"below": None}


def test_a_saved_run_is_compared_with_the_next(small_suites, cache):
    first = bench("short", "--rounds", 1, "--save")
    assert first.exit_code == 0
    assert "There is no saved run to compare with: --save keeps one." in first.stdout
    run = json.loads(cache.read_text("utf-8"))
    assert [entry["name"] for entry in run["entries"]] == [NAME, "short/bf16/n96"]
    for peer in run["entries"][0]["peers"]:  # as if it had been a thousand times better
        peer["ratio"] = {key: 1000 * value for key, value in peer["ratio"].items()}
    cache.write_text(json.dumps(run), "utf-8")
    found = json.loads(bench("short", "--rounds", 1, "--json").stdout)
    assert {(b["name"], b["peer"]) for b in found["below"]} == {(NAME, "sdpa"), (NAME, "eager")}
    assert json.loads(cache.read_text("utf-8")) == run  # only --save writes


def test_one_table_against_the_saved_run(small_suites):
    assert refused("short", "--compare") == (
        "there is no saved run to compare with; --save keeps one"
    )
    before = kept(outcome(1.2, 1.5))
    lines = list(written.comparison([outcome(1.6, 2.0)], before))
    assert lines[2].split() == [NAME, "sdpa", "1.35", "(1.20–1.50)", "1.80", "(1.60–2.00)", "▲"]
    assert lines[-1].startswith("1 figure: ▼ 0 below, ▲ 1 above")
    assert max(map(len, lines)) <= 80
    assert bench("short", "--rounds", 1, "--save").exit_code == 0
    said = bench("short", "--rounds", 1, "--compare").stdout.splitlines()
    assert [line.split()[:2] for line in said[2:-1]] == [[NAME, "sdpa"], [NAME, "eager"]]


def test_what_is_no_saved_run_is_one_sentence(small_suites, cache):
    cache.parent.mkdir()
    cache.write_text("{", "utf-8")
    assert refused("short").startswith(f"{cache} is no saved run: ")


def test_quick_has_no_slow_peers_and_ends():
    for entry in chosen(quick=True):
        assert entry.peers
        assert not set(entry.peers) & set(suites.SLOW)
    times = iter([0.0, 1.0, 50.0])
    clock = Clock(lambda: 0.0, 2, lambda: next(times))
    entries = [tiny("short", name, "flex") for name in ("fp32/a", "fp32/b")]
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regard.lab.bench.runner.measure", lambda e, *_: ran.append(e) or Outcome(e))
        found = list(run(entries, Settings(within=45.0), clock))
    assert [o.entry for o in found] == ran == entries[:1]


def test_parts_need_kernels_that_count(small_suites, monkeypatch):
    monkeypatch.setattr(native, "cycles", lambda: None)
    assert refused("--parts") == (
        "these kernels count no cycles, which would cost time; build some that do: pip install "
        "--no-deps -C cmake.define.REGARD_PARTS=ON -e ."
    )


@pytest.mark.skipif(not native.AVAILABLE, reason="built without the compiled kernels")
def test_the_parts_of_each_shape(small_suites, monkeypatch):
    counts = dict.fromkeys(native.PARTS, 0) | {"scores": 300, "mix": 200}
    monkeypatch.setattr(native, "cycles", lambda: (2, counts))
    result = bench("--parts")
    assert result.exit_code == 0
    head, *lines = (line.split() for line in result.stdout.splitlines())
    assert head[3:] == ["packing", "scores", "softmax", "mix", "observers", "rest"]
    assert [line[0] for line in lines] == [NAME, "short/bf16/n96", "observed/fp32/all/n96"]
    assert lines[0][1:] == ["0", "150", "0", "100", "0", "0"]


@pytest.mark.skipif(
    not native.AVAILABLE or native.cycles() is None, reason="built without REGARD_PARTS"
)
def test_what_is_counted():
    tensors = [t.float() for t in cycles.Inputs(problem()).tensors]
    native.cycles()
    attention(*tensors, mask=Causal(), observe=[Received()], engine="cpu")
    tiles, spent = native.cycles()
    assert tiles > 0
    assert all(spent[part] > 0 for part in ("packing", "scores", "softmax", "mix", "observers"))
    assert native.cycles() == (0, dict.fromkeys(native.PARTS, 0))
