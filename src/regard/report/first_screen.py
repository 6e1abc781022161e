"""What `regard look` says of a whole text: links by pair of words, and what stands apart.

A head that does one thing whatever the text says is one fact, so it is one line here and not the
eight strongest links; so are links to the word beside and to function words.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from ..analysis.function_words import is_content
from ..analysis.look import Look
from ..analysis.summary import KNOWN, Behaviour, Pair
from ..analysis.words import Link
from .screen import bar, fit, head_label, percent, word_name

_DIM, _HEAD = "dim", "bold"
_SIDE = 17  # the column of names beside what stands apart
OF = {"self": "", "encoder": ", encoder", "decoder": ", decoder", "cross": ", cross"}


class FirstScreen:
    """What stands on it, as lines; the fields that every page has."""

    def __init__(self, found: Look, console: Console) -> None:
        self.found = found
        self.width = max(40, min(console.width, 100))
        self.colour = bool(console.color_system) and not console.no_color
        self.ascii = console.options.ascii_only
        self.arrow = "->" if self.ascii else "→"
        self.names = [
            word_name(word.text) + name[len(word.text) :]
            for word, name in zip(found.words, found.labels, strict=True)
        ]

    def pairs(self) -> Iterator[Text]:
        """The strongest links by pair of words, with the heads that have them."""
        found = self.found.summary
        some = found.pairs or found.function_pairs or found.near_pairs
        yield Text()
        if not some:
            yield Text("no links between words: the heads read special tokens and sinks only")
            return
        gauge = 6 if self.width >= 60 else 0
        names = [self._name(pair, self.width) for pair in some]
        cell = 9 + max(len(head_label(*link[:2])) for pair in some for link in pair.heads)
        wide = max(15, max(map(cell_len, names)))
        count = max(1, min(3, (self.width - wide - gauge - 2) // cell))
        wide = min(wide, self.width - gauge - 2 - count * cell + 3)
        title = f"{fit('strongest links', wide + gauge + 2)} "
        said = "layer.head, weight" if self.width < 76 else "in which heads: layer.head and weight"
        yield Text(fit(title + said, self.width).rstrip(), style=_HEAD)
        shown = 0.0
        for pair in some:
            line = Text(f"{fit(self._name(pair, wide), wide)}  ")
            if gauge:
                line.append(bar(pair.heads[0].weight, gauge, self.ascii), style="yellow")
            line.append(" ")
            for link in pair.heads[:count]:
                style = "bold" if link.weight >= 0.3 else ""
                line.append(f"{head_label(*link[:2]):<{cell - 8}}")
                line.append(f"{link.weight:.2f}", style=style).append("    ")
                shown += link.weight
            line.rstrip()
            yield line
        for title, others in (
            ("to neighbours", found.near_pairs),
            ("to function words", found.function_pairs),
        ):
            if others and others is not some:
                items = [f"{self._name(pair, 30)} {_weight(pair.heads[0])}" for pair in others]
                yield from self._apart(title, items, " …")
        share = percent(shown / max(1, self.found.rows))
        said = f"shown {share} of the mass of all heads and words"
        yield from (Text(line, style=_DIM) for line in textwrap.wrap(said, self.width))

    def behaviours(self) -> Iterator[Text]:
        """The heads that do one thing, each thing one line."""
        found = self.found.summary.behaviours
        if not found:
            return
        yield Text()
        title = "heads that mostly read one place"
        more = f", weight it gets on average (≥ {KNOWN})" if self.width >= 76 else ""
        yield Text(title + more, style=_HEAD)
        for behaviour in found:
            items = [f"{head_label(*head[:2])} {head[2]:.2f}" for head in behaviour.heads]
            yield from self._apart(self._place(behaviour), items, " and {} more")

    def _place(self, behaviour: Behaviour) -> str:
        part = behaviour.part
        said = {
            "previous": "word before",
            "self": "itself",
            "next": "word after",
            "first": "the first",
            "separator": "separators",
        }[behaviour.place]
        if behaviour.place == "first" and (self.found.special or not part.special[0]):
            said += f": {self.names[part.keys.first]}"
        return said + OF[part.kind]

    def hints(self) -> Iterator[Text]:
        """What to ask next, with a word of this text."""
        source, head = self._example()
        walk = f"--from {source} --head {head}" if head else f"--from {source}"
        rows = [
            (f"--from {source}", "what one word reads, and in which heads"),
            ('--versus "TEXT 2"', "what changes in another text"),
            ("--html page.html", "all of it as a page: hover a word"),
            (f"regard walk TEXT {walk}", "one head, step by step"),
        ]
        wide = min(max(cell_len(asked) for asked, _ in rows), self.width // 2 + 4)
        yield Text()
        for asked, said in rows:
            line = Text(fit(asked, wide) if cell_len(asked) <= wide else asked)
            if cell_len(line.plain) + 2 + len(said) <= self.width:
                line.append(f"  {said}", style=_DIM)
            line.truncate(self.width)
            line.rstrip()
            yield line

    def _example(self) -> tuple[str, str]:
        """A content word that reads, and a head in which it does: of the strongest such link."""
        found, by = self.found, self.found.summary
        for pair in [*by.pairs, *by.near_pairs, *by.function_pairs]:
            if is_content(found.words[pair.source]):
                return _quoted(found.labels[pair.source]), head_label(*pair.heads[0][:2])
        named = zip(found.words, found.labels, strict=True)
        content = [label for word, label in named if is_content(word)]
        return (_quoted(max(content, key=len)) if content else "WORD"), ""

    def _apart(self, title: str, items: list[str], rest: str) -> Iterator[Text]:
        """A name, and as many of the items as a line takes; ``rest`` says that there are more."""
        line = f"{fit(title, max(_SIDE, min(24, cell_len(title))))}  "
        if self.width < 60:
            yield Text(fit(title, self.width).rstrip())
            line = "  "
        for i, item in enumerate(items):
            said = f"{'   ' * (i > 0)}{item}"
            left = len(items) - i
            more = "" if left == 1 else f"  {rest}".format(left - 1)
            if i and cell_len(line + said + more) > self.width:
                line += f"  {rest}".format(left)
                break
            line += said
        yield Text(fit(line, self.width).rstrip())

    def _name(self, pair: Pair, width: int) -> str:
        source, target = self.names[pair.source], self.names[pair.target]
        half = (width - len(self.arrow) - 2) // 2
        if cell_len(source) + cell_len(target) > 2 * half:
            source = fit(source, max(half, 2 * half - cell_len(target))).rstrip()
        return f"{source} {self.arrow} {target}"


def _quoted(word: str) -> str:
    """The word as a shell takes it."""
    word = word_name(word)
    return word if re.fullmatch(r"[\w.:+-]+", word) else shlex.quote(word)


def _weight(link: Link) -> str:
    return f"{head_label(*link[:2])} {link.weight:.2f}"
