"""Check this machine: package versions, compiler, processor, memory, devices, launchers, operators.

Each installed framework reports, in a process of its own, which implementation runs each operator and why. The C++
operators are compiled if they have not been yet.

Exit code 0 when at least one backend can run and no version is wrong. Exit code 2, with the pip command that fixes it,
when a version is wrong or no backend is installed. A single missing backend is reported, but is not an error.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

from telechat_twins.core import backends
from telechat_twins.core.cli import DISTRIBUTION
from telechat_twins.core.errors import UserError
from telechat_twins.core.files import IMPORT_ROOT, ROOT
from telechat_twins.core.types import JsonObject

BACKENDS = {"ms": "mindspore", "pt": "torch"}
OPTIONAL = ("mindformers", "torch-npu")
PYTHON = (3, 11)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    report = examine(ask=True)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print(_text(report))
    if report["mistakes"]:
        raise UserError("; ".join(report["mistakes"]) + (f". Run: {report['mend']}" if report["mend"] else ""))
    return 0


def installed_version(package: str) -> str | None:
    """The installed version of a distribution, or None. Reads metadata only: nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pinned_versions() -> dict[str, str]:
    """Package -> the exact version asked for, from pyproject.toml in a checkout, else from the package's metadata."""
    source = ROOT / "pyproject.toml"
    if source.is_file():
        project = tomllib.loads(source.read_text(encoding="utf-8"))["project"]
        wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    else:
        wanted = importlib.metadata.requires(DISTRIBUTION) or []
    pins = (re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*==\s*([\w.+!]+)", line) for line in wanted)
    return {pin[1].lower().replace("_", "-"): pin[2] for pin in pins if pin}


def examine(
    installed: Callable[[str], str | None] = installed_version,
    pins: dict[str, str] | None = None,
    python: tuple[int, ...] = tuple(sys.version_info[:3]),
    *,
    ask: bool = False,
) -> JsonObject:
    """All findings as plain values. ``mistakes`` is empty if the environment can be used; ``mend``: a command that
    fixes them.

    ``ask``: also report the implementations of operators, which imports the frameworks.
    """
    pins = pinned_versions() if pins is None else pins
    packages = {}
    for name in ("numpy", *BACKENDS.values(), "safetensors", "ml-dtypes", "sentencepiece", *OPTIONAL):
        packages[name] = {"installed": installed(name), "wanted": pins.get(name)}
    mistakes, install = [], []
    if python[:2] != PYTHON:
        mistakes.append(f"Python must be {PYTHON[0]}.{PYTHON[1]}, found {'.'.join(map(str, python))}")
    for name in ("numpy", *BACKENDS.values()):
        found, wanted = packages[name]["installed"], packages[name]["wanted"]
        if wanted is None or (found is None and name != "numpy"):
            continue
        if not _serves(found, wanted, minor_only=name == "numpy"):
            mistakes.append(f"{name} must be {wanted}, found {found or 'none'}")
            install.append(f"{name}=={wanted}")
    if all(packages[name]["installed"] is None for name in BACKENDS.values()):
        mistakes.append("mindspore or torch must be installed, found neither")
        install += [f"{name}=={pins[name]}" for name in BACKENDS.values() if name in pins]
    missing = [name for name in BACKENDS.values() if packages[name]["installed"] is None]
    return {
        "python": {"version": ".".join(map(str, python)), "executable": sys.executable},
        "packages": packages,
        "compiler": next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None),
        "launchers": {"ms": _beside("msrun"), "pt": _beside("torchrun")},
        "operators": {name: _operators(name) for name in BACKENDS if packages[BACKENDS[name]]["installed"] and ask},
        "machine": _machine(),
        "mistakes": mistakes,
        "mend": _pip(install) if install else None,
        "missing_backends": {name: _pip([f"{name}=={pins[name]}"]) for name in missing if name in pins},
    }


def _serves(found: str | None, wanted: str, minor_only: bool = False) -> bool:
    if found is None:
        return False
    plain = found.partition("+")[0]  # 2.13.0+cpu is a build of 2.13.0
    if minor_only:  # numpy's bug-fix releases do not matter; its 2.x breaks mindspore
        return plain.split(".")[:2] == wanted.split(".")[:2]
    return plain == wanted


def _pip(requirements: list[str]) -> str:
    return f"{sys.executable} -m pip install " + " ".join(f"'{r}'" for r in requirements)


def _beside(name: str) -> str | None:
    path = Path(sys.executable).parent / name
    return str(path) if path.exists() else shutil.which(name)


def _operators(backend: str) -> list[str]:
    """Implementations of a backend's operators, from a process that imports its framework; or why they are unknown."""
    command = [sys.executable, "-m", "telechat_twins.core.commands.doctor", backend]
    done = subprocess.run(command, capture_output=True, text=True, cwd=IMPORT_ROOT)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return [f"unknown: the framework's process ended with code {done.returncode}: {last}"]


def _machine() -> JsonObject:
    info = _read("/proc/cpuinfo")
    flags = set(next((line.partition(":")[2].split() for line in info.splitlines() if line.startswith("flags")), []))
    memory = re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo"))
    devices = Path("/dev")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "cpu_flags": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile"}),
        "ascend_devices": len([d for d in devices.glob("davinci*") if d.name[7:].isdigit()]),
        "nvidia_devices": len([d for d in devices.glob("nvidia*") if d.name[6:].isdigit()]),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _text(report: JsonObject) -> str:
    lines = [f"python        {report['python']['version']}  {report['python']['executable']}"]
    for name, entry in report["packages"].items():
        found, wanted = entry["installed"], entry["wanted"]
        if name in OPTIONAL and found is None:
            continue
        serves = wanted is None or _serves(found, wanted, minor_only=name == "numpy")
        if found is None:
            note = f"not installed (supported: {wanted})"
        elif serves:
            note = f"{found}  ok"
        elif name in ("numpy", *BACKENDS.values()):
            note = f"{found}  WRONG, must be {wanted}"
        else:
            note = f"{found}  (tested with {wanted})"
        lines.append(f"{name:<13} {note}")
    lines.append(f"C++ compiler  {report['compiler'] or 'none found; fused operators for MindSpore on CPU need one'}")
    for backend, tool in (("ms", "msrun"), ("pt", "torchrun")):
        lines.append(f"{tool:<13} {report['launchers'][backend] or 'none found'}")
    machine = report["machine"]
    bf16 = "yes" if {"avx512_bf16", "amx_bf16"} & set(machine["cpu_flags"]) else "no"
    lines.append(f"processor     {machine['system']}, {machine['cores']} cores, bf16 instructions: {bf16}")
    lines.append(f"memory        {machine['memory_gib']} GiB")
    lines.append(f"devices       {machine['ascend_devices']} Ascend, {machine['nvidia_devices']} NVIDIA")
    for backend, described in report["operators"].items():
        for i, line in enumerate(described):
            title = f"{backends.TITLES[backend]} ops" if i == 0 else ""
            lines.append(f"{title:<13} {line}")
    for name, command in report["missing_backends"].items():
        lines.append(f"to add {name}: {command}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(backends.load(sys.argv[1], "ops").described()))
