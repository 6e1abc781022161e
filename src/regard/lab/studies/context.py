"""A word's vector, layer by layer: the same at first, and apart where its meanings are apart."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from ...analysis.text_model import TextModel, load
from ...analysis.words import Words, find, from_word
from .stats import auc
from .study import Cell, Panel, Result, Setting, Study, Verdict

SENSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bank": (
        ("She put her money in the bank.", "The bank gave him a loan for the house.",
         "He works at a bank in the city.", "The bank raised its interest rates."),
        ("They sat on the bank of the river.", "The boat was tied to the bank.",
         "Flowers grew along the muddy bank of the stream.", "The river burst its bank in spring."),
    ),
    "bat": (
        ("He hit the ball with a bat.", "The player broke his bat in the game.",
         "She swung the bat and ran.", "The bat was made of wood for baseball."),
        ("A bat flew out of the cave.", "The bat hangs upside down and sleeps by day.",
         "The bat eats insects at night.", "We saw a bat with wide wings."),
    ),
    "spring": (
        ("The flowers bloom in spring.", "After winter comes spring.",
         "Birds return every spring in April.", "It rained all spring until summer."),
        ("The spring in the mattress is broken.", "A metal spring pushes the lever back.",
         "He bent the spring of the clock.", "The spring was coiled tight in the machine."),
    ),
    "match": (
        ("He lit the candle with a match.", "The match burned his finger.",
         "She struck a match in the dark.", "A box of one match and some paper for the fire."),
        ("They won the football match.", "The match ended in a draw.",
         "The tennis match lasted four hours.", "Our team lost the match on Sunday."),
    ),
    "letter": (
        ("She wrote a letter to her mother.", "The postman brought a letter today.",
         "He read the letter and sealed the envelope.", "I sent you a letter by mail."),
        ("The word begins with the letter B.", "The first letter of the alphabet is A.",
         "Write each letter in capitals.", "He spelled it with one letter wrong."),
    ),
    "plant": (
        ("Water the plant every day.", "The plant has green leaves.",
         "This plant needs sun and soil.", "She put the plant in the garden."),
        ("The workers left the power plant.", "The plant produces cars and engines.",
         "A nuclear plant was built here.", "The chemical plant closed its factory floor."),
    ),
}  # fmt: skip
RELATED = (
    ("cat", "dog"), ("king", "queen"), ("red", "blue"), ("car", "truck"), ("doctor", "nurse"),
    ("bread", "butter"), ("river", "lake"), ("monday", "tuesday"), ("london", "paris"),
    ("hot", "cold"), ("buy", "sell"), ("mother", "father"), ("gold", "silver"),
    ("winter", "summer"), ("eat", "drink"), ("run", "walk"), ("hand", "foot"), ("table", "chair"),
    ("big", "small"), ("moon", "sun"),
)  # fmt: skip


def run(at: Setting) -> Result:
    reader = load()
    words = list(SENSES)[: at.size.words]
    stacks: dict[str, Tensor] = {}
    for number, word in enumerate(words):
        at.told(word, number / len(words))
        texts = [text for sense in SENSES[word] for text in sense]
        stacks[word] = torch.stack([_vectors(reader, text, word) for text in texts])
    layers = next(iter(stacks.values())).shape[1]
    rows: list[tuple[Cell, ...]] = []
    within, across, right, moved = [], [], [], []
    for layer in range(layers):
        same, other, hit, steps = [], [], [], []
        for stack in stacks.values():
            one, two, found = _compared(stack[:, layer])
            same += one
            other += two
            hit += found
            if layer:
                steps += torch.cosine_similarity(stack[:, layer], stack[:, layer - 1], -1).tolist()
        within.append(sum(same) / len(same))
        across.append(sum(other) / len(other))
        right.append(sum(hit) / len(hit))
        moved.append(sum(steps) / len(steps) if steps else None)
        name = "embedding" if layer == 0 else f"layer {layer - 1}"
        rows.append((name, within[-1], across[-1], within[-1] - across[-1], right[-1], moved[-1]))
    near, far = _embeddings(reader)
    apart = auc(near, far)
    tried = 2 * len(SENSES[words[0]][0]) * len(words)
    verdicts = [
        Verdict("before attention a word has one vector (cosine 1 across meanings, without its "
                "position)", across[0] > 0.99999, f"{across[0]:.4f}"),
        Verdict("after the last layer its meanings are apart (more than at the embedding, by 0.1)",
                within[-1] - across[-1] > 0.1,
                f"cosine {within[-1]:.2f} within a meaning, {across[-1]:.2f} across"),
        Verdict("its nearest neighbour has the same meaning in 90 % of the sentences",
                right[-1] >= 0.9, f"{right[-1]:.0%} of {tried}; at the embedding all are equal"),
        Verdict("the vector is refined layer by layer (no layer replaces it: cosine with the layer "
                "before above 0.5)", min(x for x in moved if x is not None) > 0.5,
                ", ".join(f"{x:.2f}" for x in moved if x is not None)),
        Verdict("words of near meaning are near before any attention (above 90 % of others)",
                apart > 0.9, f"{apart:.1%} (area under the ROC curve, {len(near)} pairs against "
                f"{len(far)})"),
    ]  # fmt: skip
    names = [str(row[0]) for row in rows]
    panels = [
        Panel("one word in two meanings", "", "cosine",
              {"same meaning": (names, within), "other meaning": (names, across)}),
        Panel("nearest neighbour of the same meaning", "", "share", {"share": (names, right)},
              level=0.5),
    ]  # fmt: skip
    columns = ("vector", "same", "other", "gap", "nearest right", "kept")
    read = {w: [_read(reader, s[0], w) for s in SENSES[w]] for w in words}
    first = [sense[0] for sense in SENSES[words[0]]]
    return Result(columns, rows, verdicts, panels, notes=[
        f"all-MiniLM-L6-v2; {', '.join(words)}, each in eight sentences, four a meaning. The "
        "embedding is the word's own, before positions. nearest right: the nearest of the other "
        "seven sentences has the same meaning. kept: mean cosine with the layer before. "
        + " ".join(f"What “{words[0]}” reads most in “{text}”, layer by layer: "
                   + ", ".join(f"{one['word']} {one['weight']:.2f}" for one in found) + "."
                   for text, found in zip(first, read[words[0]], strict=True))
    ], more={"read": read})  # fmt: skip


def _vectors(reader: TextModel, text: str, word: str) -> Tensor:
    """The word's own embedding, then its vector after each layer: (layers + 1, width)."""
    encoded = reader.encode(text)
    words = Words.of(encoded.about())
    tokens = words[find(words, word).number].tokens
    ids = torch.tensor([encoded.ids], dtype=torch.int64, device="cpu")
    table = reader.model.get_input_embeddings().weight
    with torch.no_grad():
        states = reader.model(input_ids=ids, output_hidden_states=True).hidden_states
        own = table[ids[0, tokens.start : tokens.stop]].mean(0)
        return torch.stack([own, *(s[0, tokens.start : tokens.stop].mean(0) for s in states[1:])])


