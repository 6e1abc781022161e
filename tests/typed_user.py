"""A user's script, as their type checker reads it: never run.

Against the installed package, in the strictest way there is (the job `types` of CI):
mypy --strict --config-file= tests/typed_user.py; pyright tests/typed_user.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor, nn

import regard
from regard import (
    ALiBi,
    Causal,
    Cut,
    Documents,
    Edges,
    Entropy,
    First,
    Heads,
    LookResult,
    Mask,
    NoEngine,
    Padding,
    Received,
    Recording,
    RegardError,
    Rows,
    TopK,
    Window,
)
from regard.cache import KVCache
from regard.linear import Favor, LinearState
from regard.nn import MultiHeadAttention
from regard.nn.functional import scaled_dot_product_attention
from regard.sparse import BigBird


def masks(keep: Tensor, ids: Tensor) -> Mask:
    sinks = Causal() & (Window(1024) | First(4))
    assert_type(sinks, Mask)
    assert_type(~Edges([(3, 1)]), Mask)
    several: Sequence[Mask] = [sinks & Padding(keep), Documents(ids) & Causal(), Heads([1])]
    return several[0] | several[1] & ~several[2]


def computed(q: Tensor, k: Tensor, v: Tensor) -> float:
    try:
        out, (top, received) = regard.attention(
            q, k, v, mask=Causal(), bias=ALiBi(), observe=[TopK(8), Received()]
        )
    except NoEngine as error:
        raise SystemExit(str(error)) from error
    assert_type(out, Tensor)
    best: Tensor = top.weights.amax(-1) + received.mean.amax(-1)
    with_lse, lse = regard.attention(q, k, v, dropout=0.1, return_lse=True, engine="tiled")
    seen = regard.observe(q, k, observe=[Entropy()], lse=lse)
    assert_type(seen, tuple[Any, ...])
    assert_type(regard.explain(q, k, v, mask=Window(8)), dict[str, list[str]])
    assert_type(scaled_dot_product_attention(q, k, v, is_causal=True), Tensor)
    swapped, (entropy,) = scaled_dot_product_attention(q, k, v, observe=[Entropy()])
    assert_type(swapped, Tensor)
    assert_type(regard.linear_attention(q, k, v, causal=False), Tensor)
    linear, state = regard.linear_attention(q, k, v, return_state=True)
    assert_type(state, LinearState)
    linear, last, (rows,) = regard.linear_attention(
        q, k, v, feature_map=Favor(64), state=state, return_state=True, observe=[Rows([0])]
    )
    assert_type(last.length, int)
    best = best + entropy.values + linear.sum() + rows.weights.sum()
    return float((best + lse + with_lse.sum()).sum())


def watched(model: nn.Module, ids: Tensor) -> list[tuple[str, int, Any]]:
    with regard.watch(model, observe=[TopK(8), Entropy()], cut=[Cut(3, Heads([1]))]) as seen:
        model(input_ids=ids)
    assert_type(len(seen), int)
    return [(layer.name, layer.heads, layer[TopK].weights) for layer in seen if layer.pattern]


def looked(sentence: str, page: Path) -> LookResult:
    found = regard.look("gpt2", sentence, from_words="it", layers=[3, 5], heads=7, top=4)
    assert_type(found.json(), str)
    assert_type(found.html(page), Path)
    assert_type(found, LookResult)
    return found


def recorded(model: nn.Module, ids: Tensor, folder: Path) -> Tensor:
    regard.record(model, {"input_ids": ids}, folder, dtype=torch.bfloat16)
    recording = Recording.load(folder)
    assert_type(recording, Recording)
    assert_type(recording.weights(0, 3, rows=slice(0, 8), cols=[1, 2]), Tensor)
    assert_type([layer.name for layer in recording.layers], list[str])
    return recording.weights(0, 3)


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attend = MultiHeadAttention(dim, 8)
        self.cache = KVCache()

    def forward(self, x: Tensor) -> Tensor:
        out = self.attend(x, mask=BigBird(block=64))
        if not isinstance(out, Tensor):
            raise RegardError("asked for nothing but the output")
        return out
