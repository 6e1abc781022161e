"""Cross-attention as word alignment, with and without the norms of what is read."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..call.observers import Rows
from ..errors import RegardError
from .alignment import counts, diagonal, error_rate, read_alignments
from .stats import Interval, bootstrap
from .study import Cell, Panel, Result, Setting, Study, Verdict

TRAIN = "regard train translate --data ../shared/data/multi30k --out translator --budget 120"
READS = ("output", "input")
SENTENCE = ("the cat sat on the mat .", "le chat était assis sur le tapis .")


def run(at: Setting) -> Result:
    pairs = read_alignments(
        at.file("alignment/enfr.src-tgt"), at.file("alignment/enfr.gold")
    )[: at.size.pairs]  # fmt: skip
    with tempfile.TemporaryDirectory() as made:
        model, tokenizer = _translator(at, Path(made))
    tables = []
    for number, pair in enumerate(pairs):
        at.told("alignments", number / len(pairs))
        tables.append(word_tables(model, tokenizer, pair.source, pair.target))
    rows: list[tuple[Cell, ...]] = []
    errors: dict[str, Interval] = {}
    chosen: dict[str, int] = {}
    for key in tables[0]:
        made_links = [_links(table[key]) for table in tables]
        # [head][pair]; every other pair chooses the head, the rest report
        each = [
            [counts(links[head], pair) for links, pair in zip(made_links, pairs, strict=True)]
            for head in range(len(made_links[0]))
        ]
        best = min(range(len(each)), key=lambda head: error_rate(each[head][::2]))
        chosen[key] = best
        errors[key] = bootstrap(each[best][1::2], error_rate, at.random(key))
        layer, head = divmod(best, tables[0][key].shape[0] // len(model.decoder.blocks))
        read, weighted = key.split()
        rows.append((read, weighted, f"{layer}.{head}", *(100 * x for x in errors[key])))
    base = error_rate([counts(diagonal(pair), pair) for pair in pairs[1::2]])
    rows.append(("–", "diagonal", "–", 100 * base, None, None))
    best_key = min(errors, key=lambda key: errors[key].value)
    told = {key: f"{100 * one.value:.1f}" for key, one in errors.items()}
    cat = _cat(model, tokenizer, best_key, chosen[best_key])
    verdicts = [
        Verdict("cross-attention aligns words better than the diagonal",
                errors[best_key].high < base,
                f"alignment error rate {100 * errors[best_key].value:.1f} "
                f"[{100 * errors[best_key].low:.1f}, {100 * errors[best_key].high:.1f}] "
                f"({best_key}), diagonal {100 * base:.1f}"),
        Verdict("it is read better where the word is the decoder's input (Chen et al. 2020)",
                min(errors[f"input {w}"].value for w in ("weight", "norm"))
                < min(errors[f"output {w}"].value for w in ("weight", "norm")),
                ", ".join(f"{key} {value}" for key, value in told.items())),
        Verdict("weights times norms align better than weights (Kobayashi et al. 2020)",
                errors["input norm"].value < errors["input weight"].value,
                f"{told['input norm']} against {told['input weight']}"),
        Verdict("“The cat sat on the mat.” links chat to cat, more than to on",
                cat["cat"] > cat["on"], f"weights {cat['cat']:.2f} and {cat['on']:.2f}"),
    ]  # fmt: skip
    columns = ("read at", "by", "head", "AER", "low", "high")
    panel = Panel("alignment error rate", "", "AER, %", {"AER": (
        [*errors, "diagonal"], [100 * x for x in (*(e.value for e in errors.values()), base)])},
        bars=True)  # fmt: skip
    return Result(columns, rows, verdicts, [panel], notes=[
        f"{len(pairs)} hand-aligned sentence pairs of the Hansards, the target given; "
        "each target word is linked to the source word that it reads most. Head (layer.head) "
        "chosen on every other pair, the error rate (percent) of the rest with 95 % bootstrap "
        "intervals. "
        + (f"The translator was trained here for {at.size.steps} steps: it shows the plumbing, "
           "not what a translator can do."
           if at.translator is None else "")
    ])  # fmt: skip


def _translator(at: Setting, made: Path) -> tuple[Any, Any]:
    """The one that was given, or in a quick run one trained for some steps."""
    from ..models.saved import load_model
    from ..training import load_tokenizer

    folder = at.translator
    if folder is None:
        if at.mode == "full":
            raise RegardError(
                "the study translation needs a trained translator, of two hours at most: run "
                f"{TRAIN}, then give it by --translator translator"
            )
        _train(at, made)
        folder = made
    model = load_model(folder)
    if model.kind != "translator":
        raise RegardError(f"{folder} is no translator with attention; train one by {TRAIN}")
    return model, load_tokenizer(folder)


def _train(at: Setting, folder: Path) -> None:
    from ..models import ModelConfig
    from ..training import TrainingPlan, TranslationTask, read_pairs, train, train_tokenizer
    from ..training.tokenizer import BOS, EOS, PAD

    pairs = read_pairs(str(at.file("multi30k")))[: at.size.sentences]
    tokenizer = train_tokenizer((side for pair in pairs for side in pair), 2000, ends=True)
    task = TranslationTask(pairs[50:], pairs[:50], tokenizer, tokens_a_batch=1024)
    config = ModelConfig(
        vocab=tokenizer.get_vocab_size(), dim=at.size.dim, depth=2, heads=4, pad=PAD, bos=BOS,
        eos=EOS,
    )  # fmt: skip
    plan = TrainingPlan(steps=at.size.steps, seed=at.seed, precision="fp32", warmup=20)
    train(task, config, plan, folder, told=at.told)


def word_tables(
    model: Any, tokenizer: Any, source: list[str], target: list[str]
) -> dict[str, Tensor]:
    """What each target word gives each source word, by where it is read and by what: float32
    (layers · heads, target words, source words)."""
    from ..training.tokenizer import BOS

    read, written = (tokenizer.encode(" ".join(words)) for words in (source, target))
    of_source, of_target = _words(read, source), _words(written, target)
    ids = torch.tensor([read.ids], dtype=torch.int64, device="cpu")
    before = torch.tensor([[BOS, *written.ids[:-1]]], dtype=torch.int64, device="cpu")
    with torch.no_grad():
        rows = Rows(range(before.shape[1]))
        _, seen = model(before, ids, observe=[rows])
        memory, _ = model.encoder(ids, model.embedding, mask=model.source_mask(ids))
        norms = [_norms(block.cross_attention, memory) for block in model.decoder.blocks]
    weights = [block.cross[0].weights[0] for block in seen.decoder]
    found = {}
    for by in ("weight", "norm"):
        tables = [
            w if by == "weight" else w * n[:, None] for w, n in zip(weights, norms, strict=True)
        ]
        whole = _summed(torch.cat(tables), of_source, len(source), dim=2)
        for shift, where in enumerate(READS):
            # Row i reads the token that is its input; what it writes is the one after
            at = [of_target[i - shift] if i >= shift else -1 for i in range(before.shape[1])]
            found[f"{where} {by}"] = _summed(whole, at, len(target), dim=1)
    return found


def _norms(attention: Any, memory: Tensor) -> Tensor:
    """‖W_O v‖ of each head and source token: (heads, length). Kobayashi et al. 2020, eq. 5."""
    value = attention.remember(memory).value[0]  # (kv_heads, length, head_dim)
    heads = attention.heads
    value = value.repeat_interleave(heads // len(value), 0)
    project = attention.out_proj.weight.unflatten(1, (heads, -1)).movedim(1, 0)
    return (value @ project.mT).norm(dim=-1)


def _summed(table: Tensor, words: list[int], count: int, dim: int) -> Tensor:
    """Tokens summed to the words that they belong to; −1: to none."""
    at = torch.tensor([w if w >= 0 else count for w in words], dtype=torch.int64, device="cpu")
    size = [*table.shape]
    size[dim] = count + 1
    return table.new_zeros(size).index_add_(dim, at, table).narrow(dim, 0, count)


def _words(encoded: Any, words: list[str]) -> list[int]:
    """The word of each token of words joined by spaces, the one it ends in; −1: of none."""
    ends, place = [], 0
    for word in words:
        place += len(word) + 1
        ends.append(place)
    return [
        -1 if start == end else next((i for i, stop in enumerate(ends) if end <= stop), -1)
        for start, end in encoded.offsets
    ]


def _links(tables: Tensor) -> list[list[tuple[int, int]]]:
    """Of each head, every target word with the source word that it gives most."""
    return [[(int(i), j) for j, i in enumerate(one)] for one in tables.argmax(-1).tolist()]


def _cat(model: Any, tokenizer: Any, key: str, head: int) -> dict[str, float]:
    source, target = (text.split() for text in SENTENCE)
    row = word_tables(model, tokenizer, source, target)[key][head, target.index("chat")]
    total = float(row.sum())
    return {word: float(row[source.index(word)]) / total for word in ("cat", "on")}


STUDY = Study(
    "translation",
    "A translator's cross-attention aligns words: each written word reads its source.",
    "A trained translator is given hand-aligned sentence pairs; its cross-attention, by weight and "
    "by weight times ‖W_O v‖, is read as alignment.",
    run,
    tiny=dict(pairs=6, sentences=200, steps=2, dim=32),
    quick=dict(pairs=100, sentences=6000, steps=120, dim=96),
    full=dict(pairs=447, sentences=0, steps=0, dim=0),
)
