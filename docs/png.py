"""A PNG of true colours as one of 256 at most: fewer bytes, and no other program needed."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def shrink(path: Path) -> None:
    """Write the picture again in its 256 commonest colours; others become the nearest of these."""
    pixels = _read(path.read_bytes())
    height, width, _ = pixels.shape
    found = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    every, which, counts = found
    colours = every[np.argsort(-counts, kind="stable")[:256]]
    apart = every[:, None].astype(np.int32) - colours[None].astype(np.int32)
    index = (apart**2).sum(-1).argmin(-1).astype(np.uint8)[which.reshape(-1)]
    rows = np.zeros((height, width + 1), np.uint8)  # each begins with its filter: none
    rows[:, 1:] = index.reshape(height, width)
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    data = zlib.compress(rows.tobytes(), 9)
    chunks = ((b"IHDR", header), (b"PLTE", colours.tobytes()), (b"IDAT", data), (b"IEND", b""))
    path.write_bytes(_SIGNATURE + b"".join(_chunk(*chunk) for chunk in chunks))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _read(data: bytes) -> np.ndarray:
    """Pixels uint8 (height, width, 3) of a picture with 8 bits a channel, not interlaced."""
    at, packed = len(_SIGNATURE), b""
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        if kind == b"IHDR":
            width, height, depth, colours, _, _, interlaced = struct.unpack(">IIBBBBB", body)
            assert (depth, colours, interlaced) in ((8, 2, 0), (8, 6, 0)), "8 bits a channel"
        packed += body if kind == b"IDAT" else b""
        at += size + 12
    channels = 3 if colours == 2 else 4
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, -1)
    above, pixels = np.zeros(width * channels, np.uint8), []
    for row in rows:
        above = _unfiltered(int(row[0]), row[1:], above, channels)
        pixels.append(above)
    return np.stack(pixels).reshape(height, width, channels)[:, :, :3]


def _unfiltered(how: int, row: np.ndarray, above: np.ndarray, step: int) -> np.ndarray:
    """A row as it was before the filter (PNG specification, section 9)."""
    if how in (0, 2):
        return row + above if how else row
    out, up = [0] * step + row.tolist(), [0] * step + above.tolist()
    for i in range(step, len(out)):
        left, over, corner = out[i - step], up[i], up[i - step]
        if how == 1:
            near = left
        elif how == 3:
            near = (left + over) // 2
        else:
            guess = left + over - corner
            near = min((left, over, corner), key=lambda value: abs(guess - value))
        out[i] = (out[i] + near) & 255
    return np.array(out[step:], np.uint8)
