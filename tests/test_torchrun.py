"""`torchrun -m regard`: several processes, one output; and one that dies ends the others."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import regard
from regard import Recording
from texts import TROPHY

pytestmark = pytest.mark.slow


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    """Two processes, on loopback."""
    return subprocess.run(
        [*TORCHRUN, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip


def test_look_prints_once_what_one_process_prints_and_saves_what_each_has(minilm, tmp_path):
    made = torchrun(
        "-m", "regard", "look", TROPHY, "--from", "it", "--json", "--save", str(tmp_path / "rec")
    )
    assert made.returncode == 0, made.stderr
    both = json.loads(made.stdout)  # one object, as only the first process prints
    one = json.loads(regard.look(None, TROPHY, from_words="it").json())
    assert len(both["links"]) == len(one["links"])
    for a, b in zip(both["links"], one["links"], strict=True):
        assert (a["layer"], a["head"]) == (b["layer"], b["head"])
        assert a["weight"] == pytest.approx(b["weight"], abs=1e-5)
    assert made.stderr.count("saved:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rec"]  # nothing beside it
    recording = Recording.load(tmp_path / "rec")
    assert len(list((tmp_path / "rec").glob("*.rank1of2.*"))) == len(recording.layers)


def ranks(*arguments: str) -> list[subprocess.CompletedProcess]:
    """Two processes as torchrun starts them, without the third that torchrun itself is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    many = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "regard", *arguments], text=True,
            env={**os.environ, **where, **many, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [one.communicate(timeout=120) for one in started]
    return [
        subprocess.CompletedProcess(one.args, one.returncode, *both)
        for one, both in zip(started, said, strict=True)
    ]


def test_a_recording_opens_as_a_whole(folders, tmp_path):
    first, second = ranks("record", str(folders / "gpt2"), TROPHY, str(tmp_path / "rec"))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert first.stdout.count("recorded:") == 1
    assert second.stdout == ""
    parts = {path.name.split(".")[1] for path in (tmp_path / "rec").glob("layer-*")}
    assert parts == {"rank0of2", "rank1of2"}  # each process wrote its own
    recording = Recording.load(tmp_path / "rec")
    rows = recording.layers[0].weights(slice(None)).sum(-1)
    assert rows.shape[-1] == len(recording.about["tokens"])
    assert float((rows - 1).abs().max()) < 1e-5


def test_what_is_refused_is_said_once():
    first, second = ranks("look", TROPHY, "--from", "it", "--effect")
    assert first.stderr.count("start it without torchrun") == 1
    assert (second.stdout, second.stderr) == ("", "")
    assert first.returncode == 2  # and with it torchrun ends


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
    made = torchrun(str(script), "look", TROPHY)
    assert made.returncode != 0
    ours = [line for line in made.stderr.splitlines() if line.startswith("regard:")]
    assert ours in ([], ["regard: rank 0 stops: another process of this run has ended"])
    assert "exitcode" in made.stderr  # torchrun says which
