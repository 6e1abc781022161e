"""Cutting: exactly a score of −inf in eager attention; what `look --cut` reports of it."""

import copy
import json
import threading
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard import Cut, Dense, Edges, Heads, RegardError

pytest.importorskip("transformers", reason='needs pip install "regard[look]"')

import transformers as hf
from click.testing import CliRunner
from rich.cells import cell_len
from transformers import AttentionInterface

import zoo
from regard.analysis.cut import Edge, cut
from regard.analysis.probe import Probe
from regard.analysis.text_model import TextModel, load
from regard.cli import main

ANIMAL = "The animal didn't cross the road because it was tired"
FAMILIES = {str(f): f for f in zoo.FAMILIES}
CASES = {
    "BERT": "encoder.layer.1.attention.self",
    "Llama": "model.layers.0.self_attn",
    "Gemma 2": "model.layers.1.self_attn",
    "gpt-oss": "model.layers.1.self_attn",
    "T5": "decoder.block.1.layer.1.EncDecAttention",
    "BART": "model.decoder.layers.0.encoder_attn",
}
EDGE = (4, 2)  # a query that sees several keys in every case


def eagerly(model, inputs, layer, hidden=None, head=None):
    """The first output under eager, with scores of one layer at −inf, or one head's output at 0."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    names = {module: name for name, module in model.named_modules()}

    def interface(self, implementation, eager):
        def attend(module, query, key, value, mask, **kwargs):
            if names[module] == layer and hidden is not None:
                added = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
                mask = added if mask is None else mask + added
            out, weights = eager(module, query, key, value, mask, **kwargs)
            if names[module] == layer and head is not None:
                out = out.clone()
                out[:, :, head] = 0
            return out, weights

        return attend

    with torch.no_grad(), mock.patch.object(AttentionInterface, "get_interface", interface):
        return model(**inputs)[0]


def with_cut(model, inputs, *cuts) -> Tensor:
    with torch.no_grad(), regard.watch(model, cut=cuts):
        return model(**inputs)[0]


def lengths(model, inputs, layer):
    with torch.no_grad(), regard.watch(model, layers=[layer]) as seen:
        model(**inputs)
    return seen[layer].heads, seen[layer].q_len, seen[layer].k_len


def close(ours: Tensor, theirs: Tensor) -> None:
    """Outputs of whole models, which layers of linear maps round beside attention."""
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def shown(inputs) -> slice:
    """The batch items without padding: of the others, hidden rows are eager's own affair."""
    return slice(0, 1)


@pytest.mark.parametrize("family, layer", CASES.items(), ids=CASES)
def test_an_edge_is_a_score_of_minus_infinity(family, layer):
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    heads, q_len, k_len = lengths(model, inputs, layer)
    hidden = torch.zeros(1, heads, q_len, k_len, dtype=torch.bool)
    hidden[:, 1, EDGE[0], EDGE[1]] = True
    plain, truth = (eagerly(model, inputs, layer, h)[shown(inputs)] for h in (None, hidden))
    ours = with_cut(model, inputs, Cut(layer, Edges([EDGE]) & Heads([1])))[shown(inputs)]
    close(ours, truth)
    assert (truth - plain).abs().max() > 1e-3, "the cut should matter"
    dense = with_cut(model, inputs, Cut(layer, Dense(hidden.expand(zoo.BATCH, -1, -1, -1))))
    assert torch.equal(dense[shown(inputs)], ours)


@pytest.mark.parametrize("family, layer", CASES.items(), ids=CASES)
def test_a_head_is_an_output_of_zero(family, layer):
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    truth = eagerly(model, inputs, layer, head=2)
    close(with_cut(model, inputs, Cut(layer, Heads([2])))[shown(inputs)], truth[shown(inputs)])


