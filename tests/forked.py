"""Commands in processes of their own, forked from one that has imported what takes long."""

import json
import subprocess
import sys
from typing import NamedTuple

SOURCE = """
import json, os, runpy, sys, tempfile

__import__(sys.argv[1])  # regard is each child's own

def opened(where):
    if where == "/dev/full":
        return os.open(where, os.O_WRONLY)
    if where == "closed pipe":
        read, write = os.pipe()
        os.close(read)
        return write
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def read(descriptor):
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.fdopen(descriptor).read()


done = []
for arguments, environment, where in json.loads(sys.argv[2]):
    out, said = opened(where), opened("a file")
    if (child := os.fork()) == 0:
        os.environ.update(environment)
        os.dup2(out, 1)
        os.dup2(said, 2)
        sys.argv = ["regard", *arguments]
        runpy.run_module("regard.cli", run_name="__main__")  # ends as the command does
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done.append((code, read(out) if where == "a file" else "", read(said)))
print(json.dumps(done))
"""


class Done(NamedTuple):
    """What a command left; no stdout where it was not a file."""

    code: int
    stdout: str
    stderr: str


def commands(
    *given: tuple[list[str], dict[str, str]],
    out: str = "a file",
    needs: str = "transformers.models.bert.modeling_bert",
) -> list[Done]:
    """Of each (arguments, what to add to the environment), in turn.

    out: or "/dev/full", "closed pipe". needs: a module of others that is imported once for all.
    """
    asked = json.dumps([(arguments, more, out) for arguments, more in given])
    ran = subprocess.run(
        [sys.executable, "-c", SOURCE, needs, asked], capture_output=True, text=True, check=True
    )
    return [Done(*each) for each in json.loads(ran.stdout)]
