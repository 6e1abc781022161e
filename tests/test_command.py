"""The command as a whole: whatever goes wrong is one line at most, and never a traceback."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import forked

COMMAND = [sys.executable, "-m", "regard.cli"]


def test_a_usage_error_is_one_line():
    """In a process of its own; all others: tests/test_wrong_commands.py."""
    done = subprocess.run([*COMMAND, "looks"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "regard: No such command 'looks'; see regard --help\n"


# Each of the commands, as cheap as it can be
WRITES = [
    ["info"], ["info", "--json"], ["look", "a b"], ["look", "a b", "--json"],
    ["walk", "a b", "--from", "b"], ["bench", "--list"],
]  # fmt: skip
full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
FULL = ["regard: cannot write: No space left on device"]


@full_disk
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == FULL


@pytest.mark.slow
@full_disk
def test_a_full_disk_is_one_line_of_each_command():
    done = forked.commands(*((arguments, {}) for arguments in WRITES), out="/dev/full")
    for arguments, (code, _, said) in zip(WRITES, done, strict=True):
        assert (code, said.splitlines()) == (1, FULL), arguments


@pytest.mark.slow
def test_a_closed_pipe_is_silent_to_each_command():
    done = forked.commands(*((arguments, {}) for arguments in WRITES), out="closed pipe")
    for arguments, (code, _, said) in zip(WRITES, done, strict=True):
        assert (code, said) == (1, ""), arguments


def test_a_closed_pipe_is_silent():
    running = subprocess.Popen(
        [*COMMAND, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    running.stdout.close()
    with running.stderr:
        assert running.stderr.read() == ""
    assert running.wait() == 1


READS = """
import io, os, runpy, select, signal, sys

class Told(io.BytesIO):
    def read(self):
        # Python begins to wait even where the signal came just before: only a byte ends that
        came, comes = os.pipe()
        os.set_blocking(comes, False)
        signal.set_wakeup_fd(comes)
        print("reads", flush=True)
        select.select([sys.__stdin__, came], [], [])
        return b""

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
def test_a_text_that_is_too_long_is_one_line():
    """No other library's warning stands beside it, of their import or of the text."""
    text = "the cat sat on the mat " * 100
    said = ["regard: the text has 602 tokens, but all-MiniLM-L6-v2 has positions for 512"]
    done = subprocess.run([*COMMAND, "look", text], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", said)
    others = [["walk", text, "--from", "cat"], ["look", text, "--effect", "--from", "cat"]]
    for code, out, error in forked.commands(*((arguments, {}) for arguments in others)):
        assert (code, out, error.splitlines()) == (2, "", said)