def test_cuts_of_several_layers_add_up_and_each_item_has_its_own():
    """Dense cuts per batch item; two cuts in one layer are both made."""
    model = FAMILIES["BERT"].build()
    inputs = {"input_ids": zoo.ids()[:1].repeat(3, 1)}
    n = zoo.LENGTH
    mask = torch.zeros(3, 4, n, n, dtype=torch.bool)
    mask[1, 0, 3, 5] = mask[2, 3, 8, 1] = True
    both = with_cut(model, inputs, Cut(0, Dense(mask)))
    one = {"input_ids": inputs["input_ids"][:1]}
    for item, made in enumerate(([], [((3, 5), 0)], [((8, 1), 3)])):
        cuts = [Cut(0, Edges([edge]) & Heads([head])) for edge, head in made]
        torch.testing.assert_close(both[item : item + 1], with_cut(model, one, *cuts))
    two = [Cut(0, Edges([(3, 5)]) & Heads([0])), Cut(0, Edges([(3, 6)]) & Heads([0]))]
    joined = Cut("encoder.layer.0.*", Edges([(3, 5), (3, 6)]) & Heads([0]))
    assert torch.equal(with_cut(model, one, *two), with_cut(model, one, joined))


def test_torch_s_own_attention_is_cut():
    model, x = zoo.plain(), zoo.random(2, 9, 32)
    hidden = torch.tril(torch.ones(9, 9, dtype=torch.bool)).expand(4, 9, 9).logical_not()
    hidden[1, 4, 2] = True
    theirs = F.scaled_dot_product_attention
    calls = []

    def masked(query, key, value, is_causal):
        calls.append(query)
        if len(calls) == 1:  # the first block
            return theirs(query, key, value, attn_mask=~hidden)
        return theirs(query, key, value, is_causal=is_causal)

    with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", masked):
        truth = model(x)
    with torch.no_grad(), regard.watch(model, cut=[Cut(0, Edges([(4, 2)]) & Heads([1]))]):
        close(model(x), truth)


@pytest.mark.parametrize("whole", [False, True], ids=["edge", "head"])
def test_multihead_attention_is_cut(whole):
    model, x, y = zoo.multihead(), zoo.random(2, 9, 32), zoo.random(2, 7, 32) * 0.7
    hidden = torch.zeros(2, 4, 9, 7)
    hidden[:, 1, 3, 5] = -torch.inf
    mask = Heads([1]) if whole else Edges([(3, 5)]) & Heads([1])
    with torch.no_grad(), regard.watch(model, cut=[Cut("*", mask)]):
        ours, weights = model(x, y, y, average_attn_weights=False)
    if not whole:
        truth, theirs = model(x, y, y, attn_mask=hidden.flatten(0, 1), average_attn_weights=False)
        close(ours, truth)
        close(weights, theirs)
        return
    close(weights[:, 1], torch.zeros(2, 9, 7))
    silent = copy.deepcopy(model)
    with torch.no_grad():
        silent.out_proj.weight[:, 8:16] = 0
    close(ours, silent(x, y, y)[0])


def test_another_thread_is_not_cut():
    model, inputs = FAMILIES["Llama"].build(), FAMILIES["Llama"].inputs()
    with torch.no_grad():
        plain = model(**inputs)[0]
    answers = []

    def other():
        with torch.no_grad():
            answers.append(model(**inputs)[0])

    with torch.no_grad(), regard.watch(model, cut=[Cut(0, Heads([0, 1]))]):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        ours = model(**inputs)[0]
    close(answers[0][0], plain[0])
    assert (ours[0] - plain[0]).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], plain)


def test_a_cut_that_meets_nothing_is_refused():
    model, inputs = FAMILIES["BERT"].build(), FAMILIES["BERT"].inputs()
    with pytest.raises(RegardError, match="cut: no attention call is in layer 7, decoder"):
        with_cut(
            model, inputs, Cut(0, Heads([1])), Cut(7, Heads([1])), Cut("decoder.*", Heads([1]))
        )


# As a person writes it


@pytest.mark.parametrize(
    "spec, edge",
    [("3.1", (3, 1)), (" 3 ", (3, None)), ("3.1: it→animal", (3, 1, "it", "animal")),
     ("3.1:it->animal", (3, 1, "it", "animal")), ("3: it#2 → road", (3, None, "it#2", "road")),
     ("0.11: 'it' -> \"a -> b\"", (0, 11, "it", "a -> b")),
     ('10.2: "->"→[SEP]', (10, 2, "->", "[SEP]")), ("1.1: ' '->x", (1, 1, " ", "x")),
     ("1.1: don't->it", (1, 1, "don't", "it"))],
)  # fmt: skip
def test_specs(spec, edge):
    assert Edge.parse(spec) == Edge(*edge)


