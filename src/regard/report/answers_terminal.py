"""--versus, --cut and --effect on a terminal: 80 columns, readable without colour or piped."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from ..analysis.compare import NOISE, Flip, Pair, Reading, Versus
from ..analysis.look import Look
from .continuation import continuation
from .look_terminal import Page
from .screen import bar, clean, fit, word_name

if TYPE_CHECKING:
    from ..analysis.cut import Changed
    from ..analysis.effect import Effects

_DIM, _HEAD = "dim", "bold"


def print_asked(found: Look, console: Console) -> None:
    """Print what was asked for beyond the plain look."""
    page = _Asked(found, console)
    for line in page.lines():
        console.print(line, no_wrap=True, overflow="crop", crop=True, highlight=False)


class _Asked:
    def __init__(self, found: Look, console: Console) -> None:
        self.found = found
        self.page = Page(found, console)
        self.other = Page(found.other, console) if found.other is not None else None
        self.width, self.ascii = self.page.width, self.page.ascii
        self.arrow, self.names = self.page.arrow, self.page.names
        self.wide = max(12, min(26, self.width - 54))

    def lines(self) -> Iterator[Text]:
        """All sections that there are."""
        found = self.found
        for side in filter(None, (found, found.other)):
            yield from continuation(side, self.width)
        focus = found.focuses[0] if found.focuses else None
        yield from self.page.texts(focus)
        if found.other is not None and self.other is not None and found.versus:
            yield from self.other.texts(found.other.focuses[0] if found.other.focuses else None)
        yield self.page.model()
        if found.other is not None and found.other.model != found.model and self.other:
            yield self.other.model()
        if found.versus:
            yield from self.versus() if found.focuses else self.overview()
        if found.cut is not None:
            yield from self.cut(found.cut)
        for effects in found.effects:
            yield from self.effect(effects)

    def versus(self) -> Iterator[Text]:
        """What each word asked for reads in both."""
        for versus in self.found.versus:
            yield from self.means(versus)
            yield from self.moves(versus)
            yield from self.flips(versus)
        if not self.found.versus[0].same_heads:
            yield self._dim("the models' heads differ in number: only their means are compared")
        elif self.found.other is not None and self.found.other.model != self.found.model:
            yield self._dim("heads of the same number in two models need not do the same")
        yield from self.footer(
            "first, second: the word weight in each text; words that stand in each other's place "
            "are one line. A head flips where the word that it reads most (special tokens and the "
            "word itself apart) is not the counterpart of that in the first text, and not for less "
            f"than {NOISE} of weight"
        )

    def overview(self) -> Iterator[Text]:
        """The words whose reading changed most, where none was asked for."""
        yield Text()
        left = min(18, (self.width - 36) // 2)
        right = min(26, self.width - 34 - left)
        yield Text(
            f"{fit('reading changed', left)} {'moved':>6}  {fit('largest change', right)} "
            f"{'first':>6} {'second':>7}   head",
            style=_HEAD,
        )
        for versus in self.found.versus:
            line = f"{fit(word_name(versus.name), left)} {versus.moved * 100:>4.0f} %  "
            for move in versus.moves(1, self.found.special):
                line += f"{fit(pair_name(versus, move.pair), right)} {move.one:>6.2f} "
                line += f"{move.two:>7.2f}   {move.layer}.{move.head}"
            yield Text(fit(line, self.width).rstrip())
        yield from self.footer(
            "moved: the share of what the word reads that went elsewhere, half the sum of the "
            "weights' changes, mean over the heads. --from WORD: what one word reads in both"
        )

    def means(self, versus: Versus) -> Iterator[Text]:
        """The mean over the heads of what the word reads, in each."""
        yield Text()
        title = f"{fit(f'{word_name(versus.name)} reads', self.wide).rstrip()}, mean of heads"
        yield self._header(title, "")
        ranked = sorted(versus.means, key=lambda m: -max(m[1:]))
        for pair, one, two in self._listed(versus, ranked)[: self.found.top]:
            yield self._line(pair_name(versus, pair), one, two, "", 3)

    def moves(self, versus: Versus, first: str = "first", second: str = "second") -> Iterator[Text]:
        """The largest changes over all heads."""
        moves = versus.moves(self.found.top, self.found.special)
        if moves:
            yield Text()
            yield self._header("changed most, head by head", "head", first, second)
            for move in moves:
                name = pair_name(versus, move.pair)
                yield self._line(name, move.one, move.two, f"{move.layer}.{move.head}", 2)

    def flips(self, versus: Versus, first: str = "first", second: str = "second") -> Iterator[Text]:
        """The heads that flip."""
        flips = versus.flips
        if not versus.same_heads:
            return
        total = len(versus.one.heads)
        yield Text()
        said = f"{len(flips) or 'none'} of {total} heads flip{'s' * (len(flips) < 2)}"
        if total == 1:
            said = "the head flips" if flips else "the head does not flip"
        half = (self.width - 8) // 2
        columns = f"{fit(f'most read: {first}', half)}{second}" if flips else ""
        yield Text(f"{said}{':' if flips else ''}", style=_HEAD)
        if flips:
            yield Text(f"{'head':<8}{columns}", style=_HEAD)
        for flip in flips[: self.found.top]:
            yield Text(self._flip(versus, flip, half))
        if len(flips) > self.found.top:
            yield self._dim(f"… and {len(flips) - self.found.top} more, weaker; --json has all")

    def _flip(self, versus: Versus, flip: Flip, half: int) -> str:
        one, back, there, two = flip.weights
        sides = [
            f"{fit(_name(side, number), half - 16).rstrip()} {before:.2f} {self.arrow} {after:.2f}"
            for side, number, before, after in (
                (versus.one, flip.one, one, back),
                (versus.two, flip.two, there, two),
            )
        ]
        return f"{f'{flip.layer}.{flip.head}':<8}{fit(sides[0], half)}{sides[1]}"

    def cut(self, changed: Changed) -> Iterator[Text]:
        """What the cuts changed."""
        yield Text()
        for made in changed.cuts:
            name = f"layer {made.edge.layer}" if made.edge.head is None else str(made.edge)
            if made.source is None or made.target is None:
                heads = "all its heads" if made.edge.head is None else "the whole head"
                yield Text(fit(f"cut {name}: {heads}", self.width).rstrip(), style=_HEAD)
                continue
            place = f"{made.edge.layer}" + ("" if made.edge.head is None else f".{made.edge.head}")
            weights = [weight for _, weight in made.weights]
            said = f"weight {weights[0]:.2f}"
            if len(weights) > 1:
                said = f"weights of {min(weights):.2f} to {max(weights):.2f} in its heads"
            link = f"{self.names[made.source]} {self.arrow} {self.names[made.target]}"
            yield Text(fit(f"cut {place}: {link}, {said}", self.width).rstrip(), style=_HEAD)
        if changed.next is not None:
            yield from self.next(changed)
        yield Text()
        yield Text(f"{fit('final vector of', self.wide)}  changed by   cosine", style=_HEAD)
        asked = [number for number, _ in changed.readings]
        ranked = [m for m in changed.moved if m.word in asked]
        ranked += [m for m in changed.moved if m.word not in asked]
        for moved in ranked[: self.found.top]:
            line = Text(f"{fit(self.names[moved.word], self.wide)}  ")
            line.append(f"{moved.change * 100:>8.1f} %   {moved.cosine:.4f}  ")
            line.append(bar(moved.change, 10, self.ascii).rstrip(), style="yellow")
            line.rstrip()
            yield line
        for _, versus in changed.readings:
            yield from self.means_of_cut(versus)
        yield from self.footer(
            "a cut edge's score is −inf and the rest of its row grows to sum to 1; a cut head adds "
            "nothing; the later layers read what is left. changed by: ‖after − before‖ / ‖before‖"
        )

    def means_of_cut(self, versus: Versus) -> Iterator[Text]:
        """What the word reads with the cut and without."""
        yield Text()
        yield self._header(f"what {word_name(versus.name)} reads", "head", "before", "after")
        for move in versus.moves(self.found.top, self.found.special):
            name = pair_name(versus, move.pair)
            yield self._line(name, move.one, move.two, f"{move.layer}.{move.head}", 2)
        yield from self.flips(versus, "before", "after")

    def next(self, changed: Changed) -> Iterator[Text]:
        """The next token's distribution."""
        assert changed.next is not None
        yield Text()
        yield self._header("next token", "", "before", "after")
        for token, before, after in changed.next.tokens[: self.found.top]:
            yield self._line(word_name(token), before, after, "", 3)
        yield self._dim(f"KL(before ‖ after) = {changed.next.kl:.4f} nats")

    def effect(self, effects: Effects) -> Iterator[Text]:
        """The links of largest effect beside their weights."""
        yield Text()
        if effects.word is None:
            token = clean(repr(effects.token))
            of = f"the log-probability of {token}, the next token: p {math.exp(effects.size):.3f}"
        else:
            of = f"the final vector of {self.names[effects.word]}, of length {effects.size:.2f}"
        for said in textwrap.wrap(f"links by their effect on {of}", self.width):
            yield Text(said, style=_HEAD)
        yield from self.influences(effects)
        how = "what cutting the link would add to it, to first order"
        if effects.word is not None:
            how = "the length of the change that cutting the link would make, to first order"
            if effects.directions < effects.width:
                how += f", estimated from {effects.directions} of {effects.width} directions"
        yield from self.footer(
            f"effect: {how}. weight: where the head reads. weight·‖W_O v‖: the length of what the "
            "link adds to the reading word. They answer different questions; none is truer"
        )

    def influences(self, effects: Effects) -> Iterator[Text]:
        """A line a link; where the page is narrow without a bar, so that every number stays."""
        gauge, value = (9, "weight·‖W_O v‖") if self.width >= 76 else (0, "w·‖W_O v‖")
        wide = max(8, self.width - 31 - gauge - len(value))
        columns = f"{'effect':>8} {'':<{gauge}}{'weight':>7} {value}"
        yield Text(f"{fit('', wide)} {columns}   head", style=_HEAD)
        most = max((abs(link.effect) for link in effects.links), default=1) or 1
        for link in effects.links:
            pair = self.page.linked(link.source, link.target, wide)
            sign = "+" if effects.word is None else ""
            line = Text(f"{pair} {self._signed(f'{link.effect:{sign}.3f}'):>8} ")
            if gauge:
                line.append(bar(abs(link.effect) / most, 8, self.ascii) + " ", style="yellow")
            length = "–" if link.value is None else f"{link.value:.3f}"
            line.append(f"{link.weight:>7.3f} {length:>{len(value)}}   {link.layer}.{link.head}")
            yield line

    def _listed(
        self, versus: Versus, means: list[tuple[Pair, float, float]]
    ) -> list[tuple[Pair, float, float]]:
        """Without special tokens, where they were to be left out."""
        if self.found.special:
            return means
        return [m for m in means if not versus.special(m[0])]

    def _header(self, title: str, last: str, first: str = "first", second: str = "second") -> Text:
        columns = f"{first:>8} {second:>8} {'difference':>11}   {last}"
        return Text(f"{fit(title, self.wide + 4)} {columns}".rstrip(), style=_HEAD)

    def _line(self, name: str, one: float, two: float, last: str, digits: int) -> Text:
        difference = self._signed(f"{two - one:+.{digits}f}")
        line = Text(f"{fit(name, self.wide + 4)} {one:>8.{digits}f} {two:>8.{digits}f} ")
        line.append(f"{difference:>11}", style="bold" if abs(two - one) >= 0.1 else "")
        line.append(f"   {last}".rstrip())
        return line

    def _signed(self, number: str) -> str:
        return number if self.ascii else number.replace("-", "−")

    def _dim(self, text: str) -> Text:
        return Text(fit(text, self.width).rstrip(), style=_DIM)

    def footer(self, said: str) -> Iterator[Text]:
        """The definitions used."""
        yield Text()
        yield from (Text(line, style=_DIM) for line in textwrap.wrap(said, self.width))


def _name(side: Reading, number: int) -> str:
    text = side.words[number].text
    return word_name(text) + side.labels[number][len(text) :]


def pair_name(versus: Versus, pair: Pair) -> str:
    """ "animal", "tired | wide" where one stands in the other's place, "– | not"."""
    one, two = (
        "–" if number is None else _name(side, number)
        for side, number in ((versus.one, pair.one), (versus.two, pair.two))
    )
    return one if one == two else f"{one} | {two}"
