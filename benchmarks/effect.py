"""Does Effect find the edges that matter? Against the truth: every edge cut, one at a time.

    python benchmarks/effect.py [--sentences 5] [--data ../shared/data/dpr/test.c.txt]

For the first sentences of the Definite Pronoun Resolution data (Rahman and Ng 2012), in
all-MiniLM-L6-v2: of the 20 edges (layer, head, query, key) whose removal changes the pronoun's
final vector most, how many are among the 20 first by Effect, by plain weight, by weight among the
edges from the pronoun alone, and by weight · ‖W_O v‖ (of all edges, and from the pronoun). The
truth is eager attention with that one score at −inf, for every edge with a weight above 0.001.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.analysis.effect import edges
from regard.analysis.probe import Probe
from regard.analysis.text_model import TextModel, load

TOP, LEAST, BATCH = 20, 0.001, 256


class Found(NamedTuple):
    """How many of the true top 20 are among the first 20 by each column, of so many edges."""

    edges: int
    effect: int
    weight: int
    own_weight: int
    norm: int
    own_norm: int


def sentences(path: Path, count: int) -> list[tuple[str, str]]:
    """(sentence, pronoun) of the data: five lines each, the last one empty."""
    lines = path.read_text("utf-8").splitlines()
    return [(lines[5 * i], lines[5 * i + 1]) for i in range(count)]


def eager(reader: TextModel) -> Any:
    """The same model with the attention that transformers calls eager."""
    model = type(reader.model).from_pretrained(
        reader.model.name_or_path, attn_implementation="eager"
    )
    return model.eval()


@torch.no_grad()
def truth(model: Any, ids: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """(change, weight), each (layers, heads, n, n), of a BERT: ‖change of the token's vector‖.

    NaN where the weight is not above 0.001. The model is run on from the layer that is cut.
    """
    ran = model(ids, output_hidden_states=True, output_attentions=True)
    weight, n = torch.cat(ran.attentions), ids.shape[1]
    change = torch.full_like(weight, torch.nan)
    final = ran.last_hidden_state[0, token]
    blocks = model.encoder.layer
    for number in range(len(blocks)):
        places = (weight[number] > LEAST).nonzero()
        if number == len(blocks) - 1:  # the last layer's other rows are other words' vectors
            change[number].masked_fill_(weight[number] > LEAST, 0)
            places = places[places[:, 1] == token]
        for some in places.split(BATCH):
            mask = torch.zeros(len(some), weight.shape[1], n, n)
            mask[torch.arange(len(some)), some[:, 0], some[:, 1], some[:, 2]] = -torch.inf
            hidden = ran.hidden_states[number].expand(len(some), -1, -1)
            for block in blocks[number:]:
                hidden = block(hidden, attention_mask=mask)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
                mask = None
            heads, rows, cols = some.T
            change[number, heads, rows, cols] = (hidden[:, token] - final).norm(dim=-1)
    return change, weight


def measure(reader: TextModel, model: Any, text: str, pronoun: str) -> Found:
    """The figures for the last time that the pronoun stands in the text."""
    probe = Probe(reader, text)
    at = [m.start() for m in re.finditer(rf"\b{re.escape(pronoun)}\b", text)][-1]
    word = next(i for i, w in enumerate(probe.words) if w.start == at and not w.special)
    change, weight = truth(model, torch.tensor([probe.encoded.ids]), probe.words[word].tokens.start)
    seen = [torch.zeros_like(weight) for _ in range(2)]
    for number, layer in edges(probe, word).items():
        keys = layer.indices.long()
        assert layer.norms is not None
        seen[0][number].scatter_(-1, keys, layer.effect)
        norms = layer.weights * layer.norms.gather(1, keys.flatten(1)).view_as(layer.weights)
        seen[1][number].scatter_(-1, keys, norms)
    cut = change.isfinite()

    def first(ranked: Tensor) -> set[int]:
        return set(ranked.masked_fill(~cut, -1).flatten().topk(TOP).indices.tolist())

    own = torch.zeros_like(weight)
    own[:, :, probe.words[word].tokens.start] = 1
    columns = (seen[0], weight, weight * own, seen[1], seen[1] * own)
    true = first(change)
    return Found(int(cut.sum()), *(len(true & first(column)) for column in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=5)
    data = Path(__file__).resolve().parents[2] / "shared/data/dpr/test.c.txt"
    parser.add_argument("--data", type=Path, default=data)
    asked = parser.parse_args()
    reader = load()
    model = eager(reader)
    print(f"of the {TOP} edges that matter most, among the first {TOP} by")
    print("effect  weight  from it  ·‖W_O v‖  from it    edges  sentence")
    for text, pronoun in sentences(asked.data, asked.sentences):
        found = measure(reader, model, text, pronoun)
        print(
            f"{found.effect:>6}  {found.weight:>6}  {found.own_weight:>7}  {found.norm:>9}  "
            f"{found.own_norm:>7}  {found.edges:>7,}  {text} ({pronoun})",
            flush=True,
        )


if __name__ == "__main__":
    main()
