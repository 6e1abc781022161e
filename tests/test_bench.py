"""`regard bench`: turns, medians, discarded rounds, wrong results, and what it prints; no times."""

import json
import os

import pytest
import torch

for package in ("click", "rich"):
    pytest.importorskip(package, reason='needs pip install "regard[bench]"')

from rich.cells import cell_len  # noqa: E402

from regard import Causal, RegardError, Window  # noqa: E402
from regard.engines import sdpa as sdpa_engine  # noqa: E402
from regard.lab.bench import Entry, Settings, chosen, machine, measure, peers, run, suites, timing  # noqa: E402
from regard.lab.bench import runner as running  # noqa: E402
from regard.lab.bench import tables as written  # noqa: E402
from regard.lab.bench.sides import Contestant  # noqa: E402
from regard.lab.bench.timing import Clock, NeverQuiet, Timing, alternate  # noqa: E402
from test_bench_peers import OBSERVED, problem  # noqa: E402


class World:
    """A clock that only the sides move, and other processes that use what they are told to."""

    def __init__(self, loads=(), cores=2):
        self.time, self.used, self.slept, self.calls = 0.0, 0.0, [], []
        self.loads = list(loads)  # cores used by others in each round; quiet after them
        self.asked, self.cores = 0, cores

    @property
    def clock(self) -> Clock:
        return Clock(self.others, self.cores, lambda: self.time, self.slept.append)

    def others(self) -> float:
        """Asked before and after each round."""
        self.asked += 1
        if self.asked % 2:
            self.began = self.time
        elif self.loads:
            self.used += self.loads.pop(0) * (self.time - self.began)
        return self.used

    def side(self, name, *seconds):
        """A call that takes the given seconds in turn, the last of them for ever."""
        left = list(seconds)

        def call():
            self.time += left.pop(0) if len(left) > 1 else left[0]
            self.calls.append(name)

        return call

    def order(self):
        """The sides in the order of their turns."""
        return [n for i, n in enumerate(self.calls) if i == 0 or self.calls[i - 1] != n]


def test_sides_take_turns_and_every_other_round_goes_backwards():
    world = World()
    sides = {"a": world.side("a", 0.001), "b": world.side("b", 0.002), "c": world.side("c", 1.0)}
    found = alternate(sides, 3, world.clock)
    # One call each to begin with; neighbours at the seams are one stretch
    assert world.order() == ["a", "b", "c", "a", "b", "c", "b", "a", "b", "c"]
    assert {name: len(rounds) for name, rounds in found.rounds.items()} == dict(a=3, b=3, c=3)
    assert found.seconds("a") == pytest.approx(0.001)
    assert found.ratio("b", "a") == pytest.approx((2, 2, 2))
    assert found.ratio("a", "c").median == pytest.approx(0.001)
    assert found.discarded == 0
    assert world.slept == []


def test_a_turn_settles_untimed_and_its_time_is_the_median_of_its_calls():
    world = World()
    # To begin with, 5 calls that settle and fill 0.04 s, then ceil(0.02 / 0.01) timed ones
    slow = world.side("a", 0.01, 0.01, 0.01, 0.01, 0.01, 0.002, 0.008, 9.0)
    found = alternate({"a": slow}, 1, world.clock)
    assert found.rounds["a"] == [pytest.approx(0.005)]
    assert len(world.calls) == 7
    world = World()
    alternate({"long": world.side("long", 0.6)}, 2, world.clock)
    assert len(world.calls) == 3
    world = World()
    alternate({"short": world.side("short", 1e-5)}, 1, world.clock)
    settled = round(timing.SETTLE / 1e-5)
    assert settled + 1 <= len(world.calls) - timing.CALLS <= settled + 2


def test_the_ratio_is_taken_within_each_round():
    found = Timing({"ours": [1.0, 2.0, 4.0], "peer": [3.0, 4.0, 4.0]}, 0)
    assert found.ratio("peer", "ours") == (2, 1, 3)
    assert found.ratio("ours", "peer") == (0.5, pytest.approx(1 / 3), 1)
    assert found.seconds("peer") == 4


def test_rounds_with_other_load_are_discarded_and_repeated():
    world = World(loads=[0, 1.0, 0.5, 0])
    told = []
    sides = {"a": world.side("a", 0.6), "b": world.side("b", 0.8, 0.8, 5.0, 6.0, 0.8)}
    found = alternate(sides, 2, world.clock, lambda *said: told.append(said))
    assert found.discarded == 2
    assert found.rounds["b"] == [pytest.approx(0.8)] * 2  # not the disturbed 5 and 6 s
    assert told == [(1, 0), (1, 1), (1, 2), (2, 2)]
    assert world.slept == [timing.PAUSE] * 2
    # The round that is repeated goes the same way again
    assert world.calls == ["a", "b", "a", "b", "b", "a", "b", "a", "b", "a"]


