"""The steps of a walk as titles, lines and tables, which terminal and page lay out, and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..analysis.walk_result import Token, Walk, Weighing
from .look_json import _escaped


class Line(NamedTuple):
    """A line of a step: what it is, its vector, a word on it; strong where it is the result."""

    label: str
    vector: Tensor | None = None
    note: str = ""
    strong: bool = False
    numbers: tuple[str, ...] = ()


class WeightRow(NamedTuple):
    """A row of the table of weights: kind "word", "special", "others", "masked", "sink", "sum"."""

    name: str
    cells: list[str]
    weight: float | None
    value: Tensor | None
    kind: str


@dataclass
class Step:
    """One step: its title, what happens in it, and its lines or the table of weights."""

    title: str
    said: str
    lines: list[Line] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    rows: list[WeightRow] = field(default_factory=list)


def top_keys(walk: Walk, top: int) -> list[int]:
    """The keys that count: the `top` with the largest weights, largest first."""
    weights = walk.weighing.weights
    best = weights.topk(min(top, len(weights))).indices.tolist()
    return [i for i in best if weights[i] > 0]


def steps(walk: Walk, top: int) -> list[Step]:
    """The seven steps, with the `top` tokens that count most named one by one."""
    keys = top_keys(walk, top)
    return [
        _token(walk),
        _vector(walk),
        _project(walk, keys),
        _compare(walk, keys),
        _mix(walk, keys),
        _write(walk),
        _new(walk),
    ]


def head_name(walk: Walk) -> str:
    """layer.head, as `--head` takes it."""
    return f"{walk.layer}.{walk.head}"


def head_line(walk: Walk) -> str:
    """The model, the head, and how it was chosen."""
    of = {"self": "", "encoder": ", encoder", "decoder": ", decoder", "cross": ", cross-attention"}
    size = f"{walk.layers} layers × {walk.heads} heads{of[walk.kind]}"
    return f"{walk.model} · head {head_name(walk)} of {size}"


def chosen_line(walk: Walk) -> str:
    """Why this head; empty where it was asked for."""
    if walk.chosen is None:
        return ""
    to, weight = walk.chosen
    return (
        f"head {head_name(walk)}: of {walk.among} the strongest link from {walk.token.word}, "
        f"to {to} {weight:.3f} (special tokens and sinks apart); --head L.H walks another"
    )


def _token(walk: Walk) -> Step:
    token, tokens = walk.token, walk.reader.tokens
    said = f"{token.name} is token {walk.at} of {len(tokens)} (from 0), id {token.id}"
    if not token.whole:
        word = walk.reader.words[walk.word - walk.reader.first]
        said = f"{token.word} has {len(word.tokens)} tokens; the last, {said}"
    lines = []
    for i, row in enumerate(walk.embedded):
        number = "" if row.row is None else f"row {row.row} of its table"
        lines.append(Line(("+ " if i else "  ") + f"{row.kind}", row.vector, number))
    if walk.entered is not None:
        rows = [row.vector for row in walk.embedded]
        same = _sum_to(rows, walk.entered)
        how = "into layer 0" if same else "normed, into layer 0" if walk.normed else "into layer 0"
        lines.append(Line("= vector" if same else "→ vector", walk.entered, how, True))
    if walk.rotary:
        lines.append(Line("  position", None, "not added here: it rotates query and key (step 3)"))
    return Step("token", said, lines)


def _sum_to(parts: list[Tensor], whole: Tensor) -> bool:
    """Whether the parts add up to the whole, but for rounding."""
    if not parts or any(part.shape != whole.shape for part in parts):
        return False
    return float((torch.stack(parts).sum(0) - whole).abs().amax()) <= 1e-5 * float(
        whole.abs().amax()
    )


def _vector(walk: Walk) -> Step:
    stack = {"encoder": "encoder ", "decoder": "decoder ", "cross": "decoder "}.get(walk.kind, "")
    before = walk.block
    if before == 0:
        said = f"the first {stack}layer takes the vector as it is"
    elif before == 1:
        said = f"{stack}layer 0 made of it"
    else:
        said = f"{stack}layers 0 to {before - 1} made of it"
    lines = [Line("  x", walk.x, f"{len(walk.x)} numbers, length {_length(walk.x)}", True)]
    if walk.taken is not None:
        how = "after self-attention and norm" if walk.kind == "cross" else "after the layer's norm"
        lines.append(Line("  x′", walk.taken, how, True))
    return Step("vector", said, lines)


def _project(walk: Walk, keys: list[int]) -> Step:
    x = "x" if walk.taken is None else "x′"
    turned = ", rotated by their positions" if walk.rotary else ""
    other = " (of the encoder's words)" if walk.kind == "cross" else ""
    said = f"query = W_Q {x} of {walk.token.name}, key = W_K {x} of each word{other}{turned}"
    if walk.kv_heads < walk.heads:
        said += f"; {walk.heads // walk.kv_heads} heads share each key"
    size = f"{len(walk.query)} numbers, length {_length(walk.query)}"
    lines = [Line("  query", walk.query, size, True)]
    names = _names(walk, keys)
    lines += [
        Line(f"  key {name}", walk.keys[i], f"length {_length(walk.keys[i])}")
        for i, name in zip(keys, names, strict=True)
    ]
    return Step("project", said, lines)


def scaling(walk: Walk) -> str:
    """What the products are multiplied by, as the model's makers write it; empty for 1."""
    scale = walk.weighing.scale
    if abs(scale - 1) < 1e-9:
        return ""
    square = 1 / scale**2 if scale > 0 else 0.0
    if 0.5 < square < 1e6 and abs(square - round(square)) < 1e-4 * square:
        root = math.isqrt(round(square))
        return f"÷{root}" if root * root == round(square) else f"÷√{round(square)}"
    return f"×{scale:.4g}"


