"""Types of recorded columns: what a column's cells are as numbers, and numbers as such cells again.

| cells | number | type |
|---|---|---|
| whole numbers, fractions, decimals | themselves | "int64", "double", "decimal128(9, 2)", .. |
| truth values, also the texts true and false | 0 or 1 | "bool" |
| dates and times, also texts: 2024-05-31, 31.05.2024 | seconds since 1970, UTC | "timestamp[us, tz=UTC]", .. |
| times of day, durations | seconds | "time64[us]", "duration[ns]" |

A type is written as Arrow writes it. The type of a column of texts is that of its content.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from counterflow.checks import require

Array = np.ndarray[Any, Any]

# texts that pandas and Arrow read as a missing number, and None
MISSING = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}
DAY_FIRST = "%d.%m.%Y"  # dates as German tables write them; with slashes, day and month would be guesses
SECONDS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # units in a second
DAY = 86_400  # seconds
EXACT = 2**53  # up to which float64 holds all whole numbers
TIMESTAMP = re.compile(r"timestamp\[(s|ms|us|ns)(?:, tz=([^\]]+))?\]")
DECIMAL = re.compile(r"decimal(?:32|64|128|256)\((\d+), (\d+)\)")


def decode(column: Any) -> tuple[Array | None, str | None]:
    """Return the numbers of an Arrow column (N,), NaN for missing cells, and its type; (None, None) for other texts.

    The type is None for a column without cells that are not missing.

    Example:
        >>> import pyarrow
        >>> decode(pyarrow.array(["1970-01-02", "NA"]))
        (array([86400.,    nan]), 'date32[day]')
        >>> decode(pyarrow.array(["true", "FALSE"]))
        (array([1., 0.]), 'bool')
    """
    arrow, _ = _arrow()
    kind = arrow.types
    if kind.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.null_count == len(column):
        return np.full(len(column), np.nan), None
    if kind.is_temporal(column.type):
        return _seconds(column), str(column.type)
    if kind.is_string(column.type) or kind.is_large_string(column.type) or kind.is_string_view(column.type):
        return _decode_texts(column)
    numbers = _cast(column, arrow.float64())
    return (None, None) if numbers is None else (_numpy(numbers), str(column.type))


def _decode_texts(column: Any) -> tuple[Array | None, str | None]:
    arrow, compute = _arrow()
    numbers = _cast(column, arrow.float64())
    if numbers is None:
        column = compute.utf8_trim_whitespace(column)
        is_missing = compute.is_in(column, value_set=arrow.array(sorted(MISSING), column.type))
        column = compute.if_else(is_missing, arrow.scalar(None, column.type), column)
        numbers = _cast(column, arrow.float64())
    if numbers is not None:
        whole = _cast(column, arrow.int64())
        found = None if numbers.null_count == len(numbers) else "double" if whole is None else "int64"
        return _numpy(numbers), found
    truths = _cast(compute.utf8_lower(column), arrow.bool_())
    if truths is not None:
        return _numpy(_cast(truths, arrow.float64())), "bool"
    for name in ("date32[day]", "timestamp[s]", "timestamp[us]", "timestamp[us, tz=UTC]"):
        times = _cast(column, arrow_type(name))
        if times is not None:
            return _seconds(times), name
    try:
        return _seconds(compute.strptime(column, DAY_FIRST, "s")), "date32[day]"
    except arrow.ArrowInvalid:
        return None, None


def encode(numbers: Array, type: str) -> Any:
    """Return numbers (N,) as an Arrow array of a recorded type, rounded to what it holds.

    Raises:
        ValueError: no such type.

    Example:
        >>> encode(np.array([86400.0]), "date32[day]").to_pylist()
        [datetime.date(1970, 1, 2)]
    """
    arrow, _ = _arrow()
    target = arrow_type(type)
    kind = arrow.types
    if kind.is_boolean(target):
        return arrow.array(numbers > 0.5)
    if kind.is_integer(target):
        limits = np.iinfo(target.to_pandas_dtype())
        low, high = max(limits.min, -EXACT), min(limits.max, EXACT)
        return arrow.array(np.clip(np.round(numbers), low, high).astype(np.float64)).cast(target)
    if kind.is_decimal(target):
        texts = [f"{number:.{target.scale}f}" for number in numbers]
        return arrow.array(texts).cast(target)
    if kind.is_date(target):
        return arrow.array(np.round(numbers / DAY).astype("datetime64[D]")).cast(target)
    if kind.is_temporal(target):
        return (
            arrow.array(np.round(numbers * SECONDS[target.unit]).astype(np.int64))
            .cast(arrow.int32() if kind.is_time32(target) else arrow.int64())
            .cast(target)
        )
    return arrow.array(numbers).cast(target)


def joined(first: str | None, second: str | None) -> str | None:
    """Return the type of a column whose parts have these types; None where one has dates and the other has none.

    Example:
        >>> joined("int64", "double"), joined("date32[day]", "timestamp[s]"), joined("int64", "date32[day]")
        ('double', 'timestamp[s]', None)
    """
    if first is None or second is None or first == second:
        return first or second
    if is_time(first) != is_time(second):
        return None
    order = ["bool", "int64", "double"]
    if is_time(first):
        order = ["date32[day]", "timestamp[s]", "timestamp[us]", "timestamp[us, tz=UTC]"]
    return max(first, second, key=lambda each: order.index(each) if each in order else len(order))


def is_time(type: str) -> bool:
    """Return True for the types of dates, times and durations."""
    return type.startswith(("date", "time", "duration"))


def arrow_type(type: str) -> Any:
    """Return the Arrow type that is written like this.

    Raises:
        ValueError: it is not the type of a recorded column.
    """
    arrow, _ = _arrow()
    timestamp, decimal = TIMESTAMP.fullmatch(type), DECIMAL.fullmatch(type)
    if timestamp:
        return arrow.timestamp(*timestamp.groups())
    if decimal:
        precision, scale = map(int, decimal.groups())
        return (arrow.decimal128 if precision <= 38 else arrow.decimal256)(precision, scale)
    return arrow.type_for_alias(type)


def _seconds(column: Any) -> Array:
    """Return an Arrow column of dates, times or durations in seconds, NaN for missing cells."""
    arrow, compute = _arrow()
    kind = column.type
    if arrow.types.is_date(kind):
        days = compute.cast(compute.cast(column, arrow.date32()), arrow.int32())
        return _numpy(compute.cast(days, arrow.float64())) * DAY
    plain = compute.cast(column, arrow.int32() if arrow.types.is_time32(kind) else arrow.int64())
    return _numpy(compute.cast(plain, arrow.float64(), safe=False)) / SECONDS[kind.unit]


def _cast(column: Any, target: Any) -> Any:
    """Return an Arrow column of another type; None where Arrow refuses."""
    arrow, compute = _arrow()
    try:
        return compute.cast(column, target)
    except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError):
        return None


def _numpy(column: Any) -> Array:
    numbers: Array = column.to_numpy(zero_copy_only=False)
    return numbers


def _arrow() -> tuple[Any, Any]:
    return require("pyarrow", "data", "a table"), require("pyarrow.compute", "data", "a table")
