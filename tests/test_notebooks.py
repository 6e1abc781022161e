"""The notebooks run from top to bottom, and hold no outputs that a reader has not made."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each
def test_a_notebook_is_kept_without_outputs(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
@each
def test_a_notebook_runs(path, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason='needs pip install "regard[docs]"')
    nbclient = pytest.importorskip("nbclient", reason='needs pip install "regard[docs]"')
    pytest.importorskip("regard_minilm", reason="needs packages/regard-minilm")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("text/html" in output.get("data", {}) for output in shown)
    assert not [o for o in shown if o["output_type"] == "stream" and o["name"] == "stderr"]
