"""`regard look` on a terminal: 80 columns, readable without colour and when piped."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import chain

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from ..analysis.look import Focus, Look, Row
from ..analysis.parts import Part, ReadText
from ..analysis.words import SINK, SINK_QUERIES
from .continuation import continuation
from .first_screen import OF, FirstScreen
from .screen import Bit, bar, clean, counted, fit, grid, head_label, percent, word_name, wrapped

_READS = {
    "self": "reads",
    "encoder": "reads (encoder)",
    "decoder": "reads (decoder)",
    "cross": "reads (cross)",
}
_NEXT = "of each word, the step that takes it in: what it reads writes the next word"
_LINES = 10  # a text longer than this is cut around what is looked at
_WRITTEN = 40  # generated words listed
_DIM, _HEAD = "dim", "bold"
HEADS = "3.1: layer 3, head 1; both count from 0"


def print_look(found: Look, console: Console) -> None:
    """Print what was found on ``console``, as wide as it is but no wider than 100 columns."""
    page = Page(found, console)
    lines = page.focused() if found.focuses else page.overall()
    for line in chain(continuation(found, page.width), lines):
        console.print(line, no_wrap=True, overflow="crop", crop=True, highlight=False)


class Page(FirstScreen):
    """The parts of a page, as lines."""

    def overall(self) -> Iterator[Text]:
        """The page without a word asked for."""
        found = self.found
        yield from self.texts(None)
        yield self.model()
        yield from self.pairs()
        yield from self.written()
        yield from self.behaviours()
        for part in found.parts:
            yield from self.named_apart(part)
        for part in found.parts:
            if not (part.special.any() or part.sinks.any()):
                yield Text()
                yield Text(fit(f"no special tokens, no sinks{OF[part.kind]}", self.width).rstrip())
                continue
            apart = torch.stack([(row * aside).sum() for row, aside in self._aside(part)])
            words = part.received.sum(1) - apart
            yield from self.map(part, f"mass that heads leave to words{OF[part.kind]}, %", words)
        yield from self.footer(HEADS, self.sink_rule())
        yield from self.hints()

    def focused(self) -> Iterator[Text]:
        """The page for the words asked for."""
        for i, focus in enumerate(self.found.focuses):
            if i:
                yield Text("─" * self.width, style=_DIM)
            yield from self.texts(focus)
            yield self.model()
            for row in focus.rows:
                yield from self.reading(focus, row)
        rest = "mean: over the heads shown; of rest: its share without special tokens and sinks"
        half = "; here in at least half of the heads, ° in that head"
        yield from self.footer(HEADS, rest, self.sink_rule() + half)

    def _aside(self, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(part.received, part.special | part.sinks, strict=True)

    def texts(self, focus: Focus | None) -> Iterator[Text]:
        """The texts, shaded by what the focus reads."""
        for i, side in enumerate(self.found.sides):
            rows = [row for row in focus.rows if row.part.keys is side] if focus else []
            shades = _shades(rows[0]) if rows else [0] * len(side.words)
            at = focus.found.number - side.first if focus else -1
            yield from wrapped(self._bits(side, shades, at, i > 0), self.width, self.colour)

    def _bits(self, side: ReadText, shades: list[int], at: int, answer: bool) -> Iterator[Bit]:
        """The text in stretches: words, and what lies between them."""
        words, text = side.words, side.text
        room = _LINES * self.width
        middle = words[at].start if 0 <= at < len(words) else shades.index(3) if 3 in shades else 0
        begin = 0 if len(text) <= room else max(0, min(middle - room // 2, len(text) - room))
        reached = begin
        if answer:
            yield Bit("» ", style=_DIM)
        if begin:
            yield Bit("… ", style=_DIM)
        for i, word in enumerate(words):
            if word.start < begin or word.start == word.end:
                continue
            if word.end > begin + room:
                yield Bit(" …", style=_DIM)
                return
            gap = text[reached : word.start]
            yield from _gap(gap.lstrip() if reached == begin else gap)
            written = side.first + i in self.found.generated
            if written and not answer and not word.text.isspace():
                if not text[word.start - 1 : word.start].isspace():
                    yield Bit(" ")
                yield Bit("» ", style=_DIM)
                answer = True
            mark = ("[", "]") if i == at else ("", "")
            style = "italic" if written else ""
            if word.text.isspace():
                yield from _gap(word.text if reached > begin else "")
            else:
                style = f"{style} bold" if i == at else style
                yield Bit(f"{mark[0]}{clean(word.text)}{mark[1]}", shades[i], style)
            reached = word.end
        yield from _gap(text[reached:].rstrip())

    def model(self) -> Text:
        """The model, and the heads that are shown."""
        layers = {layer: heads for part in self.found.parts for layer, heads in part.layers.items()}
        count = sum(map(len, layers.values()))
        sizes = {tuple(heads) for heads in layers.values()}
        heads = next(iter(sizes))
        if count == 1:
            shown = f"head {head_label(*self.found.parts[0].heads[0])}"
        elif len(sizes) == 1 and heads == tuple(range(len(heads))):
            shown = f"{self._layers(layers)} × {counted(len(heads), 'head')}"
        elif len(sizes) == 1:
            shown = f"{self._layers(layers)} × head{'s' * (len(heads) > 1)} {_few(heads)}"
        else:
            shown = f"{count} heads of {self._layers(layers)}"
        line = f"{clean(self.found.model)} · {shown} · where heads read, not why"
        return Text(fit(line, self.width).rstrip(), style=_DIM)

    def _layers(self, shown: dict[int, list[int]]) -> str:
        numbers = sorted(shown)
        blank = {blank.layer for blank in self.found.blanks}
        if set(numbers) | blank == set(range(len(blank) + len(numbers))):
            return counted(len(numbers), "layer")
        return f"layer{'s' * (len(numbers) > 1)} {_few(numbers)}"

    def linked(self, one: int, two: int, width: int) -> str:
        """A word and the one that it reads, in ``width`` cells."""
        source, target = self.names[one], self.names[two]
        half = (width - len(self.arrow) - 2) // 2
        source = fit(source, half).rstrip() if len(source) > half else source
        return fit(f"{source} {self.arrow} {target}", width)

    def written(self) -> Iterator[Text]:
        """What the generated words read."""
        rows = self.found.written
        for kind in dict.fromkeys(row.part.kind for row in rows):
            some = [row for row in rows if row.part.kind == kind]
            wide = min(14, max(len(self.names[row.word]) for row in some))
            wide = max(wide, 9)
            yield Text()
            yield Text(
                f"{fit('generated', wide)}  "
                f"{fit(f'{_READS[kind]} on average', self.width - wide - 30)}  "
                "strongest head",
                style=_HEAD,
            )
            if kind == "cross":  # where one would look for what wrote the word itself
                yield Text(fit(_NEXT, self.width).rstrip(), style=_DIM)
            for row in some[:_WRITTEN]:
                yield self._wrote(row, wide)
            if len(some) > _WRITTEN:
                yield Text(f"… and {len(some) - _WRITTEN} more words; --json has all", style=_DIM)

    def _wrote(self, row: Row, wide: int) -> Text:
        part = row.part
        mean = row.mean.masked_fill(part.apart, 0)
        hidden = part.special | part.sinks
        if row.itself >= 0:
            mean[row.itself] = 0
            hidden[:, row.itself] = True
        said = []
        for value, place in zip(*(t.tolist() for t in mean.topk(min(3, len(mean)))), strict=True):
            if value >= 0.005:
                said.append(f"{fit(self.names[place + part.keys.first], 12).rstrip()} {value:.2f}")
        line = Text(f"{fit(self.names[row.word], wide)}  ", style="")
        line.append(fit("  ".join(said), self.width - wide - 30) + "  ")
        for link in row.links(1, hidden):
            line.append(f"{head_label(*link[:2]) + ' ':<6}")
            line.append(f"{fit(self.names[link.target], 14)} {link.weight:.2f}")
        line.rstrip()
        return line

    def named_apart(self, part: Part) -> Iterator[Text]:
        """Special tokens and sinks, with the mass they take."""
        counts = part.sinks.sum(0)
        mass = part.received.mean(0)
        rows = [
            (float(mass[i]), i, word.special, int(counts[i]))
            for i, word in enumerate(part.keys.words)
            if (self.found.special if word.special else counts[i])
        ]
        if not rows:
            return
        rows.sort(reverse=True)
        wide = max(10, min(24, self.width - 56))
        yield Text()
        yield Text(f"{fit(f'named apart{OF[part.kind]}', wide + 3)} of the mass", style=_HEAD)
        for share, i, special, sinks in rows[: self.found.top]:
            said = ["special token"] if special else []
            if sinks:
                said.append(f"sink in {sinks} of {counted(len(part.heads), 'head')}")
            line = f"{fit(self.names[i + part.keys.first], wide)} {share * 100:>10.1f} %   "
            yield Text(fit(line + ", ".join(said), self.width).rstrip())
        if len(rows) > self.found.top:
            rest = sum(row[0] for row in rows[self.found.top :])
            more = f"and {len(rows) - self.found.top} more"
            yield Text(f"{fit(more, wide)} {rest * 100:>10.1f} %")

    def reading(self, focus: Focus, row: Row) -> Iterator[Text]:
        """What the focus reads in one part: words, the strongest heads, and the map."""
        part, found = row.part, self.found
        mean, apart = row.mean, part.apart
        name = self.names[row.word]
        wide = max(8, min(14, self.width - 62))
        gauge = max(4, min(11, self.width - wide - 55))
        yield Text()
        if focus.found.of > 1:
            nth, of = focus.found.nth, focus.found.of
            base = word_name(found.words[row.word].text)
            also = base if nth == of else f"{base}#{nth + 1}"
            yield Text(f"{base}: number {nth} of {of} in the text; --from {also} is another")
        reads = _READS[part.kind]
        title = f"{fit(name, max(4, wide + gauge - len(reads))).rstrip()} {reads}"
        yield Text(
            f"{fit(title, wide + gauge + 1)} {'mean':>6} {'of rest':>7}   strongest heads",
            style=_HEAD,
        )
        shown = 0.0
        rest = max(1e-9, float(mean[~apart].sum()))
        plain = mean.masked_fill(apart, 0)
        most = max(1e-9, float(plain.max()))
        for value, place in _top(plain, found.top):
            line = Text(fit(self.names[place + part.keys.first], wide) + " ")
            line.append(bar(value / most, gauge, self.ascii), style="yellow")
            share = f"{value / rest * 100:.0f} %"
            line.append(f"  {value:.3f} {share:>7}   ")
            yield self._heads(line, row, place)
            shown += value
        for value, place in _top(mean.masked_fill(~apart, 0), max(2, found.top // 2)):
            if found.special or not part.special[place]:
                kind = "sink" if part.sink[place] else "special"
                line = Text(fit(self.names[place + part.keys.first], wide) + " ", style=_DIM)
                line.append(f"{fit(kind, gauge)}  {value:.3f} {'':>7}   ")
                yield self._heads(line, row, place)
                shown += value
        lost = 1 - float(mean.sum())
        if lost > 0.005:
            yield Text(f"{fit('learned sink', wide + gauge + 1)}  {lost:.3f}", style=_DIM)
            shown += lost
        yield _shown(shown, "of the mass")
        target = self._target(row)
        to = self.names[target + part.keys.first]
        yield from self.map(part, f"{name} {self.arrow} {to}, %", row.weights[:, target])

    def _target(self, row: Row) -> int:
        """The word read most: not itself, special or a sink unless there is no other."""
        mean = row.mean.clone()
        for aside in (row.part.sink, row.part.special):
            mean[aside] -= 2
        if row.itself >= 0:
            mean[row.itself] -= 8
        return int(mean.argmax())

    def _heads(self, line: Text, row: Row, place: int) -> Text:
        """The line with the heads that read the word most; ° where it is the head's sink."""
        part = row.part
        wide = max(5, 1 + max(len(head_label(*head)) for head in part.heads))
        count = 3 if self.width >= 76 + 3 * (wide - 5) else 2
        for value, i in _top(row.weights[:, place], count):
            if value >= 0.005:
                mark = "°" if part.sinks[i, place] else ""
                style = "bold" if value >= 0.3 else ""
                line.append(f"{head_label(*part.heads[i]):<{wide}}")
                line.append(f"{value:.2f}", style=style)
                line.append(fit(mark, 3))
        line.rstrip()
        return line

    def sink_rule(self) -> str:
        """What a sink is, and on how many queries its column mean stands in this text."""
        most = max(int(part.queries.max()) for part in self.found.parts)
        least = min(int(part.queries.min()) for part in self.found.parts)
        if most < SINK_QUERIES:
            return f"sink: none is named on a mean of {most} queries; it takes {SINK_QUERIES}"
        span = f"the {most:,} queries"
        if least < most:
            span = f"{SINK_QUERIES} or more of the {most:,} queries" if least < SINK_QUERIES else (
                f"{least:,} to {most:,} queries"
            )  # fmt: skip
        return f"sink: a word whose column mean in a head, over {span} here, is above {SINK}"

    def map(self, part: Part, title: str, values: Tensor) -> Iterator[Text]:
        """One number a head, layers down and heads across."""
        cells = dict(zip(part.heads, values.tolist(), strict=True))
        yield Text()
        blanks = [blank.layer for blank in self.found.blanks if part.kind == "self"]
        yield from grid(cells, title, self.width, blanks)

    def footer(self, *more: str) -> Iterator[Text]:
        """The definitions used."""
        yield Text()
        weight = "word weight: sum over its tokens, mean over the reading word's tokens"
        for said in (weight, *more):
            yield from (Text(line, style=_DIM) for line in textwrap.wrap(said, self.width))


