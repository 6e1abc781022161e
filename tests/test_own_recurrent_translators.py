"""Recurrent translators as transformers has them: read, padded, written on greedily and by beams."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import torch.nn.functional as F

import regard.huggingface  # noqa: F401  it registers them
from regard import RegardError
from regard.models import ModelConfig, RecurrentTranslator, beam_search
from regard.models.saved import load_model, save_model

SOURCES = torch.tensor([[5, 6, 7, 9], [8, 11, 0, 0]])
TARGETS = torch.tensor([[1, 5, 6], [1, 7, 7]])


@pytest.fixture(params=["lstm bahdanau", "lstm none", "gru bahdanau", "rnn none"])
def both(request, tmp_path):
    """Ours and transformers' of one folder."""
    from transformers import AutoModelForSeq2SeqLM

    mixer, cross = request.param.split()
    torch.manual_seed(0)
    config = ModelConfig(vocab=40, dim=16, depth=2, decoder_depth=1, mixer=mixer, cross=cross,
                         tie=False, pad=0, bos=1, eos=2)  # fmt: skip
    save_model(RecurrentTranslator(config), tmp_path / "one")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "one").eval()
    assert type(theirs).__name__ == "RegardRecurrentForConditionalGeneration"
    return load_model(tmp_path / "one"), theirs, tmp_path


@torch.no_grad()
def test_logits_and_loss_are_ours_padded_or_not(both):
    ours, theirs, _ = both
    expected = ours(TARGETS, SOURCES)
    masked = {"input_ids": SOURCES.clamp_min(3), "attention_mask": (SOURCES != 0).long()}
    for given in ({"input_ids": SOURCES}, masked):
        assert torch.equal(theirs(**given, decoder_input_ids=TARGETS).logits, expected)
    read = theirs.get_encoder()(SOURCES)
    found = theirs(encoder_outputs=read, attention_mask=SOURCES != 0, decoder_input_ids=TARGETS)
    assert torch.equal(found.logits, expected)
    labels = torch.tensor([[5, 6, 2], [7, 7, -100]])
    loss = theirs(input_ids=SOURCES, labels=labels).loss
    hand = F.cross_entropy(expected.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, hand)


@torch.no_grad()
def test_what_it_saves_is_ours_again(both):
    ours, theirs, tmp_path = both
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(load_model(tmp_path / "again")(TARGETS, SOURCES), ours(TARGETS, SOURCES))


def test_it_writes_what_ours_writes(both):
    """Without caches what ours gives with them, each source of a padded batch as by itself."""
    ours, theirs, _ = both
    with torch.no_grad():  # what was drawn writes one token over and over
        for model in (ours, theirs.model):
            model.head.weight.mul_(4)
            model.embedding.weight.mul_(4)
    greedy = beam_search(ours, SOURCES, beams=1, limit=9)
    assert greedy[0] != greedy[1]
    found = theirs.generate(SOURCES, max_new_tokens=9, do_sample=False)
    assert [written(row) for row in found] == greedy
    beams = {"num_beams": 3, "early_stopping": True}
    found = theirs.generate(SOURCES[:1], max_new_tokens=9, do_sample=False, **beams)
    (expected,) = beam_search(ours, SOURCES[:1], beams=3, limit=9)
    assert written(found[0]) == expected


def written(row):
    return [token for token in row.tolist() if token > 2]


def test_padding_that_is_not_behind_is_refused(both):
    ours, theirs, _ = both
    for source in ([[0, 5, 6]], [[5, 0, 6]], [[0, 0]]):
        ids = torch.tensor(source)
        for call in (lambda ids=ids: ours(TARGETS[:1], ids),
                     lambda ids=ids: theirs(input_ids=ids, decoder_input_ids=TARGETS[:1])):
            with pytest.raises(RegardError, match="pad on the right"):
                call()  # fmt: skip
