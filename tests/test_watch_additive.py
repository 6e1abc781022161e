"""Bahdanau's attention under a watch: its weights as the model has them, a recording, refusals."""

import pytest
import torch

import regard
from regard import Cut, Full, RegardError, Rows
from regard.models import ModelConfig, RecurrentTranslator

SOURCES = torch.tensor([[5, 6, 7, 9], [8, 11, 0, 0]])
TARGETS = torch.tensor([[1, 5, 6], [1, 7, 7]])


@pytest.fixture(params=["lstm", "gru", "rnn"])
def model(request):
    torch.manual_seed(0)
    config = ModelConfig(vocab=40, dim=16, depth=1, mixer=request.param, cross="bahdanau", pad=0)
    made = RecurrentTranslator(config).eval()
    with torch.no_grad():
        made.embedding.weight.mul_(9)  # as drawn, it reads all alike
    return made


def test_what_it_reads_is_seen_and_recorded(model):
    logits, weights = model(TARGETS, SOURCES, return_weights=True)
    with regard.watch(model, observe=[Rows(range(3))], keep_qk=True) as seen:
        watched = model(TARGETS, SOURCES)
    assert torch.equal(watched, logits)
    (layer,) = seen
    assert (layer.kind, layer.q_len, layer.k_len) == ("cross", 3, 4)
    torch.testing.assert_close(layer[Rows].weights[:, 0], weights)
    recording = seen.recording()
    for item in range(2):
        torch.testing.assert_close(recording.weights(0, 0, batch=item), weights[item])
    assert not weights[1, :, 2:].any()  # padding


def test_what_cannot_be_done_with_it_is_refused(model):
    with (
        pytest.raises(RegardError, match="weights that are computed already; nothing can be cut"),
        regard.watch(model, cut=[Cut(0, Full())]),
    ):
        model(TARGETS, SOURCES)


def test_a_watch_leaves_nothing_behind(model):
    assert not [name for name in model.state_dict() if "told" in name]
