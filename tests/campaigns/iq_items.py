"""10,000 items of every generated IQ suite and language: each has one answer, which a solver finds in its prompt alone.

    python -m tests.campaigns.iq_items [--items N] [--seeds N ...] [--suites NAME ...]

tests/unit/eval/test_iq.py has the solvers and does the same with 250 items. The last line of a seed is a digest of all
its items: seeds give the same ones on every machine. The time of each suite is processor time.
"""

from __future__ import annotations

import argparse
import hashlib
import time

from telechat_twins.core.eval.iq.items import LANGUAGES, IQOptions
from telechat_twins.core.eval.iq.tasks import generate
from tests.unit.eval.test_iq import BY_NAME, SOLVERS


def check(seed: int, names: list[str], count: int) -> None:
    """All items of one seed; SystemExit with the first that does not have exactly the answer it is said to have."""
    digest = hashlib.sha256()
    for name in names:
        for language in LANGUAGES:
            begun, prompts = time.process_time(), set()
            for item in generate(BY_NAME[name], language, IQOptions(seed=seed), count):
                found = SOLVERS[name](item.prompt)
                if found != {item.answer.strip()}:
                    raise SystemExit(f"seed {seed}: {name} {language}: {found} for {item}")
                prompts.add(item.prompt)
                digest.update(item.hash.encode())
            took = time.process_time() - begun
            print(f"{name} {language}: {len(prompts):,} different items with one answer each; {took:.0f} s", flush=True)
    print(f"seed {seed}: digest {digest.hexdigest()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--suites", nargs="+", default=list(SOLVERS), choices=list(SOLVERS))
    args = parser.parse_args()
    for seed in args.seeds:
        check(seed, args.suites, args.items)


if __name__ == "__main__":
    main()