@pytest.mark.parametrize(
    "spec", ["", "it→animal", "3.1.2", "-1", "3.x", "3.1:", "3.1: it", "3.1: →x", "a: b→c",
             "3.1: it→", "3.1: 'it→animal", "3.1: a→b→c", "3.1 it→b"],
)  # fmt: skip
def test_specs_that_are_refused(spec):
    with pytest.raises(RegardError, match="--cut"):
        Edge.parse(spec)


def run(*arguments):
    result = CliRunner().invoke(main, ["look", *arguments], env={"COLUMNS": "80"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert max(map(cell_len, result.stdout.splitlines()), default=0) <= 80 or "--json" in arguments
    return result


def test_the_command_s_figures_are_eager_s():
    """The change of the final vector, and what is read afterwards."""
    result = run(ANIMAL, "--cut", "3.1: it->animal", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["cut"]
    reader = load()
    probe = Probe(reader, ANIMAL)
    model = type(reader.model).from_pretrained(
        reader.model.name_or_path, attn_implementation="eager"
    )
    inputs = {"input_ids": torch.tensor([probe.encoded.ids])}
    n = len(probe)
    hidden = torch.zeros(1, 12, n, n, dtype=torch.bool)
    (it,), (animal,) = (
        [w.tokens.start for w in probe.words if w.text == name] for name in ("it", "animal")
    )
    hidden[0, 1, it, animal] = True
    layer = "encoder.layer.3.attention.self"
    before, after = (eagerly(model.eval(), inputs, layer, h)[0].double() for h in (None, hidden))
    assert len(found["words"]) == len(probe.words)
    for said in found["words"]:  # rounded by the command
        tokens = probe.words[said["index"]].tokens
        one, two = (x[tokens.start : tokens.stop].mean(0) for x in (before, after))
        assert said["change"] == pytest.approx(float((two - one).norm() / one.norm()), abs=1e-5)
        assert said["cosine"] == pytest.approx(float(F.cosine_similarity(one, two, 0)), abs=1e-6)
    assert found["words"][0]["word"] == "it"
    assert [c["weights"] for c in found["cuts"]] == [{"1": pytest.approx(0.6055, abs=1e-3)}]
    (reads,) = found["reads"]
    (link,) = (x for x in reads["links"] if (x["layer"], x["head"], x["to"]) == (3, 1, "animal"))
    assert (link["weight"], link["weight2"]) == (pytest.approx(0.6055, abs=1e-3), 0)
    assert found["next"] is None


def test_the_command_prints_what_changed():
    result = run(ANIMAL, "--cut", "3.1: it→animal", "--cut", "5.11", "--cut", "2", "--from", "it")
    assert result.exit_code == 0, result.stderr
    assert "cut 3.1: it → animal, weight 0.61" in result.stdout
    assert "cut 5.11: the whole head" in result.stdout
    assert "cut layer 2: all its heads" in result.stdout
    assert "final vector of" in result.stdout


def writer() -> TextModel:
    """A random Llama that writes, with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "the": 1, "cat": 2, "sat": 3, "on": 4, "mat": 5, "it": 6}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    return TextModel("small", FAMILIES["Llama"].build(), tokenizer, "causal")


def test_the_next_token_of_a_causal_model():
    reader = writer()
    probe = Probe(reader, "the cat sat on it")
    changed = cut(probe, [Edge.parse("1.2: it→cat")], top=100)
    ids = {"input_ids": torch.tensor([probe.encoded.ids])}
    hidden = torch.zeros(1, 4, 5, 5, dtype=torch.bool)
    hidden[0, 2, 4, 1] = True
    one, two = (
        eagerly(reader.model, ids, "model.layers.1.self_attn", h)[0, -1].double().log_softmax(-1)
        for h in (None, hidden)
    )
    # A difference of two models' outputs in float32, small beside them
    assert changed.next.kl == pytest.approx(float((one.exp() * (one - two)).sum()), rel=1e-3)
    assert changed.next.kl > 1e-6
    assert sum(before for _, before, _ in changed.next.tokens) == pytest.approx(1)
    assert sum(after for _, _, after in changed.next.tokens) == pytest.approx(1)
    assert max(before for _, before, _ in changed.next.tokens) == pytest.approx(
        float(one.exp().max()), rel=1e-4
    )
