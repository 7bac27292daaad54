"""The screenshots of the documentation, made by the tests' browser from what `make demo` leaves behind:

    python -m tests.support.docs_pictures demo

writes docs/parity-report.png (the demo's parity report) and docs/chat-page.png (the merged model on `tele serve`'s
page). The pages change with the program; make the pictures anew when they do.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.house import ROOT
from tests.support.browser import Browser, browser, missing

QUESTIONS = ("Who are you?", "Which frameworks can train you?")


def report(window: Browser, demo: Path) -> None:
    """The head of the demo's report."""
    window.size(1000, 900)
    window.open((demo / "parity" / "report.html").resolve().as_uri())
    time.sleep(1)
    window.picture(ROOT / "docs" / "parity-report.png")


def chat(window: Browser, demo: Path) -> None:
    """Two questions to the merged model, on a server of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve", "--backend", "pt", "--checkpoint", str(demo / "merged"), "--port", str(port)]
    server = subprocess.Popen([sys.executable, "-m", "telechat_twins.core.cli", *words])
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        window.size(900, 560)
        window.open(f"http://127.0.0.1:{port}/")
        assert window.until(lambda: bool(window.texts("h1"))), "the page did not open"
        window.run(
            "document.querySelector('#temperature').value = 0; document.querySelector('#system').value = 'Be brief.'"
        )
        for question in QUESTIONS:
            window.type("#question", question + "\ue007")
            assert window.until(lambda: window.visible("#send") and not window.visible("#stop"), 60)
        window.picture(ROOT / "docs" / "chat-page.png")
    finally:
        server.terminate()
        server.wait(30)


def main() -> int:
    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    demo = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder)) as window:
        report(window, demo)
        chat(window, demo)
    return 0


if __name__ == "__main__":
    sys.exit(main())
