"""The engines in the order in which `auto` tries them, and the choice among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from ..call.checked import Call
from ..errors import NoEngine, RegardError
from . import flex, hidden, reference, sdpa, sdpa_cuda, sdpa_op, tiled
from .blocks import launch as blocks
from .cpu import engine as cpu
from .cpu import measured
from .decode import engine as decode


class Engine(Protocol):
    """One way to compute attention."""

    name: str

    def why_not(self, call: Call) -> list[str]:
        """The reasons why it cannot run this call; empty if it can."""
        ...

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """(out, lse) of a call that it can run."""
        ...


# `auto` takes the first that can. Only by name: `reference`, which materialises the weights, and
# `flex`, until it has been measured on a GPU.
PREFERENCE: tuple[Any, ...] = (cpu, sdpa, decode, tiled)
YIELDING: tuple[Any, ...] = (sdpa, cpu, decode, tiled)  # PyTorch's kernel is measured to be faster
IN_PAGES: tuple[Any, ...] = (cpu, decode, sdpa, tiled)
ALL_OF_IT: tuple[Any, ...] = PREFERENCE  # in pages, as many queries as keys: then a copy is little
READING_PAGES: tuple[Any, ...] = (cpu, decode)  # where they lie; others have a copy, in order
BY_NAME: tuple[Any, ...] = (flex, reference)
SPREADING: tuple[Any, ...] = (sdpa, flex)  # PyTorch's own, which multiply what is hidden by 0
ENGINES: Mapping[str, Any] = {e.name: e for e in (*PREFERENCE, *BY_NAME)}


def preference(call: Call) -> tuple[Any, ...]:
    """The engines that `auto` tries for a call, in their order."""
    if call.pages is not None:
        return ALL_OF_IT if call.place.q_len == call.place.k_len else IN_PAGES
    return PREFERENCE if measured.faster(call) is None else YIELDING


def order(call: Call) -> str:
    """Why `auto` tries PyTorch's kernel before ours; empty where it does not."""
    row = measured.faster(call)
    return "" if row is None else measured.explained(row, call.query.dtype)


def spreading(call: Call) -> list[str]:
    """What becomes of numbers that are hidden and not finite, by each engine that spreads them."""
    if blocks.sees_all(call):
        return []
    return [
        f"{engine.name} multiplies what is hidden by 0: {_then(engine, call)}"
        for engine in SPREADING
        if not engine.why_not(call)
    ]


def _device(call: Call) -> str:
    return call.place.device.type


def _then(engine: Any, call: Call) -> str:
    """What becomes of it."""
    if _device(call) == "cpu":
        return (
            "where a NaN or ∞ is among it, it computes again with 0 there, and tiled the rows that "
            "see one; in an exported program it does not look"
        )
    spoils = "a NaN or ∞ there spoils rows that do not see it; engine tiled keeps them apart"
    if engine is not sdpa or not sdpa_cuda.serves(call):
        return spoils
    if reasons := blocks.refusals(call):
        return f"{spoils}; the kernel that would mend them cannot: {'; '.join(reasons)}"
    return (
        "blocks of rows, or of gradients, that a NaN or ∞ there has spoiled are computed again by "
        "Triton kernels, which look at what comes out; in an exported program nobody looks"
    )


def copying(call: Call) -> list[str]:
    """The names of the engines that could run this call on a copy of its keys, out of pages."""
    could = (name for name, reasons in refusals(call).items() if not reasons)
    return [name for name in could if ENGINES[name] not in READING_PAGES]


def refusals(call: Call) -> dict[str, list[str]]:
    """Every engine's reasons against this call, in the order of preference."""
    engines = (*preference(call), *BY_NAME)
    return {engine.name: engine.why_not(call) for engine in engines}


def select(call: Call, engine: str = "auto") -> Any:
    """The engine for a call: the named one, or the first of the preference that can."""
    if engine == "auto":
        for candidate in preference(call):
            if not candidate.why_not(call):
                return candidate
        raise _refused(call, refusals(call))
    if engine not in ENGINES:
        raise RegardError(f"no engine is named {engine!r}; there are auto, {', '.join(ENGINES)}")
    reasons = ENGINES[engine].why_not(call)
    if reasons:
        raise _refused(call, {engine: reasons})
    return ENGINES[engine]


def _refused(call: Call, reasons: dict[str, list[str]]) -> NoEngine:
    lines = [f"  {name}: {'; '.join(why)}" for name, why in reasons.items() if why]
    return NoEngine("\n".join([f"no engine can run attention on {call}", *lines]))


def run(call: Call, engine: str = "auto") -> tuple[Tensor, Tensor, dict[int, Any]]:
    """(out, lse, results): of those observers that the engine gathers itself, by their number.

    The second pass does the others.
    """
    chosen = select(call, engine)
    if call.observers and hasattr(chosen, "observed"):
        answer: tuple[Tensor, Tensor, dict[int, Any]] = chosen.observed(call)
        return answer
    if chosen is sdpa and sdpa_op.wanted(call):
        return (*sdpa_op.forward(call), {})
    out, lse = chosen.forward(call)
    if chosen in SPREADING and hidden.spread_by(call, out):
        out, lse = hidden.apart(call, chosen.forward, tiled.forward)
    return out, lse, {}
