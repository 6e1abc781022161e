"""`walk`: how one head's output for one word comes about, each step with the model's real numbers.

The model runs twice: as it is, where hooks note what its modules take and give at one position,
and watched, which shows the query, keys and values that the attention received. The steps are
computed from the second, in float64, and end where the first must agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..call.checked import Call
from ..call.geometry import Span
from ..capture.module_stack import module_of
from ..capture.options import WatchOptions
from ..capture.projection import output_projection
from ..capture.watching import WatchBlock
from ..errors import RegardError
from .activations import Trace, largest_difference, near
from .parts import kind_of
from .text_model import Encoded, quiet, without_cache
from .walk_result import Check, Embedded, Token, Walk, WalkText, Weighing
from .words import Words, columns, find, label

if TYPE_CHECKING:
    from ..capture.recording import Recording
    from .text_model import TextModel

_PLAIN = (-5.0, 12.0)  # largest scores of which exp prints well without anything taken off
_ROUNDINGS = 256  # a difference is rounding up to so many ε of the largest number compared


def walk(
    reader: TextModel,
    text: str,
    word: str,
    *,
    head: tuple[int, int] | int | None = None,
    layer: int | None = None,
    generate: int = 0,
    target: str | None = None,
    step: Callable[[int], object] | None = None,
) -> Walk:
    """Walk through what the word `word` of `text` computes in head (layer, head).

    Layers are numbered as in a recording: an encoder-decoder's decoder follows its encoder, self-
    and cross-attention apart. Without `head`, that with the strongest link from the word to another
    that is neither special nor the head's sink; of that layer, or that number in any layer, where
    only `layer` or the number is given. Of a word of several tokens the last walks.
    generate: let the model first add so many tokens; target: what an encoder-decoder's decoder
    reads, given. RegardError where the word or head is not there.
    """
    model, inputs, texts = _prepared(reader, text, generate, target, step)
    sides = _sides(texts)
    with quiet(), torch.no_grad():
        with WatchBlock(model, WatchOptions(keep_qk=True, keep_calls=True)) as seen:
            model(**inputs)
        recording = seen.recording(model=reader.name)
        number, (index, which), chosen = _place(recording, sides, word, *_pair(layer, head))
        side = sides[_of_word(sides, number)]
        at = side.words[number - side.first].tokens[-1]
        with Trace(model, at) as trace:
            model(**inputs)
    name, kind = recording.layers[index].name, kind_of(recording.layers[index], len(sides))
    source = sides[0] if kind in ("encoder", "cross") else side
    call = seen[name].call
    assert call is not None
    parts = _steps(model, trace, call, name, at, which)
    exact = recording.weights(index, which, rows=[at])[0]
    weights = parts["weighing"].weights
    checks = [_check("weights", weights, exact, torch.float32), *parts.pop("checks")]
    return Walk(
        model=reader.name,
        module=name,
        kind=kind,
        layer=index,
        head=which,
        block=seen.layers[index].index,
        layers=len(recording.layers),
        rotary=any("rotary" in n for n, _ in model.named_modules()),
        engine=str(getattr(model.config, "_attn_implementation", "")),
        chosen=chosen,
        among=_among(layer, head),
        reader=side,
        source=source,
        word=number,
        at=at,
        checks=checks,
        **parts,
    )


def _prepared(
    reader: TextModel,
    text: str,
    generate: int,
    target: str | None,
    step: Callable[[int], object] | None,
) -> tuple[Any, dict[str, Any], list[Encoded]]:
    """The model to run, its inputs, and the texts that it reads."""
    if target is not None and reader.family != "encoder-decoder":
        raise RegardError(f"{reader.name} has no decoder apart, so there is no target to give it")
    if target is not None and generate:
        raise RegardError("give a target, or let the model generate: not both")
    encoded = reader.encode(text)
    reader.check_length(len(encoded.ids), generate)
    ids = torch.tensor([encoded.ids], dtype=torch.int64, device="cpu")
    with quiet(), torch.no_grad():
        new = reader.generate(ids, generate, step).ids if generate else []
    model, texts = reader.model.base_model, [encoded]
    if reader.family == "causal" and generate:
        texts = [reader.continued(encoded, new)]
    elif reader.family == "encoder-decoder" and generate:
        texts.append(reader.continued(Encoded("", []), new))
    elif target is not None:
        texts.append(_target(reader, target))
        reader.check_length(len(texts[1].ids), 0)
    elif reader.family == "encoder-decoder":
        model = reader.model.get_encoder()
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([texts[0].ids], dtype=torch.int64, device="cpu")
    }
    if len(texts) > 1:
        inputs["decoder_input_ids"] = torch.tensor([texts[1].ids], dtype=torch.int64, device="cpu")
    return model, inputs | without_cache(model), texts


def _target(reader: TextModel, text: str) -> Encoded:
    """A given target as the decoder reads it: its start token first, no end."""
    said = reader.encode(text)
    config = reader.model.config
    start = getattr(config, "decoder_start_token_id", None)
    start = getattr(config, "bos_token_id", None) if start is None else start
    if start is None:
        raise RegardError(f"{reader.name} names no token that its decoder starts with")
    stop = len(said.ids) - (said.ids[-1] == reader.tokenizer.eos_token_id)
    return Encoded(
        text,
        [start, *said.ids[:stop]],
        [*reader.names([start]), *said.tokens[:stop]],
        [(0, 0), *said.offsets[:stop]],
        [True, *said.special[:stop]],
        reader.pieces,
    )


def _sides(texts: Sequence[Encoded]) -> list[WalkText]:
    """The texts with their words, which are numbered over all of them."""
    split = [Words.of(text.about()) for text in texts]
    names = label([word for words in split for word in words])
    sides: list[WalkText] = []
    first = 0
    for text, words in zip(texts, split, strict=True):
        tokens = []
        for i, of in enumerate(words.of_token.tolist()):
            word = words[of]
            cut = text.text[slice(*text.offsets[i])].strip() or text.tokens[i]
            before, after = i > word.tokens[0], i < word.tokens[-1]
            piece = "…" * before + cut + "…" * after + names[first + of][len(word.text) :]
            whole = len(word.tokens) == 1
            tokens.append(Token(names[first + of], piece, text.ids[i], text.special[i], whole))
        sides.append(WalkText(text.text, words, tokens, first))
        first += len(words)
    return sides


def _of_word(sides: Sequence[WalkText], number: int) -> int:
    return 1 if len(sides) > 1 and number >= sides[1].first else 0


def _among(layer: int | None, head: tuple[int, int] | int | None) -> str:
    """The heads that one is chosen from, where it is."""
    if head is None:
        return "all heads" if layer is None else f"the heads of layer {layer}"
    return f"the heads numbered {head}"


def _pair(layer: int | None, head: tuple[int, int] | int | None) -> tuple[int | None, int | None]:
    return head if isinstance(head, tuple) else (layer, head)


def _place(
    recording: Recording, sides: list[WalkText], name: str, layer: int | None, which: int | None
) -> tuple[int, tuple[int, int], tuple[str, float] | None]:
    """The number of the word, its layer and head, and what it reads there where we chose."""
    words = [word for side in sides for word in side.words]
    count = len(recording.layers)
    if layer is not None and not 0 <= layer < count:
        raise RegardError(f"no layer {layer}: the model has layers 0 to {count - 1}")
    if layer is None or which is None:
        number = find(words, name).number
        return number, *_strongest(recording, sides, number, layer, which)
    heads = recording.layer(layer).heads
    if not 0 <= which < heads:
        raise RegardError(f"no head {which}: layer {layer} has heads 0 to {heads - 1}")
    side = sides[kind_of(recording.layers[layer], len(sides)) in ("decoder", "cross")]
    try:
        number = find(words, name).number
    except RegardError:
        number = -1
    if not side.first <= number < side.first + len(side.words):
        number = side.first + find(side.words, name).number
    return number, (layer, which), None


def _strongest(
    recording: Recording, sides: list[WalkText], number: int, layer: int | None, head: int | None
) -> tuple[tuple[int, int], tuple[str, float]]:
    """The head with the strongest link from a word, and what it is a link to; of one layer, or of
    the heads of one number, where these are given."""
    own = _of_word(sides, number)
    side = sides[own]
    at = side.words[number - side.first].tokens[-1]
    best: tuple[float, int, int, str] | None = None
    for i, recorded in enumerate(recording.layers):
        kind = kind_of(recording.layers[i], len(sides))
        if not recorded.pattern or (kind in ("decoder", "cross")) != bool(own):
            continue
        if layer not in (None, i) or (head is not None and head >= recorded.heads):
            continue
        keys = sides[0] if kind in ("encoder", "cross") else side
        links = keys.words.sum_tokens(recording.weights(i, rows=[at])[:, 0])
        apart = columns(recording, i, keys.words).sinks
        apart |= torch.tensor([word.special for word in keys.words], dtype=torch.bool, device="cpu")
        if keys is side:
            apart[:, number - side.first] = True
        # What is left apart still ranks, for a word that reads nothing else
        ranked = links - 2.0 * apart
        if head is not None:
            ranked[torch.arange(len(ranked), device="cpu", dtype=torch.int64) != head] = -torch.inf
        top = int(ranked.argmax())
        which, to = divmod(top, len(keys.words))
        value = float(ranked[which, to])
        if best is None or value > best[0]:
            best = value, i, which, keys.tokens[keys.words[to].tokens[0]].word
    if best is None:
        if layer is None and head is None:
            raise RegardError("the model has no layer with softmax attention, so nothing to walk")
        named = f"layer {layer}" if head is None else f"head {head}"
        raise RegardError(f"there is no {named} with softmax attention in which the word reads")
    value, *chosen, to_name = best
    return (chosen[0], chosen[1]), (to_name, value + 2.0 * (value < 0))


def _steps(
    model: nn.Module, trace: Trace, call: Call, name: str, at: int, head: int
) -> dict[str, Any]:
    """The fields of a `Walk` that the two runs give, and its checks."""
    modules = dict(model.named_modules())
    if getattr(modules[module_of(name)], "additive", False):
        raise RegardError(
            f"{name}: additive attention multiplies no queries with keys, so there is nothing to "
            "walk through; regard look shows what it reads"
        )
    again = re.search(r"#(\d+)", name)
    run = int(again[1]) if again else 1
    block = _block(modules, module_of(name))
    layer, attention = trace.find(block, run), trace.find(module_of(name), run)
    weighings, mixed, values = _weighed(call, at)
    weights = output_projection(modules, name, mixed.numel())
    projection = next(
        n for n, m in modules.items() if getattr(m, "weight", weights[:0]).data_ptr()
        == weights.data_ptr()
    )  # fmt: skip
    ran = trace.find(projection, run)
    if ran.taken is None or ran.given is None or layer.taken is None or attention.taken is None:
        raise RegardError(f"{name}: what its layer takes and gives was not seen; cannot walk it")
    theirs = ran.taken.view_as(mixed)
    # A gate or norm on the way to W_O: what the head gives is then not what W_O takes
    scaled = not near(theirs, mixed, 1e-2)
    bias = getattr(modules[projection], "bias", None)
    bias = bias.detach().double() if isinstance(bias, Tensor) else None
    by_head = weights.detach().double().unflatten(1, mixed.shape)
    written = torch.einsum("hv,mhv->hm", theirs if scaled else mixed, by_head)
    attended = written.sum(0) + (0 if bias is None else bias)
    kind = call.query.dtype
    checks = [] if scaled else [_check("head", mixed[head], theirs[head], kind)]
    checks.append(_check("output", attended, ran.given, kind))
    base, residual = trace.residual(layer, attention, attended)
    embedded, entered, normed = _embedded(trace, block)
    place = call.place
    own = head // (place.heads // place.kv_heads)
    moves = not near(attention.taken, layer.taken, 1e-6)
    return {
        "heads": place.heads,
        "kv_heads": place.kv_heads,
        "embedded": embedded,
        "entered": entered,
        "normed": normed,
        "x": layer.taken,
        "taken": attention.taken if moves else None,
        "query": call.query[0, head, at].double(),
        "keys": call.key[0, own].double(),
        "values": values[own],
        "weighing": weighings(head),
        "mixed": mixed[head],
        "scaled": scaled,
        "written": written,
        "bias": bias,
        "attended": attended,
        "base": base,
        "residual": residual,
        "handed": layer.given,
        "checks": checks,
    }


def _weighed(call: Call, at: int) -> tuple[Callable[[int], Weighing], Tensor, Tensor]:
    """(the weighing of a head, what each mixes (heads, v_dim), values (kv_heads, keys, v_dim))."""
    assert call.value is not None
    place, group = call.place, call.place.heads // call.place.kv_heads
    query, key, value = (t[0].detach().double() for t in (call.query, call.key, call.value))
    dots = (key.repeat_interleave(group, 0) @ query[:, at, :, None])[..., 0]
    scaled = dots * call.scale
    capped = None if call.softcap is None else call.softcap * (scaled / call.softcap).tanh()
    scores = scaled if capped is None else capped
    span = Span(at, at + 1, 0, place.k_len, slice(0, 1), slice(0, place.heads))
    visible = call.program.visible(span).expand(1, place.heads, 1, -1)[0, :, 0]
    bias = None
    for added in call.biases:
        tile = added.tile(span, torch.float64).detach().expand(1, place.heads, 1, -1)[0, :, 0]
        visible = visible & (tile > torch.finfo(call.query.dtype).min / 2)  # lower hides
        bias = tile if bias is None else bias + tile
    if bias is not None:
        bias = bias.masked_fill(~visible, 0)
        scores = scores + bias
        bias = bias if bool(bias.any()) else None
    scores = scores.masked_fill(~visible, -torch.inf)
    logits = None if call.sinks is None else call.sinks.detach().double()
    top = scores.amax(-1) if logits is None else torch.maximum(scores.amax(-1), logits)
    low, high = _PLAIN
    plain = (top >= low) & (top <= high) | (top == -torch.inf)
    shift = top.masked_fill(plain, 0)
    exps = (scores - shift[:, None]).exp()
    sink_exps = (
        torch.zeros(place.heads, dtype=torch.float64, device="cpu")
        if logits is None
        else (logits - shift).exp()
    )
    total = exps.sum(-1) + sink_exps
    weights = exps / total.masked_fill(total == 0, 1)[:, None]
    mixed = (weights[:, None] @ value.repeat_interleave(group, 0))[:, 0]

    def of(head: int) -> Weighing:
        return Weighing(
            dots=dots[head],
            scale=call.scale,
            scaled=scaled[head],
            softcap=call.softcap,
            capped=None if capped is None else capped[head],
            bias=None if bias is None else bias[head],
            scores=scores[head],
            visible=visible[head],
            shift=float(shift[head]),
            exps=exps[head],
            total=float(total[head]),
            weights=weights[head],
            sink=None if logits is None else float(logits[head]),
            sink_exp=float(sink_exps[head]),
            sink_weight=float(sink_exps[head] / total[head]),
        )

    return of, mixed, value


def _embedded(trace: Trace, block: str) -> tuple[list[Embedded], Tensor | None, bool]:
    """The rows embedded for the stack of layers that `block` is of, what enters, if by a norm."""
    rows, entered, normed = trace.before(block.rpartition(".")[0])
    found = []
    for ran in rows:
        name = ran.name.rpartition(".")[2].lower()
        position = any(part in name for part in ("pos", "wpe"))
        kind = "position" if position else "type" if "type" in name else "word"
        assert ran.given is not None
        found.append(Embedded(kind, ran.row, ran.given))
    found.sort(key=lambda e: ("word", "position", "type").index(e.kind))
    return found, entered, normed


def _block(modules: dict[str, nn.Module], name: str) -> str:
    """The name of the layer that a module is part of; its own where there is no list of layers."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if isinstance(modules.get(".".join(parts[:i])), nn.ModuleList):
            return ".".join(parts[: i + 1])
    return name


def _check(what: str, ours: Tensor, theirs: Tensor, kind: torch.dtype) -> Check:
    """Two results that may differ by the rounding of a dtype."""
    size = float(theirs.abs().amax()) if theirs.numel() else 0.0
    difference = largest_difference(ours, theirs)
    bound = _ROUNDINGS * torch.finfo(kind).eps / 2 * max(size, 1e-6)
    return Check(what, difference, size, difference <= bound)
