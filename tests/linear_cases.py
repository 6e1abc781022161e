"""The calls on which linear attention is tested in all its forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid, normalize

from cases import Case, Sizes, at, bools, floats, shared_by_the_batch, sliced, transposed
from regard import Documents, Padding
from regard.linear import Favor

Build = Callable[[Sizes, Generator], dict[str, Any]]


def short(tensor: Tensor) -> Tensor:
    """Vectors of length 1: the delta rule's keys."""
    return normalize(tensor, dim=-1) if tensor.shape[-1] else tensor


def retention(heads: int) -> Tensor:
    return torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=torch.float32))))


def gate(rng: Generator, *shape: int) -> Tensor:
    """Log decays of which some are near 0 and some near −30."""
    return logsigmoid(floats(rng, *shape) * 4)


def forgetful(rng: Generator, *shape: int) -> Tensor:
    """Factors of exactly 0 and exactly 1 among others."""
    gates, kind = gate(rng, *shape), torch.rand(shape, generator=rng)
    return gates.masked_fill(kind < 0.05, -torch.inf).masked_fill(kind > 0.8, 0)


def strength(rng: Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=rng)


def plain(**more: Any) -> Build:
    """The identity map and what else is given; a function of (sizes, generator) is called."""
    return lambda s, g: {
        "feature_map": None,
        **{name: v(s, g) if callable(v) else v for name, v in more.items()},
    }


def scalar(s: Sizes, g: Generator) -> Tensor:
    return gate(g, s.batch, s.kv_heads, s.k_len)


def channel(s: Sizes, g: Generator) -> Tensor:
    return gate(g, s.batch, s.kv_heads, s.k_len, s.dim)


def beta(s: Sizes, g: Generator) -> Tensor:
    return strength(g, s.batch, s.kv_heads, s.k_len)


FORMS: dict[str, Build] = {
    "elu": lambda s, g: {},
    "elu, fixed": lambda s, g: {"decay": retention(s.heads)},
    "elu, gated": lambda s, g: {"decay": scalar(s, g)},
    "elu, not normalised": lambda s, g: {"normalise": False, "scale": 0.2},
    "identity": lambda s, g: {"feature_map": "identity", "scale": s.dim**-0.5},
    "relu": lambda s, g: {"feature_map": torch.relu},
    "wider": lambda s, g: {"feature_map": lambda x: torch.cat([x.exp(), x.neg().exp()], -1),
                           "normalise": True},
    "favor": lambda s, g: {"feature_map": Favor(24, 3)},
    "favor, gated": lambda s, g: {"feature_map": Favor(8), "decay": scalar(s, g)},
    "favor, not normalised": lambda s, g: {"feature_map": Favor(40), "normalise": False},
    "retention": plain(decay=lambda s, g: retention(s.heads)),
    "retention of kv heads": plain(decay=lambda s, g: retention(s.kv_heads)),
    "scalar gate": plain(decay=scalar),
    "scalar gate of heads": plain(decay=lambda s, g: gate(g, s.batch, s.heads, s.k_len)),
    "gla": plain(decay=channel, scale=0.5),
    "gla of heads": plain(decay=lambda s, g: gate(g, s.batch, s.heads, s.k_len, s.dim)),
    "gates of 0 and 1": plain(decay=lambda s, g: forgetful(g, s.batch, s.kv_heads, s.k_len)),
    "channels of 0 and 1": plain(
        decay=lambda s, g: forgetful(g, s.batch, s.kv_heads, s.k_len, s.dim)
    ),
    "no decay at all": plain(decay=lambda s, g: torch.zeros(s.kv_heads)),
    "delta": plain(beta=beta),
    "delta of heads": plain(beta=lambda s, g: strength(g, s.batch, s.heads, s.k_len)),
    "delta of full strength": plain(beta=lambda s, g: torch.ones(s.batch, s.kv_heads, s.k_len)),
    "gated delta": plain(beta=beta, decay=scalar),
    "gated delta, fixed": plain(beta=beta, decay=lambda s, g: retention(s.heads)),
    "channel delta": plain(beta=beta, decay=channel),
    "channel delta of 0 and 1": plain(
        beta=beta, decay=lambda s, g: forgetful(g, s.batch, s.kv_heads, s.k_len, s.dim)
    ),
    "elu delta": lambda s, g: {"beta": beta(s, g) * 0.1},
}  # fmt: skip

