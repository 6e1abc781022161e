"""Attention at the hardware's speed, with the weights in sight at any length."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .public import *  # noqa: F403
else:
    # All come with the first that is asked for: `regard --help` needs neither them nor torch.
    def __getattr__(name):
        if not name.startswith("__") and find_spec(f"{__name__}.{name}"):
            return import_module(f".{name}", __name__)  # as its modules import each other
        public = import_module(".public", __name__)
        names = getattr(public, "__all__", ())  # none while it is itself being imported
        globals().update({known: getattr(public, known) for known in names}, __all__=list(names))
        if name in globals() and names:
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *import_module(".public", __name__).__all__})
