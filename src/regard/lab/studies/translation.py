"""Translators: how well they translate, by length too, and how well attention aligns words."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import RegardError
from ...nn.models import ModelConfig
from ..training import (
    TrainingPlan,
    TranslationTask,
    load_translator,
    read_pairs,
    train,
    train_tokenizer,
    translate_texts,
)
from ..training.tokenizer import BOS, EOS, PAD
from .alignment import (
    LINKINGS,
    Aligned,
    Counts,
    counts,
    diagonal,
    error_rate,
    linked,
    read_alignments,
)
from .cross_attention import KEYS, WEIGHINGS, has_weights, heads_of, word_tables
from .stats import Interval, bootstrap
from .study import Cell, Panel, Result, Setting, Study, Verdict

TRAIN = "regard train translate --data ../shared/data/multi30k --out translator --budget 120"
SENTENCE = ("The cat sat on the mat .", "Le chat était assis sur le tapis .")
LENGTHS = (9, 12, 15, 19)  # words of a source: up to each of these, and more
WANTED = 50.0  # BLEU; OPUS-MT tc-big, a general-purpose model, has 52.4
BELOW = 0.36  # error rate of an alignment


@dataclass
class Alignment:
    """Of one way to read: the error rate of each head or mean, linked each way, on the half that
    chooses, and on the half that reports; which is best on the first; its error on the second."""

    ways: list[tuple[str, str]]  # (head or mean, linking)
    chosen_on: list[float]
    reported_on: list[float]
    best: int
    counted: list[Counts]  # of each pair that reports, by the best
    error: Interval

    def by_linking(self, linking: str) -> float:
        """The error reported of the head or mean that is best on the first half, linked so."""
        places = [n for n, way in enumerate(self.ways) if way[1] == linking]
        return self.reported_on[min(places, key=self.chosen_on.__getitem__)]

    def of_head(self, head: str) -> float | None:
        """The error reported of a head or mean, linked as the best is."""
        way = (head, self.ways[self.best][1])
        return self.reported_on[self.ways.index(way)] if way in self.ways else None


@dataclass
class Translated:
    """What one translator does. by_length: BLEU of each of LENGTHS, and of longer ones.

    budget: what it was trained by, as far as its folder says."""

    name: str
    kind: str
    parameters: int
    bleu: float
    by_length: list[float | None]
    budget: dict[str, Any] = field(default_factory=dict)
    read: dict[str, Alignment] = field(default_factory=dict)
    cat: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The way to read that aligns best on the half that chooses."""
        return min(self.read, key=lambda key: min(self.read[key].chosen_on))


def run(at: Setting) -> Result:
    _bleu([], [])  # what is missing is said before anything takes time
    pairs = read_alignments(
        at.file("alignment/enfr.src-tgt"), at.file("alignment/enfr.gold")
    )[: at.size.pairs]  # fmt: skip
    tested = read_pairs(str(at.file("multi30k")), part="test_2016_flickr")[: at.size.tested]
    found: list[Translated] = []
    signature = ""
    with tempfile.TemporaryDirectory() as made:
        folders = at.translators or (_trained(at, Path(made)),)
        names = _names(folders) if at.translators else ["trained here"]
        for name, folder in zip(names, folders, strict=True):
            both = load_translator(folder)
            one, signature = _translated(at, name, both, tested)
            one.budget = _budget(folder)
            if has_weights(both[0]):
                _aligned(at, one, both, pairs)
            found.append(one)
    base = error_rate([counts(diagonal(pair), pair) for pair in pairs[1::2]])
    return _result(at, found, base, signature, (len(tested), len(pairs)))


def _budget(folder: Path) -> dict[str, Any]:
    """Steps, tokens a batch, data and how often the first is read: {} where no run.json tells."""
    try:
        run = json.loads((folder / "run.json").read_text("utf-8"))
    except FileNotFoundError:
        return {}
    asked = {name: run["asked"].get(name) for name in ("batch", "repeat", "processes")}
    data = [Path(path).name for path in run["asked"].get("data", [])]
    return {"steps": run["decided"]["steps"], "data": data} | asked


def _names(folders: Sequence[Path]) -> list[str]:
    short = [folder.resolve().name for folder in folders]
    return short if len({*short}) == len(short) else [str(folder) for folder in folders]


