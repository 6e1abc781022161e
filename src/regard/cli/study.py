"""`regard study`: claims about attention, measured on this machine."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import click

from ..errors import RegardError
from .common import progress, replace_unprintable

_JSON = """\b
--json prints, and --out keeps in DIR/NAME.json, one object a study:
  study, claim, method   what is claimed, and how it is measured
  command, mode, sizes,
  seed                   what gives the same figures again
  seconds, machine       as `regard bench --json` describes it
  columns, rows          the table; clock: the columns with times or memory,
                         which a seed does not fix
  verdicts               [{claim, holds, figure, clock}]
  panels                 [{title, x, y, lines, …}]: what the picture shows
  notes, more            what has to be said; further figures
"""


@click.command(epilog=_JSON)
@click.argument("names", metavar="[NAME]...|all", nargs=-1)
@click.option("--quick", is_flag=True, help="Small sizes: all studies in under ten minutes.")
@click.option("--seed", metavar="N", default=0, type=click.IntRange(0), help="[default: 0]")
@click.option("--out", metavar="DIR", type=Path, help="Keep a JSON and a PNG of each study here.")
@click.option("--data", metavar="DIR", type=Path,
              help="The folder of texts that studies read.  [default: $REGARD_DATA]")  # fmt: skip
@click.option("--models", metavar="DIR", type=Path,
              help="The folder of models.  [default: models, beside the data]")  # fmt: skip
@click.option(
    "--translator",
    "translators",
    metavar="DIR",
    type=Path,
    multiple=True,
    help="A trained translator, for the study translation; several are compared.",
)
@click.option("--json", "as_object", is_flag=True, help="Print JSON: one object, or a list.")
def study(
    names: tuple[str, ...],
    quick: bool,
    seed: int,
    out: Path | None,
    data: Path | None,
    models: Path | None,
    translators: tuple[Path, ...],
    as_object: bool,
) -> None:
    """Measure claims about attention here: the studies named, or all; without a name, list them.

    A claim that does not hold on this machine, with these models and sizes, is reported as such:
    that is no error.
    """
    with progress() as told:
        told("loading", None)
        from ..lab.studies import NAMES, printed, study_named
        from ..lab.studies.study import Setting, data_folder, measure

        replace_unprintable()
        studies = [study_named(one) for one in (NAMES if names in ((), ("all",)) else names)]
        if not names:
            for one in studies:
                click.echo(
                    textwrap.fill(one.claim, 80, initial_indent=f"{one.name:<12}",
                                  subsequent_indent=" " * 12)
                )  # fmt: skip
            return
        if out is not None:
            _writable(out)
        where: dict[str, Any] = dict(data=data_folder(data), models=models, translators=translators)
        mode: Any = "quick" if quick else "full"
        found = []
        for number, one in enumerate(studies):

            def step(what: str, share: float | None, name: str = one.name) -> None:
                told(f"{name}: {what}", share)

            step("starting", None)
            setting = Setting(one.sizes(mode), seed, mode, told=step, **where)
            found.append(measure(one, setting).to_json())
            if out is not None:
                _keep(out, found[-1])
            if not as_object:
                click.echo("\n" * bool(number) + "\n".join(printed.lines(found[-1])))
    if as_object:
        click.echo(json.dumps(found[0] if len(found) == 1 else found, indent=1))


def _writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RegardError(f"cannot write to {out}: {error.strerror or error}") from error


def _keep(out: Path, found: dict[str, Any]) -> None:
    from ..lab.studies import printed

    name = found["study"]
    (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    printed.draw(found, out / f"{name}.png")
