"""docs/studies.md: how to run studies, and what full runs of them found."""

from __future__ import annotations

import json
from pathlib import Path

from . import NAMES, printed, study_named

HEAD = """\
# `regard study`

What people say of attention, measured. `regard study` lists the claims; each study measures one on
this machine and says whether it holds here. A claim that does not hold is reported as such.

```sh
pip install -c constraints.txt ".[studies]"
regard study                                     # the claims, a line each
```
<!-- not run: they take minutes, and read the folder of data -->
```sh
regard study all --quick --data ../shared/data   # all, at small sizes
regard study pronouns --data ../shared/data --seed 1
regard study cost equal --out results            # results/cost.json, results/cost.png, …
regard study translation --data ../shared/data --translator en-fr --translator lstm
```
`--data` (or `REGARD_DATA`) is the folder of texts, `--models` that of models (by default `models`
beside the data); `translation` takes trained translators by `--translator`, which may be given
again to set them side by side. The same seed gives the same figures on the same machine with as
many threads, but for times and memory: the command below each study is the one that was run.
`regard study --help` tells what the JSON holds.

`python docs/studies.py` writes this page from the JSON of full runs, which
`regard study NAME --out docs/studies` keeps.
"""


def _command(name: str) -> str:
    given = " --translator FOLDER" if name == "translation" else ""
    return f"regard study {name} --data ../shared/data{given} --out docs/studies"


def page(folder: Path) -> str:
    """The page of all full runs that a folder holds; of the other studies, the command."""
    found, missing = [], []
    for name in NAMES:
        file = folder / f"{name}.json"
        run = json.loads(file.read_text("utf-8")) if file.exists() else None
        if run is not None and run["mode"] == "full":
            found.append(printed.markdown(run))
        else:
            missing.append(f"- {name}: {study_named(name).claim} `{_command(name)}`")
    parts = [HEAD.rstrip(), *found]
    if missing:
        parts += ["## Full run not made yet", "\n".join(missing)]
    return "\n\n".join(parts) + "\n"
