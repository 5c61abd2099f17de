"""The pages for people, in a real browser: what they show, what they ask, and that nothing of a bundle becomes HTML."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asking
import httpx
import made as making
import msgspec
import numpy as np
import pyarrow as pa
import pytest
from asking import strict
from browsing import PHONE, ask, barriers, downloaded, example_csv, field, opened, text, upload
from commands import REPOSITORY
from playwright.sync_api import Browser, Page

from raylway import storage
from raylway.bundle import contents, examples
from raylway.bundle.predictor import Predictor
from serve_app.keys import Keys
from serve_app.service import Service

HOSTILE = "<img src=x onerror=\"document.title='broken'\">'&`${1}"


def test_example_values_look_as_those_of_the_data(trip: Path) -> None:
    table, _, inputs = making.trips()
    made = examples.read(trip).rows
    assert len(made) == examples.NUM_ROWS
    for row in made:
        assert type(row["day"]) is int and 1 <= row["day"] <= 31
        assert type(row["hour"]) is int and 5 <= row["hour"] < 24
        assert row["fare"] == round(row["fare"], 2) and 2 <= row["fare"] <= 90
        assert type(row["weekend"]) is bool
        assert row["carrier"] in ("AA", "B, 6", 'U"A')
        assert re.fullmatch(r"2013-\d\d-\d\d", row["booked"])
        assert re.fullmatch(r"2013-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["left"])
    assert made[0]["carrier"] == "AA"
    for at, end in ((-2, min), (-1, max)):
        assert made[at]["fare"] == end(table["fare"].to_pylist())
    assert {row["day"] for row in made} != {made[0]["day"]}
    assert list(made[0]) == list(inputs)


def test_the_form_and_the_answer(page: Page, trip_client: httpx.Client, trip: Path) -> None:
    made = examples.read(trip).rows
    for at in (0, 1, 0):
        example = made[at]
        assert field(page, "day").input_value() == str(example["day"])
        assert field(page, "fare").input_value() == str(example["fare"])
        assert field(page, "booked").input_value() == example["booked"]
        assert field(page, "carrier").evaluate("each => each.selectedOptions[0].text") == example["carrier"]
        body = ask(page)
        assert body == {"rows": [example]}
        assert [type(value) for value in body["rows"][0].values()] == [type(value) for value in example.values()]
        answer = strict(trip_client.post("/predict", json=body))
        assert json.loads(text(page, "#json")) == answer
        assert text(page, "#verdict .verdict") == answer["predictions"][0]
        assert re.fullmatch(r"Answered in [\d.]+ ms", text(page, "#verdict .note"))
        names = page.locator(".bars .name").all_text_contents()
        shown = dict(zip(names, page.locator(".bars .share").all(), strict=True))
        for name, value in answer["probabilities"][0].items():
            assert shown[name].get_attribute("title") == str(value)
            rounded = "below 0.1%" if value < 0.001 else "above 99.9%" if value > 0.999 else f"{value * 100:.1f}%"
            assert shown[name].text_content() == rounded
            bar, track = (shown[name].locator(f"xpath=..//{each}").bounding_box() for each in ("i", "i/.."))
            assert bar and track
            assert bar["width"] == pytest.approx(max(2, value * track["width"]), abs=1)
        page.get_by_role("button", name="Another example").click()
        for _ in range(len(made) - 2 if at else 0):
            page.get_by_role("button", name="Another example").click()


def test_an_empty_optional_input_and_an_unseen_category(page: Page, trip_client: httpx.Client) -> None:
    field(page, "delay").fill("")
    field(page, "carrier").select_option("another value …")
    page.get_by_label("another value of carrier").fill("ZZ <b>")
    field(page, "hour").select_option("another value …")
    page.get_by_label("another value of hour").fill("3")
    field(page, "stop").fill("nowhere")
    field(page, "day").fill(" 1e2 ")
    assert "outside the 1 to 31 of training" in page.locator(".outside").all_text_contents()
    [row] = ask(page)["rows"]
    assert "delay" not in row
    assert (row["carrier"], row["hour"], row["stop"], row["day"]) == ("ZZ <b>", 3, "nowhere", 100)
    assert text(page, "#verdict .verdict") in ("no", "yes")
    field(page, "carrier").select_option("empty")
    [row] = ask(page)["rows"]
    assert "carrier" not in row
    assert trip_client.post("/predict", json={"rows": [row]}).status_code == 200


def test_mistakes_stand_at_their_inputs(page: Page) -> None:
    mistakes = {"twelve": "expected a number", "": "expected a value", "1e999": "is not a finite number"}
    for typed, words in mistakes.items():
        field(page, "fare").fill(typed)
        field(page, "day").focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.labels[0].textContent") == "fare"
        assert field(page, "fare").get_attribute("aria-invalid") == "true"
        described = field(page, "fare").get_attribute("aria-describedby")
        assert any(words in page.locator(f"#{each}").text_content() for each in described.split())
        assert page.locator("#stale").is_visible()
    field(page, "fare").fill("12.5")
    assert field(page, "fare").get_attribute("aria-invalid") is None
    field(page, "hour").select_option("another value …")
    page.get_by_label("another value of hour").fill("inf")  # only the server knows what this column can't hold
    ask(page)
    assert "hour is not a finite number" in text(page, "#verdict")
    assert page.get_by_label("another value of hour").get_attribute("aria-invalid") == "true"
    assert page.evaluate("document.activeElement.ariaLabel") == "another value of hour"


def test_the_curl_and_the_python_of_a_request_run(page: Page, trip_client: httpx.Client) -> None:
    field(page, "carrier").select_option("another value …")
    page.get_by_label("another value of carrier").fill('it\'s "so" $HOME `id` \\ é 🙂')
    body = ask(page)
    answer = strict(trip_client.post("/predict", json=body))
    program, command = text(page, "#python"), text(page, "#curl")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"{answer}\n"
    if shutil.which("curl") is None:
        pytest.skip("NOT TESTED HERE: this machine has no curl")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == answer


def test_the_place_of_a_value_in_the_training_range(browser: Browser, tmp_path: Path) -> None:
    size = np.arange(400) / 2
    table = pa.table({"size": size, "price": 1000 * size})
    folder = making.published(tmp_path, table, "price", {"size": "number"}, name="price")
    with asking.local(Service(Predictor(folder), 64)) as client, opened(browser, client) as page:
        value = strict(client.post("/predict", json=ask(page)))["predictions"][0]
        assert float(text(page, "#verdict .verdict").replace(",", "")) == pytest.approx(value, rel=1e-5)
        words = text(page, "#detail p")
        target = client.get("/card").json()["target"]
        rows_below = page.evaluate("([target, value]) => below(target, value)", [target, 50_000])
        assert rows_below == pytest.approx(0.25, abs=0.03)
        assert re.match(r"Above [\d.]+% of the training rows", words) or "every training row" in words
        assert page.locator(".place b").is_visible()
        assert "highest 199,500" in text(page, ".ends")


def test_the_card(page: Page, trip_client: httpx.Client, trip: Path) -> None:
    shown = text(page, "main")
    for words in ("0.9035", "0.2572", "1,000 read, 900 kept: 700 training, 90 validation, 110 test", "trips.csv, more"):
        assert words in shown
    assert "January 1, 2026" in shown
    assert contents.load(trip).record.version in shown
    assert "On 110 test rows it was right 90.3% of the time." in text(page, "#lead")
    assert page.locator("#class-rows tr").all_text_contents() == ["yes101", "no100"]
    assert 'AA, B, 6, U"A' in shown
    assert "2013-01-01 to " in shown
    whole = trip_client.get("/card").text
    assert "secret" not in whole and "/home" not in whole and "private" not in whole


def test_a_bundle_of_an_earlier_version(trip: Path, browser: Browser, tmp_path: Path) -> None:
    """Without profile, without data, not even evaluated."""
    folder = shutil.copytree(trip, tmp_path / "trip")
    record = msgspec.structs.replace(contents.load(trip).record, profile=None, data=None, metrics={})
    storage.write_record(folder / contents.RECORD, record)
    with asking.local(Service(Predictor(folder), 64)) as client, opened(browser, client) as page:
        assert ask(page)["rows"] == examples.read(trip).rows[:1]
        assert text(page, "#lead") == "Predicts late (no or yes) from 9 inputs."
        assert page.locator("#metrics").is_hidden()


def hostile(folder: Path) -> Path:
    rng, count = np.random.default_rng(8), 60
    table = pa.table(
        {
            HOSTILE: rng.normal(size=count),
            "__proto__": rng.choice([HOSTILE, "</script><script>document.title='broken'</script>"], count),
            "y": rng.choice([HOSTILE, "constructor"], count),
        }
    )
    return making.published(folder, table, "y", {HOSTILE: "number", "__proto__": "category"}, name=HOSTILE)


def test_nothing_of_a_bundle_or_a_file_becomes_html(browser: Browser, tmp_path: Path) -> None:
    with asking.local(Service(Predictor(hostile(tmp_path)), 64)) as client, opened(browser, client) as page:
        assert text(page, "#name") == HOSTILE
        assert HOSTILE in page.locator("label").all_text_contents()
        before = page.evaluate("document.scripts.length")
        body = ask(page)
        assert body["rows"][0].keys() == {HOSTILE, "__proto__"}
        assert HOSTILE in page.locator(".bars .name").all_text_contents()
        content = io.StringIO()
        csv.writer(content).writerows([[HOSTILE, "__proto__", f"more {HOSTILE}"], [HOSTILE] * 3, [1, 2, 3]])
        upload(page, content.getvalue(), name=f"{HOSTILE.replace('/', '')}.csv")
        assert HOSTILE in text(page, "#problem-rows")
        assert HOSTILE in text(page, "#csv-status")
        back = list(csv.reader(io.StringIO(downloaded(page).decode(), newline="")))
        problem = f"{HOSTILE} expected a number; found ‘{HOSTILE[:40]}’"
        assert back[1] == [HOSTILE, HOSTILE, HOSTILE, "", "", "", problem]
        assert page.locator("img").count() == 0
        assert page.evaluate("document.scripts.length") == before == 1
        assert "broken" not in page.title().replace(HOSTILE, "")
    unsafe = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\son\w+=\"|https?://"
    for path in (REPOSITORY / "serve_app" / "web").iterdir():
        assert not re.search(unsafe, path.read_text())


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Browser, trip: Path) -> None:
    with (
        asking.local(Service(Predictor(trip), 64, Keys(asking.KEYS, "the test"))) as client,
        opened(browser, client, wait=False) as page,
    ):
        page.get_by_label("API key").fill("wrong-key-of-the-tests")
        page.keyboard.press("Enter")
        page.get_by_text("This key is not known here.").wait_for()
        assert text(page, "#name") == "Model"
        page.get_by_label("API key").fill(asking.KEY)
        page.keyboard.press("Enter")
        page.locator("main").wait_for()
        ask(page)
        assert text(page, "#verdict .verdict") in ("no", "yes")
        shown = text(page, "#curl") + text(page, "#python")
        assert asking.KEY not in page.content()
        assert "Bearer $API_KEY" in shown
        assert 'os.environ["API_KEY"]' in shown
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        page.reload()
        page.locator("main").wait_for()
        page.goto(f"{client.base_url}/docs")
        page.locator("main").wait_for()
        page.get_by_role("button", name="Forget the API key").click()
        page.get_by_label("API key").wait_for()
        assert page.evaluate("sessionStorage.length") == 0


class Below:
    """An application below a path, as Serve's `route_prefix` and proxies have it."""

    def __init__(self, application: Callable[..., Any], prefix: str) -> None:
        self._application, self._prefix = application, prefix

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            assert scope["path"].startswith(self._prefix)
            scope = scope | {"root_path": self._prefix}
        await self._application(scope, receive, send)


