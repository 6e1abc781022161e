"""Every architecture of transformers, tiny and random: can it be watched, is what is seen right?

    python benchmarks/models.py RESULTS.jsonl [--only NAME …] [--seconds 40]
    python benchmarks/models.py RESULTS.jsonl --write docs/models.md

Each is made from its configuration with small sizes, in a process of its own with a time limit, and
run twice: unwatched and watched, verified. Architectures that RESULTS holds already are left out,
so a run can be taken up again. --write makes the page; what the page says of others stays.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import re
import sys
import textwrap
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import regard
import tiny
from regard import RegardError, Rows
from tiny import Way
from tiny_inputs import variants

NEAR = 1e-4  # weights may differ by the rounding of float32
STEPS = 5
TRYING = 6  # seconds of a core: as many ways on a machine that others use
NOT_REACHED = "the time did not suffice"
# Tried one after the other: hybrids have attention in later layers only, rotary sections are wide
WAYS = [
    Way(), Way({"num_hidden_layers": 8}), Way({"head_dim": 64}),
    Way({"image_size": 64, "patch_size": 16}), Way({"head_dim": 128, "hidden_size": 128}),
    Way({"hidden_size": 256}), Way({"hidden_size": 512}), Way({"window_size": 64}),
    Way(fills=True), Way({"num_key_value_heads": 4}, fills=True), Way(fills=True, cuts=True),
    Way({"num_hidden_layers": 8}, fills=True, cuts=True),
    Way({"hidden_size": 512, "num_key_value_heads": 4}, fills=True),
    Way(wide=True), Way(wide=True, cuts=True),
]  # fmt: skip


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [t for part in output for t in tensors(part)] if isinstance(output, list | tuple) else []


def same(ours: Any, theirs: Any) -> bool:
    """Equal to the bit."""
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    return bool(pairs) and all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs)


def eager_weights(
    kind: str, given: dict[str, Tensor], model_class: type, way: Way, wide: bool = False
) -> list[Tensor]:
    """What the model gives itself, where it can: eager, with output_attentions=True."""
    try:
        model = tiny.build(kind, way, model_class, attn_implementation="eager")
    except (ValueError, TypeError):
        model = tiny.build(kind, way, model_class)
    model = model.double() if wide else model
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**given, output_attentions=True)
    if not hasattr(output, "items"):
        return []
    return [t for name, part in output.items() if "attentions" in name for t in tensors(part)]


def near(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours - theirs).abs().nan_to_num(0).max()) < NEAR


def compared(seen: Any, given: list[Tensor]) -> str:
    """How many layers' weights are among those that the model gives; some give scores instead."""
    layers = [layer for layer in seen if layer.pattern]
    left, equal, others = list(given), 0, []
    for layer in layers:
        ours = layer.seen[0].weights
        shaped = [t for t in left if t.shape == ours.shape]
        found = [t for t in shaped if near(t, ours) or near(t.softmax(-1), ours)]
        rows = ours.sum(-1, keepdim=True)  # less than 1 under learned sinks, which some leave out
        found = found or [t for t in shaped if near(t, ours / rows)]
        if found:
            equal += 1
            left = [t for t in left if t is not found[0]]
        elif any(near(t.sort().values, ours.sort().values) for t in shaped):
            continue  # the same keys in another order
        elif shaped:
            others.append(layer.name)
    if others and left:
        return f"OTHERS in {', '.join(others)}"
    if not equal:
        return "gives none" if not given else "gives them in another layout"
    return "equal" if equal == len(layers) else f"equal in {equal} of {len(layers)} layers"


def in_float64(kind: str, given: dict[str, Tensor], model_class: type, way: Way) -> str:
    """As `compared`, where large scores leave no rounding that could be taken for a difference."""
    given = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    model = tiny.build(kind, way, model_class).double()
    torch.manual_seed(0)
    with torch.no_grad(), regard.watch(model, observe=[Rows(range(64))], verify=True) as seen:
        model(**given)
    return compared(seen, eager_weights(kind, given, model_class, way, wide=True))


