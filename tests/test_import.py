"""`import regard`: light, and exactly the public names."""

import ast
import importlib
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import regard
from regard import public

HEAVY = (
    "transformers",
    "tokenizers",
    "click",
    "rich",
    "matplotlib",
    "pandas",
    "triton",
    "bokeh",
    "pytest",
)


def test_import_brings_no_optional_package():
    """Nor anything that only some commands need."""
    code = "import sys, torch; import regard; regard.attention; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "regard" in loaded
    assert not loaded & set(HEAVY)
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["--help"], ["look", "--help"], ["--version"]], ids=" ".join)
def test_help_needs_no_torch(arguments):
    code = (
        "import sys; from regard.cli import main; main(sys.argv[1:], standalone_mode=False); "
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "regard" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "rich"}


FRESH = """
import os, sys, torch  # what takes long, once; regard anew in each child

for use in sys.argv[1:]:
    if (child := os.fork()) == 0:
        exec(use, {"__name__": "__main__"})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, use
"""
USES = [
    "from regard import Causal, attention; attention, Causal",
    "from regard import *; attention, Causal",
    "import regard; regard.Causal, regard.call.masks.Causal",
    "import regard.engines.second_pass.weigh, regard.lab.bench, regard; regard.attention",
    "import regard.analysis.look, regard.analysis.cut",
    "import regard.call.masks, regard; regard.attention",
    "import regard; from regard import *; regard.nn.Rotary, regard.call.masks.Causal, watch",
    "import regard.nn as modules, regard.cache as caches; modules.Rotary, caches.KVCache",
    "import regard; assert not hasattr(regard, 'nope'); regard.attention",
    "import pickle, regard; w = regard.Window(3); assert pickle.loads(pickle.dumps(w)) == w",
    "from regard import *; names = {n for n in dir() if n[0] != '_'}; import regard.public; "
    "assert names == set(regard.public.__all__), names",
]


@pytest.mark.sample(0)
@pytest.mark.parametrize("uses", [USES[:6], USES[6:]], ids=["first", "then"])
def test_names_come_when_they_are_asked_for(uses):
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *uses], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def parsed(name):
    return ast.parse(Path(regard.__file__).with_name(f"{name}.py").read_text("utf-8"))


FOLDERS = ("models", "nn")


@pytest.mark.parametrize("name", ["public", *(n for n in public.NAMESPACES if n not in FOLDERS)])
def test_public_names_are_all(name):
    """Each once: what a namespace has stands nowhere else."""
    imported = {
        alias.asname or alias.name
        for node in parsed(name).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    module = importlib.import_module(f"regard.{name}")
    assert imported == set(module.__all__)
    assert len(module.__all__) == len(imported)
    assert all(getattr(module, held).__module__.startswith("regard.") for held in imported)
    assert all(getattr(module, held).__doc__ for held in imported)
    others = [m for m in ("public", *public.NAMESPACES) if m != name]
    for other in others:
        assert not imported & set(importlib.import_module(f"regard.{other}").__all__)


def test_init_is_short():
    for name, most in (("__init__", 32), ("public", 40)):
        tree = parsed(name)
        first, last = tree.body[1].lineno, tree.body[-1].end_lineno
        assert last - first < most


def test_help_fits_on_a_screen_and_names_all():
    """And no class is written out in it."""
    lines = pydoc.plain(pydoc.render_doc(regard)).splitlines()
    assert len(lines) <= 60
    assert max(len(line) for line in lines if "/" not in line) <= 80
    said = " ".join(lines)
    for name in [*public.__all__, *(f"regard.{n}" for n in (*public.NAMESPACES, "huggingface"))]:
        assert re.search(rf"\b{name}\b", said), name
    assert "__init__(" not in said


def test_dir_is_tidy():
    special = {name for name in dir(regard) if name.startswith("_")}
    assert special == {"__doc__", "__version__"}
    assert set(dir(regard)) - special == {*public.__all__, *public.NAMESPACES}


def test_no_module_bears_a_public_functions_name():
    """Neither a file nor a folder: it would take the function's place once it is imported."""
    found = {path.stem for path in Path(regard.__file__).parent.iterdir()}
    assert {"public", "call", "cache"} <= found  # both kinds are seen
    assert not found & set(public.__all__)


def test_it_is_typed_and_has_a_version():
    assert (Path(regard.__file__).parent / "py.typed").exists()
    assert regard.__version__.count(".") == 2