def test_below_a_path(browser: Browser, trip: Path) -> None:
    below = Below(Service(Predictor(trip), 64), "/models/trips")
    with asking.local(below) as client, opened(browser, client, "/models/trips") as page:
        assert ask(page)["rows"]
        assert text(page, "#verdict .verdict") in ("no", "yes")
        assert f"{client.base_url}/models/trips/predict" in text(page, "#curl")
        page.get_by_role("link", name="Interface").click()
        page.get_by_role("button", name="POST /predict").click()
        page.locator("#answer", has_text="predictions").wait_for()
        page.get_by_role("link", name="Try the model").click()
        page.locator("#form").wait_for()
        assert page.url == f"{client.base_url}/models/trips/"
        assert ask(page)["rows"]


def test_many_inputs_and_many_classes(browser: Browser, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    names = [f"f{index:03d}" for index in range(200)]
    columns: dict[str, Any] = {name: rng.normal(size=40) for name in names}
    table = pa.table(columns | {"y": [f"class {at:02d}" for at in range(20)] * 2})
    folder = making.published(tmp_path, table, "y", dict.fromkeys(names, "number"))
    with asking.local(Service(Predictor(folder), 64)) as client, opened(browser, client) as page:
        assert page.locator("#fields .field").count() == 24
        assert len(ask(page)["rows"][0]) == 200
        assert page.locator("#detail > div > .bars li").count() == 10
        assert "10 further classes" in text(page, "#detail summary")
        page.locator("#f150").evaluate("each => { each.value = 'x'; }")
        page.get_by_role("button", name="Ask the model").click()
        assert page.locator("#f150").is_visible()
        assert page.evaluate("document.activeElement.id") == "f150"


@pytest.mark.parametrize(("scheme", "path"), [("light", "/"), ("dark", "/"), ("dark", "/docs")])
def test_axe_finds_no_barrier(browser: Browser, trip_client: httpx.Client, scheme: Any, path: str) -> None:
    with opened(browser, trip_client, path, color_scheme=scheme, viewport=PHONE, reduced_motion="reduce") as page:
        if path == "/":
            field(page, "fare").fill("x")
            page.keyboard.press("Enter")
            if scheme == "light":
                barriers(page)
            field(page, "fare").fill("900")
            ask(page)
            page.locator("#whole summary").click()
            upload(page, example_csv(page, 3) + "1,2,3\n")
        barriers(page)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= PHONE["width"]


def test_the_keyboard_reaches_everything_in_order(page: Page) -> None:
    upload(page, example_csv(page, 3) + "1,2,3\n")
    ask(page)
    marked = page.evaluate(
        """() => [...document.querySelectorAll('a[href], button, input, select, summary, [tabindex="0"]')]
            .filter(each => each.checkVisibility() && each.tabIndex >= 0)
            .map((each, at) => { each.dataset.at = at; return at; })"""
    )
    page.locator(".skip").focus()
    reached = [0]
    for _ in range(len(marked) + 40):  # a field for dates is several stops
        page.keyboard.press("Tab")
        at = page.evaluate("document.activeElement.dataset.at ?? null")
        if at is not None and int(at) not in reached:
            reached.append(int(at))
            outline = page.evaluate("""() => {
                const each = document.activeElement, shown = each.id === 'file' ? each.nextElementSibling : each;
                return getComputedStyle(shown).outlineStyle; }""")
            assert outline != "none", page.evaluate("document.activeElement.outerHTML")
    assert reached == marked


def test_what_a_screen_reader_is_told(page: Page) -> None:
    for name in making.trips()[2]:
        control = page.get_by_role("form").get_by_label(re.compile(f"^{name}( optional)?$"))
        assert control.count() == 1
    assert page.locator("#verdict").get_attribute("role") == "status"
    ask(page)
    told = page.locator("#verdict").aria_snapshot()
    assert "status" in told
    assert "Answered in" in told
    assert page.get_by_role("region", name="Answer: late").count() == 1
    assert [each.text_content() for each in page.get_by_role("heading", level=2).all()] == [
        "Try it", "Many rows", "Model card",
    ]  # fmt: skip