def kinds(seen: Any, model: nn.Module) -> str:
    """How its layers attend, and whether any has no pattern."""
    from regard.capture.softmaxes import attention_modules

    own = {
        n for n in attention_modules(model)
        if "ALL_ATTENTION_FUNCTIONS" not in type(model.get_submodule(n)).forward.__code__.co_names
    }  # fmt: skip
    layers = [layer for layer in seen if layer.pattern]
    ways = Counter(
        ("own softmax" if layer.name.split("#")[0].split("~")[0] in own else "interface or torch")
        for layer in layers
    )
    said = " and ".join(ways)
    if any(layer.kind == "cross" for layer in layers):
        said += ", cross"
    silent = sum(not layer.pattern for layer in seen)
    return said + (f"; {silent} layers without a pattern" if silent else "")


def generated(model: nn.Module, given: dict[str, Tensor]) -> str:
    """Whether a watched model writes the same tokens."""
    if not model.can_generate():
        return "—"
    prompt = {n: t for n, t in given.items() if not n.startswith("decoder_")}
    settings = dict(max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, num_beams=1)
    try:
        alone = model.generate(**prompt, **settings)
        if not same(model.generate(**prompt, **settings), alone):
            return "two unwatched runs differ"
    except Exception as error:
        return f"not unwatched either ({type(error).__name__})"
    try:
        with regard.watch(model, observe=[Rows(range(64))], verify=True):
            ours = model.generate(**prompt, **settings)
    except RegardError as error:
        return f"refused: {error}"
    return "same" if same(ours, alone) else "OTHERS"


def tried(model: nn.Module) -> tuple[dict[str, Tensor], Any]:
    """Inputs that it takes, and its output."""
    errors: list[Exception] = []
    for given in variants(model):
        try:
            torch.manual_seed(0)  # some draw noise
            with torch.no_grad():
                return given, model(**given)
        except Exception as error:
            errors.append(error)
    raise next((e for e in errors if "missing" not in str(e)), errors[0])


def made(kind: str) -> tuple[nn.Module, dict[str, Tensor], Any, Way]:
    """A model that runs, its inputs and output, and the way in which its sizes fit each other."""
    first: Exception | None = None
    until = time.process_time() + TRYING
    for model_class in tiny.model_classes(kind):
        for way in WAYS:
            if first is not None and time.process_time() > until:
                raise first
            try:
                model = tiny.build(kind, way, model_class)
                return (model, *tried(model), way)
            except Exception as error:
                first = first or error
    assert first is not None
    raise first


def examined(kind: str) -> dict[str, str]:
    """What one architecture gave."""
    torch.manual_seed(0)
    if not tiny.model_classes(kind):
        return {"part": "of another model, or without a class in AutoModel"}
    try:
        model, given, alone, way = made(kind)
    except Exception as error:
        return {"unbuilt": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
                if str(error).strip() else type(error).__name__}  # fmt: skip
    found = {"model": type(model).__name__}
    try:
        with torch.no_grad(), regard.watch(model, observe=[Rows(range(64))], verify=True) as seen:
            torch.manual_seed(0)
            ours = model(**given)
    except RegardError as error:
        return found | {"refused": str(error)}
    found |= {"attention": kinds(seen, model), "bits": "equal" if same(ours, alone) else "OTHER"}
    try:
        found["eager"] = compared(seen, eager_weights(kind, given, type(model), way))
        if found["eager"].startswith("OTHERS"):
            with contextlib.suppress(Exception):  # some do not run in it
                found["eager"] = in_float64(kind, given, type(model), way)
    except Exception as error:
        found["eager"] = f"gives none ({type(error).__name__})"
    return found | {"generate": generated(model, given)}


def _work(kind: str, pipe: Any) -> None:
    try:
        torch.set_num_threads(1)
        pipe.send(examined(kind))
    except Exception:
        pipe.send({"FAILED": traceback.format_exc().strip()[-600:]})


