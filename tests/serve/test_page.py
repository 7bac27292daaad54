"""The chat page in a real browser: it streams, stops, remembers, and says what goes wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from telechat_twins.core.inference.decoding.settings import read_settings
from telechat_twins.core.inference.sampling import sampling_config
from tests.house import ROOT
from tests.support.browser import Browser, browser, missing
from tests.support.engine_support import CHAT_CONFIG, CONTEXT
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
    return opened(window, server)


def opened(window: Browser, server: Running) -> Browser:
    """The page without a conversation of an earlier visit."""
    window.open(server.url + "/")
    window.run("localStorage.clear()")
    return again(window, server)


def again(window: Browser, server: Running, name: str = NAME) -> Browser:
    """The page after a reload."""
    window.open(server.url + "/")
    assert window.until(lambda: window.texts("h1")[0].startswith(name))
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
    assert page.texts("h1 small") == [f"{CONTEXT:,} tokens"]
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
    assert window.texts(".error") == ["the server cannot be reached"]


def test_the_conversation_outlives_a_reload(page: Browser, server: Running):
    say(page, "first")
    assert idle(page)
    again(page, server)
    assert page.texts(".turn") == ["first", "You said: first"]
    assert "tokens/s" in page.texts(".stats")[0] and "of 2,048 tokens of context left" in page.texts("#left")[0]
    say(page, "second")
    assert idle(page)
    asked = next(p for p in reversed(server.runner.prefixes) if p[-1] == 5)
    assert "You said: first" in server.runner.tokenizer.decode(asked)
    page.click("#new")
    assert page.texts(".turn") == [] and page.texts("#left") == [""]
    assert again(page, server).texts(".turn") == []
    page.run('localStorage.setItem(\'tele.talk\', \'{"turns": [1, {"role": "x"}], "used": "y"}\')')
    assert again(page, server).texts(".turn") == [], "another program's value in its place"


def test_settings_outlive_a_reload_and_are_seen_to(page: Browser, server: Running):
    assert page.texts("#set") == ["Settings"]
    page.click("summary")
    page.type("#system", "Be kind.")
    page.type("#temperature", "0.3")
    page.type("#key", "secret")
    assert page.texts("#set") == ["Settings (2 changed)"]
    again(page, server)
    assert page.texts("#set") == ["Settings (2 changed)"] and not page.visible("#system")
    say(page, "hello")
    assert idle(page)
    asked = next(p for p in reversed(server.runner.prefixes) if p[-1] == 5)
    assert "Be kind." in server.runner.tokenizer.decode(asked)
    assert page.run("return document.getElementById('key').value") == "", "the key is not stored"


def test_reasoning_is_shown_apart_and_not_sent_back(window: Browser):
    def thoughtful(question: str) -> str:
        return "Hm, <b>so</b>. " * 20 + ("" if question == "ponder" else f"\n</think>\n\nYou said: {question}")

    with running(thoughtful, pause=0.01, thinking=True) as server:
        opened(window, server)
        window.log()  # what earlier tests left there
        say(window, "first")
        assert window.until(lambda: 5 < len("".join(window.texts(".thought div"))) < 200), "it does not stream"
        assert window.run("return document.querySelector('.thought').open")
        assert idle(window)
        (thought,) = window.texts(".thought div")
        assert thought == ("Hm, <b>so</b>. " * 20).strip() and window.texts(".assistant") == ["You said: first"]
        assert not window.run("return document.querySelector('.thought').open")
        again(window, server)
        assert window.texts(".thought div") == [thought]
        say(window, "ponder")
        assert idle(window)
        asked = next(p for p in reversed(server.runner.prefixes) if p[-1 - server.runner.opening] == 5)
        assert "Hm" not in server.runner.tokenizer.decode(asked)
        assert window.texts(".error") == [] and len(window.texts(".thought div")) == 2, "reasoning alone is kept"
        say(window, "third")
        assert idle(window)
        assert window.texts(".assistant") == ["You said: first", "", "You said: third"]
        window.type(".thought summary", " ")  # by keyboard
        assert window.run("return document.querySelector('.thought').open")
        assert violations(window, axe_source()) == [] and window.log() == []


def test_answers_are_made_anew_and_questions_edited(page: Browser, server: Running):
    for question in ("first", "second"):
        say(page, question)
        assert idle(page)
    assert len(page.texts(".regenerate")) == 1, "only the last answer"
    before = len([p for p in server.runner.prefixes if p[-1] == 5])
    page.type(".regenerate", "\ue007")  # by keyboard
    assert page.until(lambda: len([p for p in server.runner.prefixes if p[-1] == 5]) == before + 1) and idle(page)
    assert page.texts(".turn") == ["first", "You said: first", "second", "You said: second"]
    page.click(".edit")
    assert page.visible("#editing") and page.run("return document.activeElement.id") == "question"
    page.type("#question", "\ue00c")  # Escape leaves everything as it was
    assert not page.visible("#editing") and len(page.texts(".turn")) == 4
    page.click(".edit")
    page.type("#question", "!\ue007")
    assert idle(page)
    assert page.texts(".turn") == ["first!", "You said: first!"]
    # An answer that cannot be made anew stays.
    server.runner.failing.append(RuntimeError("planted"))
    page.click(".regenerate")
    assert idle(page)
    assert page.texts(".turn:not(.error)") == ["first!", "You said: first!"] and page.texts(".error")
    page.run("navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); }")
    page.click(".message:not(.mine) .copy")
    assert page.until(lambda: page.run("return window.copied") == "You said: first!")
    assert page.texts("#news") == ["Copied"]


def test_escape_stops_an_answer(page: Browser):
    say(page, "long")
    assert page.until(lambda: len(page.texts(".assistant")[0]) > 5)
    page.type("#question", "\ue00c")
    assert idle(page) and page.texts(".note") == ["stopped"]


def test_a_full_context_offers_a_new_chat(page: Browser):
    assert not page.visible("#full")
    page.run("document.getElementById('question').value = '\u00e9 ?'.repeat(2000)")
    page.click("#send")
    assert idle(page)
    assert "maximum context length is 2048" in page.texts(".error")[0] and page.visible("#full")
    page.click("#fresh")
    assert not page.visible("#full") and page.texts(".error") == []


def test_it_speaks_the_language_of_its_user(page: Browser, server: Running):
    words = json.loads((ROOT / "core" / "serve" / "page" / "words.json").read_text(encoding="utf-8"))
    assert words["en"].keys() == words["zh"].keys()
    assert page.texts("#send") == ["Send"] and page.run("return document.documentElement.lang") == "en"
    page.language("zh-CN")
    opened(page, server)
    assert page.texts("#send") == [words["zh"]["send"]] and page.run("return document.documentElement.lang") == "zh-CN"
    page.run("const s = document.getElementById('language'); s.value = 'en'; s.dispatchEvent(new Event('change'))")
    assert page.texts("#send") == ["Send"]
    assert again(page, server).texts("#send") == ["Send"], "the choice outlives a reload"
    page.language("en-US")


def test_models_and_sampling_are_chosen(window: Browser):
    settings = read_settings({"do_sample": True, "temperature": 0.5, "top_k": 9}, "file", CHAT_CONFIG)
    with running(reply, settings=settings, adapters=("law",)) as server:
        opened(window, server)
        window.click("summary")
        assert window.texts("#which option") == [NAME, "law"] and window.visible("#which")
        shown = "return [...arguments].map(id => document.getElementById(id).placeholder)"
        assert window.run(shown, "temperature", "top_k", "top_p", "repetition_penalty") == ["0.5", "9", "1", "1"]
        window.run("const s = document.getElementById('which'); s.value = 'law'; s.dispatchEvent(new Event('change'))")
        for name, value in (("top_p", "0.5"), ("top_k", "3"), ("repetition_penalty", "1.1"), ("seed", "4")):
            window.type(f"#{name}", value)
        asked: list = []
        submit = server.engine.submit
        server.engine.submit = lambda request: asked.append(request) or submit(request)
        say(window, "hello")
        assert idle(window)
        expected = sampling_config(temperature=0.5, top_p=0.5, top_k=3, repetition_penalty=1.1, seed=4)
        assert (asked[0].adapter, asked[0].sampling) == (1, expected)
        again(window, server, "law")


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing(page: Browser, server: Running, dark: bool):
    """Accessibility by axe in each state of the page; nothing is loaded from elsewhere, and the console is empty."""
    axe = axe_source()
    page.log()
    page.dark(dark)
    for width, language in ((390, "zh"), (1280, "en")):
        page.size(width, 800)
        page.run("const s = document.getElementById('language'); s.value = arguments[0]", language)
        page.run("document.getElementById('language').dispatchEvent(new Event('change'))")
        say(page, "What is a model?")
        assert idle(page)
        page.click("summary")
        page.click(".edit")
        page.run("document.getElementById('full').hidden = false")
        assert violations(page, axe) == []
        page.click("summary")
        page.click("#cancel")
    assert page.run("return performance.getEntriesByType('resource').every(e => e.name.startsWith(location.origin))")
    assert page.log() == []
    page.run("document.getElementById('new').textContent = ''")  # a planted fault
    assert [name for name, *_ in violations(page, axe)] == ["button-name"]


def axe_source() -> str:
    found = importlib.util.find_spec("axe_core_python")
    if found is None or not found.submodule_search_locations:
        pytest.skip("axe-core-python is in the extra dev")
    return (Path(found.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8")


def violations(page: Browser, axe: str) -> list[list[object]]:
    """What axe finds: rule, impact, and the elements."""
    return page.run(
        axe + "; return axe.run(document).then(r => r.violations.map(v => [v.id, v.impact, v.nodes.map(n => n.html)]))"
    )


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
    for selector in (
        ".user",
        ".assistant",
        ".error",
        "#send",
        "summary",
        "h1 small",
        "#question",
        ".settings label",
        ".copy",
        "#left",
    ):
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
