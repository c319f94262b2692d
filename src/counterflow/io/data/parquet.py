"""Parquet files of any origin: whether their parts fit into them, and their rows so many at a time as surely fit.

Arrow believes the sizes that are written there, and takes memory; its Python ends the process at some that do not fit.
The end of a file says where its column chunks stand, and before each page of a chunk stands a header with the sizes of
the page, both in Thrift's compact protocol. They are looked at here, without Arrow; nothing of the pages is read.

A text that stands in a dictionary, or begins as the one before it, takes next to nothing in each row of the file, and
all of its length in memory. No text is longer than what its dictionary and such pages unpack to.
"""

import io
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from counterflow.io.data.formats import needs, reading
from counterflow.io.limits import ALWAYS, check_taken

PARQUET = "a Parquet file"
MAGIC = b"PAR1"
SHORTEST = 8  # bytes of a page with its header
DEEPEST = 12  # structs within structs; the format has eight
ROOM = ALWAYS // 2  # bytes of the texts that are read at once

# Fields by their numbers in parquet.thrift of the format's own repository
SCHEMA, ROWS, GROUPS = 2, 3, 4  # of a file
TYPE, LENGTH, REPETITION, CHILDREN = 1, 2, 3, 5  # of an element of the schema
TEXT, FIXED = 6, 7  # types: of any length, and of one length
REPEATED = 2
COLUMNS, GROUP_ROWS = 1, 3  # of a row group
CHUNK = 3  # of a column in it
CHUNK_VALUES, FIRST_PAGE, FIRST_DICTIONARY = 5, 9, 11  # of its chunk
UNPACKED, PACKED, DATA, DICTIONARY, DATA_2 = 2, 3, 5, 7, 8  # of a page's header
VALUES = 1  # of those of the last three
ENCODING = {DATA: 2, DATA_2: 4}
DELTA_BYTES = 7  # the encoding of texts that begin as the one before


class Taken(NamedTuple):
    """Bytes of memory that a Parquet file takes, by what it says of itself."""

    numbers: int  # all of its numbers
    row: int  # the texts of one row, at most


def check_parquet(path: Path) -> Taken:
    """What a Parquet file takes; ValueError where its parts do not fit into it, or one of them takes too much."""
    stored, rows, numbers, widest, largest = path.stat().st_size, 0, 0, 0, 0
    with reading(path, PARQUET), path.open("rb") as file:
        room = stored // SHORTEST  # pages that fit into the file
        said = _footer(file, stored)
        leaves = _leaves(said[SCHEMA])
        for group in said[GROUPS]:
            rows += group[GROUP_ROWS]
            numbers += 8 * group[GROUP_ROWS] * len(group[COLUMNS])
            row, pages, lists = 0, 0, 0
            for k, (column, (kind, length, repeated)) in enumerate(zip(group[COLUMNS], leaves, strict=True)):
                chunk, name = column[CHUNK], f"column {k}"
                count, values, longest = chunk[CHUNK_VALUES], 0, 0
                if min(group[GROUP_ROWS], count) < 0 or not (repeated or count == group[GROUP_ROWS]):
                    raise ValueError(f"{name} has {count:,} values in {group[GROUP_ROWS]:,} rows")
                start = min(chunk[FIRST_PAGE], chunk.get(FIRST_DICTIONARY) or chunk[FIRST_PAGE])
                for page in _pages(file, start, stored) if count else ():
                    room -= 1
                    pages += page[UNPACKED]
                    values += sum(page[of].get(VALUES, 0) for of in ENCODING if of in page)
                    known = page[DICTIONARY].get(VALUES, 0) if DICTIONARY in page else 0
                    if room < 0 or not 0 <= known <= page[UNPACKED]:
                        raise ValueError(f"a page of {name} has {known:,} values in {page[UNPACKED]:,} bytes")
                    if DICTIONARY in page or _is_delta(page):
                        longest += page[UNPACKED]
                    if values >= count:
                        break
                if values != count:
                    raise ValueError(f"{name} has {values:,} values in its pages, not {count:,}")
                each = {TEXT: longest, FIXED: length}.get(kind, 0)
                if repeated:  # one row may hold them all
                    lists += count * max(each, 8)
                else:
                    row += each
            widest, largest = max(widest, row), max(largest, pages, lists, row)
        if rows != said[ROWS]:
            raise ValueError(f"it says that it has {said[ROWS]:,} rows, and its parts have {rows:,}")
    check_taken(path, "a row group", largest, stored, "write smaller row groups, if it is right")
    return Taken(numbers, widest)


