"""A headless Chromium, as Debian packages it, for the tests of the served pages."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.base import AXE_FILE_PATH
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium")
PHONE = {"width": 390, "height": 844}


@contextmanager
def browser() -> Iterator[Browser]:
    """Skips the tests where the machine has no Chromium."""
    if CHROMIUM is None:
        pytest.skip("NOT TESTED HERE: this machine has no chromium (Debian: apt-get install chromium)")
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def opened(
    browser: Browser, client: httpx.Client, path: str = "/", wait: bool = True, **options: Any
) -> Iterator[Page]:
    """A page in a profile of its own; fails when the browser has reported an error or asked anybody else.

    Args:
        browser: See `browser`.
        client: Of the server.
        path: Of the page.
        wait: Until the page has read what it shows.
        options: Of the profile (`Browser.new_context`).
    """
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(10_000)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{str(client.base_url).rstrip('/')}{path}")
    if wait:
        page.wait_for_selector("main:not([hidden])")
    yield page
    context.close()
    # a status that the server means is no fault of the page's
    assert [text for text in said if "server responded with a status of" not in text] == []
    assert asked
    assert all(url.startswith((str(client.base_url), "blob:")) for url in asked)


def ask(page: Page) -> Any:
    """Press the button and wait for the answer; the body that the page sent."""
    with page.expect_request("**/predict") as sent:
        page.get_by_role("button", name="Ask the model").click()
    page.locator("#form[aria-busy=false]").wait_for()
    return sent.value.post_data_json


def text(page: Page, selector: str) -> str:
    return page.locator(selector).text_content() or ""


def field(page: Page, name: str) -> Any:
    return page.get_by_label(name, exact=False).first


def upload(page: Page, content: str | bytes, name: str = "rows.csv") -> None:
    """Choose a file, and wait until all of it is answered."""
    data = content.encode() if isinstance(content, str) else content
    page.set_input_files("#file", {"name": name, "mimeType": "text/csv", "buffer": data})
    page.locator("#many[aria-busy=false]").wait_for()


def downloaded(page: Page) -> bytes:
    with page.expect_download() as found:
        page.get_by_role("button", name="Download with the answers").click()
    return Path(found.value.path()).read_bytes()


def example_csv(page: Page, count: int, bad: int | None = None) -> str:
    """So many rows of an example; the day of one is 13, and 14 of the others."""
    with page.expect_download() as found:
        page.get_by_role("button", name="Download an example").click()
    head, first, *_ = csv.reader(io.StringIO(Path(found.value.path()).read_text(), newline=""))
    rows = [["13" if at == bad else "14", *first[1:]] for at in range(count)]
    written = io.StringIO(newline="")
    csv.writer(written).writerows([head, *rows])
    return written.getvalue()


def barriers(page: Page) -> None:
    """Axe-core's rules of WCAG 2.2 A and AA, contrast among them, and its best practices."""
    page.evaluate(Path(AXE_FILE_PATH).read_text())
    found = page.evaluate("axe.run().then(result => result)")
    assert found["passes"]
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]] == []
