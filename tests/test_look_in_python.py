"""`regard.look`: the same as the command; it prints and shows itself; wrong input is one error."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='needs pip install "regard[look]"')

from click.testing import CliRunner  # noqa: E402

import regard  # noqa: E402
from regard import LookResult, RegardError  # noqa: E402
from regard.analysis.text_model import load  # noqa: E402
from regard.cli import main  # noqa: E402

NAME = "all-MiniLM-L6-v2"
CAT = "The cat sat on the mat because it was tired"
DOG = "The dog sat on the mat because it was tired"


def command(*arguments):
    done = CliRunner().invoke(main, ["look", CAT, *arguments], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def loaded():
    reader = load()
    return reader.model, reader.tokenizer


@pytest.fixture(scope="module")
def by_name():
    return regard.look(NAME, CAT, from_words="it", effect=True).as_dict()


OPTIONS = {
    "plain": ({}, []),
    "a word": ({"from_words": "it"}, ["--from", "it"]),
    "words": ({"from_words": ["it", "cat"], "top": 3},
              ["--from", "it", "--from", "cat", "--top", "3"]),
    "heads": ({"layers": 3, "heads": [1, 2]}, ["--layer", "3", "--head", "1", "--head", "2"]),
    "no special": ({"from_words": "it", "special": False}, ["--from", "it", "--no-special"]),
    "versus": ({"versus": DOG, "from_words": "it"}, ["--versus", DOG, "--from", "it"]),
    "versus a model": ({"versus_model": NAME}, ["--versus-model", NAME]),
    "cut": ({"cuts": "3.1: it->cat"}, ["--cut", "3.1: it->cat"]),
    "effect": ({"effect": True, "from_words": "it", "top": 2},
               ["--effect", "--from", "it", "--top", "2"]),
}  # fmt: skip


@pytest.mark.sample(0)
@pytest.mark.parametrize("given, arguments", OPTIONS.values(), ids=OPTIONS)
def test_it_says_what_the_command_says(given, arguments):
    found = regard.look(None, CAT, **given)
    assert json.loads(found.json()) == json.loads(command(*arguments, "--json"))
    shown = [line.rstrip() for line in command(*arguments).splitlines()]
    assert found.text().splitlines() == shown


class Encoder(torch.nn.Sequential):
    """A model of transformers and what pools its vectors, as sentence encoders are built."""

    def __init__(self, model, tokenizer):
        super().__init__(model, torch.nn.Linear(2, 2))
        self.tokenizer = tokenizer


@pytest.mark.slow
@pytest.mark.sample(0)
@pytest.mark.parametrize("how", ["pair", "reversed", "pipeline", "encoder"])
def test_a_loaded_model_is_read_as_it_is(loaded, by_name, how):
    model, tokenizer = loaded
    given = {
        "pair": loaded,
        "reversed": [tokenizer, model],
        "pipeline": SimpleNamespace(model=model, tokenizer=tokenizer),
        "encoder": Encoder(model, tokenizer),
    }[how]
    model.train()
    model.embeddings.eval()
    before = [module.training for module in model.modules()]
    drawn = torch.get_rng_state()
    found = regard.look(given, CAT, from_words="it", effect=True)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert by_name["model"] == NAME
    # Else the folder that it was loaded from
    assert found.as_dict() == by_name | {"model": "model"}


def test_a_loaded_model_generates(shared):
    folder = shared / "models" / "minimind2-small"
    if not folder.is_dir():
        pytest.skip("no models/minimind2-small in the folder 'shared'")
    reader = load(str(folder), generate=True)
    found = regard.look((reader.model, reader.tokenizer), "The capital of France is", generate=3)
    assert found.found.generated
    assert found.as_dict() == regard.look(folder, "The capital of France is", generate=3).as_dict()


def test_it_prints_itself(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    found = regard.look(NAME, CAT)
    assert str(found) == repr(found) == found.text(60)
    assert CAT in repr(found)
    assert "\x1b" not in repr(found)
    assert max(map(len, repr(found).splitlines())) <= 60
    assert found.words[1:4] == ["The", "cat", "sat"]
    assert found.words[found.links[0].source] in CAT


def test_it_writes_its_page(tmp_path):
    found = regard.look(NAME, CAT, from_words="it", versus=DOG)
    file = found.html(str(tmp_path / "page.html"))
    CliRunner().invoke(
        main, ["look", CAT, "--from", "it", "--versus", DOG, "--html", f"{tmp_path / 'theirs'}"]
    )
    assert file.read_text("utf-8") == (tmp_path / "theirs").read_text("utf-8")


def test_a_notebook_shows_it_in_a_frame_of_its_own():
    shown = regard.look(NAME, f"{CAT} </script><img src=x> \"'&quot;")._repr_html_()
    assert shown.startswith("<iframe ")
    assert shown.endswith('"></iframe>')
    assert 'sandbox="allow-scripts"' in shown
    assert shown.count("<") == 2  # nothing of the page is markup of the notebook's


def test_its_recording_is_exact():
    found = regard.look(NAME, CAT, from_words="it")
    weights = found.recording.weights(3, head=1)
    assert isinstance(found, LookResult)
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)), rtol=0, atol=1e-5)


WRONG = {
    "no such model": (("no-such/model", CAT), {}, "no model no-such/model"),
    "no such folder": (("./nowhere", CAT), {}, "there is no model folder ./nowhere"),
    "swapped": ((CAT, NAME), {}, "look takes the model, then the text"),
    "a number as model": ((3, CAT), {}, "model is 3; give a folder, a name, (model, tokenizer)"),
    "a module alone": ((torch.nn.Linear(2, 2), CAT), {}, "Linear has no tokenizer"),
    "another library's": (((torch.nn.Linear(2, 2), None), CAT), {}, "no transformers model"),
    "empty": ((NAME, ""), {}, "text is empty"),
    "blank": ((NAME, " \n"), {}, "text is empty"),
    "no string": ((NAME, [CAT]), {}, "text is ['The cat"),
    "none": ((NAME, None), {}, "text is None; give one string"),
    "a zero byte": ((NAME, "a\0b"), {}, "zero byte"),
    "half a character": ((NAME, "a \ud800"), {}, "half of a surrogate pair"),
    "empty versus": ((NAME, CAT), {"versus": ""}, "versus is empty"),
    "versus no string": ((NAME, CAT), {"versus": 3}, "versus is 3; give one string"),
    "no such word": ((NAME, CAT), {"from_words": "dog"}, "dog"),
    "words": ((NAME, CAT), {"from_words": 3}, "from_words is 3; give a string, or a list of them"),
    "layer": ((NAME, CAT), {"layers": 99}, "no layer 99: the model has layers 0 to 5"),
    "layers": ((NAME, CAT), {"layers": ["x"]}, "layers is 'x'; give a whole number"),
    "head": ((NAME, CAT), {"heads": [12]}, "no head 12"),
    "heads": ((NAME, CAT), {"heads": 1.5}, "heads is 1.5"),
    "top": ((NAME, CAT), {"top": 0}, "top is 0; give a number ≥ 1"),
    "generate": ((NAME, CAT), {"generate": -1}, "generate is -1; give a number ≥ 0"),
    "an encoder": ((NAME, CAT), {"generate": 2}, "is an encoder: it generates no text"),
    "cuts": ((NAME, CAT), {"cuts": "x"}, "x"),
    "cuts of numbers": ((NAME, CAT), {"cuts": [3]}, "cuts is [3]"),
    "both": ((NAME, CAT), {"cuts": "3.1", "generate": 2}, "leave generate out"),
}


@pytest.mark.parametrize("given, more, said", WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line(given, more, said):
    with pytest.raises(RegardError) as error:
        regard.look(*given, **more)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_parts_of_a_pair(loaded):
    model, tokenizer = loaded
    for given, said in [
        ((model, "x"), "'x' is no tokenizer"),
        (model, "has no tokenizer; give (model, tokenizer)"),
        ((model, SimpleNamespace(convert_ids_to_tokens=len, is_fast=False)), "no fast tokenizer"),
        ((tokenizer, tokenizer), "model is "),
        ((torch.nn.Sequential(model, load().model), tokenizer), "Sequential holds several models"),
    ]:
        with pytest.raises(RegardError) as error:
            regard.look(given, CAT)
        assert said in str(error.value)
    with pytest.raises(RegardError, match="is an encoder: it generates no text"):
        regard.look(loaded, CAT, generate=1)


@pytest.mark.parametrize("missing", ["transformers", "rich"])
def test_a_missing_extra_is_named(monkeypatch, missing, loaded):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(sys.modules, f"{missing}.console", None)
    for given in (None, loaded):
        with pytest.raises(RegardError, match=rf'{missing}: pip install "regard\[look\]"'):
            regard.look(given, CAT).text()


@pytest.mark.parametrize("file, said", [("", "folder"), (3, "3 is no path"), ("a/b/c", "folder")])
def test_a_page_that_cannot_be_written(file, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RegardError, match=said):
        regard.look(NAME, CAT).html(file)


def test_nothing_is_imported_before_it_is_called():
    code = "import sys, regard; regard.look; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "regard.report.look_result" in loaded
    assert not loaded & {"regard.report.look_html", "regard.report.look_terminal", "rich"}
    assert not loaded & {"transformers", "tokenizers", "html.parser"}