def row_groups(path: Path, groups: Sequence[int], size: int, taken: Taken) -> Iterator[Any]:
    """The rows of these row groups, in Arrow record batches of at most so many.

    Raises ValueError where a batch takes more memory than the file's bytes account for.
    """
    arrow = needs("pyarrow", "pyarrow", PARQUET)
    most = max(1, min(size, ROOM // max(taken.row, 1)))  # rows that are read at once
    stored, held, rows, parts = path.stat().st_size, 0, 0, []
    with reading(path, PARQUET):
        opened = opened_parquet(path)
    with opened:
        texts = [k for k, kind in enumerate(opened.schema_arrow.types) if not arrow.types.is_primitive(kind)]
        stream = opened.iter_batches(batch_size=most, row_groups=list(groups), use_threads=False)
        for part in arrow_batches(stream, path, PARQUET):
            parts.append(part)
            rows += part.num_rows
            for column in map(part.column, texts):
                with reading(path, PARQUET):
                    column.validate(full=True)  # whether texts are UTF-8
                held += text_bytes(column)
            check_taken(path, f"{rows:,} rows", held, stored, "write it without the column of long texts")
            if rows + most > size:
                yield from _joined(arrow, parts)
                held, rows, parts = 0, 0, []
        yield from _joined(arrow, parts)


def opened_parquet(path: Path) -> Any:
    """Arrow's ParquetFile, which reads pages as they are needed: a row group may be larger than memory."""
    parquet = needs("pyarrow.parquet", "pyarrow", PARQUET)
    return parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)


def arrow_batches(stream: Iterator[Any], path: Path, kind: str) -> Iterator[Any]:
    """What a reader of Arrow's gives, its errors told as those of a file of that kind."""
    while True:
        with reading(path, kind):
            batch = next(stream, None)
        if batch is None:
            return
        yield batch


def text_bytes(column: Any) -> int:
    """What an Arrow column takes, without the dictionaries in it."""
    types = needs("pyarrow.types", "pyarrow", PARQUET)
    if types.is_struct(column.type):
        return sum(map(text_bytes, column.flatten()))
    return int((column.dictionary_decode() if types.is_dictionary(column.type) else column).nbytes)


def _joined(arrow: Any, parts: list[Any]) -> Iterator[Any]:
    if len(parts) == 1:
        yield parts[0]
    elif parts:
        yield from arrow.Table.from_batches(parts).combine_chunks().to_batches()


def _is_delta(page: dict[int, Any]) -> bool:
    return any(kind in page and page[kind].get(place) == DELTA_BYTES for kind, place in ENCODING.items())


def _leaves(schema: list[dict[int, Any]]) -> list[tuple[int, int, bool]]:
    """Of each column: its type, the bytes of a value where all have one length, and whether a row may have several."""
    elements = iter(schema)

    def below(count: int, repeated: bool) -> Iterator[tuple[int, int, bool]]:
        for element in islice(elements, count):
            several = repeated or element.get(REPETITION) == REPEATED
            if element.get(CHILDREN):
                yield from below(element[CHILDREN], several)
            else:
                yield element[TYPE], max(element.get(LENGTH, 0), 0), several

    root = next(elements)
    return list(below(root.get(CHILDREN, 0), False))


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
