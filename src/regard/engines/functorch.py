"""torch.func's transforms (vmap, grad, jacrev, …) over our registered ops, which know none of them.

A mapped dimension is folded into the batch, which changes no bits; where something that has no
batch is mapped (a table, slopes, sinks), or weights are dropped (by a function of the item's
number), the op runs once for each slice. Second derivatives are the `reference` engine's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..call.biases import Kind
from ..call.checked import Call
from ..call.mask_program import Program
from ..call.op_schema import BIAS_WORDS, pack
from ..errors import RegardError

CPU = torch.device("cpu")
PLAIN = (Tensor, torch.nn.Parameter, type(None))
Dims = Sequence[int | None]


def active() -> bool:
    """Whether a transform of torch.func looks at what is computed now."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether nobody but autograd looks at ops on these: no compiler, mode, subclass or transform.

    Then a kernel may be called that is no op of torch.
    """
    return (
        not torch.compiler.is_compiling()
        and all(type(t) in PLAIN for t in tensors)
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and forward_ad._current_level < 0
    )


def mapping() -> bool:
    """Whether one of them is vmap (jacrev and hessian map, too)."""
    if not active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)


def run(call: Call, value: Tensor, forward: Any, backward: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of an engine's forward op, differentiable by its backward op.

    The ops take (query, key, value, what `packed.SCHEMA` names), and the backward besides
    (out, lse, grad_out, grad_lse, wanted).
    """
    packed = pack(call)
    flat = [call.query, call.key, value, *tensors_of(packed)]
    out, lse = _Forward.apply(FlatArguments.of(packed), forward, backward, *flat)
    return out, lse


def tensors_of(packed: Sequence[Any], beside: Sequence[Any] | None = None) -> list[Any]:
    """Masks, biases, sinks and seed of packed arguments, flat; or what lies `beside` them."""
    masks, biases, *single = packed if beside is None else beside
    given = [one for one, there in zip(single[:2], packed[2:4], strict=True) if there is not None]
    return [*masks, *biases, *given]


@dataclass(frozen=True, eq=False)
class FlatArguments:
    """How the tensors of packed arguments lie in a flat list, and their numbers.

    counted: for each mask and bias, whether its first dimension counts batch items (or is 1).
    """

    masks: int
    biases: int
    sinks: bool
    seed: bool
    numbers: tuple[Any, ...]
    counted: tuple[bool, ...]

    @classmethod
    def of(cls, packed: Sequence[Any]) -> FlatArguments:
        """The layout of what `packed.pack` gives."""
        masks, biases, sinks, seed, *numbers = packed
        counted = [False] * len(masks)
        for op, args in Program(tuple(numbers[0]), (), 0, 0, 0, 0, CPU).instructions():
            for i, dims in zip(args, op.form.tensors, strict=False):
                counted[i] = dims[:1] == "b"
        counted += [kind == Kind.DENSE for kind in numbers[1][::BIAS_WORDS]]
        return cls(
            len(masks), len(biases), sinks is not None, seed is not None, tuple(numbers),
            tuple(counted),
        )  # fmt: skip

    def packed(self, flat: Sequence[Tensor]) -> list[Any]:
        """The packed arguments of masks, biases, sinks and seed laid flat."""
        left = list(flat)
        masks = [left.pop(0) for _ in range(self.masks)]
        biases = [left.pop(0) for _ in range(self.biases)]
        sinks = left.pop(0) if self.sinks else None
        seed = left.pop(0) if self.seed else None
        return [masks, biases, sinks, seed, *self.numbers]

    @property
    def kinds(self) -> list[str]:
        """Of each flat tensor: "some" has an entry per batch item or one for all, "" neither."""
        return ["some" if c else "" for c in self.counted] + [""] * (self.sinks + self.seed)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(laid: FlatArguments, op: Any, backward: Any, *flat: Tensor) -> Any:
        return op(*flat[:3], *laid.packed(flat[3:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.laid, _, ctx.op, *flat = inputs
        ctx.save_for_backward(*flat, *output)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        laid: FlatArguments = ctx.laid
        first = 6 + laid.masks  # behind laid, the ops, query, key and value
        wanted = tuple(ctx.needs_input_grad[first : first + laid.biases])
        grads = _Backward.apply(laid, ctx.op, wanted, *ctx.saved_tensors, grad_out, grad_lse)
        d_biases = [g if want else None for g, want in zip(grads[3:], wanted, strict=False)]
        more = [*[None] * laid.masks, *d_biases, *grads[3 + laid.biases :], *[None] * laid.seed]
        return None, None, None, *grads[:3], *more

    @staticmethod
    def vmap(
        info: Any, in_dims: Dims, laid: FlatArguments, op: Any, backward: Any, *flat: Tensor
    ) -> Any:
        def once(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            answer: Sequence[Tensor] = _Forward.apply(laid, op, backward, *tensors)
            return answer

        kinds = [*["all"] * 3, *laid.kinds]
        return mapped(once, flat, in_dims[3:], kinds, info.batch_size, not laid.seed), (0, 0)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(laid: FlatArguments, op: Any, wanted: tuple[bool, ...], *tensors: Tensor) -> Any:
        packed = laid.packed(tensors[3:-4])
        return tuple(op(*tensors[:3], *packed, *tensors[-4:], list(wanted)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RegardError(
            "second derivatives are asked for; only engine='reference' can be differentiated twice"
        )

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Dims,
        laid: FlatArguments,
        op: Any,
        wanted: tuple[bool, ...],
        *tensors: Tensor,
    ) -> Any:
        def once(slices: Sequence[Tensor]) -> Sequence[Tensor]:
            answer: Sequence[Tensor] = _Backward.apply(laid, op, wanted, *slices)
            return answer

        # The gradient of what all items share is a sum over the items of one slice
        folds = not laid.seed and not laid.biases and not laid.sinks
        kinds = [*["all"] * 3, *laid.kinds, *["all"] * 4]
        answers = mapped(once, tensors, in_dims[3:], kinds, info.batch_size, folds)
        return answers, (0,) * len(answers)


def mapped(
    once: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    tensors: Sequence[Tensor],
    dims: Dims,
    kinds: Sequence[str],
    size: int,
    folds: bool = True,
) -> tuple[Tensor, ...]:
    """What `once` gives for each of `size` slices of the tensors along dims, stacked in front.

    kinds: of each tensor, "all" has an entry per batch item (the first has), "some" that or one for
    all of them, "" neither. folds: whether the slices may be computed as one batch.
    """
    if not folds or any(d is not None and not k for d, k in zip(dims, kinds, strict=True)):
        parts = [
            once([t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)])
            for i in range(size)
        ]
        return tuple(torch.stack(list(part)) for part in zip(*parts, strict=True))
    first = tensors[0].shape if dims[0] is None else tensors[0].movedim(dims[0], 0).shape[1:]
    folded = []
    for tensor, dim, kind in zip(tensors, dims, kinds, strict=True):
        if dim is None and (not kind or (kind == "some" and tensor.shape[0] == 1)):
            folded.append(tensor)
            continue
        whole = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        folded.append(whole.expand(-1, first[0], *whole.shape[2:]).flatten(0, 1))
    return tuple(answer.unflatten(0, (size, first[0])) for answer in once(folded))
