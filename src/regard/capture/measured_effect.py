"""`record(…, effect=…)`: the model once more, differentiated, the effects of its edges written.

Each layer's effects go to their file when the backward pass reaches it, and leave memory. What the
model keeps for a backward pass, O(N) a layer, is in memory meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..call.edge_results import EffectSeen
from ..call.observers import Effect
from ..errors import RegardError
from .by_effect import EdgeEffects
from .watching import watch

Target = Callable[[Any], Any]
NEXT = "log-probability of the likeliest next token"


def next_token(output: Any) -> Tensor:
    """The log-probability of the likeliest next token, summed over the batch."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise RegardError(
            "effect=True is measured on the next token, which this model does not name; give a "
            "function of its output that returns a scalar, effect=lambda out: …"
        )
    return logits[:, -1].log_softmax(-1).amax(-1).sum()


def measure_effects(
    model: nn.Module,
    inputs: Any,
    target: Target,
    edges: int,
    layers: Sequence[int | str] | int | str | None,
    take: Callable[[str, EdgeEffects], object],
) -> None:
    """Run the model forward and backward; `take` is given each layer's name and effects.

    RegardError for inputs that are a function, and where no gradient reaches a layer.
    """
    with (
        _differentiable(model),
        watch(model, observe=[Effect(edges)], layers=layers, verify=False) as seen,
    ):
        output = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    scalar = target(output)
    if not isinstance(scalar, Tensor) or scalar.numel() != 1 or not scalar.requires_grad:
        raise RegardError(
            "effect must give one number that depends on the model's output; take no_grad and "
            "item() out of it"
        )
    waiting = set()
    for layer in seen.layers:
        if not layer.pattern:
            continue
        (found,) = layer.seen
        assert isinstance(found, EffectSeen)
        waiting.add(layer.name)
        found.taker = _taking(layer.name, waiting, take)
    scalar.sum().backward()
    if waiting:
        raise RegardError(f"no gradient reaches {min(waiting)}: effect does not depend on it")


def _taking(
    name: str, waiting: set[str], take: Callable[[str, EdgeEffects], object]
) -> Callable[[Tensor, Tensor, Tensor], None]:
    def taken(indices: Tensor, effects: Tensor, weights: Tensor) -> None:
        waiting.discard(name)
        take(name, EdgeEffects(indices, effects, weights))

    return taken


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Gradients from what enters the model on and none of the parameters, which stay as they were.

    The first modules that make numbers of ids, or of pictures, make what gradients flow to.
    """

    def begin(module: nn.Module, given: Any, output: Any) -> Any:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad:
            return output.detach().requires_grad_()
        return output

    asked = [(p, p.requires_grad) for p in model.parameters()]
    smallest = [m for m in model.modules() if not m._modules]
    hooks = [module.register_forward_hook(begin) for module in smallest]
    try:
        for parameter, _ in asked:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in asked:
            parameter.requires_grad_(before)


def check_inputs(inputs: Any) -> None:
    """RegardError for what has more than one forward pass."""
    if not isinstance(inputs, Tensor | Mapping):
        raise RegardError(
            "effect reads one forward pass and its backward; give token ids or a mapping of the "
            "model's arguments, not a function that runs it"
        )
