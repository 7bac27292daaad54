"""A real browser without a window, driven over the WebDriver protocol: Chromium and its driver, where they are."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to an element


def missing() -> str | None:
    """Why there is no browser here, or None."""
    if not shutil.which("chromedriver"):
        return "no chromedriver here (Debian: apt-get install chromium chromium-driver)"
    if not any(map(shutil.which, BROWSERS)):
        return f"none of {', '.join(BROWSERS)} here"
    return None


class Browser:
    """One window."""

    def __init__(self, base: str, options: dict[str, Any]) -> None:
        self._base = f"{base}/session"
        self._base += "/" + self._call("POST", "", {"capabilities": {"alwaysMatch": options}})["sessionId"]

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        raw = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, raw, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=180) as response:
            return json.loads(response.read())["value"]

    def patience(self, seconds: float) -> None:
        """Time that a script may take, 30 seconds by default."""
        self._call("POST", "/timeouts", {"script": int(1000 * seconds)})

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *args: Any) -> Any:
        """The value that a script returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def _find(self, selector: str) -> str:
        return self._call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        self._call("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Keys as a user presses them; "\\ue007" is Enter."""
        self._call("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)

    def visible(self, selector: str) -> bool:
        return self._call("GET", f"/element/{self._find(selector)}/displayed")

    def dark(self, dark: bool) -> None:
        """Prefer dark or light colours, as the system's setting would."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}})

    def language(self, name: str) -> None:
        """The browser's language, as pages see it from the next one on."""
        agent = self.run("return navigator.userAgent")
        params = {"userAgent": agent, "acceptLanguage": name}
        self._call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setUserAgentOverride", "params": params})

    def size(self, width: int, height: int) -> None:
        self._call("POST", "/window/rect", {"width": width, "height": height})

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def until(self, holds: Callable[[], bool], seconds: float = 15.0) -> bool:
        deadline = time.monotonic() + seconds
        while not holds() and time.monotonic() < deadline:
            time.sleep(0.05)
        return holds()

    def log(self) -> list[str]:
        """What the page complained about."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def close(self) -> None:
        self._call("DELETE", "")


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A fresh browser whose profile is in ``folder``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    program = next(found for name in BROWSERS if (found := shutil.which(name)))
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=900,700"]
    options = {
        "browserName": "chrome",
        "goog:chromeOptions": {"binary": program, "args": [*arguments, f"--user-data-dir={folder}"]},
        "goog:loggingPrefs": {"browser": "ALL"},
    }
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        window = Browser(f"http://127.0.0.1:{port}", options)
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(10)
