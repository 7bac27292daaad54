"""One of four ranks in test_collectives.py: runs every check and writes the results to FOLDER/results_<rank>.json.

collective_rank.py BACKEND FOLDER
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path

from tests.multiproc import collective_checks, link_checks
from tests.support.collectives import CHECKS, WORLD, Env

MODULES = (collective_checks, link_checks)  # importing them registers their checks


def main(backend: str, folder: str) -> None:
    env = Env(backend)
    assert env.world == WORLD
    env.make_groups()
    results: dict[str, str] = {}
    for name, run in CHECKS.items():
        started = time.perf_counter()
        try:
            run(env)
            results[name] = "ok"
        except LookupError:
            results[name] = "no part"
        except Exception as error:  # the result of this check; the others still run
            results[name] = f"{error}\n{''.join(traceback.format_exception(error)[-3:])}"
        print(f"{name} {time.perf_counter() - started:.3f} s: {results[name]}", flush=True)
        # After every check: when one rank hangs, the others' results say where.
        Path(folder, f"results_{env.rank}.json").write_text(json.dumps(results))
    env.mesh.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