def _compare(walk: Walk, keys: list[int]) -> Step:
    w = walk.weighing
    columns: list[tuple[str, Tensor]] = [("q·k", w.dots)]
    if scaling(walk):
        columns.append((scaling(walk), w.scaled))
    if w.capped is not None:
        columns.append((f"cap {w.softcap:g}", w.capped))
    if w.bias is not None:
        columns += [("+ bias", w.bias), ("score", w.scores)]
    exp = f"exp(·{-w.shift:+.1f})".replace("-", "−") if w.shift else "exp"
    said = "how well query and key fit; exp, and ÷ the sum, make it a weight"
    if w.shift:
        said = f"how well query and key fit; {w.shift:.1f} is taken off before exp: it cancels"
    step = Step("compare", said, header=[*(name for name, _ in columns), exp, f"÷{num(w.total)}"])
    names = _names(walk, keys)
    for i, name in zip(keys, names, strict=True):
        cells = [num(float(c[i])) for _, c in columns]
        kind = "special" if walk.source.tokens[i].special else "word"
        cells += [_exp(w, float(w.exps[i])), f"{float(w.weights[i]):.3f}"]
        step.rows.append(WeightRow(name, cells, float(w.weights[i]), walk.values[i], kind))
    blank = [""] * len(columns)
    rest = _rest(walk, keys)
    if rest:
        exps, weight = float(w.exps[rest].sum()), float(w.weights[rest].sum())
        cells = [*blank, _exp(w, exps), f"{weight:.3f}"]
        step.rows.append(WeightRow(_count(len(rest), "other"), cells, weight, None, "others"))
    hidden = int((~w.visible).sum())
    if hidden:
        cells = [*blank[1:], "−∞", "0", "0"]
        step.rows.append(WeightRow(f"{hidden} masked", cells, None, None, "masked"))
    if w.sink is not None:
        cells = [*blank[1:], num(w.sink), _exp(w, w.sink_exp), f"{w.sink_weight:.3f}"]
        step.rows.append(WeightRow("learned sink", cells, w.sink_weight, None, "sink"))
    total = float(w.weights.sum()) + w.sink_weight
    cells = [*blank, _exp(w, w.total), f"{total:.3f}"]
    step.rows.append(WeightRow("sum", cells, None, None, "sum"))
    return step


