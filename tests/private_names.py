"""The rule that private names of the frameworks are used in one file each, which a test guards.

A release may rename them without notice. The check reads the source: imports with a segment that begins with one
underscore, and, in files that import a framework, such attributes of anything but the file's own objects.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.house import imports_of, python_files

FRAMEWORKS = ("mindspore", "torch", "torch_npu", "triton", "transformers")
HOMES = ("kernels/mindspore/private.py", "kernels/pytorch/private.py")
NAMED_TUPLE = ("_replace", "_asdict", "_fields", "_make")  # public, whatever their spelling
OWN = ("self", "cls")


def private_names(root: Path) -> list[str]:
    """Uses of private names of a framework outside HOMES."""
    complaints = []
    for path in python_files(root):
        where = path.relative_to(root).as_posix()
        if where in HOMES or not any(_of_framework(found.name) for found in imports_of(path)):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for line, name in (*_imports(tree), *_attributes(tree)):
            complaints.append(f"{where}:{line}: private name {name}; move it to {' or '.join(HOMES)}")
    return complaints


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if _of_framework(name) and any(map(_private, name.split("."))):
                yield node.lineno, name


def _attributes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """``torch._C``, ``x.untyped_storage()._cdata``, ``getattr(builder, "_build")``: any object may be a framework's."""
    if not any(map(_of_framework, _imported(tree))):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _private(node.attr) and not _own(node.value):
            yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            target, name, *_ = node.args
            if isinstance(name, ast.Constant) and _private(str(name.value)) and not _own(target):
                yield node.lineno, ast.unparse(node)


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def _own(node: ast.expr) -> bool:
    """Whether the attribute belongs to the class that the code is written in."""
    return isinstance(node, ast.Name) and node.id in OWN


def _of_framework(module: str) -> bool:
    return module.partition(".")[0] in FRAMEWORKS


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLE
