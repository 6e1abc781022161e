"""`context_parallel`: attention over ranks that each hold a part of the sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from ...call.checked import Call
from ...call.geometry import Span
from ...call.observers import Effect
from ...engines import functorch, refusals
from ...errors import RegardError
from ..region import inside
from . import formulas, heads, shards
from .collectives import Ranks
from .gather import Gather
from .layout import Layout, Order, named
from .parts import engine_of
from .reading import Shard, Way, read, results_of
from .ring import Ring
from .steps import Held, Step, step
from .whole import Whole, agreed, hollow

How = Literal["auto", "heads", "gather", "ring"]
WAYS = ("heads", "gather", "ring")
MOST = 2**30  # bytes of gathered keys and values that may lie on a rank at a time


@contextmanager
def context_parallel(
    mesh: DeviceMesh,
    how: How = "auto",
    *,
    order: str | Order = "zigzag",
    most: int = MOST,
) -> Iterator[None]:
    """Inside, `attention` takes this rank's part of the sequence, and sees all of it.

        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
        own = regard.distributed.shard(inputs, mesh["cp"])
        with regard.context_parallel(mesh["cp"]):
            out, (top,) = regard.attention(q, k, v, mask=Causal(), observe=[TopK(8)])
        top.gather()  # of the whole sequence, in every rank

    mesh: a DeviceMesh of one dimension. Reached are `regard.attention`, `regard.nn`, models with
    attn_implementation="regard", and watched or recorded ones. order: as the sequence was cut.
    how: "heads": each rank computes some heads of the whole sequence, after an all-to-all; where
    the ranks divide kv_heads. "gather": its own queries in all heads, on keys and values gathered
    some kv heads at a time, `most` bytes of them. "ring": blocks of keys and values pass from rank
    to rank. "auto": of those that can, what sends least; the ring where one kv head of all keys
    has more than `most` bytes.

    Masks, biases and positions are those of the whole sequence; a Padding or Documents may also
    hold those of the rank's own tokens, and is gathered then. Observers return `Sharded` results.
    Gradients of q, k and v are those of the sum of the ranks' losses; those of biases and sinks are
    this rank's share, to be summed over ranks as those of any parameter. Every rank must make the
    same calls: RegardError, in all of them, where they differ, and where `how` cannot be.
    """
    if how not in ("auto", *WAYS):
        raise RegardError(f'how is {how!r}; give "auto", "heads", "gather" or "ring"')
    ranks = Ranks(mesh)
    with _Guard(), inside(Parallel(ranks, how, named(order, ranks.size), most)):
        yield


class _Guard(TorchFunctionMode):
    """RegardError where a model computes attention by torch: a rank would see its part alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (F.scaled_dot_product_attention, F.multi_head_attention_forward):
            raise RegardError(
                f"context_parallel: {func.__name__} of torch sees this rank's part of the sequence "
                'alone; use attn_implementation="regard", regard.nn, or regard.attention'
            )
        return func(*args, **(kwargs or {}))


