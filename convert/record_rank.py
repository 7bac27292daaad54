"""Rank script of ``tele parity record``: some steps of a training run, recorded.

convert/record_rank.py JOB.json              one rank; started by core.launch.launcher
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from telechat_twins.convert.initial import open_initial
from telechat_twins.core import backends
from telechat_twins.core.config import run_config_from_dict
from telechat_twins.core.launch.worker import run_script
from telechat_twins.core.parity.record.recorder import Recorder
from telechat_twins.core.train.loop import train

SCRIPT = Path(__file__).resolve()


def main() -> int:
    """This rank's part of the job."""
    path = Path(sys.argv[1])
    job = json.loads(path.read_text(encoding="utf-8"))
    trainer = backends.load(job["backend"], "train").Trainer
    train(
        trainer,
        run_config_from_dict(job["config"]),
        path.parent / "run",
        job["resume"],
        open_initial,
        lambda config, out: Recorder(config, out, at=job["at"], full=job["full"], last=job["steps"], rows=job["rows"]),
    )
    backends.load(job["backend"], "mesh").leave()
    return 0


if __name__ == "__main__":
    raise SystemExit(run_script(main))
