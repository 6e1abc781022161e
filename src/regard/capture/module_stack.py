"""Which module of a watched model runs now, how often it ran in this forward, which ran at all."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Hook:
    """One module's hook; a copy or a pickle of the module has one that does nothing."""

    def __init__(self, module: nn.Module, act: Callable[[], None]) -> None:
        self.module, self._act = module, act
        self.handle: RemovableHandle | None = None
        self._copies: list[nn.Module] = []

    def __call__(self, *_: Any) -> None:
        self._act()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self.module) in memo:
            self._copies.append(memo[id(self.module)])
        return contextlib.nullcontext().__exit__  # takes anything, gives None, needs no regard

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")

    def remove(self) -> None:
        """Off the module, and off the copies made of it meanwhile."""
        assert self.handle is not None
        self.handle.remove()
        for copied in self._copies:
            for name, hooks in vars(copied).items():
                if name.startswith("_forward_"):  # torch keeps some four dictionaries of them
                    hooks.pop(self.handle.id, None)


class Tracker:
    """Follows one thread through a model's modules, by hooks that go when `following` ends."""

    def __init__(self, model: nn.Module) -> None:
        self.names: dict[int, str] = {id(m): n for n, m in model.named_modules()}
        self.ran: set[str] = set()
        self._model = model
        self._thread = threading.get_ident()
        self._stack: list[str] = []
        self._runs: dict[str, int] = {}
        self._calls: dict[str, int] = {}

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Hooks on every module, for the length of the block."""
        hooks: list[Hook] = []
        try:
            for name, module in self._model.named_modules():
                before = Hook(module, functools.partial(self._enter, name))
                after = Hook(module, self._leave)
                before.handle = module.register_forward_pre_hook(before)
                after.handle = module.register_forward_hook(after, always_call=True)
                hooks += [before, after]
            yield
        finally:
            for hook in hooks:
                hook.remove()

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
