"""What a watch shows to a user, and what it keeps of a call when regard itself asks for it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regard
from regard import TopK
from regard.capture.options import WatchOptions
from regard.capture.watching import WatchBlock

PUBLIC = {"forwards", "layers", "recording"}
NEW = {"plot", "to_pandas"}  # what results offer beside their numbers


class Ours(nn.Module):
    """Attention by regard."""

    def forward(self, x):
        return regard.attention(x, x, 2 * x, softcap=5.0)


class Torchs(nn.Module):
    """Attention by torch."""

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, 2 * x, is_causal=True)


def test_a_user_holds_only_what_was_seen():
    with regard.watch(Torchs(), observe=[TopK(1)]) as seen:
        pass
    assert PUBLIC <= {name for name in dir(seen) if not name.startswith("_")} <= PUBLIC | NEW


@pytest.mark.parametrize("model", [Ours(), Torchs(), nn.Sequential(Ours(), Torchs())], ids=repr)
@pytest.mark.parametrize("observe", [[], [TopK(2)], [regard.Effect(1)]], ids=repr)
def test_the_last_call_is_kept_whole_when_asked(model, observe):
    """With its values, whether the model's own attention computed it or ours in its place."""
    x = torch.randn(1, 2, 5, 4, requires_grad=True)
    with WatchBlock(model, WatchOptions(observe, keep_calls=True)) as seen:
        model(x).sum().backward()
    for layer in seen:
        assert layer.call.value.shape == x.shape
        torch.testing.assert_close(layer.call.value, 2 * layer.call.key)
    with WatchBlock(model, WatchOptions(observe)) as seen:
        model(x).sum().backward()
    assert {layer.call for layer in seen} == {None}
