"""All tables of ``tele bench``, from small to large, as one JSON file that names the processor (``make bench``).

python -m telechat_twins.core.bench.suite --out bench.json [--only step save]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from telechat_twins.core.bench.step import processor
from telechat_twins.core.files import IMPORT_ROOT
from telechat_twins.core.files.atomic import writable_file, write_text
from telechat_twins.core.types import JsonObject

MINI = ("--model", "telechat2-mini", "--seq-len", "1024", "--micro-batch", "1")
# Title -> arguments of ``tele bench``; a title begins with the benchmark's name.
TABLES: dict[str, tuple[str, ...]] = {
    "save": ("save",),
    "kernels mini": ("kernels", "--sizes", "mini"),
    "step tiny": ("step", "--micro-batch", "4"),
    "memory tiny": ("memory",),
    "decode tiny": ("decode",),
    "serve tiny": ("serve", "--clients", "1", "8"),
    "kernels large": ("kernels", "--sizes", "large"),
    "step mini fp32": ("step", *MINI, "--steps", "10", "--block", "2"),
    "step mini bf16": ("step", *MINI, "--steps", "10", "--block", "2", "--precision", "bf16"),
    "memory mini fp32": ("memory", *MINI),
    "memory mini bf16": ("memory", *MINI, "--precision", "bf16"),
    "decode mini": ("decode", "--model", "telechat2-mini"),
    "serve mini": ("serve", "--model", "telechat2-mini"),
}


def run(out: Path, tables: Mapping[str, tuple[str, ...]]) -> int:
    """Run the tables (as TABLES) in turn and write ``out`` after each; 1 if one of them failed."""
    whole: JsonObject = {
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": processor()},
        "tables": {},
        "failed": [],
    }
    for title, arguments in tables.items():
        print(f"\n== {title}: tele bench {' '.join(arguments)}", flush=True)
        with tempfile.TemporaryDirectory(prefix="tele-bench-") as folder:
            file = Path(folder) / "table.json"
            command = [sys.executable, "-m", "telechat_twins.core.cli", "bench", *arguments, "--out", str(file)]
            done = subprocess.run(command, env={**os.environ, "PYTHONPATH": _path()}, check=False)
            if done.returncode or not file.is_file():
                whole["failed"].append(title)
            else:
                whole["tables"][title] = json.loads(file.read_text(encoding="utf-8"))
        write_text(out, json.dumps(whole, indent=1) + "\n")
    print(f"\n{len(whole['tables'])} tables of {whole['machine']['processor']}: {out}")
    return 1 if whole["failed"] else 0


def _path() -> str:
    """PYTHONPATH by which commands in the caller's folder find the program."""
    return os.pathsep.join(filter(None, (str(IMPORT_ROOT), os.environ.get("PYTHONPATH", ""))))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench.json", metavar="FILE", help="the JSON file (bench.json)")
    known = sorted({arguments[0] for arguments in TABLES.values()})
    parser.add_argument("--only", nargs="+", choices=known, default=[], help="some of the benchmarks (all)")
    args = parser.parse_args(argv)
    writable_file(args.out, "--out")
    return run(Path(args.out), {title: a for title, a in TABLES.items() if not args.only or a[0] in args.only})


if __name__ == "__main__":
    raise SystemExit(main())