def run(results: Path, only: list[str], seconds: float) -> None:
    """Examine what is not in the results yet, each in a process of its own."""
    done = set()
    if results.exists():
        done = {json.loads(line)["kind"] for line in results.read_text().splitlines()}
    fork = multiprocessing.get_context("fork")
    for kind in only or tiny.names():
        if kind in done:
            continue
        here, there = fork.Pipe(duplex=False)
        process = fork.Process(target=_work, args=(kind, there))
        process.start()
        there.close()
        try:
            found = here.recv() if here.poll(seconds) else {"unbuilt": f"longer than {seconds:g} s"}
        except EOFError:
            found = {"FAILED": "the process ended"}
        process.kill()
        process.join()
        with results.open("a") as file:
            file.write(json.dumps({"kind": kind} | found, ensure_ascii=False) + "\n")
        print(kind, found, flush=True)


NOTES = {
    "big_bird": "its own matrix leaves out part of what a block weighs that stands twice in a row",
    "bigbird_pegasus": "as BigBird's, in the encoder",
    "pegasus_x": "its own rows of global tokens hold padding, and keys in another order",
    "wavlm": "the model gives the mean over heads",
    "sam3": "its text encoder is causal under sdpa, and not under eager",
    "paligemma": "the model gives them of another mask under eager than under sdpa",
}
HEAD = """# Models

What `watch` gives for each architecture of transformers {version}: made from its configuration
with tiny sizes and random weights, run once unwatched and once watched (`verify=True`), on torch
{torch}. This page is written by a script, its rows from several runs of it;
[what `watch` does](watch.md).

```sh
python benchmarks/models.py results.jsonl                          # a process each, 40 s at most
python benchmarks/models.py results.jsonl --write docs/models.md
```

- **attention**: by transformers' interface or torch's functions, or by a softmax of its own inside
  its modules, which is read there; "cross": it has cross-attention too. Layers without a softmax
  over keys (Mamba, convolutions) have no pattern.
- **bits**: whether every output of the watched model equals the unwatched one's to the bit.
- **weights**: whether each layer's weights equal, within {near:g}, those that the model itself
  gives under eager with `output_attentions=True`, in float32, or else in float64. Some give
  fewer layers than they have, give them in another layout (windows, blocks), or none.
- **generate**: whether {steps} greedy tokens are the same; —: it does not generate.

{counts}
"""


def page(found: list[dict[str, str]]) -> str:
    """The results as a page."""
    ran = [f for f in found if "bits" in f]
    own = [f for f in ran if "own softmax" in f["attention"]]
    refused = [f for f in found if "refused" in f]
    unbuilt = [f for f in found if "unbuilt" in f or "FAILED" in f]
    writing = [f for f in ran if f["generate"] == "same"]
    counts = (
        f"{len(ran)} architectures were watched, {len(own)} of which compute attention by "
        f"themselves; {sum(f['bits'] == 'equal' for f in ran)} gave the same bits, {len(writing)} "
        f"generated the same tokens. {len(refused)} were refused, most of them without attention. "
        f"{len(unbuilt)} were not run by the script, each for a reason that stands below."
    )
    said = HEAD.format(
        version=transformers.__version__, torch=torch.__version__, near=NEAR, steps=STEPS,
        counts=_wrapped(counts),
    )  # fmt: skip
    said += "\n| architecture | attention | bits | weights | generate |\n"
    said += "| --- | --- | --- | --- | --- |\n"
    for f in ran:
        note = f" ({NOTES[f['kind']]})" if f["kind"] in NOTES else ""
        weights = "differ" if f["eager"].startswith("OTHERS") else f["eager"].split(" (")[0]
        cells = (f"`{f['kind']}`", f["attention"], f["bits"], weights + note, f["generate"])
        said += f"| {' | '.join(cells)} |\n"
    said += "\n## Refused\n\n"
    by_reason: dict[str, list[str]] = {}
    for f in refused:
        reason = f["refused"].replace(f["model"], "the model")
        by_reason.setdefault(reason, []).append(f"`{f['kind']}`")
    for reason, kinds in by_reason.items():
        said += f"- {', '.join(kinds)}: {reason}\n"
    said += "\n## Not run\n\n"
    for why, kinds in _grouped(unbuilt).items():
        said += f"- {why}: {', '.join(kinds)}\n"
    parts = [f"`{f['kind']}`" for f in found if "part" in f]
    if parts:
        said += "\n## Parts\n\nConfigurations of a part of another model, or of a model that\n"
        said += f"AutoModel has no class for: {len(parts)}.\n\n{_wrapped(', '.join(parts))}\n"
    return said


