"""Periods of circular columns, also of dates and times."""

from __future__ import annotations

from collections.abc import Mapping

from counterflow.io.data.types import is_time

Period = float | str

SECONDS = {"day": 86_400.0, "week": 604_800.0, "year": 31_556_952.0}  # a week begins on Thursday, as 1970 did


def periods(circular: Mapping[str, Period]) -> dict[str, float]:
    """Return the periods of circular columns in the unit of the column, seconds for dates and times.

    Raises:
        ValueError: a text that is no period.

    Example:
        >>> periods({"angle": 360, "when": "day"})
        {'angle': 360.0, 'when': 86400.0}
    """
    found = {}
    for name, period in circular.items():
        if isinstance(period, str) and period not in SECONDS:
            raise ValueError(
                f"expected the period of circular column {name!r} to be a number or one of {', '.join(SECONDS)}, got "
                f"{period!r}"
            )
        found[name] = SECONDS[period] if isinstance(period, str) else float(period)
    return found


def circular_types(types: Mapping[str, str], circular: Mapping[str, Period]) -> dict[str, str]:
    """Return the types of the columns of samples: the part of a date or time within a day is a time, others seconds.

    Example:
        >>> circular_types({"when": "timestamp[us]", "hour": "int64"}, {"when": "day", "hour": 24})
        {'when': 'time64[us]', 'hour': 'int64'}
    """
    turned = {
        name: "time64[us]" if circular[name] in ("day", SECONDS["day"]) else "double"
        for name, type in types.items()
        if name in circular and is_time(type)
    }
    return {**types, **turned}
