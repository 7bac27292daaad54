"""Pins that hold on every machine, from pip's own resolution of all extras at once.

    pip install --dry-run --ignore-installed --report report.json ".[$(python -m tests.lock extras)]"
    python -m tests.lock report.json > requirements.lock

One resolution, so that any extras can be installed together under one set of constraints. The extra `mindformers` is
not in it: it pins packages that others need at later versions, and has an environment of its own.

Dropped: this package itself; pip; what a build of torch brings along (CUDA libraries, triton), since which ones depends
on the machine and torch pins them itself; and local labels such as +cpu, since 2.13.0 is matched by 2.13.0+cpu too.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

from telechat_twins.core.types import JsonObject

PROJECT = Path("pyproject.toml")
APART = ("mindformers",)
DROPPED = re.compile(r"(nvidia-|cuda-|pip$|triton$|telechat-twins$)")


def extras(project: JsonObject) -> list[str]:
    """The extras of a pyproject.toml's [project] that are resolved together."""
    return [name for name in project["optional-dependencies"] if name not in APART]


def lock(report: JsonObject) -> list[str]:
    """Lines ``name==version``, sorted, from pip's installation report."""
    kept = set()
    for found in report["install"]:
        name, version = normal(found["metadata"]["name"]), found["metadata"]["version"].partition("+")[0]
        if not DROPPED.match(name):
            kept.add(f"{name}=={version}")
    return sorted(kept)


def normal(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    if sys.argv[1] == "extras":
        print(",".join(extras(project)))
        return
    print(f"# {project['name']}: every package below the pins of pyproject.toml, Python 3.11. Written by `make lock`.")
    print("\n".join(lock(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
