"""Whether the parts of a Parquet file fit into it: Arrow believes the sizes that are written there, and takes memory.

The end of a file says where its column chunks stand, and before each page of a chunk stands a header with the sizes of
the page, both in Thrift's compact protocol. They are looked at here, without Arrow, whose Python ends the process at
some that do not fit; nothing of the pages is read.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from counterflow.data.formats import check_taken, reading

PARQUET = "a Parquet file"
MAGIC = b"PAR1"
SHORTEST = 8  # bytes of a page with its header
DEEPEST = 12  # structs within structs; the format has eight

# Fields by their numbers in parquet.thrift of the format's own repository
ROWS, GROUPS = 3, 4  # of a file
COLUMNS, GROUP_ROWS = 1, 3  # of a row group
CHUNK = 3  # of a column in it
PATH, CHUNK_VALUES, FIRST_PAGE, FIRST_DICTIONARY = 3, 5, 9, 11  # of its chunk
UNPACKED, PACKED, DATA, DICTIONARY, DATA_2 = 2, 3, 5, 7, 8  # of a page's header
VALUES = 1  # of those of the last three


def check_parquet(path: Path) -> int:
    """The bytes that the numbers of a Parquet file take; ValueError where its parts do not fit into it."""
    stored, rows, taken, largest = path.stat().st_size, 0, 0, 0
    with reading(path, PARQUET), path.open("rb") as file:
        room = stored // SHORTEST  # pages that fit into the file
        said = _footer(file, stored)
        for group in said[GROUPS]:
            rows += group[GROUP_ROWS]
            taken += 8 * group[GROUP_ROWS] * len(group[COLUMNS])
            for k, column in enumerate(group[COLUMNS]):
                chunk, name = column[CHUNK], f"column {k}"
                count, values, unpacked = chunk[CHUNK_VALUES], 0, 0
                if min(group[GROUP_ROWS], count) < 0 or (len(chunk[PATH]) == 1 and count != group[GROUP_ROWS]):
                    raise ValueError(f"{name} has {count:,} values in {group[GROUP_ROWS]:,} rows")
                start = min(chunk[FIRST_PAGE], chunk.get(FIRST_DICTIONARY) or chunk[FIRST_PAGE])
                for page in _pages(file, start, stored) if count else ():
                    room -= 1
                    unpacked += page[UNPACKED]
                    values += sum(page[kind].get(VALUES, 0) for kind in (DATA, DATA_2) if kind in page)
                    known = page[DICTIONARY].get(VALUES, 0) if DICTIONARY in page else 0
                    if room < 0 or not 0 <= known <= page[UNPACKED]:
                        raise ValueError(f"a page of {name} has {known:,} values in {page[UNPACKED]:,} bytes")
                    if values >= count:
                        break
                if values != count:
                    raise ValueError(f"{name} has {values:,} values in its pages, not {count:,}")
                largest = max(largest, unpacked)
        if rows != said[ROWS]:
            raise ValueError(f"it says that it has {said[ROWS]:,} rows, and its parts have {rows:,}")
    check_taken(path, "a column of a row group", largest, stored, "write smaller row groups, if it is right")
    return int(taken)


def _footer(file: BinaryIO, stored: int) -> dict[int, Any]:
    """What the end of the file says."""
    file.seek(max(stored - 8, 0))
    end = file.read()
    size = int.from_bytes(end[:4], "little")
    if end[4:] != MAGIC or size + 12 > stored:
        raise ValueError("it does not end as one")
    file.seek(stored - 8 - size)
    return _struct(io.BytesIO(file.read(size)), DEEPEST)


def _pages(file: BinaryIO, start: int, stored: int) -> Iterator[dict[int, Any]]:
    """The headers of pages that follow each other."""
    while True:
        if not 0 <= start < stored:
            raise ValueError(f"a page is said to stand at byte {start:,} of {stored:,}")
        file.seek(start)
        page = _struct(file, DEEPEST)
        packed = page.get(PACKED, -1)
        if not (isinstance(page.get(UNPACKED), int) and page[UNPACKED] >= 0 and isinstance(packed, int)):
            raise ValueError(f"no page begins at byte {start:,}")
        start = file.tell() + packed
        if not file.tell() <= start <= stored:
            raise ValueError(f"a page of {packed:,} bytes is said to stand at byte {file.tell():,} of {stored:,}")
        yield page


def _struct(file: BinaryIO, deeper: int) -> dict[int, Any]:
    """The numbers, structs and lists of a struct by field; texts are passed over."""
    if not deeper:
        raise ValueError("it has structs in structs without end")
    fields: dict[int, Any] = {}
    field = 0
    while (head := _byte(file)) != 0:
        field = field + (head >> 4) if head >> 4 else _number(file)
        if field in fields:
            raise ValueError(f"field {field} stands twice")  # which of the two does Arrow take?
        fields[field] = _value(file, head & 15, deeper)
    return fields


def _value(file: BinaryIO, kind: int, deeper: int) -> Any:
    if kind in (1, 2):  # true and false, which are their own kinds
        return kind == 1
    if kind in (4, 5, 6):
        return _number(file)
    if kind == 12:
        return _struct(file, deeper - 1)
    if kind in (3, 7, 8):  # a byte, eight of them, a text
        size = {3: 1, 7: 8}.get(kind) or _varint(file)
        file.seek(size, 1)
        return None
    if kind in (9, 10):  # a list, a set
        head = _byte(file)
        count = head >> 4 if head >> 4 < 15 else _varint(file)
        inner = 3 if head & 15 in (1, 2) else head & 15  # in a list, true and false are a byte
        return [_value(file, inner, deeper) for _ in range(count)]
    raise ValueError(f"a field of the unknown kind {kind}")  # the format has no maps


def _number(file: BinaryIO) -> int:
    zigzag = _varint(file)
    return (zigzag >> 1) ^ -(zigzag & 1)


def _varint(file: BinaryIO) -> int:
    number = 0
    for shift in range(0, 64, 7):
        byte = _byte(file)
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise ValueError("a number without end")


def _byte(file: BinaryIO) -> int:
    read = file.read(1)
    if not read:
        raise ValueError("what it says of itself ends in the midst")
    return read[0]
