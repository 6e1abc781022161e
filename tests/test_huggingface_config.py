"""`output_attentions=True` in a config, beside attn_implementation="regard"."""

import pytest
import torch
import transformers as hf

import regard
import regard.huggingface
import zoo

FAMILIES = {f.name: f for f in zoo.FAMILIES}


def attentions(output):
    """The weights that a model returned, in its order."""
    return [w for key in output if "attentions" in key for w in output[key]]


NAMES, WAYS = ("Llama", "BERT", "BART", "GPT-2"), ("from_pretrained", "config", "later")
ASKED = [(name, way) for name in NAMES for way in WAYS]
# T5's encoder and decoder have copies of the config: it cannot be asked later
ASKED += [("T5", "from_pretrained"), ("T5", "config")]


@pytest.mark.parametrize("name, way", ASKED)
def test_a_model_returns_its_weights(name, way, tmp_path):
    family = FAMILIES[name]
    model, inputs = family.build(attn_implementation="eager").double(), family.inputs()
    if (
        name == "Llama"
    ):  # in float64 its eager gives NaN to a row that sees no key, and all below it
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    with torch.no_grad():
        right = attentions(model(**inputs, output_attentions=True))
    if way == "from_pretrained":
        model.save_pretrained(tmp_path)
        ours = family.model.from_pretrained(
            tmp_path, attn_implementation="regard", output_attentions=True
        )
    elif way == "config":
        config = family.settings(
            **family.arguments, attn_implementation="regard", output_attentions=True
        )
        ours = family.model(config)
        ours.load_state_dict(model.state_dict())
    else:
        ours = model
        ours.set_attn_implementation("regard")
        ours.config.output_attentions = True
    with torch.no_grad():
        given = attentions(ours.double().eval()(**inputs))
    assert len(given) == len(right) > 0
    for weights, expected in zip(given, right, strict=True):
        sees = weights.sum(-1) > 0  # eager spreads a row that sees no key over all
        assert sees.float().mean() > 0.5
        torch.testing.assert_close(weights[sees], expected[sees], rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_others_are_refused_as_ever(implementation):
    """Only regard's has the weights."""
    with pytest.raises(Exception, match="output_attentions"):
        hf.BertConfig(attn_implementation=implementation, output_attentions=True)
    config = hf.BertConfig(attn_implementation=implementation)
    with pytest.raises(ValueError, match="output_attentions"):
        config.output_attentions = True


def test_a_watched_model_of_another_implementation_is_refused_as_ever():
    model = FAMILIES["BERT"].build(attn_implementation="sdpa")
    with regard.watch(model), pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
