"""Rank script of ``tele generate`` over several processes: core.inference.worker on any model that convert opens.

convert/generation_rank.py JOB.json          one rank; started by core.launch.launcher
"""

from __future__ import annotations

import sys
from pathlib import Path

from telechat_twins.convert.adapter import adapter_of
from telechat_twins.convert.source import weight_reader
from telechat_twins.core.inference.worker import serve_rank
from telechat_twins.core.launch.worker import run_script

SCRIPT = Path(__file__).resolve()

if __name__ == "__main__":
    raise SystemExit(run_script(lambda: serve_rank(Path(sys.argv[1]), weight_reader, adapter_of)))
