"""What each module of a model takes and gives at one position of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import RegardError


@dataclass(eq=False)
class ModuleRun:
    """One run of a module: the rows that it took and gave, float64 (dim,), where it has such.

    row: the number looked up, of an embedding. end: how many runs had begun when it ended.
    """

    name: str
    kind: str
    leaf: bool
    listed: str
    taken: Tensor | None
    row: int | None = None
    given: Tensor | None = None
    end: int = 0


class Trace:
    """While open, notes the runs of all modules, in the order in which they begin.

    at: the position whose rows are kept, of a batch of one. The hooks go when it closes.
    """

    def __init__(self, model: nn.Module, at: int) -> None:
        self.model, self.at = model, at
        self.runs: list[ModuleRun] = []
        self._open: list[ModuleRun] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Trace:
        lists = [n for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList)]
        for name, module in self.model.named_modules():
            outer = [n for n in lists if name.startswith(n + ".")]
            listed = min(outer, key=len, default="")
            leaf = not any(True for _ in module.children())

            def enter(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                name: str = name,
                listed: str = listed,
                leaf: bool = leaf,
            ) -> None:
                given = [*args, *kwargs.values()]
                rows = [r for r in map(self._row, given) if r is not None]
                numbers = [int(g[..., self.at]) for g in given[:1] if self._numbers(g)]
                ran = ModuleRun(
                    name, type(module).__name__, leaf, listed, rows[0] if rows else None
                )
                ran.row = numbers[0] if numbers else None
                self.runs.append(ran)
                self._open.append(ran)

            def leave(module: nn.Module, args: Any, out: Any) -> None:
                ran = self._open.pop()
                while isinstance(out, tuple | list) and out:
                    out = out[0]
                ran.given, ran.end = self._row(out, flat=ran.row is not None), len(self.runs)

            self._handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave),
            ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _row(self, value: Any, flat: bool = False) -> Tensor | None:
        """The position's row of (1, length, dim), or of an embedding's (length, dim)."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return None
        if flat and value.dim() == 2:
            value = value[None]
        if value.dim() != 3 or value.shape[0] != 1 or value.shape[1] <= self.at:
            return None
        return value[0, self.at].detach().double().clone()

    def _numbers(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or value.is_floating_point():
            return False
        return 1 <= value.dim() <= 2 and value.numel() == value.shape[-1] > self.at

    def find(self, name: str, run: int = 1) -> ModuleRun:
        """A module's run; RegardError if it did not run so often."""
        runs = [ran for ran in self.runs if ran.name == name]
        if len(runs) < run:
            raise RegardError(f"{name} was not seen to run {run} times; cannot walk through it")
        return runs[run - 1]

    def before(self, stack: str) -> tuple[list[ModuleRun], Tensor | None, bool]:
        """What was embedded for the list of layers `stack`, what enters it, if a norm gave that."""
        first = next((i for i, r in enumerate(self.runs) if stack and r.listed == stack), None)
        if first is None or self.runs[first].taken is None:
            return [], None, False
        entered = self.runs[first].taken
        assert entered is not None
        found, normed = [], False
        for ran in reversed(self.runs[:first]):
            if ran.listed:  # the layers of another stack
                break
            same = ran.given is not None and near(ran.given, entered, 1e-6)
            normed |= same and ran.leaf and "norm" in ran.kind.lower()
            embedding = ran.leaf and "embedding" in ran.kind.lower() and "rotary" not in ran.name
            if embedding and ran.given is not None:
                found.append(ran)
        return found[::-1], entered, normed

    def residual(
        self, layer: ModuleRun, attention: ModuleRun, attended: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The vector that `attended` is added to, and the sum, if a module takes that sum.

        Looked for among all that the layer's modules took before their attention.
        """
        begun, own = self.runs.index(layer), self.runs.index(attention)
        inside = self.runs[begun : layer.end]
        bases = [r.taken for r in inside[: own - begun + 1]]
        later = [r.taken for r in self.runs[own + 1 : layer.end]]
        for base in bases:
            if base is None or base.shape != attended.shape:
                continue
            for taken in later:
                if taken is not None and near(base + attended, taken, 1e-5):
                    return base, taken
        return None, None


def largest_difference(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one.double() - other.double()).abs().amax()) if one.numel() else 0.0


def near(one: Tensor, other: Tensor, within: float) -> bool:
    """Whether two vectors are the same but for `within` of their largest number."""
    if one.shape != other.shape:
        return False
    size = max(float(one.abs().amax()), float(other.abs().amax()), 1e-30)
    return largest_difference(one, other) <= within * size
