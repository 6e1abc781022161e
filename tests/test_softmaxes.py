"""Models that compute attention by themselves: their own weights, and their outputs to the bit."""

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import regard
import tiny
import zoo
from regard import Entropy, Received, RegardError, Rows, TopK

EVERY_ROW = Rows(range(128))
# Architectures whose attention goes through no interface, with all their weights to compare to
DENSE = [
    "blip_text_model", "bloom", "canine", "codegen", "convbert", "ctrl", "cvt", "data2vec-vision",
    "deberta", "deberta-v2", "donut-swin", "esm", "falcon", "flaubert", "fsmt", "funnel", "glpn",
    "gpt_neo", "gpt_neox_japanese", "gptj", "ibert", "imagegpt", "layoutlmv2", "layoutlmv3",
    "levit", "lilt", "luke", "lxmert", "maskformer-swin", "megatron-bert", "mgp-str", "mobilevit",
    "mpnet", "mpt", "mvp", "openai-gpt", "prophetnet", "pvt", "rembert", "roformer", "speecht5",
    "squeezebert", "swin2sr", "swinv2", "tapas", "timesformer", "trocr", "visual_bert", "vitdet",
    "xglm", "xlm", "xlnet",
]  # fmt: skip


@torch.no_grad()
def watched(model: nn.Module, given: dict[str, Tensor], observe=(EVERY_ROW,), **settings):
    """(the output unwatched, the output watched, what was seen)."""
    alone = model(**given)
    with regard.watch(model, observe=observe, verify=True, **settings) as seen:
        ours = model(**given)
    return alone, ours, seen


def tensors(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [t for part in parts if isinstance(part, dict | tuple | list | Tensor)
            for t in tensors(part)]  # fmt: skip


def assert_bits(ours, theirs) -> None:
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    assert pairs
    for one, other in pairs:
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))