def _exp(w: Weighing, value: float) -> str:
    """An exponential: to four places where the largest is 1."""
    if not w.shift:
        return num(value)
    return f"{value:.4f}" if value >= 5e-5 or value == 0 else f"{value:.0e}"


def _mix(walk: Walk, keys: list[int]) -> Step:
    w = walk.weighing
    said = "each word hands over its value, as much of it as its weight says"
    lines = []
    for n, (i, name) in enumerate(zip(keys, _names(walk, keys), strict=True)):
        part = w.weights[i] * walk.values[i]
        lines.append(Line(("+ " if n else "  ") + name, part, f"{float(w.weights[i]):.3f} · value"))
    rest = _rest(walk, keys)
    if rest:
        part = w.weights[rest] @ walk.values[rest]
        note = f"{float(w.weights[rest].sum()):.3f} in all"
        lines.append(Line(("+ " if keys else "  ") + _count(len(rest), "other"), part, note))
    lines.append(Line("= mix", walk.mixed, "Σ weight · value", True))
    return Step("mix", said, lines)


def _write(walk: Walk) -> Step:
    lengths, shares = walk.written.norm(dim=1), walk.shares.tolist()
    said = f"W_O turns {len(walk.mixed)} numbers into {len(walk.x)}; all add up (length, share)"
    if walk.scaled:
        said = "a gate or norm scales what heads give, W_O turns it; all add up (length, share)"
    order = lengths.argsort(descending=True, stable=True).tolist()
    others = [h for h in order if h != walk.head]
    named, rest = (others, []) if len(others) <= 3 else (others[:2], others[2:])
    lines = []
    for n, h in enumerate([walk.head, *named]):
        numbers = (_length(walk.written[h]), _percent(shares[h]))
        name = ("+ " if n else "  ") + f"head {walk.layer}.{h}"
        place = f"no. {order.index(h) + 1} of {walk.heads}" if n == 0 else ""
        lines.append(Line(name, walk.written[h], place, not n, numbers))
    if rest:
        whole = walk.written[rest].sum(0)
        numbers = (_length(whole), _percent(sum(shares[h] for h in rest)))
        lines.append(Line(f"+ {_count(len(rest), 'head')} more", whole, "", False, numbers))
    if walk.bias is not None:
        numbers = (_length(walk.bias), _percent(shares[-1]))
        lines.append(Line("+ bias", walk.bias, "", False, numbers))
    numbers = (_length(walk.attended), _percent(1.0))
    lines.append(Line("= attention", walk.attended, "", True, numbers))
    return Step("write", said, lines)


def _new(walk: Walk) -> Step:
    lines = []
    said = "the attention's output goes on through the rest of the layer"
    if walk.base is not None and walk.residual is not None:
        said = "attention adds to the vector that was there (the residual)"
        same = bool(torch.equal(walk.base, walk.x))
        if not same:
            lines.append(Line("  stream", walk.base, "what was there"))
        name = "= x + attention" if same else "= + attention"
        lines.append(Line(name, walk.residual, f"length {_length(walk.residual)}", True))
    if walk.handed is not None:
        note = "after norm and feed-forward"
        lines.append(Line("→ handed on", walk.handed, note, True))
    return Step("new", said, lines)


def checks(walk: Walk) -> list[tuple[bool, str]]:
    """What was compared with the model, each with whether it agrees."""
    run = f"the model's own run ({walk.engine}, not watched)"
    bias = " and the bias" if walk.bias is not None else ""
    said = {
        "weights": "weights: as regard's engine reads them",
        "head": f"mix: as in {run}",
        "output": f"attention: as there, {walk.heads} heads{bias}",
    }
    return [
        (c.fine, f"{said[c.what]}, {'within' if c.fine else 'but off by'} {c.difference:.1e}")
        for c in walk.checks
    ]


