"""Evicting caches plainly: eager, one item and kv head at a time, lists of positions."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.cache import H2O, TOVA, SnapKV


@dataclass
class Eager:
    """One layer's cache, by the papers. Heads of a layer are computed together, kept apart.

    kept[kv]: positions held, in order. sums[kv]: H2O's accumulated score of each of them.
    """

    policy: H2O | SnapKV | TOVA
    group: int
    kept: list[list[int]] = field(default_factory=list)
    sums: list[dict[int, float]] = field(default_factory=list)
    keys: Tensor | None = None  # (kv_heads, all tokens, dim)
    values: Tensor | None = None

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Callable[[int, int], bool] = lambda q, k: k <= q,
        added: Callable[[int, int, int], float] = lambda h, q, k: 0.0,
        real: Callable[[int], bool] = lambda k: True,
    ) -> tuple[Tensor, list[Tensor]]:
        """(out (heads, n, dim), weights of each kv head (group, n, all tokens)) of n new tokens."""
        kv_heads, n = key.shape[:2]
        start = 0 if self.keys is None else self.keys.shape[1]
        self.keys = key if self.keys is None else torch.cat([self.keys, key], 1)
        self.values = value if self.values is None else torch.cat([self.values, value], 1)
        self.kept = self.kept or [[] for _ in range(kv_heads)]
        self.sums = self.sums or [{} for _ in range(kv_heads)]
        out, weights = [], []
        for kv in range(kv_heads):
            held = [*self.kept[kv], *range(start, start + n)]
            rows = torch.zeros(self.group, n, start + n, dtype=query.dtype)
            for g in range(self.group):
                head = kv * self.group + g
                scores = query[head] @ self.keys[kv, held].T / query.shape[-1] ** 0.5
                for i in range(n):
                    for j, k in enumerate(held):
                        scores[i, j] += added(head, start + i, k)
                        if not visible(start + i, k):
                            scores[i, j] = -torch.inf
                seen = scores.softmax(-1)
                seen[(scores == -torch.inf).all(-1)] = 0
                out.append(seen @ self.values[kv, held])
                rows[g][:, held] = seen
            weights.append(rows)
        self.evict(start, n, weights, real)
        return torch.stack(out), weights

    def evict(self, start: int, n: int, weights: list[Tensor], real: Callable[[int], bool]) -> None:
        length = start + n
        over_heads = torch.stack([w[:, -1] for w in weights]).mean((0, 1)) if n else None
        for kv, w in enumerate(weights):
            held = [*self.kept[kv], *range(start, length)]
            policy = self.policy
            if isinstance(policy, H2O):  # algorithm 1
                for k in held:
                    self.sums[kv][k] = self.sums[kv].get(k, 0.0) + float(w[:, :, k].sum())
                score, exempt, due = self.sums[kv], policy.budget // 2, True
                if policy.recent is not None:
                    exempt = policy.recent
            elif isinstance(policy, TOVA):
                score, exempt, due = {k: float(over_heads[k]) for k in held} if n else {}, 0, n > 0
            else:
                score, exempt, due = self.votes(held, length, w), policy.window, n > 1
            if due and len(held) > policy.budget:
                others = [k for k in held if k < length - exempt]
                count = policy.budget - (len(held) - len(others))
                # Padding goes first, whatever its neighbours received
                best = sorted(others, key=lambda k: (not real(k), -score[k], -k))[:count]
                held = sorted([*best, *(k for k in held if k >= length - exempt)])
                self.sums[kv] = {k: s for k, s in self.sums[kv].items() if k in held}
            self.kept[kv] = held

    def votes(self, held: list[int], length: int, weights: Tensor) -> dict[int, float]:
        """SnapKV's listing 1: the window votes for the prefix, pooled over neighbours."""
        policy = self.policy
        prefix = [k for k in held if k < length - policy.window]
        voted = weights[:, -policy.window :][:, :, prefix].sum(1)
        scores, half = {}, policy.kernel // 2
        for at, k in enumerate(prefix):
            near = voted[:, max(at - half, 0) : at + half + 1]
            largest, mean = near.amax(-1), near.sum(-1) / policy.kernel
            scores[k] = float((largest if policy.pool == "max" else mean).mean())
        return scores
