"""The factory of registered ops: every kind of argument, there or not, wanted or not."""

import itertools

import pytest
import torch

from regard.engines.op_with_backward import op_with_backward


def forward(x, other, many, code, scale, keep):
    """(scale · x · Σ many + other, x · Σ many), and Σ many if it is kept."""
    total = sum(many, torch.zeros_like(x))
    out = scale * x * total + (0 if other is None else other)
    return [out, x * total, total if keep else x.new_empty(0)]


def fake(x, other, many, code, scale, keep):
    return [torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape if keep else 0)]


def backward(x, other, many, code, scale, out, total, grad_out, grad_more, wanted):
    assert code == CODE
    slope = scale * grad_out + (0 if grad_more is None else grad_more)
    grads = [slope * total] + ([] if other is None else [grad_out.clone()])
    return grads + [slope * x if want else x.new_empty(0) for want in wanted]


CODE = []  # an empty list of numbers wants a list as its gradient

OP, BACKWARD = op_with_backward(
    "of_a_test",
    "Tensor x, Tensor? other, Tensor[] many, int[] code, float scale, bool keep",
    "Tensor[]",
    forward=forward,
    fake=fake,
    backward=backward,
    differentiable=("x", "other", "many"),
    kept={0: "out", 2: "total"},
    gradients=("Tensor grad_out", "Tensor? grad_more"),
    unread=("keep",),
)


def given(other, wanted):
    torch.manual_seed(0)
    x, beside = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    many = [torch.randn(3, dtype=torch.float64, requires_grad=want) for want in wanted]
    return x, beside if other else None, many, CODE, 0.5, True


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("wanted", [(), (True,), (False, True), (True, False, True)])
def test_gradients_are_those_of_plain_torch(other, wanted):
    """Of either output and of both, whichever arguments are there."""
    args = given(other, wanted)
    leaves = [t for t in (*args[:2], *args[2]) if t is not None and t.requires_grad]
    for weights in itertools.product((0.0, 1.0), repeat=2):
        if not any(weights):
            continue
        ours, plain = (
            sum(w * out.sin().sum() for w, out in zip(weights, found, strict=False) if w)
            for found in (OP(*args), forward(*args))
        )
        theirs = torch.autograd.grad(plain, leaves, allow_unused=True, materialize_grads=True)
        mine = torch.autograd.grad(ours, leaves, allow_unused=True, materialize_grads=True)
        for one, two in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("wanted", [(), (False, True)])
def test_the_ops_are_what_they_say(other, wanted):
    """Schema and fakes; the backward's follow from the forward's."""
    args = given(other, wanted)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.regard.of_a_test.default, args, test_utils=tests)
    x = args[0].detach()
    still = (x, *(t if t is None else t.detach() for t in args[1:2]), [m.detach() for m in args[2]])
    rest = (*still, CODE, 0.5, *[torch.ones_like(x)] * 3, None, list(wanted))
    torch.library.opcheck(
        torch.ops.regard.of_a_test_backward.default, rest,
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_a_gradient_that_may_not_come_needs_its_output():
    """Else the backward would get nothing in the place of zeros."""
    with pytest.raises(ValueError, match="output 0 must be kept"):
        op_with_backward(
            "of_another_test", "Tensor x", "Tensor[]", forward=forward, fake=fake,
            backward=backward, differentiable=("x",), kept={}, gradients=("Tensor grad_out",),
        )  # fmt: skip
