"""The chat page in a real browser: it streams, stops, remembers, and says what goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.browser import Browser, browser, missing
from tests.support.engine_support import CONTEXT
from tests.support.serve_support import NAME, Running, ask, running

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
LONG = "It is a long answer with \u4e2d\u6587, <b>no bold</b> and `code`. " * 6


def reply(question: str) -> str:
    return {"long": LONG, "nothing": ""}.get(question, f"You said: {question}")


@pytest.fixture(scope="module")
def server():
    with running(reply, pause=0.01) as made:
        yield made


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as made:
        yield made


@pytest.fixture
def page(server: Running, window: Browser):
    window.open(server.url + "/")
    assert window.until(lambda: window.texts("h1")[0].startswith(NAME))
    return window


def say(page: Browser, text: str) -> None:
    page.type("#question", text + "\ue007")


def idle(page: Browser) -> bool:
    return page.until(lambda: page.visible("#send") and not page.visible("#stop"))


def test_the_page_is_one_file_that_loads_nothing_else(server):
    answer = ask(server.port, "/")
    text = answer.raw.decode()
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for sign in ("http://", "https://", "//cdn", '<link rel="stylesheet"', " src="):
        assert sign not in text, sign


def test_a_talk(page: Browser, server: Running):
    assert page.texts("h1 small") == [f"{CONTEXT} tokens"]
    say(page, "first")
    assert idle(page)
    page.type("#question", "two lines\ue008\ue007\ue000of it")  # Shift+Enter begins a new line
    assert len(page.texts(".user")) == 1
    page.click("#send")
    assert idle(page)
    assert page.texts(".user") == ["first", "two lines\nof it"]
    assert page.texts(".assistant") == ["You said: first", "You said: two lines\nof it"]
    asked = next(p for p in reversed(server.runner.prefixes) if p[-1] == 5)
    assert server.runner.tokenizer.decode(asked).count("You said: first") == 1, "the turns before went along"
    assert page.texts(".error") == [] and page.log() == []


def test_it_streams_and_stops(page: Browser, server: Running):
    say(page, "long")
    assert page.until(lambda: 5 < len(page.texts(".assistant")[0]) < len(LONG) // 2), "it came in one piece"
    assert page.visible("#stop") and not page.visible("#send")
    page.click("#stop")
    assert idle(page)
    text = page.texts(".assistant")[0]
    assert 0 < len(text) < len(LONG) and LONG.startswith(text) and page.texts(".note") == ["stopped"]
    assert page.until(lambda: server.service.open_answers == 0), "the server goes on writing"
    say(page, "and now?")
    assert idle(page)
    assert page.texts(".assistant")[1] == "You said: and now?"


def test_markup_of_a_model_stays_text(page: Browser):
    say(page, "long")
    assert idle(page)
    assert page.texts(".assistant") == [LONG.strip()] or page.texts(".assistant") == [LONG]
    assert page.run("return document.querySelectorAll('main b').length") == 0


def test_settings_go_along(page: Browser, server: Running):
    page.click("summary")
    page.type("#system", "Be kind.")
    page.type("#temperature", "0")
    page.type("#tokens", "3")
    say(page, "hello")
    assert idle(page)
    assert page.texts(".note") == ["ended at the limit of tokens"]
    asked = next(p for p in reversed(server.runner.prefixes) if p[-1] == 5)
    assert "Be kind." in server.runner.tokenizer.decode(asked)


def test_a_new_chat_forgets_even_while_an_answer_comes(page: Browser, server: Running):
    say(page, "long")
    assert page.until(lambda: len(page.texts(".assistant")[0]) > 5)
    page.click("#new")
    assert page.texts(".turn") == [] and "A new chat" in page.texts(".hint")[0]
    assert page.until(lambda: server.service.open_answers == 0)
    say(page, "hello")
    assert idle(page)
    assert page.texts(".turn") == ["hello", "You said: hello"]


def test_errors_are_shown_and_the_question_is_kept(page: Browser, server: Running):
    page.click("summary")
    page.type("#temperature", "7")
    say(page, "hello")
    assert idle(page)
    assert page.texts(".error") == ["temperature: must be 0.0 to 2.0, found 7"]
    assert page.texts(".user") == [] and page.run("return document.getElementById('question').value") == "hello"
    page.run("document.getElementById('temperature').value = '1'")
    server.runner.failing.append(RuntimeError("planted"))
    page.click("#send")
    assert idle(page)
    assert page.texts(".error")[-1].startswith("internal engine error")
    page.click("#send")
    assert idle(page)
    assert page.texts(".turn")[-2:] == ["hello", "You said: hello"]
    say(page, "nothing")
    assert idle(page)
    assert page.texts(".note")[-1] == "the answer is empty"


def test_a_server_with_a_key(window: Browser):
    with running(reply, keys=["the-key"]) as server:
        window.open(server.url + "/")
        assert window.until(lambda: len(window.texts(".error")) == 1)
        assert "an API key is required" in window.texts(".error")[0]
        window.click("summary")
        window.type("#key", "the-key")
        say(window, "hello")
        assert idle(window)
        assert window.texts(".assistant") == ["You said: hello"]
    say(window, "anybody?")
    assert idle(window)
    assert len(window.texts(".error")) == 2, "a server that is gone"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [900, 380])
def test_it_can_be_read(page: Browser, dark: bool, width: int, tmp_path: Path):
    page.dark(dark)
    page.size(width, 700)
    say(page, "What is a model?")
    assert idle(page)
    say(page, "long")
    assert idle(page)
    page.click("summary")
    page.type("#temperature", "9")
    say(page, "too hot")
    assert idle(page)
    page.picture(tmp_path / "page.png")
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth"), (
        "it has to be scrolled sideways"
    )
    for selector in (".user", ".assistant", ".error", "#send", "summary", "h1 small", "#question", ".settings label"):
        assert contrast(page, selector) > 4.5, f"{selector}: less than WCAG asks for text"


def contrast(page: Browser, selector: str) -> float:
    """WCAG's ratio of an element's colour to what lies behind it."""
    found = page.run(
        """
        const element = document.querySelector(arguments[0]);
        let behind = element, back;
        do { back = getComputedStyle(behind).backgroundColor; behind = behind.parentElement; }
        while (behind && back === "rgba(0, 0, 0, 0)");
        return [getComputedStyle(element).color, back].map(c => c.match(/[\\d.]+/g).slice(0, 3).map(Number));
        """,
        selector,
    )

    def luminance(rgb: list[float]) -> float:
        linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted(map(luminance, found), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)
