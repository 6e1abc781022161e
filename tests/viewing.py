"""A small recording for the tests of `regard view`, and its server in a thread."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import replace

import torch

import regard
from regard.call.checked import Call
from regard.capture.index_file import entry_of, layer_file, write_index
from regard.capture.pyramid import Results, observers
from regard.capture.recorded_layer import RecordedLayer
from regard.capture.recording import Recording
from regard.capture.stored_layer import write_layer
from regard.engines.second_pass.weigh import weigh
from regard.report.view.opened import Opened
from regard.report.view.server import HOST, Site, listen, server

ATTACK = "</script><img src=x onerror=window.pwned=1><!--"
HOSTILE = [
    ATTACK, "\x1b[31mred\x1b[0m", "\u202eevil\u202c", "&lt;b&gt;", "a" * 10_000, "\0\u2028\u2029",
    "`${window.pwned=1}", "'\"", "\n\n", "\u05d0\u05d1\u05d2",
]  # fmt: skip


def recording(tokens: int = 300, layers: int = 2, heads: int = 4, seed: int = 0, words=None):
    """Causal attention over words, half of the heads reading one place back."""
    drawn = torch.Generator().manual_seed(seed)
    made = []
    for number in range(layers):
        query = torch.randn(1, heads, tokens, 16, generator=drawn)
        key = torch.randn(1, heads // 2, tokens, 16, generator=drawn)
        before = (torch.arange(tokens) - 1).clamp(0)
        query[0, ::2] += key[0][:, before]
        mask = regard.Causal()
        _, (lse,) = regard.attention(query, key, key, mask=mask, observe=[regard.LogSumExp()])
        layer = RecordedLayer(f"layers.{number}.attention", number, "self")
        layer.add(Call.checked(query, key, key, mask=mask), lse.values)
        made.append(layer)
    names = words or [f"word{i}" for i in range(tokens)]
    text, offsets = "", []
    for name in names:
        start = len(text) + (1 if text else 0)
        text += (" " if text else "") + name
        offsets.append((start, len(text)))
    about = {"model": "small", "text": text, "tokens": names, "offsets": offsets}
    return Recording(made, about | {"special": [i == 0 for i in range(tokens)]})


def streamed(folder, tokens: int = 1000, layers: int = 2, heads: int = 4, silent: bool = False):
    """A recording as `regard.record` leaves it: a file a layer, with what was read beside it.

    silent: with a layer more, that has no pattern.
    """
    folder.mkdir()
    entries = []
    for number, layer in enumerate(recording(tokens, layers, heads).layers):
        (chunk,) = layer.chunks
        seen = observe(layer.call(chunk, 0), chunk.lse, observers(8))
        layer.norms = [
            (0, torch.rand(1, heads, tokens, generator=torch.Generator().manual_seed(1)))
        ]
        layer.values = [(0, torch.zeros(1, heads // 2, tokens, 16))]
        file = layer_file(folder, number)
        write_layer(file, layer, Results(*seen), 0)
        entries.append(entry_of(layer, file))
    if silent:
        entries.append(entry_of(RecordedLayer("conv", layers, "self", False, "it convolves"), None))
    about = recording(tokens, 1, 2).about | {"words": [[i, i + 2] for i in range(0, tokens - 1, 2)]}
    write_index(folder, about, entries, whole=True)
    return folder


def observe(call, lse, asked):
    """What observers see of a call."""
    return [part for one in asked for part in weigh(replace(call, observers=(one,)), lse)]


@contextlib.contextmanager
def served(*folders):
    """The address of a server of these recordings, and its site."""
    site = Site([Opened.load(folder) for folder in folders])
    sock = listen(0)
    runs = server(site)
    thread = threading.Thread(target=runs.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not runs.started:
        time.sleep(0.01)
    try:
        yield f"http://{HOST}:{sock.getsockname()[1]}/", site
    finally:
        runs.should_exit = True
        thread.join(20)
        site.pool.shutdown()
