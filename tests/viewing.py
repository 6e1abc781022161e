"""A small recording for the tests of `regard view`, and its server in a thread."""

from __future__ import annotations

import contextlib
import threading
import time

import torch

import regard
from regard.call.checked import Call
from regard.capture.recorded_layer import RecordedLayer
from regard.capture.recording import Recording
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
