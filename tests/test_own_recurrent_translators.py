"""Translators as transformers has them: recurrent ones, and padding, which generate() names not."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import torch.nn.functional as F

import regard.huggingface  # noqa: F401  it registers them
from regard import RegardError
from regard.models import ModelConfig, RecurrentTranslator, Translator, beam_search
from regard.nn.models.saved import load_model, save_model

SOURCES = torch.tensor([[5, 6, 7, 9], [8, 11, 0, 0]])
TARGETS = torch.tensor([[1, 5, 6], [1, 7, 7]])
KINDS = {
    "lstm bahdanau": "RegardRecurrentForConditionalGeneration",
    "lstm none": "RegardRecurrentForConditionalGeneration",
    "gru bahdanau": "RegardRecurrentForConditionalGeneration",
    "rnn none": "RegardRecurrentForConditionalGeneration",
    "softmax attention": "RegardForConditionalGeneration",
}
RECURRENT = [name for name in KINDS if name != "softmax attention"]


@pytest.fixture(params=KINDS)
def both(request, tmp_path):
    """Ours and transformers' of one folder."""
    from transformers import AutoModelForSeq2SeqLM

    mixer, cross = request.param.split()
    torch.manual_seed(0)
    config = ModelConfig(vocab=40, dim=16, heads=2, depth=2, decoder_depth=1, mixer=mixer,
                         cross=cross, tie=False, pad=0, bos=1, eos=2)  # fmt: skip
    made = Translator if mixer == "softmax" else RecurrentTranslator
    model = made(config)
    with torch.no_grad():  # as drawn, it writes one token over and over
        model.head.weight.mul_(4)
        model.embedding.weight.mul_(4)
    save_model(model, tmp_path / "one")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "one").eval()
    assert type(theirs).__name__ == KINDS[request.param]
    return load_model(tmp_path / "one"), theirs, tmp_path


@torch.no_grad()
def test_logits_and_loss_are_ours_padded_or_not(both):
    ours, theirs, _ = both
    expected = ours(TARGETS, SOURCES)
    masked = {"input_ids": SOURCES.clamp_min(3), "attention_mask": (SOURCES != 0).long()}
    read = {"encoder_outputs": theirs.get_encoder()(SOURCES)}
    for given in ({"input_ids": SOURCES}, masked, read):
        torch.testing.assert_close(theirs(**given, decoder_input_ids=TARGETS).logits, expected)
    labels = torch.tensor([[5, 6, 2], [7, 7, -100]])
    loss = theirs(input_ids=SOURCES, labels=labels).loss
    hand = F.cross_entropy(expected.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, hand)


@torch.no_grad()
def test_what_it_saves_is_ours_again(both):
    ours, theirs, tmp_path = both
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(load_model(tmp_path / "again")(TARGETS, SOURCES), ours(TARGETS, SOURCES))


def test_it_writes_what_ours_writes_each_source_as_by_itself(both):
    """Without caches what ours gives with them, the mask given or not."""
    ours, theirs, _ = both
    greedy = [beam_search(ours, row[row != 0][None], beams=1, limit=9)[0] for row in SOURCES]
    beams = [beam_search(ours, row[row != 0][None], beams=3, limit=9)[0] for row in SOURCES]
    how = {"max_new_tokens": 9, "do_sample": False}
    for given in ({}, {"attention_mask": (SOURCES != 0).long()}):
        found = theirs.generate(SOURCES, **given, **how)
        assert [written(row) for row in found] == [upto(row) for row in greedy]
        found = theirs.generate(SOURCES, num_beams=3, early_stopping=True, **given, **how)
        assert [written(row) for row in found] == [upto(row) for row in beams]
    assert sum(len(set(row)) for row in greedy) > 4


def written(row):
    """The tokens behind <s>, without </s> and padding."""
    assert row[0] == 1
    return [token for token in row[1:].tolist() if token not in (0, 2)]


def upto(row):
    return [token for token in row if token != 0]


@pytest.mark.parametrize("both", RECURRENT, indirect=True)
def test_padding_that_is_not_behind_is_refused(both):
    ours, theirs, _ = both
    for source in ([[0, 5, 6]], [[5, 0, 6]], [[0, 0]]):
        ids = torch.tensor(source)
        with pytest.raises(RegardError, match="pad on the right"):
            ours(TARGETS[:1], ids)
        with pytest.raises(RegardError, match="pad on the right"):
            theirs(input_ids=ids, decoder_input_ids=TARGETS[:1])


@pytest.mark.parametrize("both", RECURRENT, indirect=True)
def test_what_another_encoder_made_is_refused(both):
    from transformers.modeling_outputs import BaseModelOutput

    _, theirs, _ = both
    other = BaseModelOutput(last_hidden_state=torch.zeros(2, 4, 16))
    with pytest.raises(RegardError, match=r"none of this model's get_encoder\(\)"):
        theirs(encoder_outputs=other, decoder_input_ids=TARGETS)