def _compared(vectors: Tensor) -> tuple[list[float], list[float], list[bool]]:
    """Cosines within a meaning and across, and whether each one's nearest has its meaning; the
    first half of the vectors has one meaning, the rest the other."""
    half = len(vectors) // 2
    near = torch.nn.functional.normalize(vectors.double(), dim=-1)
    cosines = near @ near.mT
    same: list[float] = []
    other: list[float] = []
    for i, j in combinations(range(len(vectors)), 2):
        (same if (i < half) == (j < half) else other).append(float(cosines[i, j]))
    apart = cosines.clone().fill_diagonal_(-2)
    ranked = apart.max(-1)
    # Where all are equal (the embedding) no neighbour is the nearest
    tied = (apart >= ranked.values[:, None] - 1e-9).sum(-1) > 1
    hits = [
        bool((n < half) == (i < half)) and not bool(tied[i])
        for i, n in enumerate(ranked.indices.tolist())
    ]
    return same, other, hits


def _embeddings(reader: TextModel) -> tuple[list[float], list[float]]:
    """Cosines of input embeddings of related words, and of the same words paired otherwise."""
    table = reader.model.get_input_embeddings().weight.detach().double()
    ids = {w: reader.tokenizer.convert_tokens_to_ids(w) for pair in RELATED for w in pair}

    def cosine(one: str, other: str) -> float:
        return float(torch.cosine_similarity(table[ids[one]], table[ids[other]], 0))

    near = [cosine(*pair) for pair in RELATED]
    far = [cosine(a, d) for (a, b), (c, d) in combinations(RELATED, 2)]
    return near, far


def _read(reader: TextModel, text: str, word: str) -> list[dict[str, object]]:
    """Of each layer, the word that this word reads most, itself and special tokens apart."""
    recording = reader.record(text)
    words = Words.of(recording.about)
    number = find(words, word).number
    found: list[dict[str, object]] = []
    for layer in range(len(recording.layers)):
        mean = from_word(recording, layer, words[number], words).mean(0)
        for other, one in enumerate(words):
            if one.special or other == number:
                mean[other] = -1
        best = int(mean.argmax())
        found.append({"layer": layer, "word": words[best].text, "weight": float(mean[best])})
    return found


STUDY = Study(
    "context",
    "A word has one vector for all its meanings; layer by layer attention tells them apart.",
    "Words of two meanings in sentences of each: the cosine between their vectors within a meaning "
    "and across, from the input embedding to the last layer.",
    run,
    tiny=dict(words=1),
    quick=dict(words=6),
    full=dict(words=6),
)
