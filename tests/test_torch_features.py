"""torch.compile, torch.export, autocast, torch.func, checkpointing and DDP over our modules."""

import io
import shutil
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard import (
    ALiBi,
    Causal,
    Padding,
    Received,
    RegardError,
    TopK,
    Window,
)
from regard.nn import Block, Decoder, MultiHeadAttention, Rotary, Transformer
from regard.nn.functional import scaled_dot_product_attention
from test_nn import drawn, seeded, tokens

DIM, HEADS = 16, 4


class Masked(nn.Module):
    """A module called with a mask, which torch.export cannot be given."""

    def __init__(self, module: nn.Module, **request: Any) -> None:
        super().__init__()
        self.module, self.request = module, request

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.module(*tensors, **self.request)


def translator(decoder: int = 2, **more: Any) -> Transformer:
    given = {"kv_heads": 2, "norm": "rms", "activation": "swiglu", "qk_norm": True} | more
    return seeded(
        lambda: Transformer(vocab=11, dim=DIM, heads=HEADS, encoder=1, decoder=decoder, **given)
    )


def attend(**more: Any) -> MultiHeadAttention:
    return seeded(lambda: MultiHeadAttention(DIM, HEADS, kv_heads=2, rotary=Rotary(4), **more))


MODULES: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "causal": (lambda: Masked(attend(), mask=Causal()), (drawn(2, 9, DIM),)),
    "window": (lambda: Masked(attend(), mask=Causal() & Window(3)), (drawn(2, 9, DIM),)),
    "cross": (attend, (drawn(2, 9, DIM), drawn(2, 5, DIM))),
    "tables": (
        lambda: Masked(attend(sinks=True, softcap=5.0), mask=Causal(), bias=ALiBi()),
        (drawn(2, 9, DIM),),
    ),
    "tiled": (lambda: Masked(attend(engine="tiled"), mask=Causal()), (drawn(2, 9, DIM),)),
    "block": (
        lambda: seeded(lambda: Block(DIM, HEADS, cross=True, pre_norm=False)),
        (drawn(2, 9, DIM), drawn(2, 5, DIM)),
    ),
    **{
        kind: (lambda kind=kind: translator(positions=kind, length=20), (tokens(), tokens(9)))
        for kind in ("sinusoidal", "learned", "rotary", "relative", "alibi")
    },
}
every_module = pytest.mark.parametrize("make, given", MODULES.values(), ids=MODULES)


