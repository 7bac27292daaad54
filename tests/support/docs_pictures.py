"""Screenshots of the documentation, made by the tests' browser:

    python -m tests.support.docs_pictures
    python -m tests.support.docs_pictures demo

writes docs/chat-page.png and, with the folder that `make demo` leaves, docs/parity-report.png too. What they show
changes with the program; make them anew when it does. The browser needs a Chinese font.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from tests.house import ROOT
from tests.support.browser import Browser, browser, missing
from tests.support.serve_support import NAME, running

TALK = {
    "What is a language model?": "A language model assigns probabilities to the next token of a text. Trained on "
    "enough text, it can answer questions, translate, and write code.",
    "用中文再说一遍。": "大语言模型根据已有文本预测下一个词元。",
}


def chat_page(window: Browser, picture: Path) -> None:
    """The chat page of a server that gives the answers of ``TALK``."""
    window.size(900, 700)
    with running(lambda question: TALK[question], pause=0.02) as server:
        window.open(server.url + "/")
        assert window.until(lambda: window.texts("h1")[0].startswith(NAME))
        for place, question in enumerate(TALK, start=1):
            window.type("#question", question + "\ue007")
            assert window.until(lambda place=place: len(window.texts(".stats")) == place), question
        window.picture(picture)
        Image.open(picture).quantize(64).save(picture, optimize=True)


def parity_report(window: Browser, report: Path, picture: Path) -> None:
    """The upper part of a parity report."""
    window.size(1000, 900)
    window.open(report.resolve().as_uri())
    time.sleep(1)  # its table and plots are made by a script
    window.picture(picture)


def main() -> int:
    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder)) as window:
        chat_page(window, ROOT / "docs" / "chat-page.png")
        for demo in sys.argv[1:]:
            parity_report(window, Path(demo) / "parity" / "report.html", ROOT / "docs" / "parity-report.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
