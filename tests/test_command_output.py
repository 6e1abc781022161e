"""What the commands take as a head, and say of what they wrote."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("regard_minilm", reason="needs packages/regard-minilm")

import math
import re

import torch
import transformers
from click.testing import CliRunner
from rich.cells import cell_len

from regard.cli import main

TEXT = "The trophy didn't fit in the suitcase because it was too big."


def run(command, *arguments):
    return CliRunner().invoke(main, [command, TEXT, "--from", "it", *map(str, arguments)])


def answered(command, *arguments):
    done = run(command, *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def shown(*arguments):
    return [(head["layer"], head["head"]) for head in answered("look", *arguments)["heads"]]


def walked(*arguments):
    found = answered("walk", *arguments)
    return found["layer"], found["head"]


def test_look_takes_heads_by_layer_and_by_number():
    assert shown("--head", "3.1") == [(3, 1)]
    assert shown("--head", "3.1", "--head", "5.0") == [(3, 1), (5, 0)]
    assert shown("--head", "1", "--layer", 3) == [(3, 1)]
    assert shown("--head", "1") == [(layer, 1) for layer in range(6)]
    assert shown("--head", "0.2", "--head", "1", "--layer", 0, "--layer", 4) == [
        (0, 1), (0, 2), (4, 1),
    ]  # fmt: skip


@pytest.mark.sample(0)
@pytest.mark.parametrize("more", [("--versus", TEXT.replace("big", "small")), ("--effect",)])
def test_other_answers_take_them_too(more):
    found = answered("look", "--head", "3.1", *more)[more[0][2:]][0]
    assert {(link["layer"], link["head"]) for link in found["links"]} == {(3, 1)}


def test_walk_takes_layer_and_head_apart():
    assert walked("--head", "3.1") == (3, 1) == walked("--layer", 3, "--head", "1")
    layer, head = walked("--layer", 2)
    assert layer == 2
    links = answered("look", "--layer", 2, "--no-special")["links"]
    links = [link for link in links if link["to"] != "it"]
    strongest = max(links, key=lambda link: link["weight"])
    assert head == strongest["head"]
    layer, head = walked("--head", "11")
    assert head == 11
    assert "of the heads numbered 11 the strongest" in " ".join(
        run("walk", "--head", 11).stdout.split()
    )


@pytest.mark.parametrize("command", ["look", "walk"])
def test_html_prints_only_its_file(command, tmp_path):
    page = tmp_path / "page.html"
    done = run(command, "--html", page)
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"page: {page}\n", "")
    done = run(command, "--html", page, "--json")
    assert json.loads(done.stdout)
    assert done.stderr == f"page: {page}\n"


def test_save_says_what_it_saved(tmp_path):
    folder = tmp_path / "kept"
    done = run("look", "--save", folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    *_, blank, last = done.stdout.splitlines()
    said = f"q, k and lse of 6 layers and 17 tokens, {size / 1e6:.1f} MB"
    assert (blank, last) == ("", f"saved: {folder}, {said}")
    done = run("look", "--save", tmp_path / "two", "--html", tmp_path / "page", "--json")
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["page", "saved"]


def test_generate_shows_the_text_first_with_probabilities(folders):
    asked = (TEXT, "--model", str(folders / "gpt2"), "--generate", "8")
    found = json.loads(CliRunner().invoke(main, ["look", *asked, "--json"]).stdout)
    said = found["generated"]
    assert [found["words"][word["index"]] for word in said["words"]] == [
        word["word"] for word in said["words"]
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "gpt2").double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / "gpt2")
    ids = begun = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    product = 1.0
    with torch.no_grad():
        for _ in range(8):
            chances = model(ids).logits[0, -1].softmax(-1)
            product *= float(chances.max())
            ids = torch.cat([ids, chances.argmax()[None, None]], 1)
    assert said["text"] == tokenizer.decode(ids[0, begun.shape[1] :], skip_special_tokens=True)
    ours = math.prod(word["probability"] for word in said["words"])
    assert ours == pytest.approx(product, rel=1e-4)
    for more in ([], ["--versus", TEXT.replace("big", "small")]):
        lines = CliRunner().invoke(main, ["look", *asked, *more], env={"COLUMNS": "80"}).stdout
        first, second, *_ = lines.splitlines()
        assert first.startswith("» ")
        assert second.startswith("probability of each word: ")
        assert f" {said['words'][0]['probability']:.2f}" in lines
        assert max(map(len, lines.splitlines())) <= 80


def test_a_decoder_s_first_token_has_no_probability(folders):
    asked = (TEXT, "--model", str(folders / "t5"), "--generate", "8", "--json")
    said = json.loads(CliRunner().invoke(main, ["look", *asked]).stdout)["generated"]["words"]
    assert said[0]["probability"] is None
    assert all(0 < word["probability"] <= 1 for word in said[1:])


def test_a_plain_look_has_no_continuation():
    assert not run("look").stdout.startswith("»")
    assert "generated" not in answered("look")


@pytest.mark.slow
def test_effect_keeps_its_numbers():
    text = "It was antidisestablishmentarianism, 日本語の長い文章, that tired it."
    asked = ["look", text, "--effect", "--from", "it", "--top", "6"]
    links = json.loads(CliRunner().invoke(main, [*asked, "--json"]).stdout)["effect"][0]["links"]
    for width in (80, 44):
        page = CliRunner().invoke(main, asked, env={"COLUMNS": str(width)}).stdout
        assert max(map(cell_len, page.splitlines())) <= width
        assert re.search(r"final\s+vector\s+of\s+it,\s+of\s+length\s+\d+\.\d\d", page)
        for link in links:
            numbers = f"{link['weight']:.3f} *{link['value']:.3f} *{link['layer']}.{link['head']}"
            assert re.search(rf" {link['effect']:.3f} .*{numbers}$", page, re.M), (link, page)
