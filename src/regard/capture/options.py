"""What a watch is asked for, checked once: which layers, what to keep of them, what to cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..call.masks import Mask
from ..call.numbers import whole
from ..call.observers import Observer, listed
from ..errors import RegardError
from .layers import Cut


@dataclass(frozen=True)
class WatchOptions:
    """The arguments of `watch`, which says what each means.

    keep_calls: also keep each layer's last call whole, with its values, mask and biases (`walk`).
    """

    observe: Sequence[Observer] | None = ()
    layers: Sequence[int | str] | int | str | None = None
    keep_qk: bool = False
    cut: Sequence[Cut] | None = ()
    verify: bool | None = None
    count_padding: bool = False
    keep: Literal["last", "all"] = "last"
    keep_calls: bool = False

    def checked(self) -> WatchOptions:
        """The same, each as its one form; RegardError for what cannot be meant."""
        if self.keep not in ("last", "all"):
            raise RegardError(f"keep is {self.keep!r}; give 'last' or 'all'")
        return replace(
            self, observe=listed(self.observe), cut=_checked_cuts(self.cut),
            layers=_several(self.layers),
        )  # fmt: skip


def _several(layers: Any) -> list[int | str] | None:
    """What `layers` asks for, one of a kind alone too; RegardError where it is neither."""
    if layers is None:
        return None
    try:
        several: list[Any] = [layers] if isinstance(layers, str) else list(layers)
    except TypeError:  # one of a kind alone
        several = [layers]
    return [_which(each, "layers") for each in several]


def _which(layer: Any, what: str) -> int | str:
    """A layer as it can be asked for."""
    if isinstance(layer, str):
        return layer
    try:
        if not isinstance(layer, bool):
            return whole(layer, what)
    except RegardError:
        pass
    raise RegardError(
        f"{what} takes numbers of layers, and names or patterns of modules, not {layer!r}"
    )


def _checked_cuts(cut: Any) -> tuple[Cut, ...]:
    """What `cut` removes; RegardError where it is no list of cuts."""
    if cut is None:
        return ()
    alone = " alone" if isinstance(cut, Cut | Mask | type) else ""
    if alone or not isinstance(cut, list | tuple):
        raise RegardError(f"cut is {cut!r}{alone}; give a list, such as [Cut(3, Heads([1]))]")
    for each in cut:
        if not isinstance(each, Cut):
            raise RegardError(f"cut holds {each!r}; give cuts, such as Cut(3, Heads([1]))")
        if not isinstance(each.mask, Mask):
            raise RegardError(
                f"Cut({each.layer!r}, …): mask is a {type(each.mask).__name__}; give a regard "
                "mask, such as Edges([(10, 1)]) or Heads([1])"
            )
    return tuple(each._replace(layer=_which(each.layer, "Cut: layer")) for each in cut)
