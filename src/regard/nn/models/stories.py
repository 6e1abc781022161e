"""`load_stories`: a Llama that writes small stories, as llama2.c has it on disk."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import RegardError
from .config import ModelConfig
from .language_model import LanguageModel
from .saved import filled

UNK, BOS, EOS, BYTES = 0, 1, 2, 3  # a byte that no token has is token 3 + byte


class StoryTokenizer:
    """Byte pairs by score, as llama2.c reads them: pieces and their scores, the index is the id."""

    def __init__(self, pieces: Sequence[bytes], scores: Sequence[float]) -> None:
        self.pieces, self.scores = list(pieces), list(scores)
        self.ids = {piece: n for n, piece in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        """<s> and the text's tokens: of its characters, the pair of the best score joined first."""
        ids = []
        for char in f" {text}" if text else "":
            one = char.encode("utf-8")
            ids += [self.ids[one]] if one in self.ids else [BYTES + byte for byte in one]
        while pairs := [
            (self.scores[joined], -n, joined)
            for n, (a, b) in enumerate(pairwise(ids))
            if (joined := self.ids.get(self._piece(a) + self._piece(b))) is not None
        ]:
            _, back, joined = max(pairs)  # of equals the first
            ids[-back : 2 - back] = [joined]
        return [BOS, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens up to a </s> or another <s>, without the space that begins it."""
        ids = list(ids)[1:] if len(ids) and ids[0] == BOS else list(ids)
        ends = [n for n, one in enumerate(ids) if one in (BOS, EOS)]
        text = b"".join(self._piece(one) for one in ids[: ends[0] if ends else None])
        return text.decode("utf-8", "replace").removeprefix(" ")

    def _piece(self, one: int) -> bytes:
        return bytes([one - BYTES]) if BYTES <= one < BYTES + 256 else self.pieces[one]


def load_stories(folder: str | Path) -> tuple[LanguageModel, StoryTokenizer]:
    """(model, tokenizer) of a folder with stories260K.bin and tok512.bin, or others of the kind.

    model, tokenizer = load_stories("stories260K")
    prompt = torch.tensor([tokenizer.encode("Once upon a time")])
    print(tokenizer.decode(generate(model, prompt, 100)[0].tolist()))
    """
    folder = Path(folder)
    found = [sorted(folder.glob(pattern)) for pattern in ("stories*.bin", "tok*.bin")]
    if [len(paths) for paths in found] != [1, 1]:
        raise RegardError(f"{folder} is no model of llama2.c: it needs a stories*.bin, a tok*.bin")
    (weights,), (pieces,) = found
    model = _model(weights)
    return model, _tokenizer(pieces, model.config.vocab)


def _model(path: Path) -> LanguageModel:
    data = path.read_bytes()
    if len(data) < 28:
        raise RegardError(f"{path} is no model of llama2.c: it has {len(data)} bytes")
    dim, hidden, depth, heads, kv_heads, vocab, length = struct.unpack("<7i", data[:28])
    tie = vocab > 0  # a negative one says that the logits have weights of their own
    vocab, kv_dim = abs(vocab), dim * kv_heads // max(heads, 1)
    block = {
        "mixer_norm.weight": (dim,),
        "mixer.attention.q_proj.weight": (dim, dim),
        "mixer.attention.k_proj.weight": (kv_dim, dim),
        "mixer.attention.v_proj.weight": (kv_dim, dim),
        "mixer.attention.out_proj.weight": (dim, dim),
        "feed_forward_norm.weight": (dim,),
        "feed_forward.gate.weight": (hidden, dim),
        "feed_forward.down.weight": (dim, hidden),
        "feed_forward.up.weight": (hidden, dim),
    }
    shapes: dict[str, tuple[int, ...]] = {"embedding": (vocab, dim)}
    shapes |= {name: (depth, *shape) for name, shape in block.items()}
    shapes |= {"norm": (dim,), "angles": (length, dim // max(heads, 1))}
    shapes |= {} if tie else {"head": (vocab, dim)}
    need = 28 + 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    if min(dim, hidden, depth, heads, kv_heads, length) < 1 or len(data) != need:
        raise RegardError(f"{path} is no model of llama2.c: its header does not fit its size")
    held, at = {}, 28
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        numbers = np.frombuffer(data, "<f4", count, at).reshape(shape)
        held[name], at = torch.from_numpy(numbers.copy()), at + 4 * count
    for name, of in (("q", heads), ("k", kv_heads)):
        name = f"mixer.attention.{name}_proj.weight"
        held[name] = _halves(held[name], of)
    state = {f"stack.blocks.{n}.{name}": held[name][n] for n in range(depth) for name in block}
    # Here a token's vector is √dim times its row; there the row itself, which is the head's too
    state |= {"embedding.weight": held["embedding"] / dim**0.5, "stack.norm.weight": held["norm"]}
    state["head.weight"] = held.get("head", held["embedding"])
    config = ModelConfig(
        vocab=vocab, dim=dim, heads=heads, kv_heads=kv_heads, depth=depth, hidden=hidden,
        length=length, tie=False, bos=BOS, eos=EOS,
    )  # fmt: skip
    model: LanguageModel = filled(LanguageModel, config, state)
    return model


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows (depth, heads · size, dim) turned in pairs (2i, 2i + 1), as pairs (i, i + size / 2)."""
    pairs = weight.unflatten(1, (heads, -1, 2))
    return pairs.transpose(2, 3).flatten(1, 3)


def _tokenizer(path: Path, vocab: int) -> StoryTokenizer:
    data, at = path.read_bytes(), 4  # behind the length of the longest piece
    pieces, scores = [], []
    try:
        for _ in range(vocab):
            score, size = struct.unpack_from("<fi", data, at)
            pieces.append(data[at + 8 : at + 8 + size])
            scores.append(score)
            at += 8 + size
    except struct.error:
        at = -1
    if at != len(data):
        raise RegardError(f"{path} is no tokenizer of llama2.c of {vocab} tokens")
    return StoryTokenizer(pieces, scores)
