"""A page in headless Chromium, driven by playwright, with all that it complains of.

`python -m tests.support.browser URL docs/page.png` takes the README's picture of a running server.
"""

import contextlib
import os
import pathlib
import shutil
import sys
import types
from collections.abc import Iterator
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")  # on the path; or CHROMIUM names one
PICTURE = {"width": 1100, "height": 600}
QUESTION = (
    "Mia has 14 shells. Then she finds 9 more shells. After that, she gives 5 shells to Leo. "
    "How many shells does she have now?"
)


def chromium() -> str | None:
    """The browser's program; None where there is none."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def opened(url: str, **options: Any) -> Iterator[types.SimpleNamespace]:
    """A page at `url`; `options` are a playwright context's: viewport, color_scheme, ...

    Yields `page`, `complaints` (of the console, of scripts, of requests) and `requests`, the
    addresses of all requests.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_context(**options).new_page()
        page.set_default_timeout(60_000)
        complaints: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message: _note(complaints, message))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: _note_failure(complaints, request))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        try:
            yield types.SimpleNamespace(page=page, complaints=complaints, requests=requests)
        finally:
            browser.close()


def _note(complaints: list[str], message: Any) -> None:
    if message.type != "verbose":  # Chromium's advice on password fields
        complaints.append(f"{message.type}: {message.text}")


def _note_failure(complaints: list[str], request: Any) -> None:
    # Chromium calls about every other stream aborted that was read to its end.
    if request.failure != "net::ERR_ABORTED":
        complaints.append(f"{request.url}: {request.failure}")


def race(page: Any, question: str, tokens: int) -> str:
    """Run the race on a question; return the verdict."""
    page.click("#tab-race")
    page.fill("#prompt", question)
    page.fill("#tokens", str(tokens))
    page.click("#go")
    page.wait_for_selector("#verdict:not(:empty)")
    page.wait_for_selector("#go:not([disabled])")
    return page.inner_text("#verdict")


def main(url: str, path: str) -> None:
    """Take the picture: a race that has ended, in light colours."""
    with opened(url, viewport=PICTURE, color_scheme="light") as tab:
        race(tab.page, QUESTION, 8)  # warm: a first answer waits for pages of memory
        print(race(tab.page, QUESTION, 128))
        tab.page.screenshot(path=path)
        print(f"{path}: {pathlib.Path(path).stat().st_size} bytes; {tab.complaints or 'no errors'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
