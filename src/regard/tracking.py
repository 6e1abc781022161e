"""Which module of a watched model runs now, how often it ran in this forward, which ran at all."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import nn


class Tracker:
    """Follows one thread through a model's modules, by hooks that go when `following` ends."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(m): n for n, m in model.named_modules()}
        self.ran: set[str] = set()
        self._model = model
        self._thread = threading.get_ident()
        self._stack: list[str] = []
        self._runs: dict[str, int] = {}
        self._calls: dict[str, int] = {}

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Hooks on every module, for the length of the block."""
        handles = []
        try:
            for name, module in self._model.named_modules():
                handles += [
                    module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)),
                    module.register_forward_hook(lambda *_: self._leave(), always_call=True),
                ]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> None:
        if threading.get_ident() != self._thread:
            return
        if not self._stack:  # a new forward
            self._runs.clear()
        self._stack.append(name)
        self.ran.add(name)
        self._runs[name] = self._runs.get(name, 0) + 1
        self._calls[name] = 0

    def _leave(self) -> None:
        if threading.get_ident() == self._thread and self._stack:
            self._stack.pop()

    @property
    def innermost(self) -> str | None:
        """The name of the module whose forward runs now."""
        return self._stack[-1] if self._stack else None

    def call(self, name: str) -> str:
        """A name for the attention call that this module makes now.

        The module's own; `#2` when it runs a second time in one forward (shared layers), `~2` for
        the second call of one run.
        """
        self._calls[name] = self._calls.get(name, 0) + 1
        run, call = self._runs.get(name, 1), self._calls[name]
        return name + (f"#{run}" if run > 1 else "") + (f"~{call}" if call > 1 else "")


def module_of(call: str) -> str:
    """The module's name in the name of a call."""
    return call.split("#")[0].split("~")[0]


def kind_of(module: nn.Module, name: str) -> str:
    """ "self" or "cross", by what an attention module says of itself, or is called."""
    parts = [p for p in module_of(name).split(".") if not p.isdigit()]
    while len(parts) > 1 and parts[-1] in ("self", "attention"):  # what holds it may say more
        parts.pop()
    said = f"{parts[-1]} {type(module).__name__}".lower()
    cross = getattr(module, "is_cross_attention", False) or any(
        part in said for part in ("cross", "encdec", "encoder_attn", "encoder_decoder_att")
    )
    return "cross" if cross else "self"