def test_a_tenth_of_a_core_is_quiet():
    for load, discarded in ((0.11, 0), (0.15, 1)):
        world = World([load])
        assert alternate({"a": world.side("a", 1.0)}, 1, world.clock).discarded == discarded


def test_never_quiet():
    world = World(loads=[1.26] * 100)
    said = r"^other processes used 1\.3 of 2 cores in 8 of 8 rounds$"
    with pytest.raises(NeverQuiet, match=said) as error:
        alternate({"a": world.side("a", 1.0)}, 2, world.clock)
    assert isinstance(error.value, RegardError)


STAT = """cpu  9999 0 0 0 0 0 0 0 0 0
cpu0 100 20 3 7000 800 4 5 60 0 0
cpu1 1 1 1 9 9 1 1 1 0 0
cpu7 50000 0 0 0 0 0 0 0 0 0
intr 1 2 3
"""


def test_busy_is_what_our_cores_did_not_idle():
    tick = os.sysconf("SC_CLK_TCK")
    assert machine.busy(STAT, frozenset({0})) == 192 / tick
    assert machine.busy(STAT, frozenset({0, 1})) == 198 / tick


def test_the_machine():
    about = machine.describe()
    assert json.loads(json.dumps(about)) == about
    assert about["torch"] == torch.__version__
    assert about["threads"] == torch.get_num_threads()
    assert 1 <= about["cores"] <= os.cpu_count()
    assert about["memory_gib"] > 0
    assert machine.available_bytes() > 0
    clock = machine.clock()
    assert clock.cores == about["cores"]
    assert clock.others() <= clock.others() + 60  # CPU-seconds, not ticks


def test_everywhere_gives_the_main_thread_its_core_back():
    before = os.sched_getaffinity(0)
    one = frozenset({min(before)})
    try:
        os.sched_setaffinity(0, one)
        with machine.everywhere(frozenset(before)):
            assert os.sched_getaffinity(0) == before
        assert os.sched_getaffinity(0) == one
    finally:
        os.sched_setaffinity(0, before)


def test_without_proc_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "PROC", tmp_path)
    with pytest.raises(RegardError, match="whether the machine is quiet; it runs on Linux"):
        machine.clock()


def tiny(suite="short", shape="fp32/n96", *given, **more) -> Entry:
    return Entry(suite, shape, problem(**more), given or ("sdpa",), quick=True)


def quiet() -> Clock:
    return Clock(lambda: 0.0, 2)


def failing(share=1.0):
    """Ours, but for one number."""

    def make(inputs, engine):
        side = peers.sdpa(inputs, engine)
        return Contestant(lambda: side.run() + share * (inputs.problem.dim == 16))

    return make


def test_measure(quick_turns):
    entry = tiny("observed", "fp32/n96", "plain", "sdpa", mask=Causal(), observe=OBSERVED)
    outcome = measure(entry, Settings("tiled", 3), quiet())
    assert (outcome.engine, outcome.failed) == ("tiled", False)
    assert outcome.timing.discarded == 0
    assert set(outcome.timing.rounds) == {"ours", "plain", "sdpa"}
    assert all(len(rounds) == 3 for rounds in outcome.timing.rounds.values())
    assert outcome.ratio("sdpa").median > 0
    assert outcome.cost("plain").median == pytest.approx(1 / outcome.ratio("plain").median)
    assert outcome.ratio("eager") is None
    assert outcome.seconds("eager") is None


def test_threads_and_precision_are_set_for_an_entry_alone(monkeypatch, quick_turns):
    seen = []

    def spy(inputs, engine):
        seen.append((torch.get_num_threads(), torch.get_float32_matmul_precision()))
        return peers.sdpa(inputs, engine)

    monkeypatch.setattr(running, "ours", spy)
    before = torch.get_num_threads()
    measure(tiny(threads=2, type="fp32-high"), Settings(rounds=1), quiet())
    measure(tiny(), Settings(rounds=1), quiet())
    assert seen == [(2, "high"), (before, "highest")]
    assert torch.get_num_threads() == before
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_ours_has_wrong_is_not_timed(monkeypatch, quick_turns):
    monkeypatch.setattr(running, "ours", failing())
    outcome = measure(tiny(), Settings(rounds=1), quiet())
    assert outcome.failed
    assert outcome.timing is None
    assert outcome.wrong["ours"].startswith("out is off by 1.0e+00, bar ")


def test_what_a_peer_has_wrong_is_withheld(monkeypatch, quick_turns):
    monkeypatch.setitem(peers.PEERS, "eager", failing())
    outcome = measure(tiny("short", "n", "eager", "sdpa"), Settings(rounds=1), quiet())
    assert not outcome.failed
    assert set(outcome.timing.rounds) == {"ours", "sdpa"}
    assert "off by" in outcome.wrong["eager"]


def test_a_named_engine_that_cannot_is_told(monkeypatch):
    monkeypatch.setattr(sdpa_engine, "MASK_LIMIT", 1)
    outcome = measure(tiny(mask=Causal() & Window(9)), Settings("sdpa", 1), quiet())
    assert outcome.timing is None
    assert not outcome.failed
    assert outcome.refused["ours"].startswith("sdpa: the mask would be materialised")


