"""Fetch what the page of `regard view` takes from npm: pinned, checked, unchanged, with licences.

python tools/vendor.py          needs npm; writes src/regard/report/view/page/vendor
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VENDOR = Path(__file__).resolve().parents[1] / "src/regard/report/view/page/vendor"
SUMS = "SHA256SUMS"
PINNED = {
    "leaflet": {
        "version": "1.9.4",
        "licence": "BSD-2-Clause",
        "integrity": "nxS1ynzJOmOlHp+iL3FyWqK89GtNL8U8rvlMOsQdTTssxZwCXh8N2NB3GDQOL+YR3XnWyZAxwQixURb+FA74PA==",  # noqa: E501
        "files": {
            "dist/leaflet.js": "leaflet/leaflet.js",
            "dist/leaflet.css": "leaflet/leaflet.css",
            "LICENSE": "leaflet/LICENSE",
        },
    },
    "@tanstack/virtual-core": {
        "version": "3.19.11",
        "licence": "MIT",
        "integrity": "/5iHb0RHBvj8Di59FDs4ESNm45jls33aZAi4zccVXZjc/6ZvwQP6nzEYeT6weXjTf9E6/vrp2JhYWRyO+ZP13A==",  # noqa: E501
        "files": {
            "dist/esm/index.js": "virtual-core/index.js",
            "dist/esm/utils.js": "virtual-core/utils.js",
            "dist/esm/lazy-measurements.js": "virtual-core/lazy-measurements.js",
            "dist/esm/scroll-classifier.js": "virtual-core/scroll-classifier.js",
            "dist/esm/ios-gesture.js": "virtual-core/ios-gesture.js",
            "LICENSE": "virtual-core/LICENSE",
        },
    },
    "uplot": {
        "version": "1.6.32",
        "licence": "MIT",
        "integrity": "KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw==",  # noqa: E501
        "files": {
            "dist/uPlot.esm.js": "uplot/uPlot.js",
            "dist/uPlot.min.css": "uplot/uPlot.css",
            "LICENSE": "uplot/LICENSE",
        },
    },
}


def fetched(name: str, version: str, integrity: str, folder: Path) -> tarfile.TarFile:
    """The package's archive, whose SHA-512 is the one pinned."""
    said = subprocess.run(
        ["npm", "pack", f"{name}@{version}", "--json", "--pack-destination", str(folder)],
        check=True, capture_output=True, text=True, cwd=folder,
    ).stdout  # fmt: skip
    (archive,) = folder.glob("*.tgz")
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != integrity:
        sys.exit(f"{name} {version} is not what is pinned: sha512-{digest}; npm said {said[:200]}")
    return tarfile.open(archive)


def write(name: str, version: str, integrity: str, licence: str, files: dict[str, str]) -> None:
    """The files that the page needs, and the licence, which is the one pinned."""
    with (
        tempfile.TemporaryDirectory() as folder,
        fetched(name, version, integrity, Path(folder)) as archive,
    ):
        about = archive.extractfile("package/package.json")
        assert about is not None
        said = json.load(about)["license"]
        if said != licence:
            sys.exit(f"{name} {version} is under {said!r}, not {licence!r}")
        for source, target in files.items():
            member = archive.extractfile(f"package/{source}")
            assert member is not None
            path = VENDOR / target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(member.read())
    print(f"{name} {version}, {licence}: {len(files)} files")


def sums() -> str:
    """A line a file, as `sha256sum --check` reads them."""
    files = sorted(path for path in VENDOR.rglob("*") if path.is_file() and path.name != SUMS)
    return "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(VENDOR).as_posix()}\n"
        for path in files
    )


if __name__ == "__main__":
    for package, pinned in PINNED.items():
        write(package, **pinned)
    (VENDOR / SUMS).write_text(sums(), "utf-8")
