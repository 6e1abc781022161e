"""`import regard`: light, and exactly the public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import regard

HEAVY = ("transformers", "tokenizers", "click", "rich", "matplotlib", "triton", "bokeh", "pytest")


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


@pytest.mark.sample(0)
@pytest.mark.parametrize(
    "use",
    [
        "from regard import Causal, attention; attention, Causal",
        "from regard import *; attention, Causal",
        "import regard; regard.call.masks.Causal, regard.Causal",
        "import regard.engines.second_pass.weigh, regard.bench, regard; regard.attention",
        "import regard.analysis.look, regard.analysis.cut",
        "import regard.call.masks, regard; regard.attention",
        "import regard; assert set(regard.__all__) <= set(dir(regard))",
        "import regard; assert not hasattr(regard, 'nope'); regard.attention",
        "import pickle, regard; w = regard.Window(3); assert pickle.loads(pickle.dumps(w)) == w",
    ],
)
def test_names_come_when_they_are_asked_for(use):
    subprocess.run([sys.executable, "-c", use], check=True)


def test_public_names_are_all():
    tree = ast.parse(Path(regard.__file__).with_name("public.py").read_text("utf-8"))
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(imported) == sorted(regard.__all__)
    assert list(regard.__all__) == sorted(regard.__all__)
    assert all(getattr(regard, name).__module__.startswith("regard.") for name in imported)
    assert all(getattr(regard, name).__doc__ for name in imported)


def test_init_is_short():
    for name in ("__init__.py", "public.py"):
        assert len(Path(regard.__file__).with_name(name).read_text("utf-8").splitlines()) < 40


def test_no_module_bears_a_public_functions_name():
    modules = {path.stem for path in Path(regard.__file__).parent.glob("*.py")}
    assert not modules & set(regard.__all__)


def test_it_is_typed_and_has_a_version():
    assert (Path(regard.__file__).parent / "py.typed").exists()
    assert regard.__version__.count(".") == 2
