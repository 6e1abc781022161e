"""The tree of a watched model's modules: whole models inside it, and its lists of layers."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from torch import nn

# In the names of modules that attend to others
CROSS = ("cross", "encdec", "encoder_attn", "encoder_decoder_att")


def hugging_face(module: object) -> bool:
    """Whether it is a Hugging Face model; without importing transformers for any other."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def of_hugging_face(module: nn.Module) -> bool:
    """Whether it is such a model or a part of one: those have its config."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and any(
        isinstance(value, transformers.PreTrainedConfig) for value in vars(module).values()
    )


@dataclass(frozen=True)
class Block:
    """One of a list of blocks: a layer of the model, whatever it computes."""

    name: str
    has_attention: bool
    reason: str


class Blocks:
    """A model's outermost lists of blocks: `lists`, by the list's name.

    A list that holds whole models (several encoders, say) is none: their own lists are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.lists: dict[str, list[Block]] = {}
        for name, module in model.named_modules():
            if not isinstance(module, nn.ModuleList) or self._around(name):
                continue
            if not any(map(hugging_face, module.modules())):
                blocks = module.named_children()
                self.lists[name] = [_block(f"{name}.{n}", block) for n, block in blocks]

    def _around(self, name: str) -> str | None:
        """The list that a module stands in."""
        return next((each for each in self.lists if inside(name, each)), None)

    def index(self, call: str) -> int:
        """The number of the layer that a call's name says (encoder.layer.3.attention.self: 3).

        Its block's in the list; without one the first number in the name. Where one block serves
        every layer: which run it is.
        """
        around = self._around(call)
        again = re.search(r"#(\d+)", call)
        if again and (around is None or len(self.lists[around]) == 1):
            return int(again[1]) - 1
        below = call if around is None else call[len(around) :]
        found = re.search(r"(?:^|\.)(\d+)(?=[.#~]|$)", below)
        return int(found[1]) if found else 0

    def count(self, call: str) -> int:
        """How many blocks the list has that the call is made in; 0 without one."""
        around = self._around(call)
        return 0 if around is None else len(self.lists[around])


def kind_of(module: nn.Module, name: str) -> str:
    """Self or cross: by the module's class and name, and where that says little its parent's.

    BERT's way is attention.self beside crossattention.self, where "self" says nothing.
    """
    parts = [p for p in re.split("[#~]", name.lower())[0].split(".") if not p.isdigit()]
    while len(parts) > 1 and parts[-1] in ("self", "attention"):  # what holds it may say more
        parts.pop()
    parent, own = ["", "", *parts][-2:]  # a name of digits alone says nothing
    if not own.startswith("self_"):
        own += parent
    said = f"{own} {type(module).__name__.lower()}"
    cross = getattr(module, "is_cross_attention", False) or any(part in said for part in CROSS)
    return "cross" if cross else "self"


def inside(name: str, container: str) -> bool:
    """Whether a module stands below another, by their names."""
    return name.startswith(container + ".")


def _block(name: str, block: nn.Module) -> Block:
    kinds = dict.fromkeys(type(part).__name__ for part in block.modules())
    attention = any("Attention" in kind for kind in kinds)
    why = "computes attention by itself" if attention else "computes no softmax attention"
    parts = ", ".join(dict.fromkeys(type(part).__name__ for part in block.children()))
    return Block(name, attention, f"{type(block).__name__} {why}; its parts: {parts}")
