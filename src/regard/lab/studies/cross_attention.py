"""What each written word reads of the source, in translators with attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...call.observers import Rows

READS = ("output", "input")
WEIGHINGS = ("weight", "norm", "share", "norm share")
KEYS = tuple(f"{read} {by}" for by in WEIGHINGS for read in READS)
CLOSE = {".", ",", "!", "?", ";", ":"}  # written without a space before them

ELIDED = {"je", "me", "te", "se", "le", "la", "ne", "de", "ce", "que"}
VOWELS = set("aeiouyhàâéèêëîïôöûü")


def has_weights(model: Any) -> bool:
    """Whether a translator reads its source by attention."""
    return model.kind == "translator" or model.attention is not None


def heads_of(model: Any) -> list[str]:
    """The names of what `word_tables` gives, in its order: heads, layers' means, that of all."""
    many = (len(model.decoder.blocks), model.config.heads) if model.kind == "translator" else (1, 1)
    layers, heads = map(range, many)
    return [f"{a}.{b}" for a in layers for b in heads] + [f"{a} mean" for a in layers] + ["all"]


def word_tables(
    model: Any, tokenizer: Any, source: list[str], target: list[str]
) -> dict[str, Tensor]:
    """What each target word gives each source word, of each of KEYS: float32 (`heads_of`, target
    words, source words).

    output, input: read at the step that writes the word, or at that which has it as its input
    (Chen et al. 2020). norm: the weight times the length of what is read (Kobayashi et al. 2020).
    share, norm share: the weight, or that times the norm, over what all target words together give
    that source word, so that one that is read everywhere, such as a full stop, counts for less.
    """
    (said, of_source), (written, of_target) = (
        _encoded(tokenizer, *joined(words, french=words is target)) for words in (source, target)
    )
    bos = model.config.bos
    ids = torch.tensor([said], dtype=torch.int64, device="cpu")
    before = torch.tensor([[bos, *written[:-1]]], dtype=torch.int64, device="cpu")
    with torch.no_grad():
        read = _of_attention if model.kind == "translator" else _of_recurrence
        weights, norms = read(model, before, ids)
    found = {}
    for by, table in (("weight", weights), ("norm", weights * norms[:, :, None])):
        each = torch.cat([table.flatten(0, 1), table.mean(1), table.mean((0, 1))[None]])
        whole = _summed(each, of_source, len(source), dim=2)
        for shift, where in enumerate(READS):
            # Row i reads the token that is its input; what it writes is the one after
            at = [of_target[i - shift] if i >= shift else -1 for i in range(len(of_target))]
            found[f"{where} {by}"] = _summed(whole, at, len(target), dim=1)
    for where, by, share in (
        (where, *one) for where in READS for one in (("weight", "share"), ("norm", "norm share"))
    ):
        given = found[f"{where} {by}"]
        found[f"{where} {share}"] = given / given.sum(1, keepdim=True).clamp_min(1e-9)
    return found


def _of_attention(model: Any, before: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (layers, heads, target, source), and ‖W_O v‖ (layers, heads, source)."""
    _, seen = model(before, ids, observe=[Rows(range(before.shape[1]))])
    memory, _ = model.encoder(ids, model.embedding, mask=model.source_mask(ids))
    weights = torch.stack([block.cross[0].weights[0] for block in seen.decoder])
    norms = [_norms(block.cross_attention, memory) for block in model.decoder.blocks]
    return weights, torch.stack(norms)


def _of_recurrence(model: Any, before: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same of Bahdanau's, with the length of the vectors that it mixes."""
    _, weights = model(before, ids, return_weights=True)
    values, *_ = model.begin(ids).source
    return weights[None], values.norm(dim=-1)[None]


def _norms(attention: Any, memory: Tensor) -> Tensor:
    """‖W_O v‖ of each head and source token: (heads, length). Kobayashi et al. 2020, eq. 5."""
    value = attention.remember(memory).value[0]  # (kv_heads, length, head_dim)
    heads = attention.heads
    value = value.repeat_interleave(heads // len(value), 0)
    project = attention.out_proj.weight.unflatten(1, (heads, -1)).movedim(1, 0)
    return (value @ project.mT).norm(dim=-1)


def _summed(table: Tensor, words: list[int], count: int, dim: int) -> Tensor:
    """Tokens summed to the words that they belong to; −1: to none."""
    at = torch.tensor([w if w >= 0 else count for w in words], dtype=torch.int64, device="cpu")
    size = [*table.shape]
    size[dim] = count + 1
    return table.new_zeros(size).index_add_(dim, at, table).narrow(dim, 0, count)


def joined(words: Sequence[str], *, french: bool = False) -> tuple[str, list[int]]:
    """Words as one writes them, which is what a translator has learned to read: a capital at the
    beginning, no space before a full stop, in French l'eau for le eau. And where each ends."""
    text, ends = "", []
    for word, after in zip(words, [*words[1:], ""], strict=True):
        close = not text or word in CLOSE or text.endswith("'")
        elided = french and word.lower() in ELIDED and after[:1].lower() in VOWELS
        written = f"{word[:-1]}'" if elided else word
        text += (written if text else written[:1].upper() + written[1:]) if close else f" {written}"
        ends.append(len(text))
    return text, ends


def _encoded(tokenizer: Any, text: str, ends: Sequence[int]) -> tuple[list[int], list[int]]:
    """Tokens, and the word of each: the one it ends in; −1: of none."""
    found = tokenizer.encode(text)
    return found.ids, [
        -1 if start == end else next((i for i, stop in enumerate(ends) if end <= stop), -1)
        for start, end in found.offsets
    ]
