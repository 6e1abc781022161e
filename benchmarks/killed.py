"""Kill a recording at random moments, and check that what is left opens, layer by layer.

python benchmarks/killed.py [--kills 20] [--tokens 400] [--layers 6] [--seed 0]

A process records a small random Llama, values and effects too; it is ended by SIGKILL after a
random part of the time that one whole recording took. Of what is left every layer must be
whole: as a recording that was not disturbed has it, to the bit, with or without its effects.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from regard import Recording, RegardError

FORK = multiprocessing.get_context("fork")  # nothing is computed here before the last child ends


def record(tokens: int, layers: int, folder: Path) -> None:
    """The recording that is disturbed, or not."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=tokens,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(2, 64, (1, tokens), generator=torch.Generator().manual_seed(1))
    regard.record(model, ids, folder, values=True, effect=True)


def run(tokens: int, layers: int, folder: Path, after: float | None = None) -> float:
    """Record in a process of its own, killed so long after its folder is there.

    How long it took from then on.
    """
    child = FORK.Process(target=record, args=(tokens, layers, folder))
    child.start()
    while child.is_alive() and not (folder / "recording.json").exists():
        time.sleep(0.001)
    begun = time.perf_counter()
    if after is not None:
        child.join(after)
        if child.is_alive() and child.pid is not None:
            os.kill(child.pid, signal.SIGKILL)
    child.join()
    return time.perf_counter() - begun


def check(left: Path, whole: Recording) -> str:
    """What is left, after it was compared with a whole recording."""
    if not left.exists() or not (left / "recording.json").exists():
        return "nothing"
    try:
        found = Recording.load(left)
    except RegardError as error:
        raise SystemExit(f"does not open: {error}") from error
    if found.damaged:
        raise SystemExit(f"damaged: {found.damaged}")
    found.verify()
    effects = 0
    for layer in found.layers:
        place = next(n for n, one in enumerate(whole.layers) if one.name == layer.name)
        assert torch.equal(found.weights(layer.name), whole.weights(place))
        if layer.effects is not None:
            effects += 1
            mine, its = found.effect(layer.name), whole.effect(place)
            assert all(map(torch.equal, mine.tensors, its.tensors))
    said = "whole" if found.whole else "stopped"
    return f"{said}, {len(found.layers)} layers, {effects} with effects"


def main() -> None:
    """Kill and check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    drawn = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        lasts = run(asked.tokens, asked.layers, path / "whole")
        moments = [drawn.uniform(0, lasts) for _ in range(asked.kills)]
        for number, moment in enumerate(moments):
            run(asked.tokens, asked.layers, path / f"killed-{number}", moment)
        whole = Recording.load(path / "whole")
        for number, moment in enumerate(moments):
            said = check(path / f"killed-{number}", whole)
            print(f"{number + 1:>3} after {moment / lasts:4.0%}: {said}")


if __name__ == "__main__":
    main()