def test_no_engine_of_that_name():
    with pytest.raises(RegardError, match="no engine is named 'fast'; there are auto, "):
        Settings("fast")


def test_yardsticks_are_timed_unchecked(quick_turns):
    sparse = tiny("masks", "n", "causal", mask=Causal() & Window(5))
    linear = tiny("linear", "n", "causal", "half", mask=Causal(), form="elu")
    for entry in (sparse, linear):
        outcome = measure(entry, Settings("tiled", 1), quiet())
        assert set(outcome.timing.rounds) == {"ours", *entry.peers}
    assert outcome.engine == "chunked"


def test_a_machine_that_is_never_quiet_is_refused_at_the_first_entry(quick_turns):
    used = iter(range(10**6))
    busy = Clock(lambda: float(next(used)), 2, sleep=lambda seconds: None)
    with pytest.raises(NeverQuiet, match=r"^the machine is not quiet: other .* of short/fp32/n96;"):
        list(run([tiny(), tiny()], Settings("tiled", 1), busy))


def test_later_it_costs_one_entry_its_times(quick_turns):
    used, quiet_now = iter(range(10**6)), [True]
    clock = Clock(lambda: 0.0 if quiet_now[0] else float(next(used)), 2, sleep=lambda seconds: None)
    outcomes = run([tiny(), tiny(), tiny()], Settings("tiled", 1), clock)
    assert not next(outcomes).failed
    quiet_now[0] = False
    second = next(outcomes)
    assert second.failed
    assert second.timing is None
    assert second.busy.startswith("other processes used ")
    quiet_now[0] = True
    assert not next(outcomes).failed


def test_the_suites():
    assert list(suites.SUITES) == [
        "prefill", "causal", "gqa", "decode", "backward", "masks", "observed", "short", "threads",
        "linear",
    ]  # fmt: skip
    entries = chosen()
    assert len({e.name for e in entries}) == len(entries)
    for entry in entries:
        p = entry.problem
        assert set(entry.peers) <= set(peers.PEERS)
        assert p.heads % p.kv_heads == 0
        assert cell_len(entry.shape) <= 22  # the column of the table
    for suite in suites.SUITES:
        assert any(e.quick for e in entries if e.suite == suite)
    shown = suites.blocks(4096).layout.float().tril()
    assert 0.09 < shown.sum() / torch.ones_like(shown).tril().sum() < 0.14
    lengths = suites._packed(8192).diff()
    assert lengths.sum() == 8192
    assert (lengths > 0).all()


def test_choosing():
    assert {e.suite for e in chosen(["decode", "short"])} == {"decode", "short"}
    assert all(e.quick for e in chosen(quick=True))
    named = {e.name for e in chosen(only="causal/bf16/*")}
    assert named == {e.name for e in chosen(["causal"], only="bf16")}
    assert "causal/bf16/d64/n2048" in named
    assert [e.name for e in chosen(only="short/fp32/n64")] == ["short/fp32/n64"]
    with pytest.raises(RegardError, match="no suite is named 'nope'; there are prefill, causal, "):
        chosen(["short", "nope"])
    with pytest.raises(RegardError, match="no shape matches 'x'; regard bench --list shows all"):
        chosen(only="x")
    with pytest.raises(RegardError, match="no shape of --quick matches 'n8192/x'"):
        chosen(only="n8192/x", quick=True)


def test_times_and_ratios_have_three_digits():
    said = [written.seconds(s) for s in (123.4, 9.996, 1.0, 0.0999, 0.001, 12.34e-6, 1e-8)]
    assert said == ["123 s", "10.0 s", "1.00 s", "99.9 ms", "1.00 ms", "12.3 µs", "0.01 µs"]
    assert [written.number(n) for n in (0.123, 9.994, 12.34, 99.96)] == [
        "0.12", "9.99", "12.3", "100",
    ]  # fmt: skip


def test_where_linear_attention_overtakes():
    def outcome(form, length, ratio, type="fp32"):
        entry = tiny("linear", "n", "causal", form=form, k_len=length, type=type)
        timed = Timing({"ours": [1.0], "causal": [ratio]}, 0)
        return running.Outcome(entry, "chunked", timed)

    outcomes = [
        outcome("elu", 64, 1.2), outcome("elu", 128, 0.9), outcome("elu", 256, 1.0),
        outcome("elu", 512, 3.0), outcome("gla", 64, 0.5), outcome(None, 64, 2.0),
    ]  # fmt: skip
    assert written.overtaken(outcomes) == {"fp32 elu": 256, "fp32 gla": None}
    assert written.overtaking(outcomes) == (
        "Linear attention is faster than exact attention: fp32 elu from 256 tokens on, fp32 gla at "
        "no length timed."
    )
    assert written.overtaking([]) == ""
