"""Call: one checked, described request for attention, in the form that every engine reads."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError
from .biases import Added, Bias, DenseBias
from .dropout import Dropout
from .geometry import Place
from .mask_program import Program
from .masks import Full, Mask, Padding, given_tensor
from .numbers import FARTHEST, real, whole
from .observers import Observer, listed
from .opcodes import Op
from .pages import Pages, check
from .top_blocks import by_content

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Crossing:
    """How a number of a call goes through registered ops and into files: as it is.

    kind: its type in an op's schema. none: what stands for None there. A field with a default has
    that where a file is older than the field.
    """

    kind: str
    none: float | int | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """A request that fits together. `value` is None for the second pass alone.

    query (batch, heads, q_len, dim); key (batch, kv_heads, k_len, dim);
    value (batch, kv_heads, k_len, v_dim).
    """

    query: Tensor
    key: Tensor
    value: Tensor | None
    program: Program
    biases: tuple[Added, ...]
    scale: float = field(metadata={"crosses": Crossing("float")})
    softcap: float | None = field(metadata={"crosses": Crossing("float", none=0.0)})
    sinks: Tensor | None
    dropout: Dropout | None
    place: Place
    mask: Mask
    observers: tuple[Observer, ...] = ()
    return_lse: bool = False
    pages: Pages | None = None  # then key and value are pools (pages, kv_heads, size, dim)

    @classmethod
    def checked(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        *,
        mask: Mask | None = None,
        bias: Bias | Tensor | Sequence[Bias | Tensor] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        dropout: Dropout | float | None = None,
        query_start: int | None = None,
        key_start: int = 0,
        observe: Sequence[Observer] | None = None,
        return_lse: bool = False,
        pages: Pages | None = None,
        **unknown: Any,
    ) -> Call:
        """The call, or a RegardError that shows the shapes and says what to do."""
        if unknown:
            raise RegardError(_unknown(next(iter(unknown))))
        place = _placed(query, key, value, query_start, key_start, pages)
        mask = Full() if mask is None else mask
        if not isinstance(mask, Mask):
            raise RegardError(
                f"mask is a {type(mask).__name__}; give a regard mask, such as Causal() or "
                "Dense(tensor)"
            )
        if softcap is not None:
            softcap = real(softcap, "softcap")
            if not softcap > 0:
                raise RegardError(f"softcap is {softcap}; give a number above 0, or None")
        if scale is None:
            scale = 1 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0
        else:
            scale = real(scale, "scale")
        if sinks is not None:
            given_tensor(sinks, "sinks")
        if sinks is not None and (sinks.shape != (place.heads,) or sinks.device != place.device):
            raise RegardError(
                f"sinks is {tuple(sinks.shape)} on {sinks.device}; this call needs one logit a "
                f"head, ({place.heads},) on {place.device}"
            )
        observers = listed(observe)
        for observer in observers:
            observer.check(place)
        return cls(
            query,
            key,
            value,
            _lowered(mask, place, query, key, pages),
            tuple(b.lower(place) for b in _biases(bias)),
            scale,
            softcap,
            sinks,
            Dropout.given(dropout),
            place,
            mask,
            observers,
            return_lse,
            pages,
        )

    def gathered(self) -> Call:
        """The same call with its keys and values copied out of their pages."""
        if self.pages is None:
            return self
        return replace(
            self,
            key=self.pages.gather(self.key),
            value=None if self.value is None else self.pages.gather(self.value),
            program=self.kept(),
            pages=None,
        )

    def kept(self) -> Program:
        """The mask, and where keys lie in pages, hidden what lies beyond an item's end."""
        if self.pages is None:
            return self.program
        program, keep = self.program, self.pages.keep()
        code = (*program.code, Op.PADDING, len(program.tensors), Op.AND)
        return replace(program, code=code, tensors=(*program.tensors, keep))

    def hidden_by_biases(self) -> Call:
        """The same call with a mask that hides, too, what a bias of −∞ hides."""
        program = self.program
        for bias in self.biases:
            if bias.dense:
                shown = bias.tensor.detach() != -torch.inf
                code = (*program.code, Op.DENSE, len(program.tensors), Op.AND)
                program = replace(program, code=code, tensors=(*program.tensors, shown))
        return replace(self, program=program)

    @property
    def working(self) -> torch.dtype:
        """The dtype of scores and statistics: float32, or float64 for float64."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    @property
    def needs_grad(self) -> bool:
        """Whether anything that goes in asks for a gradient."""
        tensors = [self.query, self.key, self.value, self.sinks, *(b.tensor for b in self.biases)]
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def item(self, batch: int) -> Call:
        """The same call for one item of its batch."""
        one = slice(batch, batch + 1)
        return replace(
            self,
            query=self.query[one],
            key=self.key[one],
            value=None if self.value is None else self.value[one],
            program=self.program.item(batch),
            biases=tuple(b.item(batch) for b in self.biases),
            place=replace(self.place, batch=1),
        )

    def __str__(self) -> str:
        parts = [f"query {_shape(self.query)} {_dtype(self.query)} on {self.place.device}"]
        parts.append(f"key {_shape(self.key)}")
        if self.value is not None:
            parts.append(f"value {_shape(self.value)}")
        if not self.program.full:
            parts.append(f"mask {self.mask}")
        parts += [f"{b.kind.name.lower()} bias" for b in self.biases]
        for name in ("softcap", "sinks", "dropout"):
            if getattr(self, name) is not None:
                parts.append(name)
        return ", ".join(parts)


# What others call what is said here in another way
ELSEWHERE = {
    "causal": "mask=Causal()",
    "is_causal": "mask=Causal()",
    "attn_mask": "mask=Dense(tensor) where it is bool, bias=tensor where it is added",
    "attention_mask": "mask=Padding(keep), or mask=Dense(tensor)",
    "key_padding_mask": "mask=Padding(~key_padding_mask)",
    "window_size": "mask=Causal() & Window(n)",
    "dropout_p": "dropout=p",
    "softmax_scale": "scale=…",
    "enable_gqa": "keys of fewer heads as they are",
    "alibi_slopes": "bias=ALiBi(slopes)",
    "need_weights": "observe=[TopK(8)], or another observer",
    "output_attentions": "observe=[TopK(8)], or another observer",
}


def _unknown(name: str) -> str:
    """What to give instead of an argument that is none."""
    if name in ELSEWHERE:
        return f"no argument is named {name}; give {ELSEWHERE[name]}"
    taken = inspect.signature(Call.checked).parameters.values()
    known = [p.name for p in taken if p.kind is p.KEYWORD_ONLY]
    return f"no argument is named {name}; there are {', '.join(known)}, engine"


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _lowered(mask: Mask, place: Place, query: Tensor, key: Tensor, pages: Pages | None) -> Program:
    """The mask's program. What is chosen by content looks at a copy of the keys, in order."""
    if pages is None or not by_content(mask):
        return mask.lower(place, query, key)
    return (mask & Padding(pages.keep())).lower(place, query, pages.gather(key))


