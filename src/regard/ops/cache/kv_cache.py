"""KVCache: buffers of slots that grow, and lose what is evicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_unary

from ...call.checked import Call
from ...call.masks import Causal, Full, Mask
from ...call.observers import Observer
from ...engines.cpu import native
from ...engines.functorch import CPU, unwatched
from ...errors import RegardError
from .base import Cache
from .buffers import picked, zeros
from .decode_step import DecodePlan, Steady
from .eviction import Eviction, first_to_go
from .real_tokens import padding_last
from .slots import Biases, Layout, one


class KVCache(Cache):
    """Keys and values of all tokens; with `evict`, of those that a policy keeps.

        cache = regard.cache.KVCache()
        out = cache.attend(query, key, value)          # the prompt
        out = cache.attend(query, key, value)          # a decode step, or a chunk

    The buffers grow by half, so that appending costs O(1) a token, amortised, and what is read is a
    view of them. capacity: slots to allocate at once.

    evict: `H2O`, `SnapKV` or `TOVA`. After each call the policy keeps its budget of keys, for each
    item and kv head on its own; the call itself still sees all that was held and all that is new.
    """

    def __init__(self, *, capacity: int = 0, evict: Eviction | None = None) -> None:
        super().__init__()
        if capacity < 0:
            raise RegardError(f"KVCache: capacity is {capacity}; give a number of slots")
        if evict is not None and not isinstance(evict, Eviction):
            raise RegardError(f"KVCache: evict is {evict!r}; give a policy, such as H2O(512)")
        self._capacity, self._evict = capacity, evict
        self._fills: list[int] = []
        # Of the filled slots, once something was evicted: int32 (batch, kv_heads or 1, slots)
        self._positions: Tensor | None = None
        self._ordered = True  # whether the slots stand in order of position
        # The positions held last, and the same with those of tokens to come
        self._ahead: tuple[Tensor, Tensor] | None = None
        self._plan: DecodePlan | None = None  # the call of a decode step
        self._worth: Tensor | None = None  # what a policy that sums up has summed so far
        self._steady: Steady | None = None  # what decode steps go by

    def __getstate__(self) -> dict[str, Any]:
        # A copy has buffers of its own
        return self.__dict__ | {"_plan": None, "_steady": None}

    def __repr__(self) -> str:
        return "KVCache()" if self._evict is None else f"KVCache(evict={self._evict})"

    @property
    def gapless(self) -> bool:
        return self._evict is None

    @property
    def key(self) -> Tensor:
        """Keys held (batch, kv_heads, slots, dim), in order of position: a view."""
        self._in_order()
        return self.read()[0]

    @property
    def value(self) -> Tensor:
        """Values held (batch, kv_heads, slots, v_dim), in order of position: a view."""
        self._in_order()
        return self.read()[1]

    @property
    def positions(self) -> Tensor:
        """The position of each key held: int32 (batch, kv_heads, slots); −1 in an empty slot."""
        key = self.key
        fills = torch.tensor(self._fills, device=key.device, dtype=torch.int64)[:, None, None]
        slot = torch.arange(key.shape[2], dtype=torch.int32, device=key.device)
        held = slot[None, None] if self._positions is None else self._positions
        return held.where(slot < fills, -1).expand(key.shape[:3])

    @property
    def nbytes(self) -> int:
        kept = [self._key, self._value, self._positions, self._worth]
        kept += [] if self._ahead is None else [self._ahead[1]]
        kept += [] if self._steady is None else [self._steady.seen]
        storages = (t.untyped_storage() for t in kept if t is not None)
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def read(self) -> tuple[Tensor, Tensor]:
        key, value = self._buffers()
        slots = max(self._fills, default=0)
        return key.narrow(2, 0, slots), value.narrow(2, 0, slots)

    @property
    def _bound(self) -> int | None:
        """The most slots that a call leaves filled; None: no bound."""
        return None if self._evict is None else self._evict.budget

    @property
    def _shown(self) -> Mask | None:
        """What the cache itself lets a query see."""
        return None

    # Writing

    def _write(self, key: Tensor, value: Tensor, new: list[int]) -> Layout:
        fills = self._fills or [0] * len(new)
        ends = [f + n for f, n in zip(fills, new, strict=True)]
        _, kv_heads, q_len, _ = key.shape
        slots = max(ends, default=0)
        self._reserve(key, value, slots)
        keys, values = self._buffers()
        if one(fills) and new.count(q_len) == len(new):
            keys.narrow(2, slots - q_len, q_len).copy_(key)
            values.narrow(2, slots - q_len, q_len).copy_(value)
        else:
            item, token, slot = _real(fills, new, key.device)
            keys[item, :, slot] = key[item, :, token]
            values[item, :, slot] = value[item, :, token]
        if self._positions is not None:
            self._positions = self._extended(self._positions, fills, new, slots)
        self._fills = ends
        return Layout(
            kv_heads, q_len, slots, list(self._lengths), fills, new, self._positions, self._shown
        )

    def _hold(self, key: Tensor | None, value: Tensor | None) -> None:
        """These buffers from now on."""
        self._key, self._value = key, value
        self._plan = self._steady = None

    def _reserve(self, key: Tensor, value: Tensor, slots: int) -> None:
        """Room for that many slots."""
        if self._key is None or self._value is None:
            size = max(slots, self._capacity)
            self._hold(_room(key, size), _room(value, size))
            return
        have, q_len = self._key.shape[2], key.shape[2]
        if slots <= have:
            return
        size = max(slots, have + have // 2)
        if self._bound is not None and slots <= self._bound + q_len:
            size = min(size, self._bound + q_len)  # what is bounded needs no room to grow
        keys, values = _room(key, size), _room(value, size)
        keys[:, :, :have], values[:, :, :have] = self._key, self._value
        self._hold(keys, values)

    def _extended(self, held: Tensor, fills: list[int], new: list[int], slots: int) -> Tensor:
        """The positions held, with those of the new tokens behind each item's own."""
        steady = self._steady
        if steady and steady.follows(held, new, self._lengths):
            return steady.positions
        if new and one(fills) and one(self._lengths) and one(new):
            ahead = self._ahead
            if ahead is None or ahead[0] is not held or ahead[1].shape[2] < slots:
                start = self._lengths[0]
                stop = start + new[0] + slots // 4
                added = torch.arange(start, stop, dtype=held.dtype, device=held.device)
                ahead = held, torch.cat([held, added.expand(*held.shape[:2], -1)], 2)
            out = ahead[1].narrow(2, 0, slots)
            self._ahead = out, ahead[1]
            return out
        out = F.pad(held, (0, slots - held.shape[2]))
        item, token, slot = _real(fills, new, out.device)
        starts = torch.tensor(self._lengths, device=out.device, dtype=torch.int64)
        out[item, :, slot] = (starts[item] + token).to(out.dtype)[:, None]
        return out

    def _drop(self, counts: list[int]) -> None:
        keys, values = self._buffers()
        for item, (fill, count) in enumerate(zip(self._fills, counts, strict=True)):
            # A hidden slot is still multiplied by its weight, 0: nothing may stay in it
            keys[item, :, fill - count : fill] = 0
            values[item, :, fill - count : fill] = 0
        self._fills = [f - n for f, n in zip(self._fills, counts, strict=True)]
        if self._positions is not None:
            self._positions = self._positions[..., : max(self._fills, default=0)]

    def _clear(self) -> None:
        self._hold(None, None)
        self._positions = self._worth = self._ahead = None
        self._fills, self._lengths, self._ordered = [], [], True

    def crop(self, count: int) -> None:
        if self._positions is not None or self._worth is not None:
            raise RegardError(
                f"crop: {self!r} has evicted by the tokens that are to be forgotten; what it "
                "evicted cannot come back"
            )
        super().crop(count)

    def _pick(self, rows: Tensor) -> None:
        if self._key is None or self._value is None:
            return
        if not len(rows):
            return self._clear()
        rows = rows.to(self._key.device)
        self._hold(picked(self._key, rows), picked(self._value, rows))
        self._positions = None if self._positions is None else self._positions[rows]
        self._worth = None if self._worth is None else self._worth[rows]
        self._fills = [self._fills[r] for r in rows.tolist()]

    # Attending

    def _by_plan(
        self, query: Tensor, mask: Mask, bias: Biases, engine: str, rest: dict[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        # A decode step: one new token of each item, which sees all slots
        if bias is not None or type(mask) not in (Causal, Full):
            return None
        layout, key = self.layout, self._key
        if key is None or not layout.latest or key.device != CPU:
            return None
        if torch.compiler.is_compiling():
            return None
        if engine not in ("auto", "cpu") or has_torch_function_unary(query):
            return None
        steady = self._steady
        if steady is not None and self._positions is not steady.positions:
            steady = None
        if steady is None and self.wanted:
            return None
        plan, watched = self._plan, 0 if steady is None else steady.observe
        if plan is None or plan.observe != watched:
            call = Call.checked(query, *self.read(), **rest)
            plan = self._plan = DecodePlan.of(call, engine, watched, rest)
        if plan is None or not plan.serves(query, engine, rest):
            return None
        answer = plan.attend(query, layout.slots)
        self.settle(())
        if steady is not None and steady.seen is not None:
            self._evict_one(self._others(), steady.seen)
        return answer

    # Evicting

    @property
    def wanted(self) -> list[Observer]:
        if self._evict is None or not any(self._due()):
            return []
        return [self._evict.observer(stop) for stop in self._stops()]

    def _due(self) -> list[bool]:
        """Whether each item is to be read, and may have to evict."""
        layout, policy = self.layout, self._evict
        return [
            policy is not None and policy.reads(n, f + n)
            for f, n in zip(layout.fills, layout.new, strict=True)
        ]

    def _stops(self) -> list[int]:
        """Where the items' queries end, in the call's count; each once."""
        layout = self.layout
        return sorted({layout.query_start + n for n in set(layout.new)})

    def settle(self, seen: Sequence[Any]) -> None:
        super().settle(seen)
        if self._evict is None or not seen:
            return
        received = seen[0].sum
        if self._evict_one(self._others(), received):
            return
        layout, stops = self.layout, self._stops()
        if len(stops) > 1:
            own = [stops.index(layout.query_start + n) for n in layout.new]
            received = torch.stack([seen[at].sum[item] for item, at in enumerate(own)])
        before = self._worth
        if before is None:
            before = received.new_zeros(received.shape[0], self._buffers()[0].shape[1], 0)
        before = F.pad(before, (0, layout.slots - before.shape[2]))
        exempt = self._last(self._evict.exempt)
        worth = self._evict.worth(received, before, exempt)
        self._worth = worth if self._evict.sums_up else None
        budget = self._evict.budget
        counts = [
            min(f, budget) if due else f for f, due in zip(self._fills, self._due(), strict=True)
        ]
        worth = padding_last(worth, self._where(layout), self._real)
        self._keep(worth.masked_fill(exempt, torch.inf), counts)

    def _others(self) -> tuple[int, int]:
        """The positions that are not exempt: a range."""
        return 0, self.length - (0 if self._evict is None else self._evict.exempt)

    def _evict_one(self, among: tuple[int, int], seen: Tensor | None = None) -> bool:
        """One slot too many in every head, as after each decode step, is the kernels' to evict.

        It is one at positions `among` (a range); its worth is that of `_keep`. False: they do not
        serve this call.
        """
        steady = self._steady
        if seen is not None and not (seen.dtype == torch.float32 and unwatched(seen)):
            return False
        if steady is None or self._positions is not steady.positions:
            steady = self._steady = self._settled_down(seen)
        if steady is None:
            return False
        steady.evict(among, self.length, seen)
        self._positions, self._worth = steady.held, steady.held_total
        self._fills, self._ordered = steady.fills, False
        return True

    def _settled_down(self, seen: Tensor | None) -> Steady | None:
        """What decode steps from here on have in common; None where this call is not one."""
        layout, positions, policy = self.layout, self._positions, self._evict
        key, value = self._buffers()
        fits = layout.slots - 1 == self._bound and layout.full and layout.together
        if not fits or positions is None or not (native.AVAILABLE and key.device == CPU):
            return None
        if not unwatched(key, value) or (policy is not None and policy.by_neighbours):
            return None
        total = self._worth
        if total is not None:
            total = F.pad(total, (0, layout.slots - total.shape[2])).contiguous()
        by_layer = policy is not None and policy.by_layer
        self._positions, self._ahead = positions.contiguous(), None
        return Steady(key, value, self._positions, total, seen, by_layer)

    def _last(self, count: int) -> Tensor:
        """Which slots hold the last positions: bool (batch, kv_heads or 1, slots)."""
        layout = self.layout
        positions = self._where(layout)
        if layout.full and layout.together:
            return positions >= layout.length - count
        ends = [s + n - count for s, n in zip(layout.starts, layout.new, strict=True)]
        limits = torch.tensor(ends, device=positions.device, dtype=torch.int64)
        last = positions >= limits[:, None, None]
        return last & layout.filled(positions.device)[:, None]

    def _where(self, layout: Layout) -> Tensor:
        """The position of every slot: int32 (batch, kv_heads or 1, slots)."""
        if layout.positions is not None:
            return layout.positions
        slot = torch.arange(layout.slots, dtype=torch.int32, device=self._buffers()[0].device)
        return slot.expand(len(layout.new), 1, -1)

    def _keep(self, worth: Tensor, counts: list[int]) -> None:
        """Of each item counts[b] slots in every head, of most worth.

        worth (batch, kv_heads or 1, slots).
        """
        if counts == self._fills:
            return
        layout, most = self.layout, max(counts)
        excess = layout.slots - most
        self._positions, self._ahead = self._where(layout).expand_as(worth).contiguous(), None
        neighbours = self._evict is not None and self._evict.by_neighbours
        if layout.full and one(counts) and excess * 4 <= most and not neighbours:
            self._fill_holes(first_to_go(worth, self._positions, excess), most)
        else:
            if not layout.full:
                worth = worth.masked_fill(~layout.filled(worth.device)[:, None], -torch.inf)
            kept = first_to_go(worth, self._positions, layout.slots)[..., excess:]
            least = (
                most - torch.tensor(counts, device=kept.device, dtype=torch.int64)[:, None, None]
            )
            self._gather(kept, torch.arange(most, device=kept.device, dtype=torch.int64) >= least)
        self._fills = counts

    def _fill_holes(self, victims: Tensor, budget: int) -> None:
        """Move what is kept of the last slots to where something is evicted: O(evicted)."""
        slots, excess = self.layout.slots, victims.shape[-1]
        # The holes among the first slots come first, and of the last slots those that are kept;
        # beyond them a pair moves something evicted to where nothing is read
        targets, sources = victims, None
        if excess > 1:
            targets = victims.sort(-1).values
            last = torch.arange(budget, slots, device=victims.device, dtype=torch.int64)[:, None]
            gone = (victims[:, :, None] == last).any(-1)
            sources = gone.to(torch.int8).argsort(dim=-1, stable=True) + budget
        for tensor in (*self._buffers(), self._positions, self._worth):
            if tensor is None:
                continue
            whole = tensor.dim() == 4
            if sources is None:
                kept = tensor[:, :, budget:slots].clone()
            else:
                kept = tensor.gather(2, _over(sources, tensor) if whole else sources)
            tensor.scatter_(2, _over(targets, tensor) if whole else targets, kept)
        self._positions, self._worth = (
            None if t is None else t[..., :budget] for t in (self._positions, self._worth)
        )
        self._ordered = False

    def _gather(self, kept: Tensor, real: Tensor) -> None:
        """Keep these slots alone, in order of position; last those that are not real."""
        assert self._positions is not None
        key, value = self._buffers()
        position = self._positions.gather(-1, kept)
        position = position.where(real, torch.iinfo(torch.int32).max)
        kept = kept.gather(-1, position.argsort(dim=-1, stable=True))
        size = kept.shape[2]
        held = [t.gather(2, _over(kept, t)) for t in (key, value)]
        if key.shape[2] > size + size // 2 + 16:
            # One slot more is what the next decode step needs
            key, value = _room(key, size + 1), _room(value, size + 1)
            self._hold(key, value)
        key[:, :, :size], value[:, :, :size] = held
        self._positions = self._positions.gather(-1, kept)
        self._worth = None if self._worth is None else self._worth.gather(-1, kept)
        self._ordered = True

    def _in_order(self) -> None:
        if not self._ordered and self._positions is not None and self.settled:
            # Slots lose their order only where all items fill the same number of them
            everything = torch.arange(
                self._positions.shape[2], device=self._positions.device, dtype=torch.int64
            )
            everything = everything.expand(self._positions.shape)
            self._gather(everything, torch.ones_like(everything, dtype=torch.bool))


def _room(like: Tensor, slots: int) -> Tensor:
    """A buffer (batch, kv_heads, slots, dim)."""
    return zeros(like, *like.shape[:2], slots, like.shape[3])


def _over(slots: Tensor, tensor: Tensor) -> Tensor:
    """An index (batch, kv_heads or 1, n) for gathering from (batch, kv_heads, slots, dim)."""
    return slots[..., None].expand(*tensor.shape[:2], -1, tensor.shape[3])


def _real(fills: list[int], new: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(item, token, slot) of each new token."""
    item = [b for b, n in enumerate(new) for _ in range(n)]
    token = [i for n in new for i in range(n)]
    slot = [f + i for f, n in zip(fills, new, strict=True) for i in range(n)]
    made = torch.tensor([item, token, slot], dtype=torch.int64, device=device).reshape(3, -1)
    return made[0], made[1], made[2]
