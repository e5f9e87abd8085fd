"""The page at / in a real Chromium: chat, the race, its colours, keys, dark and light, a phone.

Needs playwright and a Chromium on the path, and is skipped without either.
"""

import dataclasses
import importlib.util
import re

import pytest

from tests.support import browser
from tests.support.engine import hashing
from tests.support.server import SETTINGS, greedy_answer, running

HERE = importlib.util.find_spec("playwright") is not None and browser.chromium() is not None
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not HERE, reason="playwright or Chromium is not installed"),
]
QUESTION = "6 green trees"
CONTRAST = """(pair) => {
  const light = color => {
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
      .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const [a, b] = pair.map(light).sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""
COLOURS = """[...document.querySelectorAll('#text-or span[title]')].map(span => {
  const style = getComputedStyle(span);
  return [style.color, style.backgroundColor];
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 375])
def test_race_runs_and_both_texts_are_the_models(server, scheme, width) -> None:
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    with browser.opened(server.url, **options) as tab:
        verdict = browser.race(tab.page, QUESTION, 60)
        text = greedy_answer(QUESTION, 60)
        assert [tab.page.text_content(f"#text-{name}") for name in ("ar", "or")] == [text, text]
        match = re.fullmatch(r"Same text, in (\d+) forwards instead of (\d+), .* as fast.", verdict)
        assert match is not None
        assert int(match[1]) < int(match[2]) == 60
        colours = tab.page.evaluate(COLOURS)
        assert len({back for _, back in colours}) == 4, "one colour per cycle, four in turn"
        for pair in colours:
            assert tab.page.evaluate(CONTRAST, pair) > 4.5, pair
        assert not tab.page.query_selector("#text-ar span[title]"), "the baseline drafts nothing"
        dark = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (dark == "rgb(20, 22, 26)") == (scheme == "dark")
        assert tab.page.evaluate("document.scrollingElement.scrollWidth") <= width
        assert tab.complaints == []
        assert all(url.startswith(server.url) for url in tab.requests)


def test_chat_goes_on_with_the_keyboard_alone(server) -> None:
    with browser.opened(server.url) as tab:
        page = tab.page
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowRight")
        assert page.is_visible("#race")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.type("12 apples")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("and 30?")
        page.keyboard.press("Enter")
        page.wait_for_selector(".note >> text=per forward")
        turns = page.locator("#log .text")
        assert turns.nth(0).text_content() == "12 apples\nand 30?"
        assert turns.nth(1).text_content(), "an answer"
        page.wait_for_selector("#send:not([disabled])")
        page.keyboard.type("And then?")
        with page.expect_request("**/v1/chat/completions") as sent:
            page.keyboard.press("Enter")
        messages = sent.value.post_data_json["messages"]
        assert [m["content"] for m in messages] == [*turns.all_text_contents()[:2], "And then?"]
        page.wait_for_selector("#log .bad >> text=over this server's context")  # no text ended it
        assert [c for c in tab.complaints if "400 (Bad Request)" not in c] == []


def test_stopped_chat_frees_its_row_and_a_new_one_begins_empty(server) -> None:
    """A reset in the middle of an answer used to leave that answer in the new chat."""
    with browser.opened(server.url) as tab:
        page = tab.page
        page.fill("#question", "a long one")
        page.click("#send")
        page.click("#reset")
        page.wait_for_selector("#send:not([disabled])")
        server.wait_until_idle()
        assert page.evaluate("messages.length") == 0
        assert page.text_content("#log") == ""
        with page.expect_request("**/v1/chat/completions") as sent:
            page.fill("#question", "hello")
            page.click("#send")
        roles = [message["role"] for message in sent.value.post_data_json["messages"]]
        assert roles == ["user"]
        page.click("#stop")
        page.wait_for_selector("#send:not([disabled])")
        server.wait_until_idle()
        assert tab.complaints == []


def test_page_shows_what_the_server_refuses() -> None:
    settings = dataclasses.replace(SETTINGS, api_key="secret", structured=False)
    with running(hashing(), settings) as server, browser.opened(server.url) as tab:
        page = tab.page
        page.wait_for_selector("#model >> text=the API key is missing or wrong")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        page.wait_for_selector("#model >> text=hash")
        assert "over this server's context" in browser.race(page, "too long " * 200, 5)
        assert "Same text" in browser.race(page, QUESTION, 5)


def test_markup_of_an_answer_is_text(server) -> None:
    with browser.opened(server.url) as tab:
        tab.page.evaluate("show(at('log'), [['<img src=x onerror=alert(1)><b>', 1, true]])")
        assert tab.page.text_content("#log") == "<img src=x onerror=alert(1)><b>"
        assert not tab.page.query_selector("#log img, #log b")
        assert tab.complaints == []