def _shades(row: Row) -> list[int]:
    """How strongly each key is shaded, 0 to 3, by the mean that the word gives it."""
    mean = row.mean.masked_fill(row.part.apart, 0)
    if row.itself >= 0:
        mean[row.itself] = 0
    share = mean / mean.max().clamp(min=1e-9)
    return [3 if s > 0.8 else 2 if s > 0.6 else 1 if s > 0.4 else 0 for s in share.tolist()]


def _gap(text: str) -> Iterator[Bit]:
    """What lies between two words: a space, a new line, or characters without a token."""
    if not text:
        return
    said = clean("".join(" " if char.isspace() else char for char in text))
    stripped = said.strip()
    if "\n" in text:
        yield Bit(stripped, style=_DIM, line=True)
    elif not stripped:
        yield Bit(" ")
    else:
        yield Bit(" " * said.startswith(" ") + stripped + " " * said.endswith(" "), style=_DIM)


def _top(values: Tensor, count: int) -> list[tuple[float, int]]:
    """The largest values above nothing, with their places."""
    best = values.topk(min(count, len(values)))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [(value, place) for value, place in pairs if value >= 0.0005]


def _shown(share: float, of: str) -> Text:
    return Text(f"shown {percent(share)} {of}", style=_DIM)


def _few(numbers: list[int] | tuple[int, ...]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (" …" if len(numbers) > 8 else "")
