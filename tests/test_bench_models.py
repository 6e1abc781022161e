"""The script that examines every architecture: what it says of some, and its page."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "models.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("models_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_it_says_of_some(script, tmp_path):
    """One of its own softmax, one of the interface, one without attention, one that is a part."""
    results, page = tmp_path / "results.jsonl", tmp_path / "models.md"
    script.run(results, ["gptj", "llama", "mamba", "clap_text_model"], 120)
    found = {f["kind"]: f for f in map(json.loads, results.read_text().splitlines())}
    right = {"bits": "equal", "eager": "equal", "generate": "same"}
    assert found["gptj"] == right | {
        "kind": "gptj", "model": "GPTJForCausalLM", "attention": "own softmax",
    }  # fmt: skip
    assert found["llama"] == right | {
        "kind": "llama", "model": "LlamaForCausalLM", "attention": "interface or torch",
    }  # fmt: skip
    assert "cannot be watched" in found["mamba"]["refused"]
    assert "part" in found["clap_text_model"]
    before = results.read_text()
    script.run(results, ["gptj", "llama"], 120)  # taken up again: nothing is left to do
    assert results.read_text() == before
    page.write_text(script.page(list(found.values())))
    assert "2 architectures were watched, 1 of which" in page.read_text()
    assert "| `gptj` | own softmax | equal | equal | same |" in page.read_text()


def test_what_a_page_says_of_others_stays(script):
    """Written again from itself it is the same, but for versions."""
    text = (SCRIPT.parents[1] / "docs" / "models.md").read_text()
    again = script.page(list(script.known(text).values()))
    start = "| architecture |"
    assert again.partition(start)[2] == text.partition(start)[2]


@pytest.mark.slow
def test_the_page_has_no_outcome_that_is_wrong():
    """What stands in the documentation: no other bits, no other tokens."""
    page = (SCRIPT.parents[1] / "docs" / "models.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 300
    for row in rows:
        bits, _, generate = [cell.strip() for cell in row.strip("|").split("|")][2:]
        assert bits == "equal", row
        assert not generate.startswith("OTHERS"), row
