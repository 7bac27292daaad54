"""The rules of the house that a program can check, each as a function from a source tree to a list of complaints.

Kept apart from test_house.py so that every rule can be run on a tree with a planted violation.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("core", "convert", "kernels", "telechat_ms", "pt_reference")
TWINS = ("telechat_ms", "pt_reference")
NAME = "telechat_twins"  # what all five are imported under
FRAMEWORKS = ("mindspore", "mindformers", "torch", "torch_npu")

# Arrows of the design: what each package may import of ours and of the frameworks. Tests may import everything.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "core": ("core",),
    "convert": ("core", "convert"),
    "kernels": ("core", "kernels", "mindspore", "torch", "torch_npu"),
    "telechat_ms": ("core", "convert", "kernels", "telechat_ms", "mindspore"),
    "pt_reference": ("core", "convert", "kernels", "pt_reference", "torch", "torch_npu"),
}
# Narrower or wider than their package, by file or folder.
EXCEPTIONS: dict[str, tuple[str, ...]] = {
    "core/commands": ("core", "convert"),  # inside functions only: `tele --help` stays instant
    "convert/mindformers/ckpt.py": ("core", "convert", "mindspore"),  # inside functions only: .ckpt is MindSpore's own
    "kernels/": ("core", "kernels"),  # the judge, dispatch and int8 are numpy
    "kernels/mindspore/": ("core", "kernels", "mindspore"),
    "kernels/ascend/": ("core", "kernels", "mindspore"),
    "kernels/cpu/": ("core", "kernels", "mindspore"),
    "kernels/pytorch/": ("core", "kernels", "torch", "torch_npu"),
    "kernels/triton/": ("core", "kernels", "torch", "torch_npu", "mindspore"),
    "kernels/bench/": ("core", "kernels", "mindspore", "torch", "torch_npu"),
    "kernels/bench/pytorch.py": ("core", "kernels", "torch", "torch_npu"),
    "kernels/bench/eager.py": ("core", "kernels", "torch", "torch_npu"),
    "kernels/bench/hf.py": ("core", "kernels", "torch"),
    "kernels/bench/mindspore.py": ("core", "kernels", "mindspore"),
}
# The other framework's operators. Visibility on an Ascend is numpy and serves both.
OTHER_KERNELS = {
    "telechat_ms": ("kernels.pytorch", "kernels.triton"),
    "pt_reference": ("kernels.mindspore", "kernels.ascend", "kernels.cpu"),
}
SHARED_KERNELS = ("kernels.ascend.visibility",)
LAZY_ONLY = {"core/": ("convert",), "convert/mindformers/ckpt.py": ("mindspore",)}
# The only places that load modules by a computed name: the command table, the door to the backends, a rank's scheduler.
DYNAMIC_IMPORTS = ("core/cli.py", "core/backends.py", "core/launch/worker.py", "tests/")

# Files and names that one twin has and the other has no use for, with the reason.
TWIN_EXCEPTIONS: dict[str, str] = {
    "pt_reference/ops.py:device": "MindSpore places tensors by itself, one device a process",
    "telechat_ms/autograd.py": "PyTorch's own autograd keeps several graphs and takes custom gradients",
    "telechat_ms/pipeline.py:Pipeline.__init__": "MindSpore returns gradients, PyTorch hands them to hooks",
}

# The model of this project is one file, below 400 lines whatever family comes; a parallel strategy is one file. These
# budgets but the model's are guidelines; what holds is 500, and 700 for tests.
BUDGETS = {"model.py": 399, "parallelize.py": 300}
PARALLEL = re.compile(r"(tensor_parallel|ring_attention|ulysses|pipeline|data_parallel|mesh)\.py$")
MODELS = tuple(f"{twin}/model.py" for twin in TWINS)
MOST_LINES, TEST_LINES = 500, 700
FUNCTION_LINES = 60

UNTRACKED = ("build", "dist", "runs", "logs", "demo")

MACHINE_PATH = re.compile(r"(?<![\w.$}])/(?:root|home|work|opt|tmp|Users|mnt|data\d*)/[\w.]")


@dataclass(frozen=True)
class Import:
    """``name`` without telechat_twins, e.g. ``core.data.blend``; ``lazy``: in a function, or for the type checker only.

    ``bare``: one of our folders is imported by its bare name.
    """

    name: str
    line: int
    lazy: bool
    bare: bool = False

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


def tracked_files(root: Path) -> list[Path]:
    """Files that are or could be committed, as git sees them; in a tree without git, all but hidden folders."""
    if (root / ".git").exists():
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=root,
            capture_output=True,
            check=True,
        )
        files = [root / name for name in listing.stdout.decode().split("\0") if name]
        return sorted(f for f in files if f.is_file())
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if n == ".ci" or not n.startswith((".", "__")) and n not in UNTRACKED]
        names[:] = [n for n in names if not n.endswith(".egg-info")]
        found += [Path(folder) / file for file in files]
    return sorted(found)


def python_files(root: Path, packages: tuple[str, ...] = PACKAGES) -> list[Path]:
    return sorted(p for package in packages for p in (root / package).rglob("*.py") if "build" not in p.parts)


def _types(node: ast.AST) -> bool:
    """``if TYPE_CHECKING:``, which no interpreter enters."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@dataclass(frozen=True)
