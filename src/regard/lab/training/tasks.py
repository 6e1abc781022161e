"""What is trained: a language model on a text, a translator on pairs. Batches, loss, validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import RegardError
from ...nn.models import LanguageModel, ModelConfig, RecurrentTranslator, Translator
from .batches import chunk_starts, padded, pair_batches
from .corpus import Pair
from .tokenizer import BOS, EOS, PAD

Batch = tuple[Tensor, ...]


class LanguageTask:
    """Next tokens of a text; the last share `valid` of it is left for validation.

    length: tokens of a chunk. batch: chunks of a step.
    """

    def __init__(
        self, text: str, tokenizer: Any, *, length: int = 256, batch: int = 16, valid: float = 0.05
    ) -> None:
        ids = np.asarray(tokenizer.encode(text).ids, dtype=np.int64)
        cut = len(ids) - max(int(len(ids) * valid), length + 1)
        if cut < length + 1:
            raise RegardError(f"the text has {len(ids)} tokens; chunks of {length} need more")
        self.ids, self.held_out = ids[:cut], ids[cut:]
        self.tokenizer, self.length, self.batch = tokenizer, length, batch

    def model(self, config: ModelConfig) -> nn.Module:
        return LanguageModel(config)

    def epoch(self, seed: int, epoch: int) -> list[list[int]]:
        """What each batch of an epoch is made of: a pure function of seed and epoch."""
        return chunk_starts(len(self.ids), self.length, self.batch, seed, epoch)

    def tensors(self, starts: Sequence[int], device: torch.device) -> Batch:
        """(tokens, next tokens), each (batch, length)."""
        return self._chunks(self.ids, starts, device)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats a token."""
        hidden, _ = model.hidden(batch[0])
        return _cross_entropy(model, hidden.flatten(0, 1), batch[1].flatten())

    def tokens(self, batch: Batch) -> int:
        return batch[1].numel()

    def validate(self, model: Any, device: torch.device) -> dict[str, float]:
        """Mean loss over what was held out, at most 64 chunks."""
        starts = list(range(0, len(self.held_out) - self.length, self.length))[:64]
        total = 0.0
        for n in range(0, len(starts), self.batch):
            part = starts[n : n + self.batch]
            loss = self.loss(model, self._chunks(self.held_out, part, device))
            total += float(loss) * len(part)
        return {"valid_loss": total / len(starts)}

    def _chunks(self, ids: np.ndarray, starts: Sequence[int], device: torch.device) -> Batch:
        rows = np.stack([ids[s : s + self.length + 1] for s in starts])
        whole = torch.from_numpy(rows).to(device)
        return whole[:, :-1], whole[:, 1:]


class TranslationTask:
    """Target sentences given their sources.

    pairs: to train on; valid: held out. tokens_a_batch: of the longer side, padding included.
    smoothing: label smoothing (Szegedy et al. 2016) in training. longest: pairs with more tokens
    are left out of training. repeat: how often an epoch reads the first `first` pairs.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        valid: Sequence[Pair],
        tokenizer: Any,
        *,
        tokens_a_batch: int = 2048,
        smoothing: float = 0.1,
        longest: int = 128,
        first: int = 0,
        repeat: int = 1,
    ) -> None:
        self.tokenizer, self.smoothing = tokenizer, smoothing
        self.budget = tokens_a_batch
        encoded = self._encoded(pairs)
        order = [*range(len(encoded)), *(list(range(first)) * (repeat - 1))]
        self.pairs = [encoded[n] for n in order if max(map(len, encoded[n])) <= longest]
        self.valid = self._encoded(valid)
        if not self.pairs or not self.valid:
            raise RegardError("translation needs pairs to train on, and some to validate by")
        self.lengths = np.array([max(map(len, pair)) for pair in self.pairs])

    def model(self, config: ModelConfig) -> nn.Module:
        return RecurrentTranslator(config) if config.recurrent else Translator(config)

    def epoch(self, seed: int, epoch: int) -> list[list[int]]:
        """What each batch of an epoch is made of: a pure function of seed and epoch."""
        return pair_batches(self.lengths, self.budget, seed, epoch)

    def tensors(self, chosen: Sequence[int], device: torch.device) -> Batch:
        """(source, target behind <s>, target up to </s>), each (batch, length)."""
        return self._batch([self.pairs[n] for n in chosen], device)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats a target token; in training, with smoothed labels."""
        source, before, after = batch
        hidden, _ = model.hidden(before, source)
        keep = after != PAD  # the head, the dearest part, sees no padding
        smoothing = self.smoothing if model.training else 0.0
        return _cross_entropy(model, hidden[keep], after[keep], smoothing)

    def tokens(self, batch: Batch) -> int:
        return int((batch[2] != PAD).sum())

    def validate(self, model: Any, device: torch.device) -> dict[str, float]:
        """Mean loss over the held-out pairs, at most 1,014."""
        pairs = self.valid[:1014]
        lengths = np.array([max(map(len, pair)) for pair in pairs])
        total, count = 0.0, 0
        for chosen in pair_batches(lengths, self.budget, 0, 0):
            batch = self._batch([pairs[n] for n in chosen], device)
            tokens = self.tokens(batch)
            total, count = total + float(self.loss(model, batch)) * tokens, count + tokens
        return {"valid_loss": total / count}

    def _encoded(self, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
        """Source with </s>, target with </s>, as the tokenizer adds it."""
        sides = [self.tokenizer.encode_batch([p[side] for p in pairs]) for side in (0, 1)]
        return [(a.ids, b.ids) for a, b in zip(*sides, strict=True)]

    def _batch(self, pairs: Sequence[tuple[list[int], list[int]]], device: torch.device) -> Batch:
        source = padded([a for a, _ in pairs], PAD, device)
        before = padded([[BOS, *b[:-1]] for _, b in pairs], PAD, device)
        after = padded([b for _, b in pairs], PAD, device)
        assert EOS in pairs[0][1]
        return source, before, after


def _cross_entropy(model: Any, hidden: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Of vectors (n, dim) against tokens (n,), in float32 whatever autocast computes in."""
    logits = model.head(hidden).float()
    return F.cross_entropy(logits, target, label_smoothing=smoothing)