def stepped(run: Any, module: nn.Module, given: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and the gradients of the parameters."""
    module.zero_grad()
    out = run(*given)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


# torch.compile


@pytest.mark.sample(0)
@every_module
def test_compiles_whole(make, given):
    """One graph, forward and backward."""
    module = make()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(stepped(compiled, module, given), stepped(module, module, given))


@pytest.mark.slow
def test_compiles_with_observers():
    model = translator().eval()

    def run(target: Tensor, source: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
        logits, seen = model(
            target, source, source_mask=Padding(keep), observe=[TopK(2), Received()]
        )
        top, received = seen.decoder[1].cross
        return logits, top.weights, top.indices, received.mean

    given = tokens(), tokens(9), torch.arange(9) < torch.tensor([[9], [4]])
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), run(*given))


SDPA: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.6},
    "float": {"attn_mask": drawn(2, 1, 5, 7)},
    "scale": {"scale": 0.3},
}


@pytest.mark.sample(0)
@pytest.mark.parametrize("request_", SDPA.values(), ids=SDPA)
def test_the_function_compiles_whole(request_):
    def run(*t: Tensor) -> Tensor:
        return scaled_dot_product_attention(*t, **request_)

    tensors = [drawn(2, 4, n, 8, seed=n) for n in (5, 7, 7)]
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    answers = []
    for function in (run, compiled):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        out.square().sum().backward()
        answers.append([out, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(answers[1], answers[0])


@pytest.mark.sample(0)
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("request_", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_the_function_compiles_for_any_length(request_, marked):
    """At the second length torch leaves sizes open, with mark_dynamic at the first."""

    def run(*t: Tensor) -> Tensor:
        return scaled_dot_product_attention(*t, **request_)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for length in (5, 9, 30):
        tensors = [drawn(2, 4, length, 8, seed=n) for n in range(3)]
        if marked:
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, 2)
        torch.testing.assert_close(compiled(*tensors), run(*tensors))


def test_dropout_compiles():
    """The seed is drawn within the graph: another at each call."""
    module = attend(dropout=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    first, second = (compiled(drawn(2, 9, DIM)) for _ in range(2))
    assert not torch.allclose(first, second)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
def test_inductor():
    module = Masked(attend(), mask=Causal() & Window(3))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True)
    given = (drawn(2, 9, DIM),)
    torch.testing.assert_close(stepped(compiled, module, given), stepped(module, module, given))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["translator", "tiled"])
def test_one_graph_for_all_lengths(kind):
    """Of a whole model; and of the engine whose loop over tiles is longer for longer sequences."""
    model = translator(decoder=1).eval() if kind == "translator" else attend(engine="tiled")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    frames = 0
    for batch, length in ((2, 7), (3, 12), (4, 23), (5, 40)):
        rng = torch.Generator().manual_seed(batch)
        given = [torch.randint(11, (batch, n), generator=rng) for n in (length, length + 3)]
        if kind == "tiled":
            given = [drawn(batch, n, DIM) for n in (length, length + 3)]
        torch.testing.assert_close(compiled(*given), model(*given))
        # The first may take two attempts: torch starts over where it finds a number to specialise
        frames = frames or counter.frame_count
        assert counter.frame_count == frames


def test_a_compiled_model_cannot_be_watched_but_observed():
    import regard

    model = translator().eval()
    with (
        pytest.raises(RegardError, match=r"watch the original, model\._orig_mod"),
        regard.watch(torch.compile(model, backend="eager")),
    ):
        pass


# torch.export


@pytest.mark.sample(0)
@every_module
def test_exports(make, given):
    """Saved, loaded again, and the same numbers."""
    module = make().eval()
    exported = torch.export.export(module, given)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    again = torch.export.load(file).module()
    with torch.no_grad():
        torch.testing.assert_close(again(*given), module(*given))


@pytest.mark.sample(0)
@pytest.mark.parametrize("engine", ["auto", "tiled"])
@pytest.mark.parametrize("mask", [Causal(), Causal() & Window(3)], ids=str)
def test_exports_with_any_batch_and_length(mask, engine):
    module = Masked(attend(engine=engine), mask=mask).eval()
    sizes = ({0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=4096)},)
    exported = torch.export.export(module, (drawn(2, 9, DIM),), dynamic_shapes=(sizes,))
    for batch, length in ((3, 5), (5, 40)):
        x = drawn(batch, length, DIM)
        torch.testing.assert_close(exported.module()(x), module(x))


def test_exports_the_function():
    class Model(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return scaled_dot_product_attention(query, key, value, is_causal=True)

    tensors = tuple(drawn(2, 4, n, 8, seed=n) for n in (5, 7, 7))
    exported = torch.export.export(Model(), tensors)
    torch.testing.assert_close(exported.module()(*tensors), Model()(*tensors))


# Autocast


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_module
def test_autocast(make, given, dtype):
    """Attention in half precision, outputs near full ones, gradients in the parameters' dtype."""
    module = make()
    exact, *exact_grads = stepped(module, module, given)
    module.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        out = module(*given)
        loss = out.float().square().sum()
    loss.backward()
    error = (out - exact).detach().abs().mean()
    assert float(error) < 0.05 * float(exact.abs().mean())
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    assert all(g.dtype == torch.float32 for g in grads)
    norms = [torch.cat([g.flatten() for g in gs]) for gs in (grads, exact_grads)]
    assert float(torch.cosine_similarity(*norms, dim=0)) > 0.98


def test_autocast_attends_in_half_precision():
    module, x = attend(qk_norm=True), drawn(2, 9, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module.remember(x).value.dtype == torch.bfloat16
        assert module(x, mask=Causal()).dtype == torch.bfloat16


# Checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    """Block by block, with dropout: what is recomputed drops the same weights."""
    stack = seeded(lambda: Decoder(3, DIM, HEADS, dropout=0.3, positions=Rotary(4)))
    answers = []
    for saving in (False, True):
        torch.manual_seed(7)
        stack.zero_grad()
        x = drawn(2, 9, DIM).requires_grad_()
        h = x
        for layer in stack.layers:
            if saving:
                h = (
                    checkpoint(layer, h, mask=Causal(), use_reentrant=False)
                    if not use_reentrant
                    else checkpoint(lambda h, at=layer: at(h, mask=Causal()), h, use_reentrant=True)
                )
            else:
                h = layer(h, mask=Causal())
        h.square().sum().backward()
        answers.append([h.detach(), x.grad, *(p.grad.clone() for p in stack.layers.parameters())])
    for ours, wanted in zip(*answers, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_checkpointing_observes():
    block = seeded(lambda: Block(DIM, HEADS))
    x = drawn(2, 9, DIM).requires_grad_()
    out, seen = checkpoint(block, x, mask=Causal(), observe=[TopK(2)], use_reentrant=False)
    out.sum().backward()
    wanted = block(x, mask=Causal(), observe=[TopK(2)])[1].own[0]
    torch.testing.assert_close(seen.own[0].weights, wanted.weights)


# DDP


def work(rank: int, folder: str, answers: Any) -> None:
    """One of two processes: a step on its own half of the batch."""
    import os

    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        model = translator(positions="relative")
        parallel = DistributedDataParallel(model)
        target, source = tokens(), tokens(9, seed=1)
        mine = slice(rank, rank + 1)
        logits, seen = parallel(target[mine], source[mine], observe=[TopK(2)])
        logits.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        answers[rank] = grads, seen.decoder[1].cross[0].weights
    finally:
        dist.destroy_process_group()


@pytest.mark.slow  # processes that compute together: the default run has test_distributed.py
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_two_processes_train_as_one(tmp_path):
    """DDP over gloo: the averaged gradients are those of the whole batch; observers work."""
    import torch.multiprocessing as mp

    with mp.get_context("spawn").Manager() as manager:
        answers = manager.dict()
        mp.spawn(work, (str(tmp_path), answers), nprocs=2)
        (first, weights), (second, others) = answers[0], answers[1]
    model = translator(positions="relative")
    logits, seen = model(tokens(), tokens(9, seed=1), observe=[TopK(2)])
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(first[name], parameter.grad, rtol=1e-4, atol=1e-6)
        assert torch.equal(first[name], second[name])
    wanted = seen.decoder[1].cross[0].weights
    torch.testing.assert_close(torch.cat([weights, others]), wanted)
