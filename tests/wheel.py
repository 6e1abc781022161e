"""What a built wheel must do: python tests/wheel.py, where it and nothing else is installed."""

import importlib.metadata
import os
import subprocess
import sys
import warnings
from pathlib import Path

warnings.simplefilter("error")

import torch  # noqa: E402

import regard  # noqa: E402
from regard.engines.cpu import native  # noqa: E402

if native.library() is None:
    sys.exit("this wheel was built without the engine cpu")
if not (Path(regard.__file__).parent / "site" / "index.html").is_file():
    sys.exit("this wheel was built without the documentation: cp -r site src/regard/site")

if "REGARD_ISA" not in os.environ:
    for level in native.levels():  # chosen once a process
        named = os.environ | {"REGARD_ISA": level}
        subprocess.run([sys.executable, __file__], env=named, check=True)
    sys.exit()

q, k, v = torch.randn(3, 2, 4, 300, 64, dtype=torch.float64).unbind()
truth = regard.attention(q, k, v, mask=regard.Causal(), engine="reference")
observe = [regard.TopK(4)]
ours, (top,) = regard.attention(
    q.float(), k.float(), v.float(), mask=regard.Causal(), observe=observe, engine="cpu"
)
level, off = native.LEVELS[native.level()], (ours - truth).abs().max().item()
print(f"regard {importlib.metadata.version('regard')}, {level}: off by {off:.1e}")
if not off < 1e-5 or not torch.isfinite(top.weights).all():
    sys.exit(f"{level} computes something else")
