"""Text written token by token: sampled or greedy by a language model, by beams in translation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import RegardError
from .language_model import LanguageModel
from .recurrent_translator import RecurrentTranslator
from .translator import Translator


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokens: Tensor,
    count: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    cache: bool = True,
    step: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """tokens (batch, length) with `count` more, (batch, length + count).

    temperature: 0 takes the likeliest; else drawn from softmax(logits / temperature), of the top_k
    likeliest. cache: whether each step goes on from the blocks' states, or reads all anew: the
    same tokens. step: told of each new column (batch,).
    """
    _check_eval(model, "generate")
    if tokens.dim() != 2 or tokens.shape[1] < 1:
        raise RegardError("generate: give at least one token to go on from, as (batch, length)")
    if count < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        raise RegardError(
            f"generate: count {count} and temperature {temperature} are ≥ 0, top_k {top_k} ≥ 1"
        )
    generator = torch.Generator(tokens.device).manual_seed(seed)
    states = model.states() if cache else None
    read = tokens
    for _ in range(count):
        logits = model(read, states=states)[:, -1]
        chosen = _chosen(logits, temperature, top_k, generator)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        read = chosen[:, None] if cache else tokens
        if step is not None:
            step(chosen)
    return tokens


def _check_eval(model: Any, name: str) -> None:
    if model.training:
        raise RegardError(f"{name}: the model is in training, with dropout; call eval() first")


def _chosen(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    weights = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


@torch.no_grad()
def beam_search(
    model: Translator | RecurrentTranslator,
    source: Tensor,
    *,
    beams: int = 5,
    limit: int | None = None,
    length_penalty: float = 1.0,
    cache: bool = True,
) -> list[list[int]]:
    """The best target found of each source (batch, length), without bos and eos.

    At each step a source keeps the `beams` likeliest targets, and its search is over when so many
    have ended, or none that still grows can become the best: that of the largest
    Σ log p / length^length_penalty, eos counted (Wu et al. 2016, eq. 14, in its simpler form).
    limit: the most target tokens, default twice the source's and 10; a target that has not ended
    there is given only where none has. cache: whether a step goes on from the state; else it reads
    all anew. What stands beside a source in the batch changes nothing.
    """
    _check_eval(model, "beam_search")
    config = model.config
    if beams < 1 or length_penalty < 0 or (limit is not None and limit < 1):
        raise RegardError(
            f"beam_search: beams {beams} and limit {limit} are ≥ 1, length_penalty "
            f"{length_penalty} ≥ 0"
        )
    if config.bos < 0 or config.eos < 0:
        raise RegardError("beam_search: the model's config has no bos and eos to begin and end by")
    lengths = (source != config.pad).sum(-1).tolist()
    searches = [
        _Search(beams, 2 * n + 10 if limit is None else limit, length_penalty) for n in lengths
    ]
    if not searches:
        return []
    batch, device = len(searches), source.device
    first = torch.arange(batch, dtype=torch.int64, device=device)[:, None] * beams
    rows = (first // beams).expand(-1, beams).flatten()
    state: Any = None
    if cache:
        state = model.begin(source)
        state.select(rows)
    target = torch.full((batch * beams, 1), config.bos, dtype=torch.int64, device=device)
    scores = torch.full((batch, beams), -torch.inf, dtype=torch.float32, device=device)
    scores[:, 0] = 0.0  # all beams begin alike: one of them lives
    while not all(search.over for search in searches):
        logits = model.step(target[:, -1:], state) if cache else model(target, source[rows])
        logits = logits[:, -1].to(torch.promote_types(logits.dtype, torch.float32))
        grown = scores[..., None] + logits.log_softmax(-1).view(batch, beams, -1)
        vocab = grown.shape[-1]
        # Of twice as many, at least `beams` go on: each beam has but one end
        best, index = grown.flatten(1).topk(min(2 * beams, beams * vocab))
        from_beam, token = index // vocab, index % vocab
        ends = token == config.eos
        scores, place = best.masked_fill(ends, -torch.inf).topk(beams)
        chosen = (first + from_beam.gather(1, place)).flatten()
        grown_target = torch.cat([target[chosen], token.gather(1, place).flatten()[:, None]], 1)
        for n, search in enumerate(searches):
            if search.over:
                continue  # another source goes on; this one's answer stands
            for beam in ends[n, :beams].nonzero()[:, 0].tolist():
                search.end(float(best[n, beam]), target[n * beams + int(from_beam[n, beam]), 1:])
            search.settle(float(scores[n, 0]), grown_target[n * beams, 1:])
        target = grown_target
        if cache:
            state.select(chosen)
    return [search.answer for search in searches]


class _Search:
    """What one source has found. limit: the most target tokens, eos among them."""

    def __init__(self, beams: int, limit: int, penalty: float) -> None:
        self.beams, self.limit, self.penalty = beams, limit, penalty
        self.best, self.answer = -torch.inf, list[int]()
        self.ended, self.length, self.over = 0, 1, False

    def end(self, score: float, target: Tensor) -> None:
        """A target ends at this step."""
        if score == -torch.inf:
            return  # of a beam that does not live
        self.ended += 1
        share = score / self.length**self.penalty
        if share > self.best:
            self.best, self.answer = share, target.tolist()

    def settle(self, live: float, target: Tensor) -> None:
        """The step is done; live, target: the likeliest that still grows, with its log p."""
        if live != live:
            raise RegardError("beam_search: the model's logits are no numbers")
        # log p never rises, and a longer one is divided by no more than this
        hopeless = live / self.limit**self.penalty <= self.best
        self.over = self.ended >= self.beams or hopeless or self.length >= self.limit
        if self.over and not self.ended:
            self.answer = target.tolist()
        self.length += 1
