"""Take again what README and docs show: the first screen, and a picture of each page.

python docs/refresh.py    needs Debian's chromium and chromium-driver, regard's extras dev, look,
view and plot
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import regard
from regard.analysis.heads import TEXT as LONGER

ROOT = Path(__file__).resolve().parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PICTURES = ("page.png", "view.png", "text.png", "explain/map.png")
MODEL, TEXT = (
    "all-MiniLM-L6-v2",
    "The trophy didn't fit in the suitcase because it was too big.",
)
LINES = 24  # of the first screen, at most, ending with a paragraph; the rest is "…"
LARGEST = 165_000  # bytes of a picture
SWITCHES = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars "
    "--disable-lcd-text --force-color-profile=srgb --force-device-scale-factor=1 "
    "--virtual-time-budget=5000"
)


def screen() -> str:
    """The first paragraphs of what the README's command prints."""
    lines = regard.look(MODEL, TEXT).text(80).splitlines()
    if len(lines) <= LINES:
        return "\n".join(lines)
    ends = [number for number, line in enumerate(lines[: LINES + 1]) if not line]
    return "\n".join([*lines[: ends[-1]], "…"])


def write_screen() -> None:
    """Put it below the command."""
    text = README.read_text("utf-8")
    command = re.escape(f'regard look "{TEXT}"\n```\n```text\n')
    shown = re.compile(f"({command}).*?(?=\n```)", re.DOTALL)
    if not shown.search(text):
        sys.exit("README.md has no text block below its command")
    README.write_text(shown.sub(lambda found: found[1] + screen(), text, count=1), "utf-8")


def take_picture(name: str, address: str, size: tuple[int, int]) -> None:
    """An address, as chromium shows it, into docs/."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("no chromium; Debian: apt install chromium")
    picture = DOCS / name
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                chromium,
                *SWITCHES.split(),
                f"--user-data-dir={folder}",
                f"--window-size={size[0]},{size[1]}",
                f"--screenshot={picture}",
                address,
            ],
            check=True,
            capture_output=True,
        )
    written = picture.stat().st_size
    print(f"{picture.relative_to(ROOT)}: {written:,} bytes")
    if written > LARGEST:
        sys.exit(f"that is more than {LARGEST:,}")


def take_look() -> None:
    """The page of `regard look --html`, at the word "it" in its telling head."""
    found = regard.look(MODEL, TEXT, from_words="it")
    number = found.words.index("it")
    with tempfile.TemporaryDirectory() as folder:
        page = found.html(Path(folder) / "page.html")
        take_picture(PICTURES[0], f"{page.as_uri()}#word={number}&head=3.1", (1180, 712))


def take_views() -> None:
    """The page of `regard view`: the map of the same head, the row of "it" kept; and a longer
    text, a word of it kept."""
    take_view(PICTURES[1], TEXT, "it", "head=3.1", (1400, 900))
    take_view(PICTURES[2], LONGER, "lamp", "head=2.9&view=text", (1240, 640))


def take_view(picture: str, text: str, word: str, where: str, size: tuple[int, int]) -> None:
    """The page over a recorded text, the last token that is this word kept, once all is drawn."""
    from screens import chromium, served, shot

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "recording"
        command = [sys.executable, "-m", "regard.cli", "record", MODEL, text, str(folder)]
        subprocess.run([*command, "--dtype", "model"], check=True, capture_output=True)
        tokens = json.loads((folder / "recording.json").read_text("utf-8"))["about"]["tokens"]
        kept = max(i for i, token in enumerate(tokens) if token == word)
        with served(str(folder)) as address, chromium() as browser:
            png = shot(browser, f"{address}#{where}&word={kept}", size, "light")
        written(DOCS / picture, png)


def written(picture: Path, png: bytes) -> None:
    """Say how large it is. Exits where it is too large."""
    picture.write_bytes(png)
    print(f"{picture.relative_to(ROOT)}: {len(png):,} bytes")
    if len(png) > LARGEST:
        sys.exit(f"that is more than {LARGEST:,}")


def take_map() -> None:
    """A pooled map of a head that reads two places back, by its own `plot`."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1024, 32).unbind()
    query[:, :, 2:] += 1.5 * key[:, :, :-2]
    key[:, :, 0] = query.mean(2) * 8
    kept = regard.Map(32, 32)
    _, (seen,) = regard.attention(query, key, key, mask=regard.Causal(), observe=[kept])
    figure = seen.plot().figure
    figure.savefig(DOCS / PICTURES[3], dpi=100, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    write_screen()
    take_look()
    take_views()
    take_map()
