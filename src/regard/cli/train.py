"""`regard train`: a language model or a translator, trained on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from ..errors import RegardError
from .common import progress

_MIXER = "What mixes tokens, or several in turn: 'window softmax'."
_ENCODER_MIXER = "The encoder's mixer.  [default: that of the decoder]"
_CROSS = "How a recurrent decoder reads the source."
_POSITIONS = "rotary, learned, sinusoidal, alibi or none.  [default: rotary]"
_REPEAT = "How often an epoch reads the first --data.  [default: 1]"
_PRECISION = "What to compute in.  [default: the faster one here]"
_EMA = "Decay of the average of parameters that is saved; 0: none.  [default: 0.999]"
_EVERY = "Seconds between checkpoints.  [default: 60]"
_BATCH_LM = "Chunks a step.  [default: 16]"
_BATCH = "Tokens a step, of the longer side, padding included.  [default: 4096]"
_DATA_LM = "A text file, or a folder of .txt and .raw files."
_DATA = "FILE,FILE of parallel lines; a .tsv, .zip, or a folder of them. May be repeated."

MODEL_OPTIONS: list[Any] = [
    click.option("--mixer", metavar="NAME", default="softmax", help=_MIXER),
    click.option("--window", metavar="N", type=int, default=64,
                 help="Keys that the mixer window sees.  [default: 64]"),
    click.option("--positions", metavar="NAME", default="rotary", help=_POSITIONS),
    click.option("--dim", type=int, default=256, help="Size of a token.  [default: 256]"),
    click.option("--heads", type=int, default=4, help="Heads.  [default: 4]"),
    click.option("--depth", type=int, default=4, help="Blocks.  [default: 4]"),
    click.option("--hidden", type=int, help="Of feed-forward layers; 0: none."),
]  # fmt: skip
RUN_OPTIONS: list[Any] = [
    click.option("--out", metavar="FOLDER", required=True, type=Path,
                 help="Where the model goes; a run that was killed there goes on."),
    click.option("--budget", metavar="MINUTES", type=float, help="As many steps as fit into it."),
    click.option("--steps", type=int, help="How many steps."),
    click.option("--seed", type=int, default=0, help="[default: 0]"),
    click.option("--lr", type=float, default=2e-3, help="Learning rate.  [default: 0.002]"),
    click.option("--warmup", type=int, default=200, help="Steps up to it.  [default: 200]"),
    click.option("--schedule", type=click.Choice(["cosine", "wsd"]), default="cosine",
                 help="How it falls.  [default: cosine]"),
    click.option("--optimizer", type=click.Choice(["adamw", "muon"]), default="adamw",
                 help="[default: adamw]"),
    click.option("--precision", type=click.Choice(["fp32", "bf16"]), help=_PRECISION),
    click.option("--ema", type=float, default=0.999, help=_EMA),
    click.option("--save-every", metavar="SECONDS", type=float, default=60.0, help=_EVERY),
    click.option("--json", "as_object", is_flag=True, help="Print what run.json says."),
]  # fmt: skip


def _with(options: list[Any]) -> Any:
    def wrap(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return wrap


@click.group()
def train() -> None:
    """Train a small model on this machine, in a folder of its own.

    Run the same command again after a kill, and it goes on to the same weights, bit by bit.
    """


@train.command()
@click.option("--data", metavar="PATH", required=True, help=_DATA_LM)
@_with(MODEL_OPTIONS)
@click.option("--vocab", type=int, default=2048, help="Tokens known.  [default: 2048]")
@click.option("--length", type=int, default=256, help="Tokens of a chunk.  [default: 256]")
@click.option("--batch", type=int, default=16, help=_BATCH_LM)
@click.option("--dropout", type=float, default=0.1, help="[default: 0.1]")
@_with(RUN_OPTIONS)
def lm(data: str, out: Path, as_object: bool, **given: Any) -> None:
    """A language model: the next token of a text, whose last twentieth is held out."""
    _check_out(out)
    with progress() as told:
        told("reading the data", None)
        from ..lab.training import LanguageTask, read_text, train
        from ..lab.training.tokenizer import BOS, EOS, PAD
        from ..nn.models import ModelConfig

        plan = _plan(given)
        sizes = _taken(given, "mixer window positions dim heads depth hidden length dropout")
        sizes |= {"pad": PAD, "bos": BOS, "eos": EOS}
        ModelConfig(vocab=given["vocab"], **sizes)  # what is wrong with it is said at once
        text = read_text(data)
        tokenizer = _tokenizer(out, [text], given["vocab"], ends=False)
        task = LanguageTask(text, tokenizer, length=given["length"], batch=given["batch"])
        config = ModelConfig(vocab=tokenizer.get_vocab_size(), **sizes)
        about = {"data": data, "batch": given["batch"]}
        said = train(task, config, plan, out, told=told, about=about)
    _print(said, out, as_object)


@train.command()
@click.option("--data", metavar="PATH", required=True, multiple=True, help=_DATA)
@click.option("--source", metavar="LANGUAGE", default="en", help="[default: en]")
@click.option("--target", metavar="LANGUAGE", default="fr", help="[default: fr]")
@click.option("--repeat", type=int, default=1, help=_REPEAT)
@_with(MODEL_OPTIONS)
@click.option("--decoder-depth", type=int, help="Blocks of the decoder.  [default: depth]")
@click.option("--encoder-mixer", metavar="NAME", help=_ENCODER_MIXER)
@click.option("--cross", type=click.Choice(["attention", "bahdanau", "none"]), help=_CROSS)
@click.option("--vocab", type=int, default=8000, help="Tokens known.  [default: 8000]")
@click.option("--batch", type=int, default=4096, help=_BATCH)
@click.option("--smoothing", type=float, default=0.1, help="Of labels.  [default: 0.1]")
@click.option("--dropout", type=float, default=0.2, help="[default: 0.2]")
@_with(RUN_OPTIONS)
def translate(
    data: tuple[str, ...], source: str, target: str, out: Path, as_object: bool, **given: Any
) -> None:
    """A translator: an encoder reads the source, a decoder writes the target.

    A folder has train.SOURCE and train.TARGET (val.… are held out), or tables; of other data 1,000
    pairs are held out.
    """
    _check_out(out)
    with progress() as told:
        told("reading the data", None)
        from ..lab.training import TranslationTask, train
        from ..lab.training.corpus import split_pairs
        from ..lab.training.tokenizer import BOS, EOS, PAD
        from ..nn.models import ModelConfig

        plan = _plan(given)
        names = "mixer window positions dim heads depth hidden decoder_depth encoder_mixer dropout"
        sizes = _taken(given, names) | {"pad": PAD, "bos": BOS, "eos": EOS}
        recurrent = given["mixer"] in ("lstm", "gru", "rnn")
        sizes["cross"] = given["cross"] or ("bahdanau" if recurrent else "attention")
        ModelConfig(vocab=given["vocab"], **sizes)  # what is wrong with it is said at once
        pairs, valid, first = split_pairs(data, source, target)
        texts = (side for pair in pairs for side in pair)
        tokenizer = _tokenizer(out, texts, given["vocab"], ends=True)
        task = TranslationTask(
            pairs, valid, tokenizer, tokens_a_batch=given["batch"], first=first,
            smoothing=given["smoothing"], repeat=given["repeat"],
        )  # fmt: skip
        config = ModelConfig(vocab=tokenizer.get_vocab_size(), **sizes)
        about = {"data": list(data), "languages": [source, target]}
        about |= _taken(given, "batch smoothing repeat")
        said = train(task, config, plan, out, told=told, about=about)
    _print(said, out, as_object)


def _taken(given: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: given[name] for name in names.split()}


def _plan(given: dict[str, Any]) -> Any:
    from ..lab.training import TrainingPlan

    names = "steps budget seed lr warmup schedule optimizer precision ema save_every"
    return TrainingPlan(**_taken(given, names))


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RegardError(f"{out} is a file; give a folder")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _tokenizer(out: Path, texts: Any, vocab: int, *, ends: bool) -> Any:
    """The tokenizer of a run that was begun in `out`, or one trained on the data."""
    from ..lab.training.tokenizer import load_tokenizer, train_tokenizer

    if (out / "run.json").exists():
        return load_tokenizer(out)
    return train_tokenizer(texts, vocab, ends=ends)


def _print(said: dict[str, Any], out: Path, as_object: bool) -> None:
    if not said:  # another rank's
        return
    if as_object:
        click.echo(json.dumps(said))
        return
    result = said["result"]
    click.echo(
        f"trained: {out}, {result['steps']:,} steps, {result['seconds'] / 60:.1f} minutes, "
        f"validation loss {result['valid_loss']:.3f}"
    )
