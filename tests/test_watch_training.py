"""A watched model in train mode draws what it draws unwatched: outputs and gradients are equal."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import regard
import regard.nn
import zoo
from regard import Cut, Effect, Heads, Received, RegardError, TopK

P = 0.3


class Calls(nn.Module):
    """Calls torch's attention function, and drops out before and after it."""

    def __init__(self):
        super().__init__()
        self.before, self.qkv = nn.Dropout(P), nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.before(x)).view(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=P if self.training else 0)
        return F.dropout(out, P, self.training)


def hugging(implementation: str, checkpoints: bool = False):
    config = hf.BertConfig(
        **zoo.ENCODER, hidden_dropout_prob=P, attention_probs_dropout_prob=P
    )  # fmt: skip
    model = hf.BertModel._from_config(config, attn_implementation=implementation)
    if checkpoints:
        model.gradient_checkpointing_enable()
    return model, zoo.encoder()


VECTORS = {"x": zoo.random(2, 5, 32)}
MODELS = {
    "eager": lambda: hugging("eager"),
    "sdpa": lambda: hugging("sdpa"),
    "regard": lambda: hugging("regard"),
    "checkpoints": lambda: hugging("sdpa", checkpoints=True),
    "torch's function": lambda: (Calls(), VECTORS),
    "torch's encoder": lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, P, batch_first=True), 2),
        {"src": VECTORS["x"]},
    ),
    "regard.nn": lambda: (regard.nn.Block(32, 4, dropout=P), VECTORS),
}
models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def stepped(model: nn.Module, inputs: dict, watching) -> list[Tensor]:
    """Output and gradients of one step, and what the generator gives after it."""
    torch.manual_seed(1)
    model.zero_grad()
    with watching:
        out = model(**inputs)
        out = out if isinstance(out, Tensor) else out[0]
        out.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [out.detach(), *grads, torch.rand(3)]


@models
def test_draws_are_the_same(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = build()
        model.train()
        alone = stepped(model, inputs, nullcontext())
        seen = regard.watch(model, observe=[TopK(3), Received()], keep_qk=True, verify=True)
        watched = stepped(model, inputs, seen)
        model.eval()
        still = stepped(model, inputs, nullcontext())
    assert len(watched) == len(alone) > 3
    assert all(map(torch.equal, watched, alone))
    assert not torch.equal(still[0], alone[0])  # something was dropped


@pytest.mark.parametrize("more", [{"cut": [Cut("*", Heads([1]))]}, {"observe": [Effect(2)]}])
@pytest.mark.parametrize("name", ["eager", "sdpa", "torch's function", "torch's encoder"])
def test_what_regard_computes_itself_says_so(name, more):
    model, inputs = MODELS[name]()
    model.train()
    with (
        pytest.raises(RegardError, match=r"drops out weights, which cut and Effect.*model\.eval"),
        regard.watch(model, **more),
    ):
        model(**inputs)
    with regard.watch(model.eval(), **more):
        model(**inputs)
