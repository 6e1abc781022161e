"""What a release says of itself: one version, everywhere."""

import re
import tomllib
from pathlib import Path

import pytest

import regard

ROOT = Path(__file__).resolve().parents[1]
CHANGELOG = ROOT / "CHANGELOG.md"


@pytest.mark.skipif(not CHANGELOG.exists(), reason="not in a source tree")
def test_the_version_is_the_same_everywhere():
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert regard.__version__ == stated
    released = re.findall(r"^## (\d+\.\d+\.\d+) - (\S+)", CHANGELOG.read_text("utf-8"), re.M)
    assert released[0][0] == stated, "CHANGELOG.md begins with another version"
