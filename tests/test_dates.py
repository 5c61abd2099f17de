"""Dates and times of `raylway.features.dates` against the standard library's."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from raylway.features import dates

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# The standard library can't name an instant outside years 1 to 9999, which a zone may make of the outermost days.
MOMENTS = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30))
ZONES = st.none() | st.integers(-23 * 60 - 59, 23 * 60 + 59).map(lambda minutes: timezone(timedelta(minutes=minutes)))


def parsed(*texts: str | None) -> list[int | None]:
    instants, valid = dates.parse(pa.array(texts, pa.string()))
    assert instants.dtype == np.int64 and not instants[~valid].any()
    return [int(instant) if known else None for instant, known in zip(instants, valid, strict=True)]


def expected(text: str) -> int:
    moment = datetime.fromisoformat(text)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (moment - EPOCH) // timedelta(microseconds=1)


@given(
    st.lists(
        st.builds(
            lambda moment, zone, form, between: moment.replace(tzinfo=zone).isoformat(between, form),
            MOMENTS,
            ZONES,
            st.sampled_from(["hours", "minutes", "seconds", "milliseconds", "microseconds", "auto"]),
            st.sampled_from(["T", " "]),
        )
        | MOMENTS.map(lambda moment: moment.date().isoformat()),
        max_size=30,
    )
)
def test_agrees_with_the_standard_library(texts: list[str]) -> None:
    assert parsed(*texts) == [expected(text) for text in texts]
    assert parsed(*texts, None, *texts) == [*map(expected, texts), None, *map(expected, texts)]


@given(st.integers(0, 9999), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
@example(1900, 2, 29, 0, 0)
@example(2000, 2, 29, 23, 59)
@example(2013, 2, 30, 0, 0)
@example(0, 1, 1, 0, 0)
def test_accepts_only_what_exists(year: int, month: int, day: int, hour: int, minute: int) -> None:
    text = f"{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}"
    try:
        datetime.fromisoformat(text)
    except ValueError:
        assert parsed(text) == [None]
    else:
        assert parsed(text) == [expected(text)]


@given(st.text("0123456789-:T +Z.", max_size=25))
def test_what_is_taken_is_what_the_standard_library_takes(text: str) -> None:
    if (found := parsed(text)[0]) is not None:
        assert found == expected(re.sub(r" (?=[Z+-])", "", text.strip()))


@pytest.mark.parametrize(
    "text",
    ["20130101", "2013", "2013-01", "01/02/2013", "2013-W01-1", "2013-001", "05:00", "2013-01-01T24:00", "", " ",
     "2013-01-01T05:00:60", "2013-01-01T", "2013-01-01Z", "2013-01-01T05+24:00", "2013-01-01T05:00 CET", "late",
     "٢٠١٣-01-01", "2013-01-01\n"],
)  # fmt: skip
def test_what_is_no_date(text: str) -> None:
    assert parsed(text) == [None]


def test_spellings_of_one_instant() -> None:
    spellings = [
        "2013-01-01T05:00:00.5Z", "2013-01-01 05:00:00,5", " 2013-01-01t05:00:00.500000999z ",
        "2013-01-01 05:00:00.5 UTC", "2013-01-01T07:00:00.5+02:00", "2013-01-01T07:00:00.5 +0200",
        "2013-01-01T07:00:00.5+02", "2012-12-31T23:30:00.5-05:30",
    ]  # fmt: skip
    assert set(parsed(*spellings)) == {expected("2013-01-01T05:00:00.5+00:00")}


def test_a_column_without_a_present_cell() -> None:
    instants, valid = dates.parse(pa.chunked_array([pa.nulls(2)]))
    assert instants.tolist() == [0, 0] and not valid.any()
    assert len(dates.parse(pa.array([], pa.string()))[0]) == 0


@given(MOMENTS)
def test_text_names_the_instant(moment: datetime) -> None:
    instant = (moment.replace(tzinfo=UTC) - EPOCH) // timedelta(microseconds=1)
    assert parsed(dates.text(instant)) == [instant]
    assert dates.text(expected("2013-01-01")) == "2013-01-01"
    assert dates.text(expected("2013-01-01T05:00:00.5")) == "2013-01-01T05:00:00.5Z"
