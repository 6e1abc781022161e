"""Text written token by token: sampled or greedy by a language model, by beams in translation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError


@torch.no_grad()
def generate(
    model: Any,
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
    if tokens.shape[1] < 1:
        raise RegardError("generate: give at least one token to go on from")
    generator = torch.Generator(tokens.device).manual_seed(seed)
    states = model.states() if cache else None
    read = tokens
    for _ in range(count):
        logits = model(read, states=states)[:, -1].float()
        chosen = _chosen(logits, temperature, top_k, generator)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        read = chosen[:, None] if cache else tokens
        if step is not None:
            step(chosen)
    return tokens


def _chosen(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> Tensor:
    if temperature <= 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    weights = (logits / temperature).softmax(-1)
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


@torch.no_grad()
def beam_search(
    model: Any,
    source: Tensor,
    *,
    beams: int = 5,
    limit: int | None = None,
    length_penalty: float = 1.0,
    cache: bool = True,
) -> list[list[int]]:
    """The best target of each source (batch, length), without bos and eos.

    Each source keeps `beams` targets, those of the largest Σ log p / length^length_penalty (Wu et
    al. 2016, eq. 14, in its simpler form). limit: the most target tokens, default twice the
    source's and 10. cache: whether a step goes on from the state; else it reads all anew.
    """
    if beams < 1:
        raise RegardError(f"beams is {beams}; give a number ≥ 1")
    batch, config = source.shape[0], model.config
    limit = 2 * source.shape[1] + 10 if limit is None else limit
    rows = torch.arange(batch, dtype=torch.int64, device=source.device).repeat_interleave(beams)
    state = model.begin(source)
    state.select(rows)
    target = torch.full((batch * beams, 1), config.bos, dtype=torch.int64, device=source.device)
    scores = torch.full((batch, beams), -torch.inf, dtype=torch.float32, device=source.device)
    scores[:, 0] = 0.0  # all beams begin alike: one of them lives
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(batch)]
    for length in range(1, limit + 1):
        if cache:
            logits = model.step(target[:, -1:], state)[:, -1]
        else:
            logits = model(target, source[rows])[:, -1]
        grown = scores[..., None] + logits.float().log_softmax(-1).view(batch, beams, -1)
        vocab = grown.shape[-1]
        best, index = grown.flatten(1).topk(2 * beams)  # as many may end
        from_beam, token = index // vocab, index % vocab
        ends = token == config.eos
        _keep_finished(finished, target.view(batch, beams, -1), best, from_beam, ends, length,
                       beams, length_penalty)  # fmt: skip
        best = best.masked_fill(ends, -torch.inf)
        scores, place = best.topk(beams)
        from_beam, token = from_beam.gather(1, place), token.gather(1, place)
        if all(_settled(f, float(scores[n, 0]), limit, beams, length_penalty)
               for n, f in enumerate(finished)):  # fmt: skip
            break
        chosen = (
            torch.arange(batch, dtype=torch.int64, device=source.device)[:, None] * beams
            + from_beam
        ).flatten()
        target = torch.cat([target[chosen], token.flatten()[:, None]], 1)
        if cache:
            state.select(chosen)
    live = target.view(batch, beams, -1)
    return [max(done)[1] if done else live[n, 0, 1:].tolist() for n, done in enumerate(finished)]


def _keep_finished(
    finished: list[list[tuple[float, list[int]]]],
    target: Tensor,
    best: Tensor,
    from_beam: Tensor,
    ends: Tensor,
    length: int,
    beams: int,
    penalty: float,
) -> None:
    """Note the targets among the first `beams` that end here."""
    for item, place in ends[:, :beams].nonzero().tolist():
        score = float(best[item, place])
        if score > -float("inf"):
            words = target[item, int(from_beam[item, place]), 1:].tolist()
            finished[item].append((score / length**penalty, words))


def _settled(
    done: list[tuple[float, list[int]]], live: float, limit: int, beams: int, penalty: float
) -> bool:
    """Whether no target that still grows could become the best."""
    if len(done) < beams and live > -float("inf"):
        return False
    return not done or live / limit**penalty <= max(done)[0] or len(done) >= 2 * beams
