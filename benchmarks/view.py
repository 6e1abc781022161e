"""What `regard view` costs at a length: the first view, cold tiles, the server's memory.

python benchmarks/view.py [--tokens 131072] [--heads 8] [--tiles 500] [--bare] [--zoom 7] [--values]

q and k are random, each head reading some way back; the recording is made once, in a temporary
folder. Tiles are drawn at random over all zooms below the diagonal; each is asked for once.
--bare: of texts whose attention would take hours; the log-sum-exp is the one that is expected of
random q and k, and no maps are pooled, so --zoom should say up to which zoom tiles are asked for.
--values: with lengths of what keys add, and their maps, as `regard record --values` keeps them;
tiles of these are then asked for, too, and what pooling their maps took is said.
"""

from __future__ import annotations

import argparse
import http.client
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import torch

import regard
from regard.call.checked import Call
from regard.capture.by_value import pooled_maps
from regard.capture.index_file import entry_of, layer_file, write_index
from regard.capture.pyramid import Results, observers
from regard.capture.recorded_layer import RecordedLayer
from regard.capture.stored_layer import write_layer

DIM, SIDE = 64, 128


def made(tokens: int, heads: int, folder: Path, bare: bool, values: bool) -> None:
    """A recording of one layer, whose heads read 1, 64, 4,096 … tokens back."""
    drawn = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, tokens, DIM, generator=drawn)
    key = torch.randn(1, max(heads // 2, 1), tokens, DIM, generator=drawn)
    for head in range(heads):
        back = (torch.arange(tokens) - 64 ** (head % 3)).clamp(0)
        query[0, head] += 0.8 * key[0, head // 2, back]
    query, key = query.bfloat16(), key.bfloat16()
    mask = regard.Causal()
    if bare:  # the scores' variance is 1
        lse, seen = (torch.arange(1, tokens + 1).log() + 0.5).expand(1, heads, -1), []
    else:
        observe = [regard.LogSumExp(), *observers(1)]  # as `regard.record` keeps them
        begun = time.perf_counter()
        _, (found, *seen) = regard.attention(query, key, key, mask=mask, observe=observe)
        print(f"attention, and what is read beside it: {time.perf_counter() - begun:.1f} s")
        lse = found.values
    layer = RecordedLayer("attention", 0, "self")
    layer.add(Call.checked(query, key, key, mask=mask), lse)
    results = Results(*seen)
    if values:
        norm = torch.rand(1, heads, tokens, generator=drawn)
        layer.values, layer.norms = [(0, key)], [(0, norm)]
        if results.sums is not None:
            begun = time.perf_counter()
            call = Call.checked(query, key, key, mask=mask)
            sums, maxima = pooled_maps(call, lse, norm, results.sums)
            results = replace(results, value_sums=sums, value_maxima=maxima)
            print(f"maps of lengths: {time.perf_counter() - begun:.1f} s more")
    names = [f"word{i}" for i in range(tokens)]
    folder.mkdir()
    file = layer_file(folder, 0)
    write_layer(file, layer, results, 0)
    about = {"model": "synthetic", "tokens": names}
    write_index(folder, about, [entry_of(layer, file)], whole=True)


def memory(process: int) -> float:
    """Its largest resident size so far, in GB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e6


def asked(address: str, path: str) -> float:
    """Seconds until the whole answer is there."""
    begun = time.perf_counter()
    connection = http.client.HTTPConnection(urlsplit(address).netloc)
    connection.request("GET", path)
    response = connection.getresponse()
    response.read()
    connection.close()
    if response.status != 200:
        sys.exit(f"{path}: {response.status}")
    return time.perf_counter() - begun


def main() -> None:
    """Make, serve, ask, print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tokens", type=int, default=131_072)
    options.add_argument("--heads", type=int, default=8)
    options.add_argument("--tiles", type=int, default=500)
    options.add_argument("--bare", action="store_true")
    options.add_argument("--values", action="store_true")
    options.add_argument("--zoom", type=int, help="tiles of cells of 2^zoom tokens at most")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "recording"
        made(given.tokens, given.heads, folder, given.bare, given.values)
        begun = time.perf_counter()
        command = [sys.executable, "-m", "regard.cli", "view", str(folder), "--no-browser"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            line = server.stdout.readline()
            address = next(word for word in line.split() if word.startswith("http"))
            top = (given.tokens // SIDE - 1).bit_length()
            top = top if given.zoom is None else min(given.zoom, top)
            for path in ("/", "/page/view.js"):
                asked(address, path)
            page = time.perf_counter() - begun
            asked(address, "/api/about")
            ready = time.perf_counter() - begun
            asked(address, f"/api/tiles?layer=0&head=0&zoom={top}&at=0.0")
            print(f"{given.tokens:,} tokens, {given.heads} heads")
            print(f"the page: {page:.2f} s after the command")
            print(f"what it needs to begin: {ready:.2f} s after the command")
            first = time.perf_counter() - begun
            print(f"the coarsest zoom's first tile: {first:.2f} s after the command")
            # Answered once torch is imported: else whichever tile comes first waits for it, and
            # its time would be taken for its zoom's
            asked(address, "/api/tiles?layer=0&head=0&zoom=0&at=0.0")
            computed = time.perf_counter() - begun
            print(f"the first tile that is computed: {computed:.2f} s after the command")
            chosen, times = random.Random(0), {}
            for _ in range(given.tiles):
                zoom = chosen.randint(0, top)
                row = chosen.randrange(-(-given.tokens // (SIDE << zoom)))
                place = f"{row}.{chosen.randint(0, row)}"
                head = chosen.randrange(given.heads)
                path = f"/api/tiles?layer=0&head={head}&zoom={zoom}&at={place}"
                times.setdefault(zoom, []).append(1000 * asked(address, path))
            whole = sorted(t for some in times.values() for t in some)
            print(f"{len(whole)} tiles: median {statistics.median(whole):.1f} ms, "
                  f"99th percentile {whole[int(0.99 * (len(whole) - 1))]:.0f} ms")  # fmt: skip
            for zoom, some in sorted(times.items()):
                print(f"  zoom {zoom}: median {statistics.median(some):.1f} ms, "
                      f"most {max(some):.0f} ms")  # fmt: skip
            for way, said in (("out", "what a token reads"), ("in", "what reads it")):
                paths = [
                    f"/api/fan?layer=0&head=0&index={chosen.randrange(given.tokens)}&way={way}"
                    for _ in range(10)
                ]
                fans = [1000 * asked(address, path) for path in paths]
                print(f"{said}: median {statistics.median(fans):.0f} ms, most {max(fans):.0f} ms")
            if given.values:
                for zoom in range(top, -1, -1):
                    path = f"/api/tiles?layer=0&head=0&zoom={zoom}&at=0.0&measure=value"
                    each = [1000 * asked(address, f"{path}&reduce={way}") for way in ("sum", "max")]
                    said = f"{each[0]:.1f} ms as sums, {each[1]:.1f} ms as maxima"
                    print(f"a tile of lengths, zoom {zoom}: {said}")
            parts = [n * given.tokens // 16 for n in range(17)]
            ranges = ",".join(f"{a}-{b}" for a, b in pairwise(parts))
            shares = asked(address, f"/api/segments?layer=0&given={ranges}")
            print(f"shares of 16 segments, 64 rows of all heads: {1000 * shares:.0f} ms")
            finder = asked(address, f"/api/reads?source=word{given.tokens - 1}&target=word7")
            print(f"which head reads a word: {1000 * finder:.0f} ms")
            print(f"server: {memory(server.pid):.2f} GB at most")
            server.terminate()


if __name__ == "__main__":
    main()
