"""Rank script of ``tele serve`` over several processes: core.serve.process on any model that convert opens.

convert/serving_rank.py JOB.json          one rank; started by core.launch.launcher
"""

from __future__ import annotations

import sys
from pathlib import Path

from telechat_twins.convert.adapter import adapter_of
from telechat_twins.convert.source import weight_reader
from telechat_twins.core.commands.options import load_model
from telechat_twins.core.launch.worker import run_script
from telechat_twins.core.serve.process.ranks import serve_rank

if __name__ == "__main__":
    raise SystemExit(run_script(lambda: serve_rank(Path(sys.argv[1]), load_model, weight_reader, adapter_of)))
