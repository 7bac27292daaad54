"""The ranks' own script: core/parity/worker.py, where a task named after a fault is done with it.

rank.py JOB.json
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from telechat_twins.core.launch.worker import run_script
from telechat_twins.core.parity import worker
from tests.mutation import catalogue
from tests.mutation.fault import planted


def around(task: worker.Task, backend: str) -> AbstractContextManager[None]:
    """The process as the task wants it."""
    return planted(catalogue.named(task.name), backend)


def main() -> int:
    return worker.main(around=around)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
