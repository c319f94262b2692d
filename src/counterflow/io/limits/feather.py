"""Check of an Arrow IPC file, also called Feather: the sizes that its compressed buffers unpack to.

Arrow allocates the size that a compressed buffer declares in its first eight bytes. Arrow's reader of messages copies
none of them; the places of the buffers stand in a FlatBuffer before each message and are read here.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from counterflow.checks import require
from counterflow.io.limits import check_memory, decoding

KIND = "an Arrow or Feather file"
MAGIC = b"ARROW1"
START = 8  # bytes of the magic and its padding, after which a file is a stream of messages

# Field numbers of Message.fbs in github.com/apache/arrow: of Message, RecordBatch and DictionaryBatch.
HEADER = 2
BUFFERS, COMPRESSION = 2, 3
DATA = 1
KINDS = ("record batch", "dictionary")  # of the messages with data


def check_feather(path: Path) -> None:
    """Raise ValueError if a batch unpacks to more memory than the file accounts for, or is no message at all."""
    ipc = require("pyarrow.ipc", "data", KIND)
    stored = path.stat().st_size
    with decoding(path, KIND), path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin as one")
        file.seek(START)
        largest = max((_unpacked(message) for message in ipc.MessageReader.open_stream(file)), default=0)
    check_memory(path, "a batch of rows", largest, stored, "if that size is right, write smaller batches")


def _unpacked(message: Any) -> int:
    """Return the bytes that the buffers of a message take when they are unpacked."""
    if message.type not in KINDS:
        return 0
    table = _Table.root(message.metadata.to_pybytes()).table(HEADER)
    if message.type == "dictionary":
        table = table.table(DATA)
    body = memoryview(message.body)
    if not table.has(COMPRESSION):
        return len(body)
    total = 0
    for offset, length in table.pairs(BUFFERS):
        if not 0 <= offset <= offset + length <= len(body):
            raise ValueError(f"a buffer of {length:,} bytes is declared at byte {offset:,} of {len(body):,}")
        if length:
            (size,) = struct.unpack_from("<q", body, offset)
            if size < -1:
                raise ValueError(f"a buffer declares {size:,} bytes")
            total += length if size == -1 else size  # -1 marks a buffer that is not compressed
    return total


class _Table:
    """Table of a FlatBuffer: its fields are found through a list of their places, the vtable."""

    def __init__(self, data: bytes, place: int) -> None:
        self._data, self._place = data, place
        self._vtable = place - self._read("<i", place)

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, struct.unpack_from("<I", data, 0)[0])

    def has(self, field: int) -> bool:
        return self._field(field) is not None

    def table(self, field: int) -> _Table:
        """Return the table that a field points to."""
        return _Table(self._data, self._target(field))

    def pairs(self, field: int) -> list[tuple[int, int]]:
        """Return a vector of structs of two 64-bit integers."""
        place = self._target(field)
        count = self._read("<I", place)
        if place + 4 + 16 * count > len(self._data):
            raise ValueError(f"{count:,} buffers are declared in {len(self._data):,} bytes")
        return [struct.unpack_from("<qq", self._data, place + 4 + 16 * k) for k in range(count)]

    def _target(self, field: int) -> int:
        place = self._field(field)
        if place is None:
            raise ValueError(f"field {field} is missing in its metadata")
        return place + self._read("<I", place)

    def _field(self, field: int) -> int | None:
        entry = 4 + 2 * field
        if entry >= self._read("<H", self._vtable):
            return None
        offset = self._read("<H", self._vtable + entry)
        return self._place + offset if offset else None

    def _read(self, kind: str, place: int) -> int:
        if place < 0:
            raise ValueError("its metadata points before its start")
        number: int = struct.unpack_from(kind, self._data, place)[0]
        return number
