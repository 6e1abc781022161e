"""What the package remembers for the life of a process is bounded: a user asks for ever more."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import regard


def unbounded(source: str) -> list[str]:
    """Functions of arguments whose answers are all kept: `cache`, `lru_cache(None)`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        taken = node.args
        if not (taken.posonlyargs or taken.args or taken.kwonlyargs or taken.vararg or taken.kwarg):
            continue  # one answer
        for decorator in node.decorator_list:
            name = ast.unparse(decorator).removeprefix("functools.")
            if name == "cache" or (name.startswith("lru_cache(") and "None" in name):
                found.append(node.name)
    return found


def test_no_cache_of_a_function_of_arguments_is_unbounded():
    root = Path(regard.__file__).parent
    found = {
        f"{path.relative_to(root)}: {name}"
        for path in root.rglob("*.py")
        for name in unbounded(path.read_text())
    }
    assert not found


@pytest.mark.parametrize(
    "source, found",
    [
        ("@cache\ndef f(x): ...", ["f"]),
        ("@functools.cache\ndef f(*x): ...", ["f"]),
        ("@lru_cache(maxsize=None)\ndef f(*, x): ...", ["f"]),
        ("@lru_cache(256)\ndef f(x): ...", []),
        ("@cache\ndef f(): ...", []),
    ],
)
def test_what_is_unbounded_is_found(source, found):
    assert unbounded(source) == found
