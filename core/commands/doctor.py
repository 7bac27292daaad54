"""Check this machine: package versions, extras, compiler, processor, memory, disk, devices, launchers, operators.

Each installed framework reports, in a process of its own, which implementation runs each operator and why. The C++
operators are compiled if they have not been yet. Each line is printed as soon as it is known.

Exit code 0 when at least one backend can run. Exit code 2, with the pip command that fixes it, when numpy's or Python's
version is wrong or no backend is installed. A single missing backend is reported, but is not an error; a framework
outside the tested versions gets a warning.
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
import sysconfig
import time
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
NOT_LISTED = (
    "ms",
    "pt",
    "mindformers",
    "npu",
    "dev",
)  # extras whose packages have lines of their own, or are for tests
CANN_FOLDERS = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann", "/usr/local/Ascend/latest")
PYTHON = (3, 11)
# Versions beside the pinned ones whose cell of docs/matrix.md has passed. Others may work: they get a warning.
TESTED: dict[str, tuple[str, ...]] = {"mindspore": ("2.10.0",), "torch": ("2.14.1",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    if args.json:
        report = examine(ask=True)
        print(json.dumps(report, indent=1))
    else:
        report = examine()
        print(_text(report), flush=True)
        _print_operators([name for name, package in BACKENDS.items() if report["packages"][package]["installed"]])
    if report["mistakes"]:
        raise UserError("; ".join(report["mistakes"]) + (f". Run: {report['mend']}" if report["mend"] else ""))
    return 0


def _print_operators(names: list[str]) -> None:
    """Print the implementations of operators, backend by backend, with a line before what takes long."""
    if names and _compiler():
        what = "the C++ operators of the CPU, which takes half a minute for each backend once on a machine"
        print(f"compiling     {what}", end="", flush=True)
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "telechat_twins.kernels.cpu.build"], cwd=IMPORT_ROOT)
        state = "ready" if done.returncode == 0 else "failed, see above"
        print(f" ... {state} after {time.monotonic() - began:.0f} s", flush=True)
    for name in names:
        for i, line in enumerate(_operators(name)):
            print(f"{f'{backends.TITLES[name]} ops' if i == 0 else '':<13} {line}", flush=True)


def _compiler() -> str | None:
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def installed_version(package: str) -> str | None:
    """The installed version of a distribution, or None. Reads metadata only: nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements() -> dict[str, list[str]]:
    """Extra ("" for what is always needed) -> its requirements, from pyproject.toml in a checkout, else from the
    package's metadata."""
    source = ROOT / "pyproject.toml"
    if source.is_file():
        project = tomllib.loads(source.read_text(encoding="utf-8"))["project"]
        return {"": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, list[str]] = {}
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        found.setdefault(extra[1] if extra else "", []).append(line)
    return found


def _pins(lines: list[str]) -> dict[str, str]:
    pins = (re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*==\s*([\w.+!]+)", line) for line in lines)
    return {pin[1].lower().replace("_", "-"): pin[2] for pin in pins if pin}


def pinned_versions() -> dict[str, str]:
    """Package -> the exact version asked for, of all requirements."""
    return _pins([line for lines in requirements().values() for line in lines])


def _extras(installed: Callable[[str], str | None]) -> JsonObject:
    """Extra -> the packages that it lacks, and the command that installs it."""
    found: JsonObject = {}
    for extra, lines in requirements().items():
        if extra and extra not in NOT_LISTED:
            lacks = [name for name in _pins(lines) if installed(name) is None]
            found[extra] = {"missing": lacks, "install": backends.install_command(extra) if lacks else None}
    return found


def examine(
    installed: Callable[[str], str | None] = installed_version,
    pins: dict[str, str] | None = None,
    python: tuple[int, ...] = tuple(sys.version_info[:3]),
    *,
    ask: bool = False,
) -> JsonObject:
    """All findings as plain values. ``mistakes`` is empty if the environment can be used; ``mend``: a command that
    fixes them. ``warnings``: frameworks of versions that no test ran with.

    ``ask``: also report the implementations of operators, which imports the frameworks.
    """
    pins = pinned_versions() if pins is None else pins
    packages = {}
    for name in ("numpy", *BACKENDS.values(), "safetensors", "ml-dtypes", "sentencepiece", *OPTIONAL):
        packages[name] = {"installed": installed(name), "wanted": pins.get(name)}
    mistakes, install, warnings = [], [], []
    if python[:2] != PYTHON:
        mistakes.append(f"Python must be {PYTHON[0]}.{PYTHON[1]}, found {'.'.join(map(str, python))}")
    for name in ("numpy", *BACKENDS.values()):
        found, wanted = packages[name]["installed"], packages[name]["wanted"]
        if wanted is None or (found is None and name != "numpy"):
            continue
        if name != "numpy":
            if found is not None and not _tested(name, found, wanted):
                known = ", ".join((wanted, *TESTED.get(name, ())))
                warnings.append(f"{name} {found} is not among the tested versions ({known}); see docs/matrix.md")
        elif not _serves(found, wanted, minor_only=True):
            mistakes.append(f"{name} must be {wanted}, found {found or 'none'}")
            install.append(f"{name}=={wanted}")
    if all(packages[name]["installed"] is None for name in BACKENDS.values()):
        mistakes.append("mindspore or torch must be installed, found neither")
        install += [f"{name}=={pins[name]}" for name in BACKENDS.values() if name in pins]
    missing = [name for name in BACKENDS.values() if packages[name]["installed"] is None]
    return {
        "python": {"version": ".".join(map(str, python)), "executable": sys.executable},
        "packages": packages,
        "extras": _extras(installed),
        "compiler": _compiler(),
        "python_headers": (Path(sysconfig.get_path("include")) / "Python.h").is_file(),
        "launchers": {"ms": _beside("msrun"), "pt": _beside("torchrun")},
        "operators": {name: _operators(name) for name in BACKENDS if packages[BACKENDS[name]]["installed"] and ask},
        "machine": _machine(),
        "mistakes": mistakes,
        "warnings": warnings,
        "mend": _pip(install) if install else None,
        "missing_backends": {name: _pip([f"{name}=={pins[name]}"]) for name in missing if name in pins},
    }


def _tested(name: str, found: str, wanted: str) -> bool:
    """Whether tests ran with this version of a framework: the pinned one, or one of the matrix."""
    return any(_serves(found, version) for version in (wanted, *TESTED.get(name, ())))


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
        "cann": _cann(),
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
    }


