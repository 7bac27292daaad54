"""Rules on the import graph and on the files of a folder, as functions from a source tree to complaints.

Imports inside functions and under TYPE_CHECKING count as well: a lazy circle is also a circle.
"""

from __future__ import annotations

from pathlib import Path

from tests.house import PACKAGES, TWINS, imports_of, python_files

# From the ground up. A file of core/ imports its own room or rooms of lower floors; rooms of one floor do not see
# each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("near", "shown", "types", "wrapped"),
    ("errors",),
    ("schema", "backends", "cli", "files", "launch"),
    ("model",),
    ("parallel", "checkpoint", "watching"),
    ("sections",),
    ("config",),
    ("data",),
    ("train", "inference", "planner"),
    ("serve", "parity", "bench", "mup", "eval"),
    ("commands",),
)
# Rooms of the second floor that use each other, one way: the command line and the launcher write files and end alike;
# backends name the pip command of a checkout or of a wheel.
SAME_FLOOR = {
    ("launch", "files"),
    ("launch", "schema"),
    ("cli", "files"),
    ("cli", "launch"),
    ("schema", "files"),
    ("backends", "files"),
}
FILES_A_FOLDER, FILES_A_TWIN = 20, 25


def modules(root: Path) -> dict[str, Path]:
    """Dotted module name -> file, of all five packages."""
    return {
        path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
        for path in python_files(root)
    }


def graph(root: Path) -> dict[str, dict[str, int]]:
    """Module -> the modules of ours it imports, each with a line."""
    known = modules(root)
    edges: dict[str, dict[str, int]] = {}
    for name, path in known.items():
        edges[name] = {}
        for found in imports_of(path):
            # `from core.data import blend` is seen as core.data and as core.data.blend; the package itself has no code.
            if found.name in known and found.name != name and known[found.name].name != "__init__.py":
                edges[name].setdefault(found.name, found.line)
    return edges


def floors(root: Path) -> list[str]:
    """Imports of core/ that climb, or that cross to another room of the same floor."""
    height = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    files, complaints = modules(root), []
    for name, targets in graph(root).items():
        if not name.startswith("core."):
            continue
        room = name.split(".")[1]
        where = files[name].relative_to(root).as_posix()
        if room not in height:
            complaints.append(f"{where}: room '{room}' is not on any floor; add it to tests/floors.py")
            continue
        for target, line in targets.items():
            if not target.startswith("core."):
                continue
            there = target.split(".")[1]
            if there == room or (room, there) in SAME_FLOOR or there not in height:
                continue
            if height[there] >= height[room]:
                complaints.append(f"{where}:{line}: '{room}' imports {target}, which is not on a lower floor")
    return complaints


def no_circles(root: Path) -> list[str]:
    """Groups of modules that import each other (strongly connected components, Tarjan)."""
    edges = graph(root)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in edges[name]:
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            members = []
            while not members or members[-1] != name:
                members.append(stack.pop())
            if len(members) > 1:
                circles.append(sorted(members))

    for name in edges:
        if name not in index:
            visit(name)
    return [f"{' and '.join(circle)} import each other" for circle in sorted(circles)]


def flat(root: Path) -> list[str]:
    """Folders with more Python files than the limit."""
    counts: dict[str, int] = {}
    for path in python_files(root, PACKAGES):
        if path.name != "__init__.py":
            folder = path.parent.relative_to(root).as_posix()
            counts[folder] = counts.get(folder, 0) + 1
    limits = {folder: FILES_A_TWIN if folder in TWINS else FILES_A_FOLDER for folder in counts}
    return [f"{f}/: {n} files, at most {limits[f]}" for f, n in sorted(counts.items()) if n > limits[f]]


def commands_are_leaves(root: Path) -> list[str]:
    """Modules that import a command; what two commands share is library code in its room, or core/commands/options.py.

    A command's own parts (plan/growth of plan, mup/search of mup) are not commands of their own, and may share code.
    """
    return [
        f"{name}: imports the command {target} (line {line})"
        for name, targets in graph(root).items()
        for target, line in targets.items()
        if target.startswith("core.commands.")
        and target != "core.commands.options"
        and not (name.startswith("core.commands.") and target.startswith((f"{name}_", f"{name}.")))
        and not (target.count(".") > 2 and name.rpartition(".")[0] == target.rpartition(".")[0])
    ]
