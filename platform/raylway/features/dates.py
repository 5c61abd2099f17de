"""Dates and times as text, and the instants that they name: the one reading of both for files, requests and splits.

What is a date, `YYYY-MM-DD`, alone or followed by `T` or a space and a time: `HH`, `HH:MM`, `HH:MM:SS` or
`HH:MM:SS.ffffff` (a comma does as well; digits beyond the microsecond are cut off), and then perhaps a zone: `Z`,
`UTC`, `+HH`, `+HHMM` or `+HH:MM`. Blanks around it do not count. The year has four digits, 0001 to 9999, and the
date must exist. A text without a zone is meant in UTC, one without a time is the first instant of its day.

What is none, on purpose: `20130101` and `2013` (numbers), `01/02/2013` and `1.2.2013` (day and month can't be told
apart), weeks, ordinal dates, a time alone, hour 24 and leap seconds.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

DAY = 86_400_000_000
"""Microseconds."""
FIRST, LAST = -719_162 * DAY, 2_932_897 * DAY - 1
"""Of the years 1 and 9999: a zone may lead out of them."""

_PATTERN = (
    r"^[ \t]*(?P<year>\d{4})-(?P<month>\d{2})-(?P<day>\d{2})"
    r"(?:[Tt ](?P<hour>\d{2})(?::(?P<minute>\d{2})(?::(?P<second>\d{2})(?:[.,](?P<fraction>\d+))?)?)?"
    r"(?: ?(?:[Zz]|UTC|(?P<sign>[+-])(?P<zone_hour>\d{2})(?::?(?P<zone_minute>\d{2}))?))?)? *$"
)
_LIMITS = {"hour": 23, "minute": 59, "second": 59, "zone_hour": 23, "zone_minute": 59}


def parse(texts: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The instants that N texts name; each different text is read once.

    Args:
        texts: Strings; some or all may be missing.

    Returns:
        Microseconds since 1970-01-01 UTC, int64 [N], 0 where there is none; and whether there is one, bool [N].
    """
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    encoded = pc.cast(texts, pa.string()).dictionary_encode()
    instants, valid = _parsed(encoded.dictionary)
    rows = pc.fill_null(encoded.indices, len(instants)).to_numpy(zero_copy_only=False)
    return np.append(instants, 0)[rows], np.append(valid, False)[rows]


def parts(instants: np.ndarray) -> dict[str, np.ndarray]:
    """What a model may learn from N instants, in UTC: int64 `year`, `month` (1 to 12), `day` (1 to 31), `weekday` (1 is
    Monday, 7 Sunday) and `hour` (0 to 23), and float64 `seconds` since 1970."""
    days = instants // DAY
    dates = days.astype("datetime64[D]")
    months = dates.astype("datetime64[M]")
    number = months.astype(np.int64)
    return {
        "year": number // 12 + 1970,
        "month": number % 12 + 1,
        "day": (dates - months.astype("datetime64[D]")).astype(np.int64) + 1,
        "weekday": (days + 3) % 7 + 1,  # 1970 began on a Thursday
        "hour": (instants - days * DAY) // 3_600_000_000,
        "seconds": instants / 1_000_000,
    }


def text(instant: int) -> str:
    """The shortest such text that names an instant: `2013-01-01`, or `2013-01-01T05:00:00.5Z`.

    Args:
        instant: Microseconds since 1970-01-01 UTC, in the years 1 to 9999.
    """
    moment = str(np.datetime64(instant, "us"))
    if instant % DAY == 0:
        return moment[:10]
    return (moment.rstrip("0").rstrip(".") if instant % 1_000_000 else moment[:19]) + "Z"


def _parsed(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """As `parse`, for texts of which none is missing."""
    found = pc.extract_regex(texts, _PATTERN)
    matched = found.is_valid().to_numpy(zero_copy_only=False)
    number = {name: _integers(found, name) for name in ("year", "month", "day", *_LIMITS)}
    fraction = pc.utf8_slice_codeunits(pc.struct_field(found, "fraction"), 0, 6)
    micros = _as_integers(pc.utf8_rpad(fraction, 6, "0"))
    west = pc.fill_null(pc.equal(pc.struct_field(found, "sign"), "-"), False).to_numpy(zero_copy_only=False)

    year, month, day = number["year"], number["month"], number["day"]
    valid = matched & (year >= 1) & (month >= 1) & (month <= 12) & (day >= 1)
    for name, most in _LIMITS.items():
        valid &= number[name] <= most
    first = _month_start(year, month)
    following = _month_start(year + month // 12, month % 12 + 1)
    valid &= day <= (following - first).astype(np.int64)

    minutes = number["hour"] * 60 + number["minute"]
    minutes -= np.where(west, -1, 1) * (number["zone_hour"] * 60 + number["zone_minute"])
    days = first.astype(np.int64) + day - 1
    instants = days * DAY + (minutes * 60 + number["second"]) * 1_000_000 + micros
    valid &= (instants >= FIRST) & (instants <= LAST)
    return np.where(valid, instants, 0), valid


def _month_start(year: np.ndarray, month: np.ndarray) -> np.ndarray:
    """The first day of a month, datetime64[D]; the calendar is numpy's, the Gregorian one for all years."""
    months = (year - 1970) * 12 + np.clip(month, 1, 12) - 1
    return months.astype("datetime64[M]").astype("datetime64[D]")


def _integers(found: pa.StructArray, name: str) -> np.ndarray:
    return _as_integers(pc.struct_field(found, name))


def _as_integers(digits: pa.Array) -> np.ndarray:
    """Texts of digits as int64; 0 for an empty or missing one."""
    empty = pc.fill_null(pc.equal(digits, ""), True)
    return pc.cast(pc.if_else(empty, "0", digits), pa.int64()).to_numpy(zero_copy_only=False)
