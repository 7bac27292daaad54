"""10,000 items of every generated IQ suite and language: each has one answer, which a solver finds in its prompt alone.

    python -m tests.campaigns.iq_items [--items N]     (about 4 minutes of processor time)

tests/unit/eval/test_iq.py has the solvers and does the same with 250 items. The last line is a digest of all items:
seeds give the same ones on every machine.
"""

from __future__ import annotations

import argparse
import hashlib

from telechat_twins.core.eval.iq.items import LANGUAGES, IQOptions
from telechat_twins.core.eval.iq.tasks import generate
from tests.unit.eval.test_iq import BY_NAME, SOLVERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--suites", nargs="+", default=list(SOLVERS), choices=list(SOLVERS))
    args = parser.parse_args()
    digest = hashlib.sha256()
    for name in args.suites:
        for language in LANGUAGES:
            prompts = set()
            for item in generate(BY_NAME[name], language, IQOptions(), args.items):
                found = SOLVERS[name](item.prompt)
                if found != {item.answer.strip()}:
                    raise SystemExit(f"{name} {language}: {found} for {item}")
                prompts.add(item.prompt)
                digest.update(item.hash.encode())
            print(f"{name} {language}: {len(prompts):,} different items, each with one answer", flush=True)
    print(f"digest {digest.hexdigest()}")


if __name__ == "__main__":
    main()
