"""What ranks do in tests of `generate()`: a prompt read by parts, then tokens that all see."""

import torch
from transformers import DynamicCache

import regard
import regard.huggingface
from distributed_recordings import inputs, model
from regard import (
    Distances,
    Entropy,
    LogSumExp,
    Map,
    MaxScore,
    Received,
    Rows,
    TopK,
    context_parallel,
)

OBSERVERS = (
    TopK(3), Received(), Received(heads="mean"), Entropy(), MaxScore(), LogSumExp(), Rows([-1]),
    Map(4, 4), Map(3, 5, "max"), Distances(8),
)  # fmt: skip
NEW = 5


def prompt(length: int) -> dict[str, torch.Tensor]:
    """Two texts, of which the second is padded."""
    return {name: t for name, t in inputs(length).items() if name != "use_cache"}


def generate(made, given, cache=None, observe=OBSERVERS, **more):
    """Tokens, and what is seen while they are made."""
    with torch.no_grad(), regard.watch(made, observe=observe) as seen:
        tokens = made.generate(
            **given, past_key_values=cache, max_new_tokens=NEW, **{"do_sample": False} | more
        )
    return tokens, [layer.seen for layer in seen.layers]


def alone(length: int, **more):
    """In one process: the prompt's first tokens are read before the watch."""
    made, given = model(), prompt(length)
    keep = given["attention_mask"]
    with torch.no_grad():
        read = made(
            input_ids=given["input_ids"][:, :-1], attention_mask=keep[:, :-1],
            position_ids=(keep.cumsum(-1) - 1).clamp(min=0)[:, :-1],
            past_key_values=DynamicCache(), use_cache=True,
        )  # fmt: skip
    return generate(made, given, read.past_key_values, **more)


def generated(mesh, length: int, order="zigzag", **more):
    """The same over ranks; and how many keys of each layer lie here."""
    made, given = model(), prompt(length)
    torch.manual_seed(7)
    with context_parallel(mesh, order=order):
        cache = regard.huggingface.prefill(made, given)
        tokens, seen = generate(made, given, cache, **more)
    return tokens, seen, [layer.keys.shape[2] for layer in cache.layers]


def unwatched(mesh, length: int):
    made, given = model(), prompt(length)
    with context_parallel(mesh):
        cache = regard.huggingface.prefill(made, given)
        return made.generate(**given, past_key_values=cache, max_new_tokens=NEW, do_sample=False)


def drawn(mesh, length: int):
    """Tokens drawn by the same seed in every rank."""
    return generated(mesh, length, observe=[TopK(2)], do_sample=True)[0]


def refused(mesh, what: str) -> str:
    """What a rank is told."""
    made, given = model(), prompt(12)
    try:
        if what == "outside":
            regard.huggingface.prefill(made, given)
        with context_parallel(mesh):
            if what == "one token":
                regard.huggingface.prefill(made, {"input_ids": given["input_ids"][:, :1]})
            if what == "too short":
                given = {name: t[:, :2] for name, t in given.items()}
            cache = regard.huggingface.prefill(made, given)
            if what == "other tokens" and mesh.get_local_rank():
                given["input_ids"][:, -1] += 1
            more = {"num_beams": 2} if what == "beams" else {}
            if what == "kept":
                with regard.watch(made, keep_qk=True):
                    made.generate(**given, past_key_values=cache, max_new_tokens=1)
            made.generate(**given, past_key_values=cache, max_new_tokens=1, **more)
    except regard.RegardError as error:
        return str(error)
    return ""
