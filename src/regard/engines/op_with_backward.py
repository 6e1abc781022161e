"""A registered op whose gradients a second one computes: both opaque, so that compilers keep them.

Given are what the two compute and the forward's schema; from that follow the backward's schema, its
fake, what is saved in between, and which gradient belongs to which argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Ops = tuple[Any, Any]  # the forward's and the backward's, as `torch.library.custom_op` gives them


def op_with_backward(
    name: str,
    arguments: str,
    outputs: str,
    *,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., list[Tensor]],
    differentiable: Sequence[str],
    kept: Mapping[int, str],
    gradients: Sequence[str],
    unread: Sequence[str] = (),
) -> Ops:
    """Register regard::`name` and regard::`name`_backward.

    arguments, outputs: of the forward, as in a schema. differentiable: the arguments that have
    gradients. kept: outputs that the backward reads, by number. gradients: those of the first
    outputs, as in a schema: of an optional one that is not there, None. unread: the arguments that
    the backward does without.

    backward takes the arguments, the kept outputs, the gradients and, where lists of tensors are
    differentiable, `wanted`: a bool for each tensor of these. It returns the gradients of what is
    there in the order of the arguments; in the place of one that is not wanted, an empty tensor
    like the first argument.
    """
    every = [Argument(*said.rsplit(" ", 1)) for said in arguments.split(", ")]
    plan = _Plan(
        f"{name}_backward",
        every,
        [a for a in every if a.name not in unread],
        [a for a in every if a.name in differentiable],
        kept,
        [said.startswith("Tensor?") for said in gradients],
    )
    alone = [i for i, optional in enumerate(plan.optional) if not optional and i not in kept]
    if alone and (any(plan.optional) or outputs == "Tensor[]"):
        raise ValueError(
            f"{name}: output {alone[0]} must be kept, for zeros in place of its gradient"
        )
    taken = [f"{a.kind} {a.name}" for a in plan.read] + [f"Tensor {n}" for n in kept.values()]
    taken += [*gradients, *(["bool[] wanted"] if plan.lists else [])]
    op = torch.library.custom_op(
        f"regard::{name}", forward, mutates_args=(), schema=f"({arguments}) -> {outputs}"
    )
    op.register_fake(fake)
    backward_op = torch.library.custom_op(
        f"regard::{plan.name}", backward, mutates_args=(),
        schema=f"({', '.join(taken)}) -> Tensor[]",
    )  # fmt: skip
    backward_op.register_fake(plan.fake)
    op.register_autograd(plan.gradients, setup_context=plan.save)
    return op, backward_op


@dataclass(frozen=True)
class Argument:
    """An argument of a schema: kind is "Tensor", "Tensor?", "Tensor[]", or that of a number."""

    kind: str
    name: str

    @property
    def holds_tensors(self) -> bool:
        """Whether autograd must keep what is in it."""
        return self.kind.startswith("Tensor")

    @property
    def many(self) -> bool:
        """Whether it is a list of tensors."""
        return self.kind == "Tensor[]"


@dataclass(frozen=True)
class _Plan:
    """What passes from the forward to the backward, and back to the arguments."""

    name: str
    every: list[Argument]
    read: list[Argument]
    differentiable: list[Argument]
    kept: Mapping[int, str]
    optional: list[bool]  # of each gradient that comes in

    @property
    def lists(self) -> list[Argument]:
        """The differentiable lists."""
        return [a for a in self.differentiable if a.many]

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Tensors go where autograd watches over them, all else beside."""
        given = dict(zip((a.name for a in self.every), inputs, strict=True))
        ctx.counts = {a.name: len(given[a.name]) for a in self.every if a.many}
        ctx.numbers = {a.name: given[a.name] for a in self.every if not a.holds_tensors}
        flat: list[Tensor | None] = []
        for a in self.read:
            if a.holds_tensors:
                flat += given[a.name] if a.many else [given[a.name]]
        ctx.save_for_backward(*flat, *(output[i] for i in self.kept))
        # An optional gradient that does not come saves the backward its part
        ctx.set_materialize_grads(not any(self.optional))

    def gradients(self, ctx: Any, *came: Any) -> tuple[Any, ...]:
        """A gradient, or nothing in its form, for each argument of the forward."""
        saved = iter(ctx.saved_tensors)
        given = dict(ctx.numbers)
        for a in self.read:
            if a.holds_tensors:
                given[a.name] = _next(saved, ctx.counts[a.name]) if a.many else next(saved)
        kept = dict(zip(self.kept, saved, strict=True))
        # An op that returns a list has one list of gradients
        grads = came[0] if isinstance(came[0], list | tuple) else came
        grads = [
            torch.zeros_like(kept[i]) if grads[i] is None and not optional else grads[i]
            for i, optional in enumerate(self.optional)
        ]
        wanted = [t.requires_grad for a in self.lists for t in given[a.name]]
        op = getattr(torch.ops.regard, self.name)
        found = iter(
            op(
                *(given[a.name] for a in self.read), *kept.values(), *grads,
                *([wanted] if self.lists else []),
            )
        )  # fmt: skip
        asked, answers = iter(wanted), dict[str, Any]()
        for a in self.differentiable:
            if a.many:
                some = _next(found, ctx.counts[a.name])
                answers[a.name] = [g if next(asked) else None for g in some]
            else:
                answers[a.name] = None if given[a.name] is None else next(found)
        return tuple(answers[a.name] if a.name in answers else _nothing(ctx, a) for a in self.every)

    def fake(self, *inputs: Any) -> list[Tensor]:
        """The shapes of what the backward returns: those of the arguments."""
        given = dict(zip((a.name for a in self.read), inputs, strict=False))
        wanted = iter(inputs[-1] if self.lists else ())
        grads: list[Tensor] = []
        for a in self.differentiable:
            value = given[a.name]
            if a.many:
                grads += [
                    torch.empty_like(t) if next(wanted) else inputs[0].new_empty(0) for t in value
                ]
            elif value is not None:
                grads.append(torch.empty_like(value, memory_format=torch.contiguous_format))
        return grads


def _nothing(ctx: Any, argument: Argument) -> Any:
    """No gradient of an argument; lists of tensors, and empty lists, want a list."""
    if argument.many:
        return [None] * ctx.counts[argument.name]
    return [] if ctx.numbers.get(argument.name) == [] else None


def _next(tensors: Any, count: int) -> list[Tensor]:
    return [next(tensors) for _ in range(count)]
