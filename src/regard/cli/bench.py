"""`regard bench`: our attention against its peers on this machine."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import RegardError

if TYPE_CHECKING:
    from ..lab.bench.terminal import Table

_JSON = """\b
--json prints one object:
  machine     {processor, cores, isa, kernels: the instruction set that ours
              use, memory_gib, threads, bound, system, python, regard, torch,
              onnxruntime, date}
  engine      the one asked for
  rounds      quiet rounds for each shape
  entries     [{suite, name, problem: the call, engine: the one that ran,
              seconds: the median, rounds: [seconds], wrong, refused, busy:
              why there is no time, discarded: rounds, peers: [{name,
              seconds, rounds, wrong, refused, ratio: {median, low, high} of
              its time over ours in each round}]}]
  below       [{name, peer, now, was: ratios}]: what has fallen below the last
              saved run; null: there is none of this machine
  overtaken   {form: tokens}: from where linear attention is faster than
              exact, of the lengths timed; null: nowhere
"""
_ARGUMENTS = "regard.bench.arguments"

_ENGINE = "Our engine; auto takes the first that can.  [default: auto]"
_QUICK = "A few shapes of each suite against SDPA, within a minute."
_SAVE = "Keep the figures: later runs tell what is below them."
_COMPARE = "Print one table against the saved run, instead of times."
_PARTS = "Print where the cycles of ours go, a tile, instead of times."
_WITHIN = 45.0  # seconds after which --quick begins no shape, to end within a minute
_ROUNDS = "Quiet rounds for each shape.  [default: 7; 3 with --quick]"
_THREADS = "torch's threads.  [default: one a core]"
_ONLY = 'Only shapes whose name matches, such as "causal/bf16/*" or d64.'


class _Bench(click.Command):
    """Remembers its arguments: the process that is bound to the cores gets the same."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)


@click.command(cls=_Bench, epilog=_JSON)
@click.argument("suites", metavar="[SUITE]...", nargs=-1)
@click.option("--only", metavar="PATTERN", help=_ONLY)
@click.option("--quick", is_flag=True, help=_QUICK)
@click.option("--rounds", metavar="N", type=click.IntRange(1), help=_ROUNDS)
@click.option("--threads", metavar="N", type=click.IntRange(1), help=_THREADS)
@click.option("--engine", metavar="NAME", default="auto", help=_ENGINE)
@click.option("--json", "as_object", is_flag=True, help="Print one JSON object, as below.")
@click.option("--out", metavar="FILE", type=Path, help="Write a page of Markdown tables too.")
@click.option("--save", is_flag=True, help=_SAVE)
@click.option("--compare", is_flag=True, help=_COMPARE)
@click.option("--parts", is_flag=True, help=_PARTS)
@click.option("--list", "listed", is_flag=True, help="List suites, shapes and peers; run nothing.")
@click.pass_context
def bench(
    ctx: click.Context,
    suites: tuple[str, ...],
    only: str | None,
    quick: bool,
    rounds: int | None,
    threads: int | None,
    engine: str,
    as_object: bool,
    out: Path | None,
    save: bool,
    compare: bool,
    parts: bool,
    listed: bool,
) -> None:
    """Time our attention against its peers on this machine: all suites, or those named.

    The sides take turns in one process with bound threads; rounds in which other processes used
    the cores are discarded. Every result is first checked against float64. Where ours is wrong,
    or the machine was not quiet, there is no time and the exit code is 1.
    """
    import torch

    from ..lab.bench import Settings, chosen, cycles, machine, run, saved
    from ..lab.bench import tables as written

    if threads is not None:  # the suite `threads` goes up to it
        ctx.call_on_close(partial(torch.set_num_threads, torch.get_num_threads()))
        torch.set_num_threads(threads)
    entries = chosen(suites, only, quick)
    settings = Settings(engine, rounds or (3 if quick else 7), _WITHIN if quick else None)
    if out is not None and not os.access(out.parent, os.W_OK):
        raise RegardError(f"cannot write {out}: {out.parent} is not a folder to write to")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what the terminal cannot show is no failure
    if listed:
        click.echo("\n".join(written.listing(entries)))
        return
    arguments: list[str] = ctx.meta[_ARGUMENTS]
    if "OMP_PROC_BIND" not in os.environ:
        raise click.exceptions.Exit(_bound(arguments, machine.BOUND))
    clock = machine.clock()
    if threads is not None and threads > clock.cores:
        raise RegardError(f"--threads {threads}: this process may use {clock.cores} cores")
    about = machine.describe()
    if parts:
        cycles.check()
        for line in cycles.table(entries):
            click.echo(line)
        return
    before = saved.last()
    if compare:
        if before is None:
            raise RegardError("there is no saved run to compare with; --save keeps one")
        if differs := saved.other(before, about):
            raise RegardError(f"not to be compared: the saved run had {', '.join(differs)}")
    table = None if as_object or compare else _table(about)
    outcomes = []
    for outcome in run(entries, settings, clock, _progress):
        _progress("")
        outcomes.append(outcome)
        if table is not None:
            table.add(outcome)
    found = written.as_dict(outcomes, about, settings) | written.below(outcomes, about, before)
    if as_object:
        click.echo(json.dumps(found, indent=1))
    elif compare and before is not None:
        for line in written.comparison(outcomes, before):
            click.echo(line)
    elif table is not None:
        table.foot(outcomes, settings)
        for line in written.fallen(outcomes, about, before, len(entries)):
            click.echo(line)
    if save:
        saved.save(found)
    if out is not None:
        command = shlex.join(["regard", "bench", *arguments])
        out.write_text(written.markdown(outcomes, about, settings, command), "utf-8")
    if any(outcome.failed for outcome in outcomes):
        raise click.exceptions.Exit(1)


def _bound(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the same command in a process whose threads are bound: torch asks when it is imported."""
    command = [sys.executable, "-m", "regard.cli", "bench", *arguments]
    return subprocess.run(command, env=os.environ | environment, check=False).returncode


def _table(about: Mapping[str, Any]) -> Table:
    try:
        from rich.console import Console

        from ..lab.bench.terminal import Table
    except ImportError as error:
        raise RegardError('printing needs rich: pip install "regard[bench]"') from error
    table = Table(Console())
    table.head(about)
    return table


def _progress(what: str) -> None:
    """One line on stderr, where that is a terminal. No thread draws it: it would be other load."""
    if sys.stderr.isatty():
        click.echo(f"\r{what[:79]:<79}\r", nl=False, err=True)
