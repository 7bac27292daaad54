"""Seeded damage to the files of a folder: flipped bits, truncation, swapped files, zeroed pages, edited JSON."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = 4096
NUMBERS: tuple[Any, ...] = (0, 1, -1, 2, 7, 1e-3, 0.5, 3.0, 1000, 10**6, True, None, "1", [], {}, float("inf"))


@dataclass(frozen=True)
class Damage:
    """``kind``: a key of KINDS; ``file``: the damaged file's path in the folder; ``said``: what was done to it."""

    kind: str
    file: str
    said: str


def corrupt(folder: Path, other: Path, seed: int) -> Damage:
    """Damage one file of ``folder``, as ``seed`` decides. ``other`` is an intact folder of the same format with other
    content: where files come from that belong elsewhere."""
    rng = random.Random(seed)
    for _ in range(100):
        kind = rng.choice(list(KINDS))
        pattern = "*.json" if kind == "json" else "*"
        files = sorted(path for path in folder.rglob(pattern) if path.is_file())
        if not files:
            continue
        path = rng.choice(files)
        if said := KINDS[kind](rng, path, folder, other):
            return Damage(kind, str(path.relative_to(folder)), said)
    raise AssertionError(f"{folder}: nothing in it could be damaged")


def _flip_bits(rng: random.Random, path: Path, folder: Path, other: Path) -> str | None:
    data = bytearray(path.read_bytes())
    if not data:
        return None
    places = [rng.randrange(len(data) * 8) for _ in range(rng.choice((1, 1, 1, 2, 16)))]
    for place in places:
        data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    return f"bits {places[:3]}"


def _truncate(rng: random.Random, path: Path, folder: Path, other: Path) -> str | None:
    size = path.stat().st_size
    if size < 2:
        return None
    left = rng.choice((rng.randrange(size), size - 1, size // 2, size // PAGE * PAGE, 0))
    if left == size:
        return None
    os.truncate(path, left)
    return f"{left} of {size} bytes are left"


def _append(rng: random.Random, path: Path, folder: Path, other: Path) -> str | None:
    data = rng.choice((b"\0", b"\n", b" ", b"x", bytes(PAGE), rng.randbytes(rng.randrange(1, 200))))
    with open(path, "ab") as file:
        file.write(data)
    return f"{len(data)} bytes"


def _zero_page(rng: random.Random, path: Path, folder: Path, other: Path) -> str | None:
    data = bytearray(path.read_bytes())
    size = rng.choice((PAGE, 512, 64))
    if len(data) < 16:
        return None
    start = rng.randrange(0, len(data), size)
    end = min(start + size, len(data))
    if not any(data[start:end]):
        return None
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    return f"bytes {start} to {end}"


def _overwrite(rng: random.Random, path: Path, folder: Path, other: Path) -> str | None:
    data = bytearray(path.read_bytes())
    if not data:
        return None
    start = rng.randrange(len(data))
    count = min(rng.choice((1, 8, 64, 1024)), len(data) - start)
    before, data[start : start + count] = data[start : start + count], rng.randbytes(count)
    if data[start : start + count] == before:
        return None
    path.write_bytes(data)
    return f"bytes {start} to {start + count}"


def _swap(rng: random.Random, path: Path, folder: Path, other: Path) -> str | None:
    others = sorted(p for p in folder.rglob(f"*{path.suffix}") if p.is_file() and p != path)
    if not others:
        return None
    second = rng.choice(others)
    first_data, second_data = path.read_bytes(), second.read_bytes()
    path.write_bytes(second_data)
    second.write_bytes(first_data)
    return f"with {second.relative_to(folder)}"


def _replace(rng: random.Random, path: Path, folder: Path, other: Path) -> str | None:
    twin = other / path.relative_to(folder)
    if not twin.is_file() or twin.read_bytes() == path.read_bytes():
        return None
    shutil.copyfile(twin, path)
    return "by that of another folder"


def _remove(rng: random.Random, path: Path, folder: Path, other: Path) -> str | None:
    path.unlink()
    return "the whole file"


def _edit_json(rng: random.Random, path: Path, folder: Path, other: Path) -> str | None:
    value = json.loads(path.read_text(encoding="utf-8"))
    nodes = list(_nodes(value))
    if not nodes:
        return None
    container, key = rng.choice(nodes)
    action = rng.choice(("remove", "change", "change", "rename", "nudge"))
    before = container[key]
    if action == "remove":
        del container[key]
    elif action == "rename" and isinstance(container, dict):
        container[key + "x"] = container.pop(key)
    elif action == "nudge" and isinstance(before, (int, float)) and not isinstance(before, bool):
        container[key] = before + rng.choice((1, -1, before))
    else:
        container[key] = rng.choice(NUMBERS)
    path.write_text(json.dumps(value), encoding="utf-8")
    return f"{action} {key!r} ({str(before)[:30]} -> {str(_get(container, key))[:30]})"


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        pairs = [(value, key) for key in value]
    elif isinstance(value, list):
        pairs = [(value, place) for place in range(len(value))]
    for container, key in pairs:
        yield container, key
        yield from _nodes(container[key])


def _get(container: Any, key: Any) -> Any:
    try:
        return container[key]
    except (KeyError, IndexError):
        return "gone"


KINDS: dict[str, Callable[[random.Random, Path, Path, Path], str | None]] = {
    "bits": _flip_bits,
    "truncated": _truncate,
    "appended": _append,
    "zeroed": _zero_page,
    "overwritten": _overwrite,
    "swapped": _swap,
    "replaced": _replace,
    "removed": _remove,
    "json": _edit_json,
}
