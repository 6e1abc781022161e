"""Cache: the keys and values of one layer, and the one front door to attend over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import (
    handle_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from ...call.checked import Call
from ...call.dropout import Dropout
from ...call.masks import Causal, Mask
from ...call.observers import Observer, listed
from ...call.padding import kept
from ...engines.second_pass.weigh import weigh
from ...errors import RegardError
from ..attend import attention
from .slot_results import moves, spread, to_positions
from .slots import Biases, InSlots, Layout

Lengths = Sequence[int] | Tensor | None
_OWNER = "_regard_cache"


class Cache:
    """The keys and values of one layer, for the tokens seen so far.

    Keys stay as they are given: rotate them by their true position, which is `length` (or, in a
    ragged batch, `lengths`) for the next token, whatever was evicted. A cache is for inference: it
    keeps no graph.
    """

    def __init__(self) -> None:
        self._key: Tensor | None = None
        self._value: Tensor | None = None
        self._lengths: list[int] = []
        self._layout: Layout | None = None
        self._settled = True
        self._began = False  # whether the last append was the first
        self._real: Tensor | None = None  # bool (batch, length): not padding; None: all, or unsaid

    # What a kind of cache is made of

    def _write(self, key: Tensor, value: Tensor, new: list[int]) -> Layout:
        """Store the first new[b] tokens of each item; where they and the held ones stand."""
        raise NotImplementedError

    def _drop(self, counts: list[int]) -> None:
        """Forget the last counts[b] tokens of each item, which were just written or never evict."""
        raise NotImplementedError

    def _clear(self) -> None:
        """Let go of buffers, shapes and dtype; no item holds anything."""
        raise NotImplementedError

    def _pick(self, rows: Tensor) -> None:
        """Make the batch of these of its items."""
        raise NotImplementedError

    def read(self) -> tuple[Tensor, Tensor]:
        """Key and value (batch, kv_heads, slots, dim) as the last `append` left them, in slots."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes allocated: keys, values, and all that is kept about them."""
        raise NotImplementedError

    @property
    def wanted(self) -> list[Observer]:
        """What has to be observed of the last append's attention, for `settle`; over slots."""
        return []

    def settle(self, seen: Sequence[Any]) -> None:
        """After the attention over the last append: take what `wanted` saw, and evict."""
        self._settled = True

    @property
    def settled(self) -> bool:
        """Whether the last append was attended over, and what is to be evicted is."""
        return self._settled

    @property
    def gapless(self) -> bool:
        """Whether it never evicts, so that slots are positions whatever comes."""
        return True

    def _note(self, mask: Any) -> None:
        """Before the attention over the last append: learn what its mask says of padding."""
        if self.gapless or not isinstance(mask, Mask):
            return
        layout = self.layout
        keep = kept(mask, (layout.q_len, layout.length), None)
        fits = keep is not None and len(keep) in (1, len(layout.new))  # else attention says so
        self._real = keep if keep is not None and fits and not bool(keep.all()) else None

    # What all have in common

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """What is written to: (…, kv_heads, …, dim) and (…, kv_heads, …, v_dim)."""
        if self._key is None or self._value is None:
            raise RegardError(f"{self!r} is empty: append keys and values first")
        return self._key, self._value

    def _shape(self) -> tuple[tuple[int, int, int], torch.dtype, torch.device] | None:
        """(kv_heads, dim, v_dim), dtype and device; None while there is nothing."""
        if self._key is None or self._value is None:
            return None
        sizes = (self._key.shape[1], self._key.shape[3], self._value.shape[3])
        return sizes, self._key.dtype, self._key.device

    @property
    def length(self) -> int:
        """Tokens seen so far, evicted ones among them: the position of the next token.

        In a ragged batch that of the longest item.
        """
        return max(self._lengths, default=0)

    @property
    def lengths(self) -> Tensor:
        """Tokens seen so far by each item: int64 (batch,)."""
        shape = self._shape()
        return torch.tensor(self._lengths, dtype=torch.int64, device=shape[2] if shape else None)

    @property
    def layout(self) -> Layout:
        """Where the queries and keys of the last append stand."""
        if self._layout is None:
            raise RegardError(f"{self!r}: nothing was appended yet")
        return self._layout

    def append(self, key: Tensor, value: Tensor, lengths: Lengths = None) -> None:
        """Store the keys and values of new tokens, at the end of what each item of the batch holds.

        key (batch, kv_heads, n, dim), value (batch, kv_heads, n, v_dim). lengths (batch,): how many
        of the n are real for each item; the others are padding. `attend` does this itself.
        """
        self._check(key, value)
        if not self._settled:
            raise RegardError(
                f"{self!r} evicts by what its last call attended to, and was not told; use attend, "
                "or settle"
            )
        new = self._counted(lengths, key)
        self._began = not self._lengths
        if self._began:
            self._lengths = [0] * len(new)
        if key.requires_grad or value.requires_grad:
            key, value = key.detach(), value.detach()
        self._layout, self._real = self._write(key, value, new), None
        self._lengths = [s + n for s, n in zip(self._lengths, new, strict=True)]
        self._settled = self.gapless

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Mask = Causal(),
        bias: Biases = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        dropout: Dropout | float | None = None,
        lengths: Lengths = None,
        observe: Sequence[Observer] | None = None,
        return_lse: bool = False,
        engine: str = "auto",
    ) -> Any:
        """Append new tokens, and attend from their queries to all that is held.

        query (batch, heads, n, dim), key (batch, kv_heads, n, dim), value (batch, kv_heads, n,
        v_dim): n new tokens, a prompt, a chunk or one decode step. lengths (batch,): how many of
        the n are real for each item of the batch; the others are padding: their rows are 0.

        mask, bias and observers speak of the sequence: keys 0 … length − 1, with the evicted ones
        among them (a tensor in a mask or bias has a size for each), and the queries at its end.
        The other arguments, and what is returned, are those of `regard.attention`. Results of
        observers are per position; an evicted key has weight 0. After an error the cache is as it
        was before.
        """
        _check_query(query, key)
        if listed(observe):
            self._in_order()
        self.append(key, value, lengths)
        try:
            return self.attend_appended(
                query, mask=mask, bias=bias, observe=observe, return_lse=return_lse, engine=engine,
                scale=scale, softcap=softcap, sinks=sinks, dropout=dropout,
            )  # fmt: skip
        except Exception:
            self._take_back()
            raise

    def attend_appended(
        self,
        query: Tensor,
        *,
        mask: Mask,
        bias: Biases = None,
        observe: Sequence[Observer] | None = None,
        return_lse: bool = False,
        engine: str = "auto",
        **rest: Any,
    ) -> Any:
        """`attend`, after `append`: for who computes between the two."""
        self._note(mask)
        if observe is None and (found := self._by_plan(query, mask, bias, engine, rest)):
            return found if return_lse else found[0]
        layout, wanted, straight = self.layout, self.wanted, self.layout.straight
        watched = not straight and has_torch_function_unary(query)
        if rest.get("dropout") and not straight:
            raise RegardError(
                f"dropout: {self!r} no longer holds what dropout goes by, all positions; use "
                "dropout=None (a module's eval())"
            )
        request = layout.request(query, mask, bias) | rest | {"engine": engine}
        if observe is None and not watched:  # nothing to say again in positions
            request |= {"return_lse": return_lse, "observe": wanted or None}
            answer = self._attention(query, **request)
            if not wanted:
                self.settle(())
                return answer
            *answer, seen = answer
            self.settle(seen)
            return tuple(answer) if return_lse else answer[0]
        asked = list(observe or ())
        direct = [o for o in asked if straight or moves(o)]
        later = [o for o in asked if o not in direct]
        request["observe"] = [*wanted, *direct] or None
        request["return_lse"] = return_lse or bool(later) or watched
        if straight:
            answer = self._attention(query, **request)
        else:
            # Who watches is told of the call over positions, not of this one
            with torch._C.DisableTorchFunction():
                answer = self._attention(query, **request)
        out, *told = (answer,) if isinstance(answer, Tensor) else answer
        seen = told[-1] if request["observe"] else ()
        results = dict(zip(map(id, direct), seen[len(wanted) :], strict=True))
        if direct and not straight:
            slots = InSlots(layout, query)
            results = {name: to_positions(result, slots) for name, result in results.items()}
        if watched:
            tell(self.in_positions(query, mask=mask, bias=bias, **rest), told[0], out)
        if later:
            call = self.in_positions(query, mask=mask, bias=bias, observe=later, **rest)
            results |= zip(map(id, later), weigh(call, told[0], out), strict=True)
        self.settle(seen[: len(wanted)])
        answer = (out, told[0]) if return_lse else (out,)
        if observe is not None:
            answer = (*answer, tuple(results[id(o)] for o in asked))
        return answer if len(answer) > 1 else out

    def _by_plan(
        self, query: Tensor, mask: Mask, bias: Biases, engine: str, rest: dict[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """(out, lse) of a call that has so much in common with the last that little is to be done.

        And settled. None: it has not.
        """
        return None

    def in_positions(self, query: Tensor, *, mask: Mask, bias: Biases = None, **rest: Any) -> Call:
        """The call over the last append, over positions instead of slots; before it is settled.

        Evicted keys are 0 and hidden: O(length) memory. The rest is what `Call.checked` takes.
        """
        self._note(mask)
        return spread(self.layout, query, *self.read(), mask, bias, **rest)

    def _attention(self, query: Tensor, **request: Any) -> Any:
        """`regard.attention` over what is held: the one place to read it in place instead."""
        return attention(query, *self.read(), **request)

    def _in_order(self) -> None:
        """Put the slots in order of position, where they are not."""

    def select(self, rows: Sequence[int] | Tensor) -> None:
        """Make the batch of these items, in this order; one may come twice, or be left out.

        For beam search, for several answers to one prompt, and to drop what is finished.
        """
        given = rows.flatten().tolist() if isinstance(rows, Tensor) else list(rows)
        batch = len(self._lengths)
        if any(not isinstance(r, int) or not 0 <= r < batch for r in given):
            raise RegardError(f"select: rows {given}; the batch has items 0 … {batch - 1}")
        self._must_be_settled("select")
        self._pick(torch.tensor(given, dtype=torch.int64, device="cpu"))
        self._lengths = [self._lengths[r] for r in given]
        self._layout = None

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens of each item. RegardError where a policy has evicted."""
        if not 0 <= count <= min(self._lengths, default=0):
            raise RegardError(
                f"crop: {count} of {min(self._lengths, default=0)} tokens; give a number of tokens "
                "that all items have"
            )
        self._must_be_settled("crop")
        self._drop([count] * len(self._lengths))
        self._lengths = [s - count for s in self._lengths]
        self._layout = None

    def _take_back(self) -> None:
        """Undo the last append."""
        new = self.layout.new
        self._drop(new)
        self._lengths = [s - n for s, n in zip(self._lengths, new, strict=True)]
        self._layout, self._settled = None, True
        if not self.length:
            self._lengths = [] if self._began else self._lengths
            self._clear()

    def _must_be_settled(self, what: str) -> None:
        if not self._settled:
            raise RegardError(f"{what}: {self!r} was not told what its last call attended to")

    def _check(self, key: Tensor, value: Tensor) -> None:
        wrong = self._misfit(key, value)
        if wrong:
            said = f"key {tuple(key.shape)} {key.dtype}, value {tuple(value.shape)} {value.dtype}"
            raise RegardError(f"{said} on {key.device}: {wrong}")
        if (key.requires_grad or value.requires_grad) and torch.is_grad_enabled():
            raise RegardError("a cache keeps no graph; run under torch.no_grad()")

    def _misfit(self, key: Tensor, value: Tensor) -> str:
        sizes = key.shape
        if key.dim() != 4 or value.dim() != 4 or sizes[:3] != value.shape[:3]:
            return "each needs (batch, kv_heads, length, dim), the first three the same"
        if not sizes[1]:
            return "there are no kv_heads; give at least one"
        if key.dtype != value.dtype or key.device != value.device:
            return "give both in one dtype and on one device"
        if self._lengths and sizes[0] != len(self._lengths):
            return f"the cache holds a batch of {len(self._lengths)}"
        held = self._shape()
        mine = ((sizes[1], sizes[3], value.shape[3]), key.dtype, key.device)
        if held is None or held == mine:
            return ""
        (kv_heads, dim, v_dim), dtype, device = held
        return (
            f"the cache holds {kv_heads} kv_heads, dim {dim} and v_dim {v_dim}, {dtype} on {device}"
        )

    def _counted(self, lengths: Lengths, key: Tensor) -> list[int]:
        batch, n = key.shape[0], key.shape[2]
        if lengths is None:
            return [n] * batch
        new = [int(m) for m in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
        if len(new) != batch or any(not 0 <= m <= n for m in new):
            raise RegardError(
                f"lengths {new}: give one number for each of {batch} items, of 0 … {n} new tokens"
            )
        return new


def tell(call: Call, lse: Tensor, out: Tensor) -> None:
    """Nothing; but who overrides torch's functions (`watch`) sees what a cache computed.

    call: over positions, where `regard.attention` was over slots. lse, out: what came of it.
    """
    if has_torch_function_variadic(lse, out):
        handle_torch_function(tell, (lse, out), call, lse, out)


def mark(key: Tensor, owner: Any) -> None:
    """Note on a tensor of keys whose slots they are; for an attention that is handed them alone."""
    setattr(key, _OWNER, owner)


def owner_of(key: Tensor) -> Any:
    """The cache whose slots these keys are, if they are marked; `Held` of keys over ranks."""
    return getattr(key, _OWNER, None)


def _check_query(query: Tensor, key: Tensor) -> None:
    if query.dim() != 4 or key.dim() != 4:
        wrong = "each needs 4 dimensions, (batch, heads, length, dim)"
    elif query.shape[:3:2] != key.shape[:3:2]:
        wrong = "each new token has a query and a key; make the lengths equal"
    else:
        return
    raise RegardError(f"query {tuple(query.shape)}, key {tuple(key.shape)}: {wrong}")
