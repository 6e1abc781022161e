"""docs/studies.md anew, from what full runs of `regard study --out docs/studies` left there."""

from pathlib import Path

from regard.lab.studies.page import page

DOCS = Path(__file__).parent

if __name__ == "__main__":
    (DOCS / "studies.md").write_text(page(DOCS / "studies"), "utf-8")
