"""Take again what the README shows: the first screen, and the picture of the page.

python docs/refresh.py          needs Debian's chromium, and regard with its extra "look"
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import regard

ROOT = Path(__file__).resolve().parents[1]
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "page.png"
MODEL, TEXT = (
    "all-MiniLM-L6-v2",
    "The trophy didn't fit in the suitcase because it was too big.",
)
LINES = 24  # of the first screen, at most, ending with a paragraph; the rest is "…"
SIZE = (1180, 712)
LARGEST = 150_000  # bytes of the picture
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


def take_picture() -> None:
    """The page, at the word "it" in its telling head, as chromium shows it."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("no chromium; Debian: apt install chromium")
    found = regard.look(MODEL, TEXT, from_words="it")
    number = found.words.index("it")
    with tempfile.TemporaryDirectory() as folder:
        page = found.html(Path(folder) / "page.html")
        subprocess.run(
            [
                chromium,
                *SWITCHES.split(),
                f"--user-data-dir={folder}/chromium",
                f"--window-size={SIZE[0]},{SIZE[1]}",
                f"--screenshot={PICTURE}",
                f"{page.as_uri()}#word={number}&head=3.1",
            ],
            check=True,
            capture_output=True,
        )
    size = PICTURE.stat().st_size
    print(f"{PICTURE.relative_to(ROOT)}: {size:,} bytes")
    if size > LARGEST:
        sys.exit(f"that is more than {LARGEST:,}")


if __name__ == "__main__":
    write_screen()
    take_picture()