class Call:
    """``name``: dotted, "" where it has none. ``allow_pickle`` and ``shell``: whether that is anything but False."""

    name: str
    line: int
    allow_pickle: bool | None  # None: not given
    shell: bool


@dataclass(frozen=True)
class Source:
    """What several rules ask of a file; it is parsed once for all of them."""

    imports: list[Import]
    calls: list[Call]
    functions: list[tuple[str, int, int]]  # name, line, number of lines


def source_of(path: Path) -> Source:
    about = path.stat()
    return _source(path, about.st_mtime_ns, about.st_size)


@cache
def _source(path: Path, _changed: int, _size: int) -> Source:
    made = Source([], [], [])

    def add(name: str, line: int, lazy: bool) -> None:
        ours = name.removeprefix(f"{NAME}.")
        made.imports.append(Import(ours, line, lazy, bare=name == ours and name.partition(".")[0] in PACKAGES))

    def visit(node: ast.AST, lazy: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inner = lazy
            if isinstance(child, ast.Import):
                for alias in child.names:
                    add(alias.name, child.lineno, lazy)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                add("." * child.level + base, child.lineno, lazy)
                if not child.level:
                    for alias in child.names:
                        add(f"{base}.{alias.name}", child.lineno, lazy)
            elif isinstance(child, ast.Call):
                made.calls.append(_call(child))
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inner = True
                if not isinstance(child, ast.Lambda):
                    lines = (child.end_lineno or 0) - child.lineno + 1
                    made.functions.append((child.name, child.lineno, lines))
            visit(child, inner or _types(child))

    visit(_tree(path), False)
    return made


def _call(node: ast.Call) -> Call:
    parts: list[str] = []
    target: ast.expr = node.func
    while isinstance(target, ast.Attribute):
        parts.append(target.attr)
        target = target.value
    name = ".".join([target.id, *reversed(parts)]) if isinstance(target, ast.Name) else ""
    keywords = {k.arg: not (isinstance(k.value, ast.Constant) and k.value.value is False) for k in node.keywords}
    return Call(name, node.lineno, keywords.get("allow_pickle"), keywords.get("shell", False))


def imports_of(path: Path) -> list[Import]:
    return source_of(path).imports


def wrong_imports(root: Path) -> list[str]:
    """Imports against the arrows, relative imports, and modules loaded by a computed name outside the doors."""
    complaints = []
    for path in python_files(root):
        where = path.relative_to(root).as_posix()
        rule = max((k for k in EXCEPTIONS if where.startswith(k)), key=len, default=None)
        allowed = EXCEPTIONS[rule] if rule else MAY_IMPORT[where.partition("/")[0]]
        lazy_only = next((names for k, names in LAZY_ONLY.items() if where.startswith(k)), ())
        watched = {*PACKAGES, *FRAMEWORKS, "tests"}
        for found in imports_of(path):
            if found.name.startswith("."):
                complaints.append(f"{where}:{found.line}: relative import; write the full name")
            elif found.top in watched and found.top not in allowed:
                complaints.append(f"{where}:{found.line}: imports {found.name}, may import only {', '.join(allowed)}")
            elif found.top in lazy_only and not found.lazy:
                complaints.append(f"{where}:{found.line}: imports {found.name} at the top; do it inside the function")
            for twin, others in OTHER_KERNELS.items():
                shared = found.name.startswith(SHARED_KERNELS) or found.name == "kernels.ascend"
                if where.startswith(twin) and found.name.startswith(others) and not shared:
                    complaints.append(f"{where}:{found.line}: imports the other framework's {found.name}")
        if not where.startswith(DYNAMIC_IMPORTS):
            for call in source_of(path).calls:
                if call.name.rpartition(".")[2] in ("import_module", "__import__"):
                    complaints.append(f"{where}:{call.line}: loads a module by name; core.backends.load is the door")
    return complaints


def bare_names(root: Path) -> list[str]:
    """Folders imported by their bare names, which another package may have, and which would be loaded twice."""
    return [
        f"{path.relative_to(root).as_posix()}:{found.line}: write {NAME}.{found.name}, not {found.name}"
        for path in python_files(root, (*PACKAGES, "tests"))
        for found in imports_of(path)
        if found.bare
    ]


def twin_differences(root: Path) -> list[str]:
    """Files and public top-level names that one backend has and the other lacks."""
    complaints = []
    files = {twin: {p.relative_to(root / twin).as_posix() for p in python_files(root, (twin,))} for twin in TWINS}
    for here, there in (TWINS, TWINS[::-1]):
        for name in sorted(files[here] - files[there]):
            if f"{here}/{name}" not in TWIN_EXCEPTIONS:
                complaints.append(f"{here}/{name}: {there} has no such file")
        for name in sorted(files[here] & files[there]):
            for public in sorted(_public(root / here / name) - _public(root / there / name)):
                if f"{here}/{name}:{public}" not in TWIN_EXCEPTIONS:
                    complaints.append(f"{here}/{name}: '{public}' has no twin in {there}/{name}")
    return complaints


def stale_exceptions(root: Path) -> list[str]:
    """Entries of TWIN_EXCEPTIONS whose file or name is not there any more."""
    complaints = []
    for exception in TWIN_EXCEPTIONS:
        file, _, name = exception.partition(":")
        path = root / file
        if not path.exists() or (name and name not in _public(path) | _signatures(path).keys()):
            complaints.append(f"{exception}: listed as an exception, but it does not exist")
    return complaints


def twin_signatures(root: Path) -> list[str]:
    """Public functions and methods of twins whose parameter names differ."""
    complaints = []
    here, there = TWINS
    for path in python_files(root, (here,)):
        other = root / there / path.relative_to(root / here)
        if not other.exists():
            continue
        ours, theirs = _signatures(path), _signatures(other)
        for name in sorted(ours.keys() & theirs.keys()):
            if ours[name] != theirs[name] and f"{path.relative_to(root).as_posix()}:{name}" not in TWIN_EXCEPTIONS:
                where = f"{here}|{there}/{path.relative_to(root / here).as_posix()}"
                complaints.append(f"{where}: {name}({', '.join(ours[name])}) against ({', '.join(theirs[name])})")
    return complaints


BANNED_MODULES = ("pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib")
BANNED_CALLS = {
    "torch.save": "pickles; write safetensors through core.checkpoint.read",
    "torch.load": "unpickles; read safetensors through core.checkpoint.read",
    "yaml.load": "may build any object; core.schema.load_yaml is the safe loader",
    "yaml.unsafe_load": "builds any object; use core.schema.load_yaml",
    "yaml.full_load": "builds many objects; use core.schema.load_yaml",
    "yaml.load_all": "may build any object; use core.schema.load_yaml",
    "os.system": "no shell; use subprocess with a list",
    "eval": "runs text as code",
    "exec": "runs text as code",
}


def unsafe_calls(root: Path) -> list[str]:
    """Pickle in any form, YAML by an unsafe loader, numpy files that may hold objects, text run as code."""
    complaints = []
    for path in python_files(root, (*PACKAGES, "tests")):
        where = path.relative_to(root).as_posix()
        for found in imports_of(path):
            if found.top in BANNED_MODULES:
                complaints.append(f"{where}:{found.line}: imports {found.name}; nothing here is pickled")
        for call in source_of(path).calls:
            name = call.name
            if name in BANNED_CALLS and not (name == "yaml.load" and where == "core/schema.py"):
                complaints.append(f"{where}:{call.line}: {name} {BANNED_CALLS[name]}")
            if call.allow_pickle or (name in ("np.load", "numpy.load") and call.allow_pickle is None):
                complaints.append(f"{where}:{call.line}: {name} needs allow_pickle=False")
            if call.shell:
                complaints.append(f"{where}:{call.line}: {name} with shell=True; give a list")
    return complaints


def machine_paths(root: Path) -> list[str]:
    """Text files with an absolute path of one machine in them."""
    complaints = []
    for path in tracked_files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            found = MACHINE_PATH.search(line)
            if found:
                complaints.append(f"{path.relative_to(root).as_posix()}:{number}: path of one machine, {found[0]}...")
    return complaints


def sizes(root: Path) -> list[tuple[str, int, int]]:
    """(file, lines, budget) of every source file, largest share of its budget first."""
    rows = []
    for path in tracked_files(root):
        if path.suffix not in (".py", ".cc", ".h"):
            continue
        where = path.relative_to(root).as_posix()
        budget = TEST_LINES if where.startswith("tests/") else MOST_LINES
        if where.startswith(TWINS):
            budget = 300 if PARALLEL.search(path.name) else BUDGETS.get(path.name, MOST_LINES)
        rows.append((where, len(path.read_bytes().splitlines()), budget))
    return sorted(rows, key=lambda row: (-row[1] / row[2], row[0]))


def too_long(root: Path) -> list[str]:
    return [
        f"{where}: {lines} lines, at most {most}"
        for where, lines, budget in sizes(root)
        if lines > (most := budget if where in MODELS else TEST_LINES if where.startswith("tests/") else MOST_LINES)
    ]


def long_functions(root: Path) -> list[str]:
    """Functions that do not fit on a screen; a kernel may, its loop nest is one thought."""
    return [
        f"{path.relative_to(root).as_posix()}:{line}: {name} has {lines} lines, at most {FUNCTION_LINES}"
        for path in python_files(root)
        if path.relative_to(root).parts[0] != "kernels"
        for name, line, lines in source_of(path).functions
        if lines > FUNCTION_LINES
    ]


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _public(path: Path) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {n.name for n in _tree(path).body if isinstance(n, kinds) and not n.name.startswith("_")}


def _signatures(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}

    def add(prefix: str, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            found[prefix + node.name] = [a.arg for a in arguments]

    for node in _tree(path).body:
        add("", node)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                add(f"{node.name}.", member)
    return found
