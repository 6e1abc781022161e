"""Triton kernels compiled for Hopper (sm_90) without a GPU: what a launch there would run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

TARGET = GPUTarget("cuda", 90, 32)
BACKEND = make_backend(TARGET)


class Compiled:
    """Stands in a kernel's place: compiles what would be launched, and hands it to `report`."""

    def __init__(self, kernel: Any, report: Callable[[Any, Any], None]) -> None:
        self.kernel, self.report = kernel, report
        self.bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.launch

    def launch(self, *given: Any, **named: Any) -> None:
        # As Triton does it at a launch: what is divisible by 16, or 1, also within tuples
        bound, specialization, named = self.bind(*given, **named, debug=False)
        options, types, constants, attributes = self.kernel._pack_args(
            BACKEND, named, bound, specialization, named
        )
        source = ASTSource(self.kernel, types, constants, attributes)
        self.report(self.kernel, triton.compile(source, target=TARGET, options=options.__dict__))


@contextmanager
def compiling(kernels: dict[Any, str], report: Callable[[Any, Any], None]) -> Iterator[None]:
    """Within it, kernels (module: names) are not launched but compiled: report(kernel, made)."""
    patches = [
        patch.object(module, name, Compiled(getattr(module, name), report))
        for module, names in kernels.items()
        for name in names.split()
    ]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()