def num(value: float) -> str:
    """A number in at most nine places."""
    size = abs(value)
    if size >= 1e6:
        return f"{value:.3g}"
    return f"{value:.2f}" if size >= 0.1 or value == 0 else f"{value:.3f}"


def as_dict(walk: Walk, top: int) -> dict[str, Any]:
    """The object that ``regard walk --json`` prints; its help says what each field means."""
    w = walk.weighing

    def listed(vector: Tensor | None) -> list[float] | None:
        return None if vector is None else [float(f"{x:.7g}") for x in vector.tolist()]

    def one(i: int) -> dict[str, Any]:
        return {
            "index": i,
            **_said(walk.source.tokens[i]),
            "dot": float(w.dots[i]),
            "scaled": float(w.scaled[i]),
            "capped": None if w.capped is None else float(w.capped[i]),
            "bias": None if w.bias is None else float(w.bias[i]),
            "score": float(w.scores[i]),
            "exp": float(w.exps[i]),
            "weight": float(w.weights[i]),
            "key": listed(walk.keys[i]),
            "value": listed(walk.values[i]),
        }

    keys = top_keys(walk, top)
    rest = _rest(walk, keys)
    chosen = walk.chosen and {"to": walk.chosen[0], "weight": walk.chosen[1]}
    return {
        "model": walk.model,
        "layer": walk.layer,
        "head": walk.head,
        "module": walk.module,
        "kind": walk.kind,
        "chosen": chosen or None,
        "token": {"index": walk.at, **_said(walk.token)},
        "embedded": [
            {"kind": e.kind, "row": e.row, "vector": listed(e.vector)} for e in walk.embedded
        ],
        "entered": listed(walk.entered),
        "x": listed(walk.x),
        "normed": listed(walk.taken),
        "query": listed(walk.query),
        "scale": w.scale,
        "softcap": w.softcap,
        "shift": w.shift,
        "exp_sum": w.total,
        "read": [one(i) for i in keys],
        "others": {
            "count": len(rest),
            "exp": float(w.exps[rest].sum()),
            "weight": float(w.weights[rest].sum()),
        },
        "masked": int((~w.visible).sum()),
        "sink": None if w.sink is None else {"logit": w.sink, "weight": w.sink_weight},
        "weights": listed(w.weights),
        "weight_sum": float(w.weights.sum()) + w.sink_weight,
        "mixed": listed(walk.mixed),
        "heads": [
            {"head": h, "length": float(walk.written[h].norm()), "share": share}
            for h, share in enumerate(walk.shares.tolist()[:-1])
        ],
        "written": listed(walk.written[walk.head]),
        "bias": listed(walk.bias),
        "attention": listed(walk.attended),
        "residual": listed(walk.residual),
        "handed_on": listed(walk.handed),
        "checks": [
            {"what": c.what, "difference": c.difference, "largest": c.size, "agrees": c.fine}
            for c in walk.checks
        ],
    }


def as_json(walk: Walk, top: int, ascii_only: bool = False) -> str:
    """``as_dict`` as one line, with nothing in it that a terminal obeys."""
    line = json.dumps(as_dict(walk, top), ensure_ascii=ascii_only)
    return "".join(char if char.isprintable() else _escaped(char) for char in line)


def _said(token: Token) -> dict[str, Any]:
    return {"word": token.word, "token": token.piece, "id": token.id, "special": token.special}


def _names(walk: Walk, keys: list[int]) -> list[str]:
    return [walk.source.tokens[i].name for i in keys]


def _rest(walk: Walk, keys: list[int]) -> list[int]:
    """The visible keys not named one by one."""
    return [i for i in walk.weighing.visible.nonzero().flatten().tolist() if i not in set(keys)]


def _length(vector: Tensor) -> str:
    return num(float(vector.norm()))


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