def known(text: str) -> dict[str, dict[str, str]]:
    """What a page says of each architecture, as results that give the same page."""
    rows, refused, unbuilt, parts = ([*re.split(r"\n## .*\n", text), "", "", ""])[:4]
    found = {}
    for row in re.findall(r"^\| (`.*) \|$", rows, re.MULTILINE):
        name, attention, bits, weights, generate = row.split(" | ")
        kind = name.strip("`")
        weights = weights.removesuffix(f" ({NOTES.get(kind)})").replace("differ", "OTHERS")
        found[kind] = {
            "attention": attention, "bits": bits, "eager": weights, "generate": generate
        }  # fmt: skip
    for kinds, reason in re.findall(r"^- ((?:`[^`]+`(?:, )?)+): (.*)$", refused, re.MULTILINE):
        for kind in re.findall(r"`([^`]+)`", kinds):
            found[kind] = {"model": "the model", "refused": reason}
    for why, kinds in re.findall(r"^- (.*): ((?:`[^`]+`(?:, )?)+)$", unbuilt, re.MULTILINE):
        for kind in re.findall(r"`([^`]+)`", kinds):
            found[kind] = {"unbuilt": "", "why": why}
    for kind in re.findall(r"`([^`]+)`", parts):
        found[kind] = {"part": "of another model"}
    return {kind: {"kind": kind} | each for kind, each in found.items()}


def _grouped(unbuilt: list[dict[str, str]]) -> dict[str, list[str]]:
    """The architectures not run by the reason; what is too long to read stands last."""
    by_reason: dict[str, list[str]] = {}
    for f in unbuilt:
        by_reason.setdefault(reason(f), []).append(f"`{f['kind']}`")
    return dict(
        sorted(by_reason.items(), key=lambda item: (item[0].startswith("not run"), item[0]))
    )


def reason(found: dict[str, str]) -> str:
    """Why one was not run, in a few words."""
    if "why" in found:
        return found["why"]
    said = found.get("unbuilt") or found["FAILED"]
    if package := re.search(r"requires the (\S+) library", said):
        return f"needs the package {package[1]}"
    if 'missing the required "forward"' in said:
        return "has no forward of its own, only generate"
    if missing := re.search(r"missing \d+ required positional arguments?: (.*)", said):
        names = ", ".join(f"`{n}`" for n in re.findall(r"'(\w+)", missing[1]))
        return f"not run: the script makes no {names}"
    if said.startswith("longer than"):
        return f"not run: {said}, on two cores that others used"
    if said == NOT_REACHED:
        return f"not run: {said}"
    if re.match(r"ValueError: [\d,]+ parameters", said):
        return "not run: too large"
    return "not run: the sizes or inputs that the script makes do not fit each other"


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 108, break_long_words=False, break_on_hyphens=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.write:
        found = {f["kind"]: f for f in map(json.loads, arguments.results.read_text().splitlines())}
        every = {name: {"kind": name, "unbuilt": NOT_REACHED} for name in tiny.names()}
        if arguments.write.exists():
            every |= known(arguments.write.read_text())
        arguments.write.write_text(page(list((every | found).values())))
    else:
        run(arguments.results, arguments.only, arguments.seconds)