def _cann() -> JsonObject | None:
    """Folder and version of the CANN toolkit, or None."""
    named = [os.environ.get(name, "") for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")]
    for folder in filter(None, [*named, *CANN_FOLDERS]):
        if Path(folder).is_dir():
            told = "".join(_read(str(file)) for file in sorted(Path(folder).glob("*/version.info"))[:1])
            version = re.search(r"^[Vv]ersion\s*=\s*(\S+)", told, flags=re.MULTILINE)
            return {"folder": folder, "version": version[1] if version else None}
    return None


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
        serves = serves or (found is not None and wanted is not None and _tested(name, found, wanted))
        if found is None:
            note = f"not installed (supported: {wanted})"
        elif serves:
            note = f"{found}  ok"
        elif name == "numpy":
            note = f"{found}  WRONG, must be {wanted}"
        else:
            note = f"{found}  (tested with {wanted})"
        lines.append(f"{name:<13} {note}")
    lines += _extra_lines(report["extras"])
    lines.append(f"C++ compiler  {report['compiler'] or 'none found; fused operators for MindSpore on CPU need one'}")
    if not report["python_headers"]:
        lines.append("Python.h      none found; the same operators need it: install Python's headers, e.g. python3-dev")
    for backend, tool in (("ms", "msrun"), ("pt", "torchrun")):
        lines.append(f"{tool:<13} {report['launchers'][backend] or 'none found'}")
    machine = report["machine"]
    bf16 = "yes" if {"avx512_bf16", "amx_bf16"} & set(machine["cpu_flags"]) else "no"
    lines.append(f"processor     {machine['system']}, {machine['cores']} cores, bf16 instructions: {bf16}")
    lines.append(f"memory        {machine['memory_gib']} GiB")
    lines.append(f"disk          {machine['disk_free_gib']} GiB free in this folder")
    lines.append(f"devices       {machine['ascend_devices']} Ascend, {machine['nvidia_devices']} NVIDIA")
    cann = machine["cann"]
    lines.append(
        f"CANN          {cann['version'] or 'version unknown'}  {cann['folder']}"
        if cann
        else "CANN          none found"
    )
    for backend, described in report["operators"].items():
        for i, line in enumerate(described):
            title = f"{backends.TITLES[backend]} ops" if i == 0 else ""
            lines.append(f"{title:<13} {line}")
    for name, command in report["missing_backends"].items():
        lines.append(f"to add {name}: {command}")
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


def _extra_lines(extras: JsonObject) -> list[str]:
    """A line for each extra: installed, or what it lacks and how to install it."""
    lines = []
    for i, (extra, entry) in enumerate(extras.items()):
        lacks = ", ".join(entry["missing"])
        state = f"lacks {lacks}: {entry['install']}" if lacks else "installed"
        lines.append(f"{'extras' if i == 0 else '':<13} {extra:<11} {state}")
    return lines


if __name__ == "__main__":
    print(json.dumps(backends.load(sys.argv[1], "ops").described()))
