"""`torchrun -m regard`: several processes, one output; and one that dies ends the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from regard import Recording
from texts import TROPHY

pytestmark = pytest.mark.slow


def torchrun(*arguments: str, **more) -> subprocess.CompletedProcess:
    """Two processes of `python -m regard`, on loopback."""
    started = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(
        [*started, "-m", "regard", *arguments], env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def test_look_prints_once_what_one_process_prints(minilm):
    made = torchrun("look", TROPHY, "--from", "it", "--json")
    assert made.returncode == 0, made.stderr
    both = json.loads(made.stdout)  # one object, as only the first process prints
    alone = subprocess.run(
        [sys.executable, "-m", "regard", "look", TROPHY, "--from", "it", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    one = json.loads(alone.stdout)
    assert len(both["links"]) == len(one["links"])
    for a, b in zip(both["links"], one["links"], strict=True):
        assert (a["layer"], a["head"]) == (b["layer"], b["head"])
        assert a["weight"] == pytest.approx(b["weight"], abs=1e-5)


def test_a_recording_opens_as_a_whole(folders, tmp_path):
    made = torchrun("record", str(folders / "gpt2"), TROPHY, str(tmp_path / "rec"))
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("recorded:") == 1
    parts = {path.name.split(".")[1] for path in (tmp_path / "rec").glob("layer-*")}
    assert parts == {"rank0of2", "rank1of2"}  # each process wrote its own
    recording = Recording.load(tmp_path / "rec")
    rows = recording.layers[0].weights(slice(None)).sum(-1)
    assert rows.shape[-1] == len(recording.about["tokens"])
    assert float((rows - 1).abs().max()) < 1e-5


def test_look_saves_what_each_process_has(minilm, tmp_path):
    made = torchrun("look", TROPHY, "--from", "it", "--save", str(tmp_path / "rec"))
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("saved:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rec"]  # nothing beside it
    recording = Recording.load(tmp_path / "rec")
    assert len(list((tmp_path / "rec").glob("*.rank1of2.*"))) == len(recording.layers)


def test_what_is_refused_is_said_once():
    made = torchrun("look", TROPHY, "--from", "it", "--effect")
    assert made.stderr.count("start it without torchrun") == 1
    assert made.returncode != 0


DIES = """
import os, sys
from regard.analysis import over_ranks
from regard.cli import main
run = over_ranks.run
def dies(model, inputs):
    if os.environ["RANK"] == "1":
        os._exit(7)
    run(model, inputs)
over_ranks.run = dies
main(sys.argv[1:], prog_name="regard")
"""


def test_a_process_that_dies_ends_the_other_with_one_line(tmp_path):
    """Not after the 30 minutes that a collective waits."""
    script = Path(tmp_path / "dies.py")
    script.write_text(DIES)
    made = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), "look", TROPHY],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert made.returncode != 0
    ours = [line for line in made.stderr.splitlines() if line.startswith("regard:")]
    assert ours in ([], ["regard: rank 0 stops: another process of this run has ended"])
    assert "exitcode" in made.stderr  # torchrun says which
