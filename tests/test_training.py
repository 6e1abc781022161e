"""Training: the loop learns, resumes to the bit, and says what it did; batches, schedules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("tokenizers")

from regard import RegardError
from regard.lab.training.batches import chunk_starts, pair_batches
from regard.lab.training.corpus import split_pairs
from regard.lab.training.optimizers import rate
from regard.nn.models.saved import load_model
from regard.training import TrainingPlan, TranslationTask, read_pairs, train_tokenizer
from training_runs import run

SCRIPT = Path(__file__).with_name("training_runs.py")


class Stopped(Exception):
    pass


def stop_at(line):
    seen = iter(range(1, 99))

    def told(what, share):
        if share is not None and next(seen) == line:
            raise Stopped

    return told


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    run(out)
    return out


def same(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def test_the_loss_goes_down(tmp_path):
    run(tmp_path, steps=60, dim=32, lr=1e-2, save_every=60.0, dropout=0.0, ema=0.9)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["valid_loss"] < 0.6 * lines[0]["loss"]
    assert [line["step"] for line in lines] == list(range(1, 61))


def test_an_interrupted_run_ends_with_the_same_bits(whole, tmp_path):
    for line in (3, 2):
        with pytest.raises(Stopped):
            run(tmp_path, told=stop_at(line))
    run(tmp_path)
    assert same(whole, tmp_path)
    steps = [json.loads(t)["step"] for t in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_muon_resumes_too(tmp_path):
    run(tmp_path / "a", optimizer="muon", schedule="wsd")
    with pytest.raises(Stopped):
        run(tmp_path / "b", optimizer="muon", schedule="wsd", told=stop_at(5))
    run(tmp_path / "b", optimizer="muon", schedule="wsd")
    assert same(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(whole, tmp_path):
    for when in (("3", "save"), ("2", "step")):
        done = subprocess.run([sys.executable, SCRIPT, tmp_path, *when], check=False)
        assert done.returncode == -9
    assert list(tmp_path.glob(".checkpoint*.tmp"))  # the save that was cut short
    run(tmp_path)
    assert same(whole, tmp_path)


@pytest.mark.slow
def test_two_processes_give_what_one_gives_with_twice_the_batch(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", "0", "--standalone"]
    subprocess.run([*command, SCRIPT, tmp_path / "two", "ddp"], check=True)
    run(tmp_path / "one", batch=4, dropout=0.0)
    two, one = (load_file(tmp_path / n / "model.safetensors") for n in ("two", "one"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)


def test_what_a_run_leaves(whole):
    said = json.loads((whole / "run.json").read_text())
    assert said["decided"]["steps"] == said["result"]["steps"] == 8
    assert said["decided"]["precision"] == "fp32"
    assert (whole / "run.png").read_bytes()[:4] == b"\x89PNG"
    model = load_model(whole)
    assert model(torch.tensor([[5, 6, 7]])).shape == (1, 3, model.config.vocab)


def test_another_plan_in_the_same_folder_is_refused(whole):
    with pytest.raises(RegardError, match="has a run with another plan; give the same"):
        run(whole, seed=1)


def test_a_budget_becomes_steps(tmp_path):
    said = run(tmp_path, steps=None, budget=0.01)
    assert said["decided"]["steps"] >= 1
    assert said["decided"]["precision"] in ("fp32", "bf16")


@pytest.mark.parametrize("given", [{}, {"steps": 3, "budget": 1.0}, {"steps": 0}, {"budget": -1}])
def test_a_plan_that_cannot_be_is_refused(given):
    with pytest.raises(RegardError):
        TrainingPlan(**given)


def test_order_is_a_function_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(1, 30, 200)
    for make in (
        lambda seed, epoch: pair_batches(lengths, 64, seed, epoch),
        lambda seed, epoch: chunk_starts(1000, 7, 4, seed, epoch),
    ):
        assert make(1, 2) == make(1, 2)
        assert make(1, 2) != make(1, 3)
        assert make(1, 2) != make(2, 2)


def test_batches_hold_every_pair_once_and_no_more_than_their_tokens():
    lengths = np.random.default_rng(0).integers(1, 30, 200)
    batches = pair_batches(lengths, 64, 0, 0)
    assert sorted(n for batch in batches for n in batch) == list(range(200))
    assert max(len(batch) * lengths[batch].max() for batch in batches) <= 64
    waste = 1 - lengths.sum() / sum(len(batch) * lengths[batch].max() for batch in batches)
    assert waste < 0.1


def test_schedules():
    for schedule in ("cosine", "wsd"):
        shares = [rate(schedule, step, 100, 10) for step in range(100)]
        assert shares[9] == 1.0
        assert shares[:10] == sorted(shares[:10])
        assert shares[10:] == sorted(shares[10:], reverse=True)
        assert shares[-1] < 0.05


def test_pairs_of_files_tables_and_folders(tmp_path):
    pairs = [(f"one {n}", f"un {n}") for n in range(300)]
    (tmp_path / "a.tsv").write_text("".join(f"{a}\t{b}\tby someone\n" for a, b in pairs))
    (tmp_path / "train.en").write_text("".join(f"{a}\n" for a, _ in pairs))
    (tmp_path / "train.fr").write_text("".join(f"{b}\n" for _, b in pairs))
    assert read_pairs(str(tmp_path / "a.tsv")) == pairs
    assert read_pairs(str(tmp_path)) == pairs
    assert read_pairs(f"{tmp_path}/train.fr,{tmp_path}/train.en")[0] == ("un 0", "one 0")
    train, valid, first = split_pairs([str(tmp_path), str(tmp_path / "a.tsv")], "en", "fr")
    assert (len(train), len(valid), first) == (594, 6, 297)
    (tmp_path / "val.en").write_text("one\n")
    (tmp_path / "val.fr").write_text("un\n")
    assert split_pairs([str(tmp_path)], "en", "fr")[1] == [("one", "un")]
    (tmp_path / "val.fr").write_text("un\ndeux\n")
    with pytest.raises(RegardError, match="a sentence a line"):
        split_pairs([str(tmp_path)], "en", "fr")


def test_a_tokenizer_gives_back_what_it_read():
    tokenizer = train_tokenizer(["une chaîne", "a chain"], 300, ends=True)
    ids = tokenizer.encode("Çà et là 貓 🐈").ids
    assert ids[-1] == 2
    assert tokenizer.decode(ids).strip() == "Çà et là 貓 🐈"


@pytest.mark.parametrize("mixer, cross", [("softmax", "attention"), ("lstm", "bahdanau")])
def test_padding_does_not_change_the_loss(mixer, cross):
    from regard.models import ModelConfig

    tokenizer = train_tokenizer(["one two three", "un deux trois"], 280, ends=True)
    pairs = [("one", "un"), ("one two three one two", "un deux trois un deux")]
    task = TranslationTask(pairs, pairs, tokenizer)
    config = ModelConfig(vocab=280, dim=16, heads=2, depth=1, pad=0, mixer=mixer, cross=cross)
    model = task.model(config).double().eval()
    cpu = torch.device("cpu")
    both = task.tensors([0, 1], cpu)
    apart = [task.tensors([n], cpu) for n in (0, 1)]
    counts = [task.tokens(batch) for batch in apart]
    total = sum(float(task.loss(model, b)) * c for b, c in zip(apart, counts, strict=True))
    assert task.tokens(both) == sum(counts)
    assert float(task.loss(model, both)) == pytest.approx(total / sum(counts), rel=1e-5)
