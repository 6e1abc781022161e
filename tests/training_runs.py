"""A tiny run, as a script too: python training_runs.py OUT [DIE_AT_STEP | DIE_IN_SAVE].

With a third argument the process kills itself, by SIGKILL, at that log line or amid that save.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from regard.models import ModelConfig
from regard.training import LanguageTask, TrainingPlan, train, train_tokenizer

NUMBERS = [(a, b) for a in range(9) for b in range(9)]
TEXT = "".join(f"the {a} cat saw {b} dogs and {a} of them ran. " for a, b in NUMBERS)


def run(out, *, told=lambda what, share: None, batch=2, dim=16, **plan):
    """A run of 8 steps, with dropout unless the plan says how many batches make one."""
    torch.manual_seed(len(str(out)))  # what was drawn before a run is nothing to it
    tokenizer = train_tokenizer([TEXT], 300)
    task = LanguageTask(TEXT, tokenizer, length=16, batch=batch)
    config = ModelConfig(
        vocab=tokenizer.get_vocab_size(), dim=dim, heads=2, depth=1,
        dropout=plan.pop("dropout", 0.1), mixer=plan.pop("mixer", "softmax"),
    )  # fmt: skip
    given = {"steps": 8, "warmup": 2, "save_every": 0.0, "log_every": 1, "validate_every": 4}
    return train(task, config, TrainingPlan(**given | plan), Path(out), told=told)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, *when = sys.argv[1:]
    if when and when[0] == "ddp":
        run(out, batch=2, dropout=0.0)
        raise SystemExit
    lines = 0

    def told(what, share):
        global lines
        lines += share is not None
        if when[1:] == ["step"] and lines == int(when[0]):
            die()

    if when[1:] == ["save"]:
        saves, replace = 0, os.replace

        def replaced(made, path):
            global saves
            saves += str(path).endswith("checkpoint.safetensors")
            if saves == int(when[0]):
                die()
            replace(made, path)

        os.replace = replaced
    run(out, told=told)
