"""`regard.look`: layers, heads and tokens as the command takes them."""

import json

import pytest

pytest.importorskip("transformers", reason='needs pip install "regard[look]"')

from click.testing import CliRunner

import regard
from regard import RegardError
from regard.cli import main

TEXT = "Unbelievably, the cat sat because it was tired"
SAME = {
    "tokens": ({"tokens": True, "from_words": "it"}, ["--tokens", "--from", "it"]),
    "tokens compared": (
        {"tokens": True, "versus": "The dog sat"}, ["--tokens", "--versus", "The dog sat"]
    ),
    "a head of a layer": ({"heads": "3.1"}, ["--head", "3.1"]),
    "heads of layers": ({"heads": ["3.1", " 5.0"]}, ["--head", "3.1", "--head", "5.0"]),
    "both kinds": ({"heads": ("0.2", 1), "layers": [0, "4"]},
                   ["--head", "0.2", "--head", "1", "--layer", "0", "--layer", "4"]),
    "strings": ({"heads": "1", "layers": "3"}, ["--head", "1", "--layer", "3"]),
}  # fmt: skip


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("given, arguments", SAME.values(), ids=SAME)
def test_it_takes_what_the_command_takes(given, arguments):
    found = regard.look(None, TEXT, **given)
    done = CliRunner().invoke(main, ["look", TEXT, *arguments, "--json"])
    assert done.exit_code == 0, done.stderr
    assert found.as_dict() == json.loads(done.stdout)


def test_tokens_are_what_the_model_reads():
    words, tokens = (regard.look(None, TEXT, tokens=given).words for given in (False, True))
    assert words[1] == "Unbelievably"
    assert len(tokens) > len(words)
    assert "Unbelievably" not in tokens


@pytest.mark.parametrize(
    "given, said",
    [
        ({"heads": "x"}, "heads 'x': give layer and head, as 3.1, or a head, as 1"),
        ({"heads": ["3.1", "1.2.3"]}, "heads '1.2.3': give layer and head"),
        ({"heads": "-1"}, "heads '-1': give layer and head"),
        ({"heads": "9.1"}, "no layer 9"),
        ({"heads": "3.99"}, "no head 3.99: layer 3 has heads 0 to 11"),
        ({"heads": [None]}, "heads is None; give a whole number"),
        ({"layers": 1.5}, "layers is 1.5; give a whole number, or a list of them"),
        ({"layers": "3.1"}, "layers is '3.1'; give a whole number"),
    ],
    ids=str,
)
def test_what_no_head_or_layer_is(given, said):
    with pytest.raises(RegardError) as error:
        regard.look(None, TEXT, **given)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
