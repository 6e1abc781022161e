"""In a notebook a result's text is its text: nothing is displayed by the way, nothing is lost."""

import pytest

pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
console = pytest.importorskip("rich.console", reason='needs pip install "regard[look]"')

import regard  # noqa: E402


@pytest.mark.parametrize("asked", [{}, {"versus": "The dog sat."}], ids=["plain", "versus"])
def test_text_is_the_same_in_a_notebook(asked, monkeypatch):
    found = regard.look(None, "The cat sat.", **asked)
    outside = found.text(80)
    monkeypatch.setattr(console, "_is_jupyter", lambda: True)
    shown = []
    monkeypatch.setattr("rich.jupyter.display", lambda *given: shown.append(given))
    assert found.text(80) == outside
    assert not shown
