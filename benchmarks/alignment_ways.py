"""More ways to read cross-attention as alignment than the study has, on the half that chooses.

    python benchmarks/alignment_ways.py TRANSLATOR [--data ../shared/data]

The study `translation` chooses between weights and shares of them, linked in three ways, on every
other of the hand-aligned sentence pairs, and reports the rest. Here, on those that choose alone:
half a share, and both words' shares in turns (Sinkhorn and Knopp 1967); and, at the end of
grow-diag, links of words that have none on either side (grow-diag-final-and, Koehn et al. 2005).
Of each way the alignment error rate in percent, and the head or mean of heads that it is of.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from regard.lab.studies.alignment import (
    Counts,
    Links,
    counts,
    error_rate,
    linked,
    read_alignments,
)
from regard.lab.studies.cross_attention import READS, heads_of, word_tables
from regard.training import load_translator

LEAST = 1e-9


def shared(table: Tensor) -> Tensor:
    """Over what all target words give a source word."""
    return table / (table.sum(1, keepdim=True) + LEAST)


def sinkhorn(table: Tensor, rounds: int) -> Tensor:
    for _ in range(rounds):
        table = shared(table / (table.sum(2, keepdim=True) + LEAST))
    return table


WAYS = {
    "as it is": lambda table: table,
    "share": shared,
    "half of the share": lambda table: table / (table.sum(1, keepdim=True) + LEAST).sqrt(),
    "Sinkhorn, 2 rounds": lambda table: sinkhorn(table, 2),
    "Sinkhorn, 10 rounds": lambda table: sinkhorn(table, 10),
}


def every_linking(table: Tensor) -> Iterator[tuple[str, Links]]:
    """Of one table (target words, source words)."""
    reads, readers = table.argmax(-1).tolist(), table.argmax(-2).tolist()
    found = linked(reads, readers)
    yield from found.items()
    yield "grow-diag-final-and", _finished(found["grow-diag"], reads, readers)


def _finished(grown: Links, reads: list[int], readers: list[int]) -> Links:
    """With links, of either way, of words that have none on either side."""
    made = set(grown)
    sources, targets = ({link[side] for link in made} for side in (0, 1))
    for way in ([(i, j) for j, i in enumerate(reads)], list(enumerate(readers))):
        for i, j in sorted(way):
            if i not in sources and j not in targets:
                made.add((i, j))
                sources.add(i)
                targets.add(j)
    return frozenset(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("translator", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    asked = parser.parse_args()
    folder = asked.data / "alignment"
    pairs = read_alignments(folder / "enfr.src-tgt", folder / "enfr.gold")[::2]
    model, tokenizer = load_translator(asked.translator)
    heads = heads_of(model)
    counted: dict[tuple[str, str, str], dict[str, list[Counts]]] = {}
    for pair in pairs:
        tables = word_tables(model, tokenizer, pair.source, pair.target)
        for by in ("weight", "norm"):
            for read in READS:
                for way, scaled in WAYS.items():
                    for head, table in zip(heads, scaled(tables[f"{read} {by}"]), strict=True):
                        for how, links in every_linking(table):
                            of = counted.setdefault((f"{read} {by}", way, how), {})
                            of.setdefault(head, []).append(counts(links, pair))
    print(f"{len(pairs)} pairs; alignment error rate, %")
    found = {
        way: {head: error_rate(each) for head, each in heads.items()}
        for way, heads in counted.items()
    }
    for way, errors in sorted(found.items(), key=lambda one: min(one[1].values())):
        head = min(errors, key=errors.__getitem__)
        print(f"{100 * errors[head]:5.1f}  {', '.join(way)}: {head}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