def _translated(
    at: Setting, name: str, both: tuple[Any, Any], tested: list[tuple[str, str]]
) -> tuple[Translated, str]:
    """BLEU of a translator, whole and by the length of the source."""
    model, tokenizer = both
    said = translate_texts(
        model, tokenizer, [source for source, _ in tested], beams=at.size.beams,
        told=lambda what, share: at.told(f"{name}: {what}", share),
    )  # fmt: skip
    references = [target for _, target in tested]
    bleu, signature = _bleu(said, references)
    by_length: list[float | None] = []
    for inside in _buckets([source for source, _ in tested]):
        part = _bleu([said[n] for n in inside], [references[n] for n in inside])[0]
        by_length.append(part if inside else None)
    parameters = sum(one.numel() for one in model.parameters())
    kind = "transformer" if model.kind == "translator" else _recurrent(model)
    return Translated(name, kind, parameters, bleu, by_length), signature


def _recurrent(model: Any) -> str:
    cross = "without attention" if model.attention is None else "with Bahdanau's attention"
    return f"{model.config.mixer} {cross}"


def _bleu(said: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Corpus BLEU in percent by sacreBLEU's defaults (Post 2018), and its signature."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise RegardError('BLEU needs sacrebleu: pip install "regard[studies]"') from error
    metric = BLEU()
    if not said:
        return float("nan"), ""
    score = metric.corpus_score(list(said), [list(references)]).score
    return float(score), str(metric.get_signature())


def _buckets(sources: Sequence[str]) -> list[list[int]]:
    """Which sources are of up to so many words, of each of LENGTHS, and which are longer."""
    found: list[list[int]] = [[] for _ in range(len(LENGTHS) + 1)]
    for number, source in enumerate(sources):
        words = len(source.split())
        found[sum(words > most for most in LENGTHS)].append(number)
    return found


def _aligned(at: Setting, one: Translated, both: tuple[Any, Any], pairs: Sequence[Aligned]) -> None:
    """What its attention links, against what people linked."""
    model, tokenizer = both
    heads = heads_of(model)
    tables = []
    for number, pair in enumerate(pairs):
        at.told(f"{one.name}: alignments", number / len(pairs))
        tables.append(word_tables(model, tokenizer, pair.source, pair.target))
    for key in KEYS:
        one.read[key] = _chosen(at, key, heads, [table[key] for table in tables], pairs)
    source, target = (text.split() for text in SENTENCE)
    table = word_tables(model, tokenizer, source, target)[one.key]
    best = one.read[one.key]
    row = table[heads.index(best.ways[best.best][0]), target.index("chat")]
    total = float(row.sum())
    one.cat = {word: float(row[source.index(word)]) / total for word in ("cat", "on")}


def _chosen(
    at: Setting, key: str, heads: list[str], tables: list[Any], pairs: Sequence[Aligned]
) -> Alignment:
    """Every other pair chooses the head or mean, and how it is linked; the rest report."""
    each: dict[tuple[str, str], list[Counts]] = {
        (head, how): [] for how in LINKINGS for head in heads
    }
    for table, pair in zip(tables, pairs, strict=True):
        both = (table.argmax(-1).tolist(), table.argmax(-2).tolist())
        for head, reads, readers in zip(heads, *both, strict=True):
            for how, made in linked(reads, readers).items():
                each[head, how].append(counts(made, pair))
    first, second = ([error_rate(one[half::2]) for one in each.values()] for half in (0, 1))
    best = first.index(min(first))
    reported = [*each.values()][best][1::2]
    error = bootstrap(reported, error_rate, at.random(key))
    return Alignment([*each], first, second, best, reported, error)


def _result(
    at: Setting, found: list[Translated], base: float, signature: str, many: tuple[int, int]
) -> Result:
    rows: list[tuple[Cell, ...]] = [
        ("parameters", *(one.parameters for one in found)),
        ("steps of training", *(one.budget.get("steps") for one in found)),
        ("BLEU", *(one.bleu for one in found)),
    ]
    spans = [*(f"{low + 1} to {high}" for low, high in zip((0, *LENGTHS), LENGTHS, strict=False)),
             f"over {LENGTHS[-1]}"]  # fmt: skip
    rows += [
        (f"BLEU, {span} words", *(one.by_length[n] for one in found))
        for n, span in enumerate(spans)
    ]
    rows += [
        (f"AER, {key}", *(100 * one.read[key].error.value if one.read else None for one in found))
        for key in KEYS
    ]
    rows += _parts(found)
    rows.append(("AER, diagonal", *(100 * base for _ in found)))
    panels = [
        Panel("BLEU by length", "words", "BLEU",
              {one.name: (spans, [x or 0.0 for x in one.by_length]) for one in found}, bars=True),
        Panel("alignment error rate", "", "AER, %", {
            one.name: ([*KEYS, "diagonal"],
                       [100 * x for x in (*(one.read[k].error.value for k in KEYS), base)])
            for one in found if one.read}, bars=True),
    ]  # fmt: skip
    return Result(
        ("measure", *(one.name for one in found)), rows, _verdicts(at, found, base), panels,
        notes=_notes(at, found, signature, many),
        more={"translators": [_more(one) for one in found], "signature": signature},
    )  # fmt: skip


def _parts(found: list[Translated]) -> list[tuple[Cell, ...]]:
    """By the best way to read: the error rate of each way to link, and of each mean."""
    best = [one.read[one.key] if one.read else None for one in found]
    means = {head for one in best if one for head, _ in one.ways if head.endswith("mean")}
    named = {f"layer {name.split()[0]}'s mean": name for name in sorted(means)}
    named |= {"mean of all layers": "all"} if means else {}
    rows: list[tuple[Cell, ...]] = [
        (f"AER, {how}", *(100 * one.by_linking(how) if one else None for one in best))
        for how in (LINKINGS if means else ())
    ]
    for said, name in named.items():
        errors = [one.of_head(name) if one else None for one in best]
        rows.append((f"AER, {said}", *(100 * x if x is not None else None for x in errors)))
    return rows


def _verdicts(at: Setting, found: list[Translated], base: float) -> list[Verdict]:
    first = found[0]
    said = ", ".join(f"{one.name} {one.bleu:.1f}" for one in found)
    verdicts = [
        Verdict(f"a translator trained here reaches BLEU {WANTED:.0f} on Multi30k's test of 2016",
                max(one.bleu for one in found) >= WANTED, said),
    ]  # fmt: skip
    if first.read:
        verdicts += _of_alignment(at, first, base)
    return verdicts + _of_recurrence(found)


def _of_recurrence(found: list[Translated]) -> list[Verdict]:
    """Of translators with a budget in common: attention or not, recurrence or not."""
    older = [one for one in found if one.kind != "transformer"]
    alike = [one for one in found if older and one.budget == older[0].budget]
    older = [one for one in alike if one in older]
    newer = [one for one in alike if one not in older]
    verdicts = []
    if newer:
        verdicts.append(Verdict(
            "a transformer translates better than recurrent translators of the same steps and data",
            max(one.bleu for one in newer) > max(one.bleu for one in older),
            "BLEU " + ", ".join(f"{one.name} {one.bleu:.1f}" for one in alike),
        ))  # fmt: skip
    seeing, blind = ([one for one in older if bool(one.read) is reads] for reads in (True, False))
    if seeing and blind:
        falls = {one.name: _fall(one) for one in (seeing[0], blind[0])}
        told = (f"{name} {fall:.1f} ({share:.0%} of it)" for name, (fall, share) in falls.items())
        verdicts.append(Verdict(
            "without attention a recurrent translator loses more on long sentences than with it",
            falls[blind[0].name] > falls[seeing[0].name],
            f"BLEU of the shortest less that of the longest: {', '.join(told)}",
        ))  # fmt: skip
        verdicts.append(Verdict(
            "a recurrent translator translates better with attention than without",
            seeing[0].bleu > blind[0].bleu,
            f"BLEU {seeing[0].bleu:.1f} against {blind[0].bleu:.1f}",
        ))  # fmt: skip
    return verdicts


def _fall(one: Translated) -> tuple[float, float]:
    """How much BLEU falls from the shortest sentences to the longest, and what share of it."""
    known = [x for x in one.by_length if x is not None]
    fall = known[0] - known[-1]
    return fall, fall / max(known[0], 1e-9)


def _of_alignment(at: Setting, one: Translated, base: float) -> list[Verdict]:
    errors = {key: found.error for key, found in one.read.items()}
    told = {key: f"{100 * error.value:.1f}" for key, error in errors.items()}
    way = one.read[one.key]
    best = way.error
    pairs = [*zip(one.read["output norm"].counted, one.read["output weight"].counted, strict=True)]
    gain = bootstrap(pairs, _difference, at.random("norm"))
    figure = (
        f"alignment error rate {100 * best.value:.1f} [{100 * best.low:.1f}, {100 * best.high:.1f}]"
        f" ({one.key}, {' '.join(way.ways[way.best])})"
    )
    return [
        Verdict("cross-attention aligns words better than the diagonal",
                best.high < base, f"{figure}, diagonal {100 * base:.1f}"),
        Verdict(f"its alignment error rate is below {100 * BELOW:.0f}", best.value < BELOW, figure),
        Verdict("it is read better where the word is the decoder's input (Chen et al. 2020)",
                min(errors[f"input {by}"].value for by in WEIGHINGS)
                < min(errors[f"output {by}"].value for by in WEIGHINGS),
                ", ".join(f"{key} {value}" for key, value in told.items())),
        Verdict("weights times norms align better than weights (Kobayashi et al. 2020)",
                gain.high < 0,
                f"read at the output {told['output norm']} against {told['output weight']}: "
                f"{100 * gain.value:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"),
        Verdict("“The cat sat on the mat.” links chat to cat, more than to on",
                one.cat["cat"] > one.cat["on"],
                f"weights {one.cat['cat']:.2f} and {one.cat['on']:.2f}"),
    ]  # fmt: skip


def _difference(pairs: Sequence[tuple[Counts, Counts]]) -> float:
    """Of two ways, pair by pair: the first's error rate less the second's."""
    first, second = zip(*pairs, strict=True)
    return error_rate(first) - error_rate(second)


def _notes(
    at: Setting, found: list[Translated], signature: str, many: tuple[int, int]
) -> list[str]:
    kinds = "; ".join(f"{one.name}: {one.kind}" for one in found)
    heads = "; ".join(
        f"{one.name} "
        + ", ".join(f"{key} {' '.join(way.ways[way.best])}" for key, way in one.read.items())
        for one in found if one.read
    )  # fmt: skip
    notes = [
        f"{kinds}. BLEU: sacreBLEU, {signature}, {many[0]} sentences of Multi30k, "
        f"test_2016_flickr, beam search with {at.size.beams} beams; length in words of the source. "
        f"AER: alignment error rate in percent on {many[1]} hand-aligned sentence pairs of the "
        "Hansards, the target given. output, input: read at the step that writes the word, or "
        "that has it as its input. norm: weight times ‖W_O v‖; share: weight (or norm) over what "
        "all target words give that source word. argmax: a target word is linked to the source "
        "word that it reads most; mutual: where it also reads that one more than other words do; "
        "grow-diag: these, and beside them links of either way of words that have none (Koehn et "
        "al. 2005; here both ways are of one translator's table). The head (layer.head) or mean of "
        "heads and how it is linked are chosen on every other pair, the error rate is that of the "
        "rest; ways to link and means by the best way to read. Chosen: "
        f"{heads or 'none'}."
    ]
    if not at.translators:
        notes.append(f"The translator was trained here for {at.size.steps} steps: it shows the "
                     "plumbing, not what a translator can do.")  # fmt: skip
    return notes


def _more(one: Translated) -> Mapping[str, Any]:
    return {
        "name": one.name, "kind": one.kind, "parameters": one.parameters, "bleu": one.bleu,
        "bleu_by_length": one.by_length, "budget": one.budget, "cat": one.cat,
        "alignment": {
            key: {"chosen": " ".join(way.ways[way.best]), "aer": list(way.error),
                  "ways": [" ".join(one) for one in way.ways],
                  "chosen_on": way.chosen_on, "reported_on": way.reported_on}
            for key, way in one.read.items()
        },
    }  # fmt: skip


def _trained(at: Setting, folder: Path) -> Path:
    """In a quick run, a translator trained for some steps."""
    if at.mode == "full":
        raise RegardError(
            "the study translation needs a trained translator, of two hours at most: run "
            f"{TRAIN}, then give it by --translator translator"
        )
    pairs = read_pairs(str(at.file("multi30k")))[: at.size.sentences]
    tokenizer = train_tokenizer((side for pair in pairs for side in pair), 2000, ends=True)
    task = TranslationTask(pairs[50:], pairs[:50], tokenizer, tokens_a_batch=1024)
    config = ModelConfig(
        vocab=tokenizer.get_vocab_size(), dim=at.size.dim, depth=2, heads=4, pad=PAD, bos=BOS,
        eos=EOS,
    )  # fmt: skip
    plan = TrainingPlan(steps=at.size.steps, seed=at.seed, precision="fp32", warmup=20)
    train(task, config, plan, folder, told=at.told)
    return folder


STUDY = Study(
    "translation",
    "A translator's cross-attention aligns words: each written word reads its source.",
    "Trained translators translate a test set, and are given hand-aligned sentence pairs; their "
    "cross-attention, by weight and by weight times ‖W_O v‖, is read as alignment.",
    run,
    tiny=dict(pairs=6, sentences=200, steps=2, dim=32, tested=4, beams=2),
    quick=dict(pairs=100, sentences=6000, steps=120, dim=96, tested=50, beams=2),
    full=dict(pairs=447, sentences=0, steps=0, dim=0, tested=1000, beams=5),
)