MASKS: dict[str, Callable[[Sizes, Generator], Any]] = {
    "documents": lambda s, g: Documents.from_cu_seqlens(
        torch.tensor([0, 1, 2, s.k_len // 2, s.k_len // 2, s.k_len])
    ),
    "documents of items": lambda s, g: Documents(
        torch.stack([torch.arange(s.k_len) // (9 + 31 * b) for b in range(s.batch)])
    ),
    "documents with gaps": lambda s, g: Documents(gaps(s, g)),
    "padding": lambda s, g: Padding(bools(g, s.batch, s.k_len)),
    "left padding": lambda s, g: Padding(torch.arange(s.k_len) >= 20),
    "both": lambda s, g: Documents(gaps(s, g)) & Padding(bools(g, s.batch, s.k_len, share=0.9)),
    "nothing": lambda s, g: Padding(torch.zeros(s.k_len, dtype=torch.bool)),
}


def gaps(s: Sizes, g: Generator) -> Tensor:
    """Three documents an item, and tokens of none between and within them."""
    ids = torch.arange(s.k_len) * 3 // max(s.k_len, 1)
    return ids.expand(s.batch, -1).masked_fill(bools(g, s.batch, s.k_len, share=0.2), -1)


def masked(form: str, mask: str) -> Build:
    return lambda s, g: {**FORMS[form](s, g), "mask": MASKS[mask](s, g)}


def delta(form: str) -> bool:
    return "delta" in form


def case(name: str, sizes: Sizes, form: str, build: Build | None = None, **more: Any) -> Case:
    layout = more.pop("layout", lambda tensor: tensor)
    both = (lambda t: layout(short(t))) if delta(form) else layout
    return Case(name, sizes, build or FORMS[form], layout=both, **more)


BASE = at(131, batch=2, heads=4, kv_heads=2, dim=6, v_dim=5)
SWEPT = ("elu", "retention", "gla", "gated delta", "channel delta")
CAUSAL = [
    *(case(form, BASE, form) for form in FORMS),
    *(
        case(f"{form}, {mask}", BASE, form, masked(form, mask))
        for form in ("elu", "identity", "gla", "delta", "channel delta")
        for mask in MASKS
    ),
    case("favor, documents", BASE, "favor", masked("favor", "documents of items")),
    case("elu, gated, both", BASE, "elu, gated", masked("elu, gated", "both")),
    *(
        case(f"{n} tokens, {form}", at(n, batch=1, heads=2, kv_heads=1, dim=4), form)
        for n in (1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129)
        for form in SWEPT
    ),
    *(
        case(f"dim {d}, v_dim {v}, {form}", at(40, batch=1, dim=d, v_dim=v), form)
        for d, v in ((1, 1), (1, 7), (24, 1), (64, 32))
        for form in SWEPT
    ),
    *(
        case(f"{h} heads of {kv}, {form}", at(70, batch=1, heads=h, kv_heads=kv, dim=4), form)
        for h, kv in ((1, 1), (3, 3), (6, 1), (6, 2))
        for form in ("elu", "gla of heads", "channel delta", "delta of heads")
    ),
    case("large queries", BASE, "elu", magnitude=30.0),
    case("small queries", BASE, "favor", magnitude=1e-4),
    *(
        case(f"{name}, {form}", BASE, form, layout=layout)
        for name, layout in (
            ("transposed", transposed), ("sliced", sliced), ("expanded", shared_by_the_batch)
        )
        for form in ("elu", "channel delta")
    ),
    *(
        case(f"{name}, {form}", sizes, form)
        for name, sizes in (
            ("no batch", replace(BASE, batch=0)), ("no token", at(0)), ("no dim", at(5, dim=0))
        )
        for form in ("elu", "retention", "channel delta", "favor")
    ),
]  # fmt: skip


def everywhere(build: Build) -> Build:
    return lambda s, g: {**build(s, g), "causal": False}


def crossed(s: Sizes, g: Generator) -> dict[str, Any]:
    """Documents of queries and keys, in any order; some queries have no key."""
    ids = torch.randint(-1, 5, (s.batch, s.q_len), generator=g)
    return {"mask": Documents(ids, torch.randint(-1, 4, (s.k_len,), generator=g))}


CROSS = at(70, 90, dim=6, v_dim=5)
EVERYWHERE = [
    *(
        case(f"everywhere, {form}", sizes, form, everywhere(FORMS[form]))
        for form in ("elu", "identity", "relu", "favor", "elu, not normalised")
        for sizes in (BASE, CROSS)
    ),
    *(
        case(f"everywhere, {form}, {mask}", BASE, form, everywhere(masked(form, mask)))
        for form in ("elu", "identity")
        for mask in MASKS
    ),
    case("across documents", CROSS, "elu", everywhere(crossed)),
    case("everywhere, one query", at(1, 33), "elu", everywhere(FORMS["elu"])),
    case("everywhere, no key", at(7, 0), "elu", everywhere(FORMS["elu"])),
    case("everywhere, no query", at(0, 7), "favor", everywhere(FORMS["favor"])),
    case("everywhere, no batch", at(5, 7, batch=0), "elu", everywhere(crossed)),
]
CASES = CAUSAL + EVERYWHERE
# Without the sweeps of sizes, for tests that take long or look at something else
FEW = [c for c in CASES if not (c.name[0].isdigit() or c.name.startswith(("dim ", "no ")))]