class Parallel:
    """The region that `context_parallel` opens."""

    def __init__(self, ranks: Ranks, how: str, order: Order, most: int) -> None:
        self.ranks, self.how, self.order, self.most = ranks, how, order, most

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, *, engine: str = "auto", **request: Any
    ) -> Any:
        """As `regard.attention`, on this rank's part of the sequence."""
        out, lse, results = self.run(query, key, value, engine=engine, **request)
        found = (out, lse) if request.get("return_lse") else (out,)
        if request.get("observe") is not None:
            found = (*found, results)
        return found if len(found) > 1 else out

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        engine: str = "auto",
        asking: Callable[[Call], Call] | None = None,
        **request: Any,
    ) -> tuple[Tensor, Tensor | None, tuple[Any, ...]]:
        """(out, lse, results); by heads, lse is None unless it is asked for.

        asking: gives the call of the whole sequence the observers of a watch; all ranks do alike.
        """
        whole = self.whole(query, key, value, engine=engine, **request)
        if asking is not None:
            whole = replace(whole, call=asking(whole.call))
        how = self.chosen(whole, query, key, value)
        if how == "heads":
            lse = bool(request.get("return_lse"))
            return heads.attend(whole, query, key, value, engine, lse)
        job: Gather | Ring = (
            Ring(whole, engine) if how == "ring" else Gather(whole, engine, self.most)
        )
        biases = [b.tensor for b in whole.call.biases]
        out, lse = _Attention.apply(job, query, key, value, whole.call.sinks, *biases)
        return out, lse, job.results

    @property
    def first(self) -> bool:
        """Whether this is the first rank."""
        return self.ranks.rank == 0

    @property
    def place(self) -> tuple[int, int]:
        """(this rank, how many there are)."""
        return self.ranks.rank, self.ranks.size

    def tell(self, text: str) -> list[str]:
        """What each rank says. None goes on before the last has spoken."""
        return self.ranks.tell(text)

    def joined(self, own: Tensor, dim: int) -> Tensor:
        """The whole of what lies on each rank, in every rank."""
        length = torch.tensor([own.shape[dim]], dtype=torch.int64, device=own.device)
        held = [int(n) for n in torch.cat(self.ranks.all_gather(length)).tolist()]
        return self.ranks.gather(own, Layout(sum(held), self.order), dim)

    def shard(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Shard:
        """This rank's part of a whole call, with what its observers see; all ranks take part."""
        return read(call, self._reading(call, key), query, key, value)

    def read(self, call: Call, query: Tensor, key: Tensor) -> tuple[Any, ...]:
        """What the observers of a whole call see, sharded; all ranks take part."""
        return results_of(call, self._reading(call, key), query, key)

    def _reading(self, call: Call, key: Tensor) -> Way:
        """How keys travel where values do not."""
        one = call.place.batch * call.place.k_len * key.shape[3] * key.element_size()
        ring = self.how == "ring" or (self.how != "gather" and one > self.most)
        return Way(self.ranks, self.order, ring, self.most)

    def together(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """The whole call with its numbers, gathered in every rank; without gradients."""
        queries, keys = (Layout(n, self.order) for n in (call.place.q_len, call.place.k_len))
        q, k, v = (
            self.ranks.gather(t.detach(), layout, 2)
            for t, layout in ((query, queries), (key, keys), (value, keys))
        )
        return replace(call, query=q, key=k, value=v, dropout=None)

    def cut(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of a model's arguments, as `shard` cuts them."""
        own: dict[str, Any] = shards.cut(inputs, self.ranks, self.order)
        return own

    def ranges(self, length: int) -> list[tuple[int, int]]:
        """The ranges (start, stop) of a sequence's positions that this rank holds."""
        return Layout(length, self.order).spans(self.ranks.rank)

    def step(
        self, query: Tensor, held: Held, *, asking: Callable[[Call], Call] | None = None,
        **request: Any,
    ) -> Step:  # fmt: skip
        """A few queries, the same in every rank, on the keys that the ranks hold."""
        return step(self.ranks, query, held, asking, **request)

    def positions(self, length: int, start: int, device: torch.device) -> Tensor:
        """The positions of this rank's tokens, of which there are `length`: int64 (length,)."""
        own = torch.tensor([length], dtype=torch.int64, device=device)
        held = [int(n) for n in torch.cat(self.ranks.all_gather(own)).tolist()]
        layout = Layout(sum(held), self.order)
        if held != layout.sizes:
            raise RegardError(
                f"the ranks hold {held} of {sum(held)} positions; in this order they must hold "
                f"{layout.sizes}: cut the sequence by regard.distributed.shard"
            )
        return layout.positions(self.ranks.rank, device) + start

    def whole(
        self, query: Tensor, key: Tensor, value: Tensor, *, engine: str = "auto", **request: Any
    ) -> Whole:
        """The call over the whole sequence; all ranks take part."""
        if request.get("pages") is not None:
            raise RegardError("context_parallel: keys in pages are not sharded; give them in order")
        if torch.compiler.is_compiling() or functorch.active():
            raise RegardError(
                "context_parallel: attention over ranks runs under no compiler and no transform of "
                "torch.func; compile what is between its calls"
            )
        return agreed(self.ranks, self.order, self.how, query, key, value, request, engine)

    def chosen(self, whole: Whole, query: Tensor, key: Tensor, value: Tensor) -> str:
        """The way that the call goes; RegardError where the one asked for cannot."""
        refused = self.refused(whole, wants=_wants(whole, query, key, value))
        if self.how != "auto":
            if refused[self.how]:
                said = "; ".join(refused[self.how])
                raise RegardError(
                    f'context_parallel: how="{self.how}" cannot run this: {said}; "auto" takes a '
                    "way that can, if there is one"
                )
            return self.how
        able = [how for how in WAYS if not refused[how]]
        if not able:
            lines = "; ".join(f"{how}: {', '.join(why)}" for how, why in refused.items())
            raise RegardError(f"context_parallel: no way can run this call: {lines}")
        sizes = self.sizes(whole, query, value)
        one = sizes.batch * sizes.k_len * (sizes.dim + sizes.v_dim) * sizes.element
        cost = {how: formulas.forward(how, sizes) for how in able}
        if "gather" in able and "ring" in able:
            del cost["gather" if one > self.most else "ring"]
        return min(cost, key=lambda how: cost[how])

    def refused(self, whole: Whole, wants: bool) -> dict[str, list[str]]:
        """Each way's reasons against a call; [] if it can."""
        call, size = whole.call, self.ranks.size
        by_heads, by_gather, by_ring = list[str](), list[str](), list[str]()
        if call.place.kv_heads % size:
            by_heads.append(f"{size} ranks do not divide kv_heads {call.place.kv_heads}")
        if call.dropout is not None:
            by_heads.append("dropout counts heads, and a rank has some of them alone")
        if any(isinstance(o, Effect) and o.norm for o in call.observers):
            said = 'Effect of a norm reads the keys after the backward; they are gone: how="heads"'
            by_gather.append(said)
            by_ring.append(said)
        if any(isinstance(o, Effect) for o in call.observers) and not wants:
            said = "Effect needs gradients: nothing here asks for one"
            by_gather.append(said)
            by_ring.append(said)
        return {"heads": by_heads, "gather": by_gather, "ring": by_ring}

    def sizes(self, whole: Whole, query: Tensor, value: Tensor) -> formulas.Sizes:
        """The numbers of the formulas."""
        place = whole.call.place
        return formulas.Sizes(
            self.ranks.size, place.batch, place.heads, place.kv_heads, place.q_len, place.k_len,
            query.shape[3], value.shape[3], query.element_size(),
        )  # fmt: skip

    def explain(
        self, query: Tensor, key: Tensor, value: Tensor, **request: Any
    ) -> dict[str, list[str]]:
        """How the call would go, what would travel, and the engines' reasons on a rank's part."""
        whole = self.whole(query, key, value, **request)
        wants = _wants(whole, query, key, value)
        refused = self.refused(whole, wants)
        how = self.chosen(whole, query, key, value)
        sizes = self.sizes(whole, query, value)
        said: dict[str, list[str]] = {f"by {way}": refused[way] for way in WAYS}
        sent = formulas.forward(how, sizes, bool(request.get("return_lse")))
        said["travels"] = [f"by {how}: a rank sends {sent / 2**20:.3f} MiB in the forward"]
        if wants:
            back = formulas.backward(how, sizes, bool(request.get("return_lse")))
            said["travels"].append(f"and {back / 2**20:.3f} MiB in the backward")
        local = self._local(whole, how, query, key, value)
        if wants and how != "heads":
            said["gradients"] = [
                f"by engine {engine_of(local).name}, whichever computes the forward: those of a "
                "part take the log-sum-exp and D of all keys"
            ]
        return said | refusals(local)

    def _local(self, whole: Whole, how: str, query: Tensor, key: Tensor, value: Tensor) -> Any:
        """A call as a rank computes it, in form alone."""
        place, size = whole.call.place, self.ranks.size
        share = slice(0, place.heads // size) if how == "heads" else slice(0, place.heads)
        first = (0, place.q_len) if how == "heads" else whole.queries.spans(self.ranks.rank)[0]
        group = share.stop * place.kv_heads // place.heads
        q = hollow(query, (place.batch, share.stop, first[1] - first[0], query.shape[3]))
        k = hollow(query, (place.batch, group, place.k_len, query.shape[3]))
        v = hollow(query, (place.batch, group, place.k_len, value.shape[3]))
        return whole.part(q, k, v, Span(*first, 0, place.k_len, heads=share))


def _wants(whole: Whole, *tensors: Tensor) -> bool:
    """Whether anything asks for a gradient."""
    given = [*tensors, whole.call.sinks, *(b.tensor for b in whole.call.biases)]
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)


class _Attention(torch.autograd.Function):
    """A job under autograd. It keeps this rank's own tensors: keys are sent again."""

    @staticmethod
    def forward(ctx: Any, job: Gather | Ring, *tensors: Any) -> Any:
        query, key, value, sinks, *biases = tensors
        out, lse = job.forward(query, key, value)
        ctx.job, ctx.wanted = job, [b.requires_grad for b in biases]
        ctx.save_for_backward(query, key, value, sinks, out, lse, *biases)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:
        query, key, value, _, out, lse, *_ = ctx.saved_tensors
        grads = ctx.job.backward(query, key, value, out, lse, grad_out, grad_lse, ctx.wanted)
        return None, *grads
