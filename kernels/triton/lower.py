"""Compilation of every shipped configuration without a device: `python -m telechat_twins.kernels.triton.lower`.

For Ascend910B3, triton-ascend lowers to linalg (the last step, to machine code, needs CANN); with ``--gpu``, the
installed triton compiles to machine code for sm_90. triton-ascend is imported as ``triton``, so it is installed into a
folder of its own, first on the path of a child process. The result is cached there by the hash of sources and versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from telechat_twins.kernels.triton.launch import Argument, Launch

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / "build" / "triton-ascend"
REQUIREMENTS = ("triton-ascend==3.2.0", "pybind11==3.0.1")
ASCEND = "Ascend910B3"
SHARED_MEMORY = 227 * 1024  # bytes per program on sm_90
_LEFT_OVER = re.compile(r"\btt\.(?!tensor_kind|divisibility)\w+")


class Row(NamedTuple):
    """``memory``: counted bytes of the unified buffer on Ascend, shared memory on a GPU. ``why``: the error, if any."""

    kernel: str
    dtypes: str
    config: str
    memory: int
    why: str


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when every configuration compiles, 1 when one does not, 2 when triton-ascend cannot be installed."""
    parser = argparse.ArgumentParser(
        prog="python -m telechat_twins.kernels.triton.lower", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--gpu", action="store_true", help="for sm_90, with the installed triton")
    parser.add_argument("--only", default="", help="only kernels whose name contains this; not cached")
    parser.add_argument("--one-each", action="store_true", help="one configuration of every kernel; not cached")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        json.dump(compile_all(False, options.only, options.one_each), sys.stdout)
        return 0
    start = time.perf_counter()
    if options.gpu:
        rows, kept = compile_all(True, options.only, options.one_each), False
    else:
        try:
            install()
        except subprocess.CalledProcessError as failure:
            print(f"triton-ascend could not be installed:\n{failure.stderr}", file=sys.stderr)
            return 2
        rows, kept = lower_for_ascend(options.only, options.one_each)
    print(table(rows, "shared memory" if options.gpu else "unified buffer"))
    bad = sum(bool(row.why) for row in rows)
    target = "sm_90" if options.gpu else ASCEND
    spent = "cached" if kept else f"{time.perf_counter() - start:.0f} s"
    print(f"{len(rows) - bad} of {len(rows)} configurations compile for {target} ({spent}); not run on device")
    return 1 if bad or not rows else 0


def installed() -> bool:
    """Whether the environment of this version is complete."""
    marker = ENVIRONMENT / "requirements.txt"
    return marker.exists() and marker.read_text().split() == list(REQUIREMENTS)


def install() -> None:
    """Install the environment unless it is complete. Raises CalledProcessError when pip fails.

    It is filled under a temporary name and renamed: an interrupted installation never looks complete, and of two
    concurrent ones the first is used.
    """
    if installed():
        return
    ENVIRONMENT.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="triton-ascend-", dir=ENVIRONMENT.parent))
    try:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*command, "--target", str(scratch), *REQUIREMENTS], check=True, capture_output=True, text=True)
        (scratch / "requirements.txt").write_text("\n".join(REQUIREMENTS))
        if not installed():
            shutil.rmtree(ENVIRONMENT, ignore_errors=True)
            try:
                scratch.rename(ENVIRONMENT)
            except OSError:
                if not installed():
                    raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def lower_for_ascend(only: str = "", one_each: bool = False) -> tuple[list[Row], bool]:
    """The rows, and whether they come from the cache. Requires ``installed()``."""
    whole = not only and not one_each
    rows = kept_rows() if whole else None
    if rows is not None:
        return rows, True
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join((str(ENVIRONMENT), str(ROOT))), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-m", "telechat_twins.kernels.triton.lower", "--inside", "--only", only]
    command += ["--one-each"] if one_each else []
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"lowering ended with {done.returncode}:\n{done.stderr[-4000:]}")
    rows = [Row(*row) for row in json.loads(done.stdout)]
    if whole:
        fresh = ENVIRONMENT / f"lowered.{os.getpid()}"
        fresh.write_text(json.dumps({"key": source_key(), "rows": rows}))
        fresh.replace(ENVIRONMENT / "lowered.json")
    return rows, False


