"""Check of a Parquet file's metadata, without Arrow, and an upper limit on the memory that its rows need.

Arrow believes the sizes in the metadata and allocates them; its Python bindings end the process at some sizes that it
cannot allocate. The footer of a file says where its column chunks are, and before each page of a chunk stands a header
with the page's sizes; both are in Thrift's compact protocol. They are read here. The pages themselves are not.

A text in a dictionary, or one that begins like the text before it, takes next to nothing in each row of the file but
its full length in memory. No text is longer than what its dictionary and such pages unpack to.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from counterflow.io.limits import check_memory, decoding

KIND = "a Parquet file"
MAGIC = b"PAR1"
MIN_PAGE = 8  # bytes of a page with its header
MAX_DEPTH = 12  # of nested structs; the format has eight

# Field numbers of parquet.thrift in github.com/apache/parquet-format.
# FileMetaData:
SCHEMA, FILE_ROWS, ROW_GROUPS = 2, 3, 4
# SchemaElement:
TYPE, TYPE_LENGTH, REPETITION, CHILDREN = 1, 2, 3, 5
BYTE_ARRAY, FIXED_LEN_BYTE_ARRAY = 6, 7  # values of TYPE
REPEATED = 2  # value of REPETITION
# RowGroup, and ColumnChunk in it:
COLUMNS, GROUP_ROWS = 1, 3
META_DATA = 3
# ColumnMetaData:
CHUNK_VALUES, DATA_PAGE_OFFSET, DICTIONARY_PAGE_OFFSET = 5, 9, 11
# PageHeader, and the headers in it of the three kinds of pages:
UNCOMPRESSED, COMPRESSED, DATA, DICTIONARY, DATA_V2 = 2, 3, 5, 7, 8
PAGE_VALUES = 1
ENCODING = {DATA: 2, DATA_V2: 4}
DELTA_BYTE_ARRAY = 7  # the encoding of texts by the prefix that they share with the text before

# Types of Thrift's compact protocol
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12


class Needs(NamedTuple):
    """Bytes of memory that a Parquet file needs, at most, according to its metadata."""

    numbers: int  # of all its numbers
    row: int  # of the texts of one row


class _Column(NamedTuple):
    """Column of a schema."""

    type: int
    length: int  # bytes of a value, for FIXED_LEN_BYTE_ARRAY
    repeated: bool  # a row may hold several values


class _Chunk(NamedTuple):
    """Sizes of a column chunk, from the headers of its pages."""

    pages: int  # how many
    bytes: int  # of all pages, uncompressed
    longest: int  # an upper limit on the bytes of one text


def check_parquet(path: Path) -> Needs:
    """Return how much memory a Parquet file needs.

    Raises:
        ValueError: the metadata contradicts itself or the size of the file, or a row group needs more memory than the
            file accounts for.
    """
    stored = path.stat().st_size
    rows, numbers, widest, largest = 0, 0, 0, 0
    with decoding(path, KIND), path.open("rb") as file:
        pages_left = stored // MIN_PAGE
        footer = _footer(file, stored)
        columns = _columns(footer[SCHEMA])
        for group in footer[ROW_GROUPS]:
            rows += group[GROUP_ROWS]
            numbers += 8 * group[GROUP_ROWS] * len(group[COLUMNS])
            row, group_bytes, list_bytes = 0, 0, 0
            for k, (chunk, column) in enumerate(zip(group[COLUMNS], columns, strict=True)):
                count = _count_values(chunk[META_DATA], group[GROUP_ROWS], column, f"column {k}")
                sizes = _chunk(file, stored, chunk[META_DATA], pages_left, f"column {k}")
                pages_left -= sizes.pages
                group_bytes += sizes.bytes
                each = {BYTE_ARRAY: sizes.longest, FIXED_LEN_BYTE_ARRAY: column.length}.get(column.type, 0)
                if column.repeated:  # one row may hold all values
                    list_bytes += count * max(each, 8)
                else:
                    row += each
            widest = max(widest, row)
            largest = max(largest, group_bytes, list_bytes, row)
        if rows != footer[FILE_ROWS]:
            raise ValueError(f"it declares {footer[FILE_ROWS]:,} rows, and its row groups have {rows:,}")
    check_memory(path, "a row group", largest, stored, "if that size is right, write smaller row groups")
    return Needs(numbers, widest)


def _count_values(chunk: dict[int, Any], rows: int, column: _Column, name: str) -> int:
    """Return the number of values that a column chunk declares, if it fits the number of rows."""
    count: int = chunk[CHUNK_VALUES]
    if min(rows, count) < 0 or not (column.repeated or count == rows):
        raise ValueError(f"{name} has {count:,} values in {rows:,} rows")
    return count


def _chunk(file: BinaryIO, stored: int, chunk: dict[int, Any], max_pages: int, name: str) -> _Chunk:
    """Add up the headers of a column chunk's pages, and check that they hold the declared number of values."""
    count = chunk[CHUNK_VALUES]
    start = min(chunk[DATA_PAGE_OFFSET], chunk.get(DICTIONARY_PAGE_OFFSET) or chunk[DATA_PAGE_OFFSET])
    pages, size, values, longest = 0, 0, 0, 0
    for page in _pages(file, start, stored) if count else ():
        pages += 1
        size += page[UNCOMPRESSED]
        values += sum(page[kind].get(PAGE_VALUES, 0) for kind in ENCODING if kind in page)
        in_dictionary = page[DICTIONARY].get(PAGE_VALUES, 0) if DICTIONARY in page else 0
        if pages > max_pages or not 0 <= in_dictionary <= page[UNCOMPRESSED]:
            raise ValueError(f"a page of {name} has {in_dictionary:,} values in {page[UNCOMPRESSED]:,} bytes")
        if DICTIONARY in page or _is_delta(page):
            longest += page[UNCOMPRESSED]
        if values >= count:
            break
    if values != count:
        raise ValueError(f"{name} has {values:,} values in its pages, not {count:,}")
    return _Chunk(pages, size, longest)


def _is_delta(page: dict[int, Any]) -> bool:
    return any(kind in page and page[kind].get(field) == DELTA_BYTE_ARRAY for kind, field in ENCODING.items())


def _columns(schema: list[dict[int, Any]]) -> list[_Column]:
    """Return the leaves of a schema, which is a tree listed depth first."""
    elements = iter(schema)

    def leaves(count: int, repeated: bool) -> Iterator[_Column]:
        for element in islice(elements, count):
            repeats = repeated or element.get(REPETITION) == REPEATED
            if element.get(CHILDREN):
                yield from leaves(element[CHILDREN], repeats)
            else:
                yield _Column(element[TYPE], max(element.get(TYPE_LENGTH, 0), 0), repeats)

    root = next(elements)
    return list(leaves(root.get(CHILDREN, 0), False))


def _footer(file: BinaryIO, stored: int) -> dict[int, Any]:
    """Read the FileMetaData at the end of the file."""
    file.seek(max(stored - 8, 0))
    end = file.read()
    size = int.from_bytes(end[:4], "little")
    if end[4:] != MAGIC or size + 12 > stored:
        raise ValueError("it does not end as one")
    file.seek(stored - 8 - size)
    return _struct(io.BytesIO(file.read(size)), MAX_DEPTH)


def _pages(file: BinaryIO, start: int, stored: int) -> Iterator[dict[int, Any]]:
    """Yield the headers of consecutive pages."""
    while True:
        if not 0 <= start < stored:
            raise ValueError(f"a page is declared at byte {start:,} of {stored:,}")
        file.seek(start)
        page = _struct(file, MAX_DEPTH)
        compressed = page.get(COMPRESSED, -1)
        if not (isinstance(page.get(UNCOMPRESSED), int) and page[UNCOMPRESSED] >= 0 and isinstance(compressed, int)):
            raise ValueError(f"no page begins at byte {start:,}")
        start = file.tell() + compressed
        if not file.tell() <= start <= stored:
            raise ValueError(f"a page of {compressed:,} bytes is declared at byte {file.tell():,} of {stored:,}")
        yield page


def _struct(file: BinaryIO, depth: int) -> dict[int, Any]:
    """Read a struct: its numbers, structs and lists by field number; texts are skipped."""
    if not depth:
        raise ValueError("its structs are nested too deeply")
    fields: dict[int, Any] = {}
    field = 0
    while (head := _byte(file)) != 0:
        field = field + (head >> 4) if head >> 4 else _number(file)
        if field in fields:
            raise ValueError(f"field {field} appears twice")  # it is not defined which of the two Arrow takes
        fields[field] = _value(file, head & 15, depth)
    return fields


def _value(file: BinaryIO, kind: int, depth: int) -> Any:
    if kind in (TRUE, FALSE):  # a field's type is its value
        return kind == TRUE
    if kind in (I16, I32, I64):
        return _number(file)
    if kind == STRUCT:
        return _struct(file, depth - 1)
    if kind in (BYTE, DOUBLE, BINARY):
        size = {BYTE: 1, DOUBLE: 8}.get(kind) or _varint(file)
        if size:
            file.seek(size - 1, 1)
            _byte(file)  # the last one: seek does not fail beyond the end, and a list would go on for ever
        return None
    if kind in (LIST, SET):
        head = _byte(file)
        count = head >> 4 if head >> 4 < 15 else _varint(file)
        inner = BYTE if head & 15 in (TRUE, FALSE) else head & 15  # in a list, a truth value is a byte
        return [_value(file, inner, depth) for _ in range(count)]
    raise ValueError(f"a field of the unknown type {kind}")  # the format has no maps


def _number(file: BinaryIO) -> int:
    """Read a signed integer, in zigzag encoding."""
    zigzag = _varint(file)
    return (zigzag >> 1) ^ -(zigzag & 1)


def _varint(file: BinaryIO) -> int:
    """Read an unsigned integer, seven bits in each byte."""
    number = 0
    for shift in range(0, 64, 7):
        byte = _byte(file)
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise ValueError("an integer of more than 64 bits")


def _byte(file: BinaryIO) -> int:
    read = file.read(1)
    if not read:
        raise ValueError("its metadata is cut off")
    return read[0]
