"""The built documentation in a real browser, page by page: `make docs-check`, after `make docs`.

Every page in both languages, light on a desktop and dark on a phone: what axe finds (accessibility), messages in the
console, requests to other hosts, and pages that scroll sideways; then that the search finds words of both languages,
each in pages of its own that are there.
Exits with 1 if there is anything.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import importlib.util
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from telechat_twins.core.files import ROOT
from tests.support.browser import Browser, browser, missing

SITE = ROOT / "build" / "site"
VIEWS = ((1280, False), (390, True))  # width in pixels, dark
ELSEWHERE = (
    "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(location.origin))"
)
WIDER = "return document.documentElement.scrollWidth - window.innerWidth"
# A page, what is typed into its search, and the title of a page that has to be among what is found.
SEARCHES = (
    ("serving", "checkpoint", "Checkpoints"),
    ("zh/serving", "学习率", "训练"),
    ("zh/serving", "词表", "分词器"),
    ("zh", "checkpoint", "检查点"),
)
FOUND = "return [...document.querySelectorAll('.md-search-result__link')].map(e => e.href)"
STATUS = "return fetch(arguments[0]).then(answer => answer.status)"
AXE = (
    "; return axe.run(document).then(r => r.violations.map(v => v.id + ' (' + v.impact + ') at '"
    " + v.nodes.slice(0, 3).map(n => n.html.slice(0, 160)).join(' | ') + ' [' + v.nodes.length + ']'))"
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, without a line for each request."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Address of ``folder`` on this machine."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def axe_script() -> str:
    """The source of axe, from the package axe-core-python."""
    found = importlib.util.find_spec("axe_core_python")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("axe-core-python is not installed; it is in the extra dev")
    return (Path(found.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8")


def faults(window: Browser, address: str, axe: str) -> list[str]:
    """What is wrong with one page as the window shows it."""
    window.open(address)
    window.until(lambda: window.run("return document.readyState") == "complete")
    found = [f"axe: {one}" for one in window.run(axe + AXE)]
    found += [f"loaded from elsewhere: {name}" for name in window.run(ELSEWHERE)]
    if (wider := window.run(WIDER)) > 0:
        found.append(f"scrolls sideways by {wider} pixels")
    return found + [f"console: {message}" for message in window.log()]


def unfound(window: Browser, base: str) -> list[str]:
    """What is wrong with the searches: not found, of another language than the page, or not there."""
    titles = "return [...document.querySelectorAll('.md-search-result__item h1')].map(e => e.textContent)"
    missed = []
    for page, words, title in SEARCHES:
        window.open(f"{base}/{page}/")
        window.run("document.querySelector('.md-search__input').focus()")
        window.type(".md-search__input", words)

        def found(title: str = title) -> bool:
            return any(title in one.replace("\u200b", "") for one in window.run(titles))

        if not window.until(found, 30):
            missed.append(f"a search for {words} on {page} does not find {title}")
        links = window.run(FOUND)
        foreign = [link for link in links if link.startswith(f"{base}/zh/") != page.startswith("zh")]
        missed += [f"a search on {page} leads to another language: {foreign[0]}"] if foreign else []
        dead = [link for link in links[:3] if window.run(STATUS, link) != 200]
        missed += [f"a search on {page} leads nowhere: {dead[0]}"] if dead else []
    return missed


def main() -> int:
    """Look at every page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", nargs="*", help="only these, e.g. zh/serving (default: all)")
    parser.add_argument("--pictures", type=Path, help="folder for a screenshot of each page")
    args = parser.parse_args()
    if why := missing() or (None if (SITE / "index.html").exists() else f"no {SITE}: run `make docs` first"):
        raise SystemExit(why)
    names = args.pages or sorted(str(p.parent.relative_to(SITE)) for p in SITE.rglob("index.html"))
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
    axe, bad = axe_script(), 0
    with served(SITE) as base, tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as window:
        window.patience(120)
        for width, dark in VIEWS:
            window.size(width, 900)
            window.dark(dark)
            for name in names:
                found = faults(window, f"{base}/{name}/", axe)
                bad += bool(found)
                print(f"{'FAULT' if found else 'fine'}  {name} at {width} {'dark' if dark else 'light'}", flush=True)
                print("".join(f"       {one}\n" for one in found), end="")
                if args.pictures:
                    window.picture(args.pictures / f"{name.replace('/', '-')}-{width}.png")
        missed = unfound(window, base)
    print("".join(f"FAULT {one}\n" for one in missed), end="")
    print(f"{len(names)} pages, {len(VIEWS)} views: {bad} with faults; {len(SEARCHES)} searches: {len(missed)} faults")
    return int(bad > 0 or bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
