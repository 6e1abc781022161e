"""docs/modules.md: its examples run in order and print what stands below them."""

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "modules.md"


def test_the_examples_print_what_the_page_says():
    if not PAGE.exists():
        pytest.skip("the docs are not in a source distribution")
    fenced = re.findall(r"```(python|text)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    printed, checked = "", 0
    for kind, text in fenced:
        if kind == "python":
            assert not printed, f"the page does not show: {printed}"
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, str(PAGE), "exec"), names)
            printed = out.getvalue()
        else:
            assert printed == text
            printed, checked = "", checked + 1
    assert not printed
    assert checked >= 7
