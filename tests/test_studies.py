"""`regard study`: every study at its tiniest size, its figures by seed, what it writes and says."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("regard_minilm", reason="needs packages/regard-minilm")

import torch
from click.testing import CliRunner

from regard.analysis import text_model
from regard.cli import main
from regard.errors import RegardError
from regard.lab.studies import NAMES, printed, study_named
from regard.lab.studies.page import page
from regard.lab.studies.study import Setting, measure, reproducible


@pytest.fixture(scope="module")
def loaded_once():
    """Models loaded but once for all studies."""
    load, held = text_model.load, {}

    def once(name=None, **options):
        key = (name, *sorted(options.items()))
        if key not in held:
            held[key] = load(name, **options)
        return held[key]

    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            module = __import__(f"regard.lab.studies.{name}", fromlist=["load"])
            if hasattr(module, "load"):
                patch.setattr(module, "load", once)
        yield


def measured(name, data=None, seed=0):
    study = study_named(name)
    return measure(study, Setting(study.sizes("tiny"), seed, "tiny", data)).to_json()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_study_gives_the_same_figures_by_its_seed(name, shared, loaded_once, tmp_path):
    drawn = torch.get_rng_state()
    found = measured(name, shared / "data")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert found["rows"]
    assert found["verdicts"]
    assert found["panels"]
    assert json.loads(json.dumps(found)) == found
    assert max(map(len, printed.lines(found))) <= 80
    assert reproducible(measured(name, shared / "data")) == reproducible(found)
    printed.draw(found, tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"


def test_another_seed_gives_other_figures():
    one, again, other = (measured("gradient", seed=seed) for seed in (0, 0, 1))
    assert reproducible(one) == reproducible(again)
    assert one["rows"] != other["rows"]


def invoke(*arguments):
    return CliRunner().invoke(main, ["study", *map(str, arguments)])


@pytest.fixture
def tiny(monkeypatch):
    """The command's studies at their tiniest."""
    from regard.lab.studies.study import Study

    monkeypatch.setattr(Study, "sizes", lambda self, mode, real=Study.sizes: real(self, "tiny"))


def test_without_a_name_the_claims_are_listed():
    done = invoke()
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == list(NAMES)
    assert max(map(len, lines)) <= 80


def test_a_study_is_printed_and_kept(tiny, tmp_path):
    done = invoke("gradient", "--quick", "--seed", 3, "--out", tmp_path / "new")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "new/gradient.json").read_text())
    assert (found["mode"], found["seed"]) == ("quick", 3)
    assert found["command"].endswith("regard study gradient --quick --seed 3")
    assert done.stdout.splitlines() == list(printed.lines(found))
    assert (tmp_path / "new/gradient.png").exists()


def test_json_is_one_object_or_a_list(tiny):
    assert json.loads(invoke("gradient", "--json").stdout)["study"] == "gradient"
    both = json.loads(invoke("gradient", "learned", "--json").stdout)
    assert [one["study"] for one in both] == ["gradient", "learned"]


@pytest.mark.parametrize("name", ["pronouns", "window", "scaling"])
def test_missing_data_is_one_sentence(name, monkeypatch):
    monkeypatch.delenv("REGARD_DATA", raising=False)
    done = invoke(name)
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("regard: this study reads ")


def test_data_may_be_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("REGARD_DATA", str(tmp_path))
    done = invoke("scaling")
    assert done.exit_code == 2
    assert f"there is no tinyshakespeare/input.txt in {tmp_path}" in done.stderr
    monkeypatch.setenv("REGARD_DATA", str(tmp_path / "none"))
    assert "there is no folder of data" in invoke("scaling").stderr


def test_a_full_translation_needs_a_translator(shared):
    study = study_named("translation")
    setting = Setting(study.sizes("full"), 0, "full", shared / "data")
    with pytest.raises(RegardError, match="run regard train translate"):
        measure(study, setting)


def test_no_such_study_is_one_sentence():
    done = invoke("costs")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("regard: no study 'costs'; there are cost, recall")


def test_the_page_holds_full_runs_alone(tmp_path, tiny):
    study = study_named("gradient")
    full = measure(study, Setting(study.sizes("full"), 0, "full")).to_json()
    (tmp_path / "gradient.json").write_text(json.dumps(full))
    (tmp_path / "learned.json").write_text(json.dumps(full | {"study": "learned", "mode": "quick"}))
    found = page(tmp_path)
    assert "## gradient" in found
    assert "regard study gradient --seed 0`" in found
    assert "## learned" not in found
    assert "- learned: " in found.partition("## Full run not made yet")[2]


def test_the_docs_page_is_that_of_its_runs(request):
    docs = request.config.rootpath / "docs"
    if not docs.is_dir():
        pytest.skip("the docs are not in a source distribution")
    assert (docs / "studies.md").read_text("utf-8") == page(docs / "studies")
