"""Rank script of layout tasks whose weights are those of a model's folder: core.parity.worker with convert's reader.

convert/parity_rank.py JOB.json              one rank; started by core.launch.launcher
"""

from __future__ import annotations

from pathlib import Path

from telechat_twins.convert.source import weight_reader
from telechat_twins.core.launch.worker import run_script
from telechat_twins.core.parity.worker import main

SCRIPT = Path(__file__).resolve()

if __name__ == "__main__":
    raise SystemExit(run_script(lambda: main(open_reader=weight_reader)))
