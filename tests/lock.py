"""`pip freeze --all | python -m tests.lock pyproject.toml > requirements.lock`: pins that hold on every machine.

Dropped: this package itself; pip; what a build of torch brings along (CUDA libraries, triton), since which ones depends
on the machine and torch pins them itself; and local labels such as +cpu, since 2.13.0 is matched by 2.13.0+cpu too.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

DROPPED = re.compile(r"(nvidia-|cuda-|pip$|triton$|telechat-twins$)")


def lock(frozen: Iterable[str]) -> list[str]:
    """Lines ``name==version``, sorted, from lines of ``pip freeze --all``."""
    kept = set()
    for line in frozen:
        found = re.match(r"([\w.-]+)==([\w.!]+)(\+[\w.]+)?$", line.strip())
        if found and not DROPPED.match(found[1].lower().replace("_", "-")):
            kept.add(f"{found[1].lower().replace('_', '-')}=={found[2]}")
    return sorted(kept)


def main() -> None:
    project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
    print(f"# {project['name']}: every package below the pins of pyproject.toml, Python 3.11. Written by `make lock`.")
    print("\n".join(lock(sys.stdin)))


if __name__ == "__main__":
    main()
