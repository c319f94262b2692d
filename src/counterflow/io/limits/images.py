"""Limits on images: the pixels that a header declares, and those that a stream unpacks to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

from counterflow.io.limits import FREE_BYTES, MAX_RATIO, check_memory, decoding

BYTES_PER_PIXEL = 8  # while an image is decoded: four channels, twice
CHUNK = 1 << 20  # bytes


class Readable(Protocol):
    """Stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes."""


def check_image(path: Path, size: tuple[int, int]) -> None:
    """Raise ValueError if decoding an image of size (height, width) takes more memory than its file accounts for."""
    needed = BYTES_PER_PIXEL * math.prod(size)
    check_memory(path, f"an image of {size}", needed, path.stat().st_size, "resize it, if it is really that large")


def read_pixels(stream: Readable, declared: int, path: Path, kind: str) -> bytearray:
    """Read the declared number of bytes from a stream that may unpack to any number, or up to one chunk more.

    Memory grows with what the stream holds, not with what its header declares.

    Raises:
        ValueError: the stream does not decode as `kind`, or unpacks to more bytes than the file accounts for.
    """
    stored = path.stat().st_size
    limit = min(declared, max(FREE_BYTES, MAX_RATIO * stored))
    pixels = bytearray()
    while len(pixels) <= limit:
        with decoding(path, kind):
            chunk = stream.read(CHUNK)
        if not chunk:
            return pixels
        pixels += chunk
    check_memory(path, "its pixels", declared, stored, "if these are really images, unzip the file")
    return pixels
