"""The command as a whole: whatever goes wrong is one line at most, and never a traceback."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "regard.cli"]


def test_a_usage_error_is_one_line():
    """In a process of its own; all others: tests/test_wrong_commands.py."""
    done = subprocess.run([*COMMAND, "looks"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "regard: No such command 'looks'; see regard --help\n"


# Each of the commands, as cheap as it can be
WRITES = [
    ["--help"], ["info"], ["info", "--json"], ["look", "a b"], ["look", "a b", "--json"],
    ["walk", "a b", "--from", "b"], ["bench", "--list"],
]  # fmt: skip


@pytest.mark.sample(0)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", WRITES, ids=" ".join)
def test_a_full_disk_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["regard: cannot write: No space left on device"]


@pytest.mark.sample(0)
@pytest.mark.parametrize("arguments", WRITES, ids=" ".join)
def test_a_closed_pipe_is_silent(arguments):
    running = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    running.stdout.close()
    with running.stderr:
        assert running.stderr.read() == ""
    assert running.wait() == 1


READS = """
import io, runpy, sys

class Told(io.BytesIO):
    def read(self):
        print("reads", flush=True)
        return sys.__stdin__.buffer.read()

sys.argv[0] = "regard"
sys.stdin = io.TextIOWrapper(Told())
runpy.run_module("regard.cli", run_name="__main__")
"""


def test_an_interrupt_has_no_traceback():
    """While it waits for its text, as it says: before, Python itself would be interrupted."""
    with subprocess.Popen(
        [sys.executable, "-c", READS, "look", "-"], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Whoever runs the tests in the background ignores it, and hands that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:  # fmt: skip
        assert running.stdout.readline() == "reads\n"
        running.send_signal(signal.SIGINT)
        assert "Traceback" not in running.stderr.read()
        assert running.wait() == 130


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["look"], ["walk", "--from", "cat"], ["look", "--effect", "--from", "cat"]],
    ids=" ".join,
)
def test_a_text_that_is_too_long_is_one_line(arguments):
    """No other library's warning stands beside it."""
    text = "the cat sat on the mat " * 100
    command, *more = arguments
    done = subprocess.run(
        [*COMMAND, command, text, *more], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "regard: the text has 602 tokens, but all-MiniLM-L6-v2 has positions for 512"
    ]
