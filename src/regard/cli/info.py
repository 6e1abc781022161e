"""`regard info`: what is installed, and what can run here."""

from __future__ import annotations

import json
import os
import platform
import textwrap
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from .. import __version__

_JSON = """\b
--json prints one object:
  versions          {regard, python, torch, transformers, triton}: null
                    where not installed
  engines           {name: {available, reasons}}, in the order in which
                    "auto" tries them; reasons against a plain call
  instruction_sets  of the engine cpu: {library: built in, here: that this
                    machine has, too, asked: by REGARD_ISA, used}
  threads, cores    that torch uses; that this process may use
  gpus              [{name, capability, memory_gib}]
  faster            what to do for a faster engine here
"""
_NO_KERNELS = (
    "install a C++ compiler (GCC 12 or newer, Clang), then regard again: pip install "
    "--force-reinstall --no-deps, with what was given before"
)


@click.command(epilog=_JSON)
@click.option("--json", "as_object", is_flag=True, help="Print one JSON object, as below.")
def info(as_object: bool) -> None:
    """Show versions, engines, instruction sets, threads and GPUs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that torch does not like, say
        found = gather()
    if as_object:
        click.echo(json.dumps(found | {"faster": faster(found)}, indent=1))
    else:
        click.echo(written(found))


def gather() -> dict[str, Any]:
    """What `--json` prints. RegardError if REGARD_ISA names what this machine does not have."""
    import torch

    from ..engines.cpu import native

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "versions": {
            "regard": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": _version("transformers"),
            "triton": _version("triton"),
        },
        "engines": {
            name: {"available": not reasons, "reasons": reasons}
            for name, reasons in _reasons(["cpu", "cuda"] if gpus else ["cpu"]).items()
        },
        "instruction_sets": {
            "library": native.built(),
            "here": native.levels(),
            "asked": os.environ.get("REGARD_ISA"),
            "used": native.LEVELS[native.level()] if native.library() else None,
        },
        "threads": torch.get_num_threads(),
        "cores": _cores(),
        "gpus": [_gpu(torch.cuda.get_device_properties(i)) for i in gpus],
    }


def _reasons(devices: list[str]) -> dict[str, list[str]]:
    """Each engine's reasons against a plain call; [] if it runs on one of the devices."""
    import torch

    from .. import explain

    reasons: dict[str, list[str]] = {}
    for device in devices:
        plain = torch.zeros(1, 1, 2, 16, device=device, dtype=torch.float32)
        for name, against in explain(plain, plain, plain).items():
            reasons[name] = against and reasons.get(name, against)
    return reasons


def _cores() -> int | None:
    """The cores that this process may use; where a binding gave its main thread one, more."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count()
    from ..lab.bench.machine import cores

    return len(cores())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu(device: Any) -> dict[str, Any]:
    return {
        "name": device.name,
        "capability": f"{device.major}.{device.minor}",
        "memory_gib": round(device.total_memory / 2**30, 1),
    }


def written(found: dict[str, Any]) -> str:
    """The same for people, in 80 columns."""
    lines = [_line(name, given or "not installed") for name, given in found["versions"].items()]
    lines.append("")
    for name, engine in found["engines"].items():
        said = "available" if engine["available"] else f"not here: {'; '.join(engine['reasons'])}"
        lines.append(_line(f"engine {name}", said))
    lines.append("")
    isa = found["instruction_sets"]
    if isa["library"]:
        asked = "" if isa["asked"] is None else ", as REGARD_ISA says"
        lines.append(_line("instructions", f"in use    {isa['used']}{asked}"))
        lines.append(_line("", f"here      {', '.join(isa['here'])}"))
        lines.append(_line("", f"built in  {', '.join(isa['library'])}"))
    else:
        lines.append(_line("instructions", "none: built without a C++ compiler"))
    lines.append(_line("threads", f"{found['threads']} of {found['cores']} cores"))
    gpus = [
        f"{g['name']}, {g['memory_gib']} GiB, compute capability {g['capability']}"
        for g in found["gpus"]
    ]
    lines += [_line("GPU", gpu) for gpu in gpus or ["none"]]
    lines += [
        "",
        *(_line("to be faster", step) for step in faster(found) or ["nothing to do here"]),
    ]
    return "\n".join(lines)


def faster(found: dict[str, Any]) -> list[str]:
    """What to do for a faster engine on this machine; [] where all that it has is in use."""
    isa, versions, steps = found["instruction_sets"], found["versions"], []
    if not isa["library"]:
        steps.append(_NO_KERNELS)
    elif isa["asked"] and isa["used"] != isa["here"][-1]:
        steps.append(f"unset REGARD_ISA: this machine has {isa['here'][-1]}")
    if found["cores"] and found["threads"] < found["cores"]:
        steps.append(
            f"torch uses {found['threads']} of {found['cores']} cores: set OMP_NUM_THREADS, or "
            "call torch.set_num_threads"
        )
    if found["gpus"] and not versions["triton"]:
        steps.append('on the GPU, weights are read by torch alone: pip install "regard[cuda]"')
    return steps


def _line(name: str, said: str) -> str:
    return textwrap.fill(
        said, 80, initial_indent=f"{name:<18}", subsequent_indent=" " * 18, break_on_hyphens=False
    )