def _biases(bias: Bias | Tensor | Sequence[Bias | Tensor] | None) -> list[Bias]:
    if bias is None:
        return []
    given = list(bias) if isinstance(bias, list | tuple) else [bias]
    biases: list[Bias] = []
    for each in given:
        if not isinstance(each, Bias | Tensor):
            raise RegardError(
                f"bias holds {each!r}; give ALiBi(), RelativeBias(table), a tensor, or a list"
            )
        biases.append(DenseBias(each) if isinstance(each, Tensor) else each)
    return biases


def _placed(
    query: Tensor, key: Tensor, value: Tensor | None, query_start: int | None, key_start: int,
    pages: Pages | None,
) -> Place:  # fmt: skip
    """Check shapes, dtypes and devices against each other; say where the call stands."""
    named = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, given in named.items():
        given_tensor(given, name)
    wrong = _misfit(query, key, value, pages is not None)
    if wrong:
        said = ", ".join(f"{n} {_shape(t)} {_dtype(t)} on {t.device}" for n, t in named.items())
        raise RegardError(f"{said}: {wrong}")
    batch, heads, q_len, _ = query.shape
    kv_heads, k_len = key.shape[1:3]
    if pages is not None:
        check(query, key, pages)
        k_len = pages.k_len
    key_start = whole(key_start, "key_start")
    if key_start < 0:
        raise RegardError(f"key_start is {key_start}; positions of keys count from 0")
    if query_start is None:
        query_start = key_start + k_len - q_len
    query_start = whole(query_start, "query_start")
    if key_start + k_len > FARTHEST or not -FARTHEST <= query_start <= FARTHEST - q_len:
        raise RegardError(
            f"queries stand from {query_start} on, keys from {key_start} on; give positions within "
            "± 2³¹, which results count in int32"
        )
    return Place(batch, heads, kv_heads, q_len, k_len, query_start, key_start, query.device)


def _misfit(query: Tensor, key: Tensor, value: Tensor | None, paged: bool) -> str:
    if query.dim() != 4 or key.dim() != 4 or (value is not None and value.dim() != 4):
        return "each needs 4 dimensions, (batch, heads, length, dim)"
    if key.shape[0] != query.shape[0] and not paged:
        return f"query has batch {query.shape[0]}, key {key.shape[0]}; make them equal"
    if key.shape[3] != query.shape[3]:
        return f"query has dim {query.shape[3]}, key {key.shape[3]}; make them equal"
    if not query.shape[1]:
        return "there are no heads; give at least one"
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        return f"kv_heads {key.shape[1]} must divide heads {query.shape[1]}"
    if value is not None and value.shape[:3] != key.shape[:3]:
        return "key and value must agree in batch, kv_heads and length"
    others = (key,) if value is None else (key, value)
    if query.dtype not in FLOATS or any(t.dtype != query.dtype for t in others):
        return "give all of them in one dtype of float64, float32, float16, bfloat16"
    if any(t.device != query.device for t in others):
        return "move all of them to one device"
    return ""
