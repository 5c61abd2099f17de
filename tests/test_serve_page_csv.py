"""A CSV file on the served page: read as other programs read it, sent in parts, given back with every row's answer."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import asking
import httpx
import numpy as np
import pytest
from asking import strict
from browsing import downloaded, example_csv, opened, text, upload
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page

from raylway.bundle.predictor import Predictor
from serve_app import service
from serve_app.service import Service

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=6) | st.sampled_from(
    ['"', '""', ",", "\n", "\r\n", " a ", ";", "\t", '","', "é", "🙂"]
)


def test_csv_is_read_as_python_reads_it(page: Page) -> None:
    @settings(max_examples=40)
    @given(
        st.lists(st.lists(TEXT, min_size=1, max_size=4), max_size=5),
        st.sampled_from(["\n", "\r\n"]),
        st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
        st.sampled_from(",;\t"),
        st.booleans(),
    )
    def check(rows: list[list[str]], end: str, quoting: Any, delimiter: str, is_open: bool) -> None:
        written = io.StringIO(newline="")
        csv.writer(written, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(rows)
        content = written.getvalue().removesuffix(end if is_open else "")
        read = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter)
        expected = [row for row in read if row not in ([], [""])]
        found = page.evaluate("([text, by]) => [...records(text, by)].map(each => each.cells)", [content, delimiter])
        assert found == expected

    check()


def test_a_file_comes_back_with_answers(page: Page, trip_client: httpx.Client) -> None:
    names = [
        "left",
        "carrier",
        "id",
        "stop",
        "fare",
        "day",
        "booked",
        "hour",
        "weekend",
    ]  # another order, no delay, an id
    rows = [
        ["2013-03-01T05:00:00Z", ["AA", "B, 6", "new\nline", ""][at % 4], f"{at:05d}", f"stop {at % 150:03d}",
         f" {at / 100} ", str(1 + at % 31), "2013-02-03", str(at % 24), ["True", "false"][at % 2]]
        for at in range(1203)
    ]  # fmt: skip
    rows[3][4], rows[600][4], rows[700][6], rows[701][7] = "cheap", "", "soon", "inf"
    rows[5] = rows[5][:4]
    written = io.StringIO(newline="")
    csv.writer(written, lineterminator="\r\n").writerows([names, *rows])
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json["rows"]))
    upload(page, b"\xef\xbb\xbf" + written.getvalue().encode())
    status = text(page, "#csv-status")
    assert status == "rows.csv: 1,198 of 1,203 rows answered, 5 with a problem. Not asked for: id."
    assert all(len(part) <= 500 for part in sent)
    back = list(csv.reader(io.StringIO(downloaded(page).decode(), newline="")))
    assert back[0] == [*names, "prediction", "p_no", "p_yes", "problem"]
    assert len(back) == len(rows) + 1
    problems = {at: row[-1] for at, row in enumerate(back[1:]) if row[-1]}
    assert problems.pop(3) == "fare expected a number; found ‘cheap’"
    assert problems.pop(5) == "has 4 cells, the header 9"
    assert problems.pop(600) == "fare is empty"
    assert problems.pop(700).startswith("booked expected a date")
    assert problems.pop(701) == "hour is not a finite number"
    assert problems == {}
    lines = [int(text) for text in page.locator("#problem-rows th").all_text_contents()]
    starts = np.cumsum([2] + [1 + row[1].count("\n") for row in rows])
    assert lines == [starts[at] for at in (3, 5, 600, 700, 701)]
    good = [at for at in range(len(rows)) if at not in (3, 5, 600, 700, 701)]
    asked = [
        {
            "left": row[0],
            "stop": row[3],
            "fare": float(row[4]),
            "day": int(row[5]),
            "booked": row[6],
            "hour": int(row[7]),
            "weekend": row[8] == "True",
        }
        | ({"carrier": row[1]} if row[1] else {})
        for row in (rows[at] for at in good)
    ]
    answer = strict(trip_client.post("/predict", json={"rows": asked}))
    for at, label, probabilities in zip(good, answer["predictions"], answer["probabilities"], strict=True):
        assert back[at + 1][:-4] == rows[at]
        assert back[at + 1][-4] == label
        assert [float(text) for text in back[at + 1][-3:-1]] == [probabilities["no"], probabilities["yes"]]
    assert page.locator("#answers tbody tr").count() == 100


def test_requests_are_as_small_as_the_server_wants(
    browser: Browser, trip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_BODY_BYTES", 1500)
    with asking.local(Service(Predictor(trip), 64)) as client, opened(browser, client) as page:
        sent: list[int] = []
        page.on("request", lambda request: sent.append(len(request.post_data_buffer)))
        upload(page, example_csv(page, 30))
        assert text(page, "#csv-status") == "rows.csv: 30 of 30 rows answered."
        assert len(sent) > 2
        assert max(sent) <= 1500


def test_a_server_that_is_busy_is_asked_again_and_one_that_fails_fails_rows(page: Page) -> None:
    answers = iter([503, 429, 200])

    def answer(route: Any) -> None:
        status = next(answers, 200)
        rows = route.request.post_data_json["rows"]
        if status == 200 and any(row["day"] == 13 for row in rows):
            status = 500
        if status == 200:
            route.continue_()
        else:
            route.fulfill(status=status, headers={"Retry-After": "0.01"}, json={"detail": f"status {status}"})

    page.route("**/predict", answer)
    upload(page, example_csv(page, 6, bad=4))
    assert "5 of 6 rows answered, 1 with a problem." in text(page, "#csv-status")
    assert page.locator("#problem-rows tr").all_text_contents() == ["6status 500"]
    page.unroute("**/predict")
    page.route("**/predict", lambda route: route.fulfill(status=404, json={"detail": "nobody is here"}))
    upload(page, example_csv(page, 3))
    assert "0 of 3 rows answered, 3 with a problem. Stopped: nobody is here" in (text(page, "#csv-status"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "The file is empty."),
        (b"day,fare\n1,2\n", "The header lacks hour, stop, weekend, booked, left. It has day, fare."),
        (b"day,day\n1,2\n", "The column day stands in the header twice."),
        (b"day,fare\n\xff,2\n", "not text in UTF-8"),
        (b'day,"fare\n1,2\n', "The quote that opens in the record of line 1 never closes."),
    ],
)
def test_files_that_are_no_rows(page: Page, content: bytes, words: str) -> None:
    upload(page, content)
    assert words in text(page, "#csv-status")
    assert page.locator("#results").is_hidden()
