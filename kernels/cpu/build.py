"""Build of the C++ operators: compiled once, cached by a hash of sources, flags, compiler, processor and versions.

Two libraries: ``load_extension`` provides MindSpore operators, with the flags and loader of ``ops.CustomOpBuilder``;
``load_plain`` provides the kernels alone for numpy arrays and for memory by address.

The compiler is called directly, because CustomOpBuilder.build requires ninja, rebuilds in every process, and locks its
folder with a file that a killed build leaves behind.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from telechat_twins.kernels.cpu.cache import cache_folder, distrust, make_private, say

FOLDER = Path(__file__).resolve().parent
KERNELS = (
    "registry.cc",
    "pool.cc",
    "program.cc",
    "norm.cc",
    "pointwise.cc",
    "loss.cc",
    "attention.cc",
    "paged.cc",
    "matmul.cc",
    "thin.cc",
    "split_matmul.cc",
    "linear.cc",
    "low_rank.cc",
    "rows.cc",
    "sums.cc",
)
NAME = "telechat_cpu_kernels"
FLAGS = ("-O3", "-march=native", "-pthread", "-Wno-maybe-uninitialized")
_KEPT = 4  # most recently used libraries of a name that stay in the cache


class BuildError(RuntimeError):
    """The library cannot be built; the message is one line: what is missing, or the compiler's error."""


def compiler() -> str | None:
    """Path of the C++ compiler, None without one."""
    return next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)


@functools.cache
def load_extension() -> ModuleType:
    """The module whose ``run`` launches a kernel on MindSpore tensors. Raises BuildError."""
    import mindspore
    from mindspore import ops

    from telechat_twins.kernels.mindspore.private import import_extension

    builder = ops.CustomOpBuilder(NAME, [str(FOLDER / "bindings.cc")], backend="CPU")
    path = build(
        NAME,
        ("bindings.cc", *KERNELS),
        [*builder.get_cflags(), *FLAGS, f"-I{_python_include()}", *(f"-I{p}" for p in builder.get_include_paths())],
        [*builder.get_ldflags(), "-pthread"],
        f"mindspore {mindspore.__version__}",
    )
    return import_extension(builder, path)


@functools.cache
def extension_library() -> ctypes.CDLL:
    """The kernels of ``load_extension`` by address: the same library, with its threads and their number."""
    found = load_extension().__file__
    assert found is not None  # a library's module
    return _declared(ctypes.CDLL(found))


@functools.cache
def load_plain(*more: str, sources: tuple[str, ...] = KERNELS) -> ctypes.CDLL:
    """The kernels of ``sources`` without MindSpore. Raises BuildError.

    ``more``: additional flags, e.g. ``-fsanitize=address`` (whose library must be preloaded) or ``-mno-avx512f``.
    """
    flags = ["-std=c++17", "-fPIC", *FLAGS, *more]
    return _declared(ctypes.CDLL(str(build("telechat_kernels", sources, flags, ["-shared", "-pthread", *more], ""))))


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.tele_kernel.argtypes = [ctypes.c_char_p, *[ctypes.POINTER(ctypes.c_int)] * 3]
    library.tele_run.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    library.tele_run.restype = None
    return library


def build(name: str, sources: Sequence[str], cflags: Sequence[str], ldflags: Sequence[str], extra: str) -> Path:
    """Path of the library ``name`` of ``sources`` in this folder, from the cache or compiled into it.

    Concurrent processes wait for the one that compiles. The library is renamed into place when it is complete.
    """
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler found (g++, c++ or clang++); install one, e.g. the package g++")
    try:
        folder = cache_folder() / f"{name}-{_key(cxx, sources, cflags, ldflags, extra)}"
        library = folder / f"{name}.so"
        make_private(folder)
        if library.exists() and not distrust(library, folder=False):
            os.utime(folder)
            return library
        with _locked(folder / "lock"):
            if why := distrust(library, folder=False):
                say(f"{library} {why}; it is built anew")
                library.unlink()
            if not library.exists():
                print("building the C++ operators of the CPU, once (about half a minute)", file=sys.stderr, flush=True)
                _compile(cxx, library, [FOLDER / source for source in sources], cflags, ldflags)
                _forget_old(folder.parent, name)
    except OSError as error:
        raise BuildError(f"the compiled library cannot be stored: {error}") from None
    return library


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Exclusive file lock, released by the operating system when its holder dies. Without ``wait``, BlockingIOError
    where another process has it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(lock)


def _compile(cxx: str, library: Path, sources: Sequence[Path], cflags: Sequence[str], ldflags: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as room:
        objects = [Path(room) / f"{source.stem}.o" for source in sources]
        commands = [[cxx, *cflags, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_call, commands))
        whole = Path(room) / library.name
        _call([cxx, *map(str, objects), *ldflags, "-o", str(whole)])
        whole.chmod(0o700)  # independent of the umask: distrust() refuses group-writable files
        os.replace(whole, library)


def _call(command: list[str]) -> None:
    # A sanitizer's library preloaded for the kernels would instrument the compiler too and slow it down many times.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise BuildError(f"{Path(command[0]).name} ended with code {done.returncode}: {first}")


def _key(cxx: str, sources: Sequence[str], cflags: Sequence[str], ldflags: Sequence[str], extra: str) -> str:
    """Hash of everything the library depends on: sources, flags, compiler, processor, versions."""
    found = hashlib.sha256()
    for path in sorted({*(FOLDER / source for source in sources), *FOLDER.glob("*.h")}):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    for text in (*cflags, *ldflags, extra, cxx, version, _processor(), sys.version):
        found.update(text.encode() + b"\0")
    return found.hexdigest()[:16]


def _processor() -> str:
    """Model and features of the processor, on which -march=native depends: machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))


def _python_include() -> str:
    """The folder of Python's headers, which the MindSpore library includes. BuildError if they are not installed."""
    import sysconfig

    folder = sysconfig.get_path("include")
    if not (Path(folder) / "Python.h").is_file():
        raise BuildError(f"no Python.h in {folder}; install Python's headers, e.g. the package python3-dev")
    return folder


def _forget_old(cache: Path, name: str) -> None:
    """Remove all but the most recently used libraries, and leave alone what another process is compiling."""
    folders = sorted(cache.glob(f"{name}-*"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in folders[_KEPT:]:
        with contextlib.suppress(OSError), _locked(folder / "lock", wait=False):
            shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Compile the libraries of both twins if necessary, MindSpore's where it is installed; exit code 1, with the
    reason, when that fails."""
    try:
        load_plain()
        if importlib.util.find_spec("mindspore") is not None:
            load_extension()
    except BuildError as error:
        print(f"no C++ operators for the CPU: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