def kept_rows() -> list[Row] | None:
    """The cached result of a run over the present sources, or None."""
    outcome = ENVIRONMENT / "lowered.json"
    if not outcome.exists():
        return None
    kept = json.loads(outcome.read_text())
    return [Row(*row) for row in kept["rows"]] if kept["key"] == source_key() else None


def source_key() -> str:
    """Hash of the sources of this package and of the versions."""
    digest = hashlib.sha256("\n".join(REQUIREMENTS).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compile_all(gpu: bool, only: str = "", one_each: bool = False) -> list[Row]:
    """Compile in this process, with its triton."""
    from telechat_twins.kernels.triton import shipped
    from telechat_twins.kernels.triton.blocks import ASCEND_910B3, H200

    compile_one: Callable[[Launch, dict[str, str]], int] = to_machine_code if gpu else to_linalg
    rows: list[Row] = []
    for launch in shipped.launches(H200 if gpu else ASCEND_910B3):
        name = launch.kernel.__name__
        if only not in name or (one_each and any(row.kernel == name for row in rows)):
            continue
        config = " ".join(f"{key}={int(v) if isinstance(v, bool) else v}" for key, v in launch.constants.items())
        memory, why = launch.tiles.buffer, ""
        try:
            memory = compile_one(launch, shipped.types(launch))
        except Exception as failure:  # any error of the compiler becomes the row's reason
            why = reason(failure)
        rows.append(Row(name, shipped.dtypes_of(launch), config, memory, why))
    return rows


def to_linalg(launch: Launch, types: dict[str, str]) -> int:
    """Lower one launch by triton-ascend; returns the counted bytes of its tiles. Raises the compiler's errors, and
    RuntimeError when an operation of Triton remains."""
    from triton.backends.ascend.compiler import AscendBackend
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from telechat_twins.kernels.pytorch.private import triton_ir

    ir = triton_ir()
    target = GPUTarget("npu", ASCEND, 0)
    backend = AscendBackend(target)
    options = backend.parse_options({})
    absent = {name: None for name, kind in types.items() if kind == "none"}
    signature = {name: kind for name, kind in types.items() if kind != "none"}
    source = ASTSource(launch.kernel, signature=signature, constants={**launch.constants, **absent})
    stages: dict[str, Callable] = {}
    backend.add_stages(stages, options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    metadata = {**options.__dict__, "target": target, "hash": "none"}
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    linalg = stages["ttadapter"](stages["ttir"](module, metadata), metadata)
    left = sorted(set(_LEFT_OVER.findall(linalg)))
    if left or "func.func @" not in linalg:
        raise RuntimeError(f"not lowered to linalg: {', '.join(left) or 'the function'}")
    return launch.tiles.buffer


def to_machine_code(launch: Launch, types: dict[str, str]) -> int:
    """Compile one launch for sm_90, without a GPU; returns its shared memory in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Argument | str] = dict(launch.constants)
    aligned: dict[tuple[int], list[list[str | int]]] = {}
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
            continue
        signature[name] = types[name]
        if types[name].startswith("*") or (isinstance(value, int) and value % 16 == 0):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, aligned)
    options = {"num_warps": launch.tiles.warps, "num_stages": launch.tiles.stages}
    shared = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared
    if shared > SHARED_MEMORY:
        raise RuntimeError(f"needs {shared} bytes of shared memory, sm_90 has {SHARED_MEMORY}")
    return shared


def reason(failure: Exception) -> str:
    """The first line with an error, else the first line, of the message of a compiler or tool."""
    text = failure.stderr if isinstance(failure, subprocess.CalledProcessError) else str(failure)
    text = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines or [type(failure).__name__]
    return telling[0][:200]


def table(rows: list[Row], memory: str) -> str:
    """The rows as aligned text, by kernel and descending memory."""
    heads = ("kernel", "dtypes", "config", memory, "ok")
    cells = [heads]
    for row in sorted(rows, key=lambda row: (row.kernel, -row.memory)):
        cells.append((row.kernel, row.dtypes, row.config, f"{row.memory:,}", row.why or "ok"))
    widths = [max(len(line[i]) for line in cells) for i in range(4)]
    return "\n".join(
        f"{a:{widths[0]}}  {b:{widths[1]}}  {c:{widths[2]}}  {d:>{widths[3]}}  {e}" for a, b, c, d, e in cells
    )


if __name__ == "__main__":
    sys.exit(main())
