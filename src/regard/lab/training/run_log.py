"""What became of a run, step by step: a line of JSON each, and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...nn.models.saved import write_text


class RunLog:
    """Lines of JSON, appended; after a kill, those beyond the checkpoint are cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []

    def cut(self, step: int) -> None:
        """Keep the lines up to a step; a line that was half written goes too."""
        if self.path.exists():
            for text in self.path.read_text("utf-8").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    break
                if line["step"] <= step:
                    self.lines.append(line)
        if self.lines or self.path.exists():
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, **line: Any) -> None:
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Loss and validation loss over steps, as a picture; none where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([n["step"] for n in lines], [n["loss"] for n in lines], label="training")
    held = [n for n in lines if "valid_loss" in n]
    axes.plot([n["step"] for n in held], [n["valid_loss"] for n in held], "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend()
    figure.savefig(path, dpi=120)
