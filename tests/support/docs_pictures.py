"""The screenshot of a parity report in the documentation, made by the tests' browser from what `make demo` leaves:

    python -m tests.support.docs_pictures demo

writes docs/parity-report.png. The report changes with the program; make the picture anew when it does.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.house import ROOT
from tests.support.browser import browser, missing


def main() -> int:
    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    report = Path(sys.argv[1]) / "parity" / "report.html"
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder)) as window:
        window.size(1000, 900)
        window.open(report.resolve().as_uri())
        time.sleep(1)  # its table and plots are made by a script
        window.picture(ROOT / "docs" / "parity-report.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
