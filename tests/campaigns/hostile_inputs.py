"""Hostile files, made from valid ones: what is done to a JSON or YAML text, a safetensors file, a row, a number.

Everything here attacks limits and checks of this repository and is refused by them. Nothing is meant for the libraries
below: no input is known to crash or to slip past a check of any of them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from telechat_twins.core.checkpoint.pieces import manifest_digest
from telechat_twins.core.files.safetensors import file_sha256

ESCAPES = ("\x1b[2J\x1b[31m", "\x1b]0;title\x07", "a\rb", "line\nbreak", "\u202egnp.exe", "\x9b31m", "\x7f\x08\x08")


@dataclass(frozen=True)
class Case:
    """One command on one hostile input. ``may_pass``: it may also succeed, if what it prints is clean."""

    name: str
    words: tuple[str, ...]
    may_pass: bool = False


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


# Of JSON.


def hostile_json(rng: random.Random, valid: dict[str, Any]) -> tuple[str, bytes]:
    """(what was done, a text that is no valid description of anything)."""
    inner = dumps(valid)[1:-1]

    def with_member(member: bytes) -> bytes:
        return b"{" + member + b", " + inner + b"}"

    attacks: dict[str, Callable[[], bytes]] = {
        "deep nesting": lambda: with_member(b'"x": ' + rng.choice([b"[", b'{"a":']) * rng.randint(2_000, 200_000)),
        "key twice": lambda: with_member(
            b", ".join(b'"k%d": 0' % n for n in range(rng.randint(2, 40_000))) + b', "k0": 1'
        ),
        "digits": lambda: with_member(b'"x": ' + b"9" * rng.randint(41, 100_000)),
        "beyond range": lambda: with_member(
            b'"x": ' + rng.choice([b"1e999", b"-1e400", b"NaN", b"Infinity", b"-Infinity"])
        ),
        "many values": lambda: with_member(
            b'"x": [' + rng.choice([b"[],", b"{},", b"0,"]) * rng.randint(600_001, 3_000_000) + b"0]"
        ),
        "too large": lambda: with_member(b'"x": "' + b"a" * rng.randint((32 << 20) + 1, 40 << 20) + b'"'),
        "wide characters": lambda: with_member(
            '"x": "\U0001f600'.encode() + b"a" * rng.randint(9 << 20, 12 << 20) + b'"'
        ),
        "surrogate": lambda: with_member(b'"x\\ud8%02x": 0' % rng.randrange(256)),
        "not UTF-8": lambda: with_member(b'"x": "' + rng.choice([b"\xff", b"\xc0\xaf", b"\xed\xa0\x80"]) + b'"'),
        "truncated": lambda: dumps(valid)[: rng.randrange(len(dumps(valid)) - 1)],
        "no object": lambda: rng.choice([b"[]", b"0", b"null", b'"text"', b"true", b"", b"\0" * 100]),
        "trailing": lambda: dumps(valid) + rng.choice([b"{}", b"]", b",", b"\0"]),
    }
    name = rng.choice(list(attacks))
    return name, attacks[name]()


BAD_SIZES = (0, -1, 2**31, 2**63 - 1, 10**30, 1.5, "48", True, [48], {"a": 1}, 1e300)


# Of safetensors.


def safetensors_bytes(header: bytes, data: int = 0) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(data)


def hostile_safetensors(rng: random.Random, path: Path) -> str:
    """Write a hostile file at ``path``; what was done."""
    entry: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    shapes = (
        [0] * rng.randint(33, 5_000),
        [2**62, 2**62],
        [2**63],
        [10**39],
        [-1],
        [-(2**40), -1],
        [1.0, 8],
        [True],
        "2",
        None,
        [[2]],
        [2, "x"],
        [2**32, 2**32, 2**32],
        [3],
    )
    offsets = ([8, 0], [-8, 0], [0, 2**63], [0, 10**39], [0, 8, 16], [0], 8, None, [0.0, 8.0], [4, 12], [0, 7])
    kinds: dict[str, Callable[[], bytes]] = {
        "shape": lambda: safetensors_bytes(dumps({"a": {**entry, "shape": rng.choice(shapes)}}), 8),
        "offsets": lambda: safetensors_bytes(dumps({"a": {**entry, "data_offsets": rng.choice(offsets)}}), 8),
        "dtype": lambda: safetensors_bytes(
            dumps({"a": {**entry, "dtype": rng.choice(["F128", "f32", "", 3, None, ["F32"], "x" * 100_000])}}), 8
        ),
        "entry": lambda: safetensors_bytes(dumps({"a": rng.choice([3, [], {}, {**entry, "more": 1}, "x", None])}), 8),
        "overlap": lambda: safetensors_bytes(dumps({"a": entry, rng.choice(ESCAPES): entry}), 8),
        "gap": lambda: safetensors_bytes(dumps({rng.choice(ESCAPES): {**entry, "data_offsets": [8, 16]}}), 16),
        "short": lambda: safetensors_bytes(dumps({"a": entry}), rng.randrange(8)),
        "long": lambda: safetensors_bytes(dumps({"a": entry}), rng.randint(9, 10_000)),
        "metadata": lambda: safetensors_bytes(
            dumps({"__metadata__": rng.choice([[], "x", {"a": 1}, {"a": {}}, 3]), "a": entry}), 8
        ),
        "long name": lambda: safetensors_bytes(
            dumps({"n" * rng.randint(100_000, 3_000_000): {**entry, "shape": [3]}}), 8
        ),
        "header length": lambda: (
            struct.pack("<Q", rng.choice([1, 7, 2**40, 2**63, 2**64 - 1])) + dumps({"a": entry}) + bytes(8)
        ),
        "json": lambda: safetensors_bytes(hostile_json(rng, {"a": entry})[1], 8),
        "tiny": lambda: rng.randbytes(rng.randrange(8)),
    }
    name = rng.choice([*kinds, "large header"])
    if name == "large header":
        length = rng.randint((32 << 20) + 1, 1 << 30)
        with open(path, "wb") as file:  # sparse: it takes no room on the disk
            file.write(struct.pack("<Q", length) + b"{")
            file.truncate(8 + length)
    else:
        path.write_bytes(kinds[name]())
    return name


def hostile_place(rng: random.Random, path: Path, there: bool = False) -> str:
    """Something that is no file of any use, under the name of one; ``there``: and not just nothing."""
    path.unlink(missing_ok=True)
    kinds = ["pipe", "device", "folder", "sparse", "no file", "link that dangles", "link to itself"]
    name = rng.choice(kinds[:4] if there else kinds)
    if name == "pipe":
        os.mkfifo(path)
    elif name == "device":
        path.symlink_to(rng.choice(["/dev/zero", "/dev/urandom", "/dev/null", "/dev/full"]))
    elif name == "folder":
        path.mkdir()
    elif name == "link that dangles":
        path.symlink_to("nowhere")
    elif name == "link to itself":
        path.symlink_to(path.name)
    elif name == "sparse":
        with open(path, "wb") as file:
            file.truncate(rng.randint(1 << 27, 1 << 40))
    return name


# Of YAML.


def hostile_yaml(rng: random.Random, valid: str) -> tuple[str, bytes]:
    """(what was done, a text that is refused wherever a config is read)."""
    levels = rng.randint(8, 40)
    fan = rng.randint(3, 9)
    bomb = "x0: &x0 [1, 2]\n" + "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * fan)}]\n" for n in range(1, levels))
    merge = "x0: &x0 {k: 1}\n" + "".join(
        f"x{n}: &x{n}\n  <<: [{', '.join([f'*x{n - 1}'] * fan)}]\n" for n in range(1, levels)
    )
    attacks: dict[str, Callable[[], str]] = {
        "aliases": lambda: bomb + valid,
        "merges": lambda: merge + valid,
        "cycle": lambda: f"x: &x {rng.choice(['[*x]', '{a: *x}', '[[[*x]]]'])}\n" + valid,
        "deep nesting": lambda: "x: " + rng.choice(["[", "{a: "]) * rng.randint(100, 20_000) + "\n" + valid,
        "deep block": lambda: "".join(" " * n + "a:\n" for n in range(rng.randint(70, 400))),
        "key twice": lambda: valid + "".join(f"k{n}: 0\n" for n in range(rng.randint(1, 2_000))) + "k0: 1\n",
        "unknown key": lambda: (
            valid + rng.choice([json.dumps(rng.choice(ESCAPES)), "y" * 100_000, "123456", "~"]) + ": 0\n"
        ),
        "many values": lambda: valid + "x: [" + "0, " * rng.randint(10_001, 30_000) + "0]\n",
        "tag": lambda: valid + "x: " + rng.choice(["!!int zzz", "!unknown 1", "!!binary '*'", "!!float x"]) + "\n",
        "digits": lambda: valid + f"x: {rng.choice('-+ ')}{'9' * rng.randint(41, 60_000)}\n",
        "too large": lambda: valid + "#" * rng.randint(1 << 17, 1 << 22),
        "not UTF-8": lambda: valid + "x: \udcff\n",
        "control character": lambda: valid + f"x: {rng.choice(chr(0) + chr(27) + chr(7))}\n",
        "root": lambda: rng.choice(["", "3", "[]", "text", "- a\n- b\n", "~", "--- 1\n--- 2\n"]),
        "syntax": lambda: valid + rng.choice(["x: [1", "x: 'a", "\tx: 1", "x: {a", "? [a]: b", "*a", "x: @"]) + "\n",
    }
    name = rng.choice(list(attacks))
    return name, attacks[name]().encode("utf-8", "surrogateescape")


def hostile_value(rng: random.Random) -> str:
    """A value that no numeric option of a config has, in YAML."""
    return rng.choice(
        [
            "-1",
            "1e999",
            ".inf",
            ".nan",
            "9" * rng.randint(20, 5_000),
            "[1, 2]",
            "{a: 1}",
            '"\\e[31m"',
            "1.5.2",
            "~",
            "x" * 5_000,
        ]
    )


# Of rows.


def hostile_row(rng: random.Random, dialogue: bool) -> tuple[str, bytes]:
    """(what was done, one line of a .jsonl that is refused)."""
    valid: dict[str, Any] = {"text": "word"}
    if dialogue:
        valid = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    deep = b'{"text": ' + rng.choice([b"[", b'{"a":']) * rng.randint(2_000, 100_000)
    attacks: dict[str, Callable[[], bytes]] = {
        "line too long": lambda: b'{"text": "' + b"a" * rng.randint(4 << 20, 24 << 20) + b'"}',
        "wide characters": lambda: b'{"text": "\xf0\x9f\x98\x80' + b"a" * rng.randint(5 << 20, 8 << 20) + b'"}',
        "many values": lambda: (
            b'{"text": [' + rng.choice([b"[],", b"{},", b"0,"]) * rng.randint(200_001, 2_000_000) + b"0]}"
        ),
        "deep nesting": lambda: deep,
        "digits": lambda: b'{"text": ' + b"9" * rng.randint(4_301, 100_000) + b"}",
        "not UTF-8": lambda: b'{"text": "\xff"}',
        "surrogate": lambda: (
            dumps(valid)[:-1] + b', "text": "\\ud800"}' if not dialogue else dumps(valid).replace(b'"a"', b'"\\udfff"')
        ),
        "no object": lambda: rng.choice([b"[]", b"3", b'"x"', b"null", b"tru", b"{", b"\0"]),
        "keys": lambda: dumps({rng.choice(ESCAPES): 1, "n" * rng.randint(1, 1_000_000): 2}),
        "content": lambda: dumps(
            {"messages": [{"role": "user", "content": rng.choice([3, [3], {}, True])}]}
            if dialogue
            else {"text": rng.choice([3, [], {}, None])}
        ),
        "role": lambda: dumps(
            {"messages": [{"role": rng.choice([*ESCAPES, "r" * 100_000, 3, None]), "content": "x"}]}
            if dialogue
            else {"messages": []}
        ),
        "list": lambda: dumps({"messages": rng.choice([{}, "x", 3, [], [3], [[]]])} if dialogue else {"text": ["x"]}),
    }
    name = rng.choice(list(attacks))
    return name, attacks[name]()


# Of tables.


def hostile_table(rng: random.Random) -> tuple[str, bytes]:
    """(what was done, a .csv of losses that is refused)."""
    rows = "".join(f"{2**n},{4 - n / 8}\n" for n in range(6))
    attacks: dict[str, Callable[[], str]] = {
        "number": lambda: (
            "parameters,loss\n"
            + rows
            + f"{rng.choice(['1e999', 'nan', '-inf', '-3', '0', '9' * rng.randint(400, 100_000), 'x', ESCAPES[0]])},3\n"
        ),
        "columns": lambda: "parameters,loss," + ",".join(f"c{n}" for n in range(rng.randint(1, 50_000))) + "\n" + rows,
        "row": lambda: "parameters,loss\n" + rows + "1," * rng.randint(2, 100_000) + "\n",
        "column": lambda: f"parameters,{rng.choice(['l' * 100_000, ESCAPES[1], 'losses', ''])}\n" + rows,
        "too large": lambda: "parameters,loss\n" + "#" * rng.randint((1 << 20) + 1, 1 << 22),
        "not UTF-8": lambda: "parameters,loss\n\udcff\n",
        "nothing": lambda: rng.choice(["", "\n" * 10_000, "#\n" * 1_000, "parameters,loss\n"]),
        "twice": lambda: "parameters,loss\n" + rows + rows,
    }
    name = rng.choice(list(attacks))
    return name, attacks[name]().encode("utf-8", "surrogateescape")


# Of checkpoints.


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and give it the digest that belongs to it, as an attacker can."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest.pop("digest")
    change(manifest)
    path.write_text(json.dumps({**manifest, "digest": manifest_digest(manifest)}), encoding="utf-8")


def replace_listed(folder: Path, name: str, data: bytes) -> None:
    """Replace a file of a checkpoint and list the new one."""
    (folder / name).write_bytes(data)
    facts = {"size": len(data), "sha256": file_sha256(folder / name)}
    rewrite_manifest(folder, lambda manifest: manifest["files"].update({name: facts}))


class Damage(NamedTuple):
    """A checkpoint to damage: its manifest, one tensor of it, and a file outside of its folder."""

    manifest: dict[str, Any]
    tensor: dict[str, Any]
    outside: Path

    @property
    def piece(self) -> dict[str, Any]:
        return self.tensor["pieces"][0]

    @property
    def facts(self) -> dict[str, Any]:
        """Size and hash of the file outside, as a manifest lists them."""
        return {"size": self.outside.stat().st_size, "sha256": file_sha256(self.outside)}


def _escape(rng: random.Random, it: Damage) -> None:
    name = rng.choice(["../outside.json", str(it.outside), "assets/../../outside.json", "a\0b"])
    it.manifest["files"][name] = it.facts


def _link(rng: random.Random, it: Damage) -> None:
    it.manifest["files"]["link.json"] = it.facts


def _pieces(rng: random.Random, it: Damage) -> None:
    it.tensor["pieces"] = rng.choice([[], None, 3, it.tensor["pieces"] * rng.choice([2, 20_000]), [{}], [[]]])


def _sizes(rng: random.Random, it: Damage) -> None:
    wrong = [[-1, 0], [2**62, 1], [10**39], [], None, [0] * 500, [1.0]]
    it.piece[rng.choice(["offset", "extent"])] = rng.choice(wrong)


def _shape(rng: random.Random, it: Damage) -> None:
    it.tensor["shape"] = rng.choice([[2**61, 4], [-1], [0] * 1_000, "x", None, [10**30], [2**61] * 30])


def _kinds(rng: random.Random, it: Damage) -> None:
    it.manifest["tensors"] = rng.choice([{}, [], None, {"weights": 3}, {"weights": {}, "optimizer": []}])


def _step(rng: random.Random, it: Damage) -> None:
    it.manifest["step"] = rng.choice(["x", None, [], {}])


def _version(rng: random.Random, it: Damage) -> None:
    wrong = [2**70, "x" * 1_000_000, [[]] * 10_000, ESCAPES[0], None]
    it.manifest[rng.choice(["version", "format"])] = rng.choice(wrong)


def _unlisted(rng: random.Random, it: Damage) -> None:
    it.piece["file"] = rng.choice(["nowhere.safetensors", "../outside.json", ESCAPES[1], "f" * 100_000])


def _boxes(rng: random.Random, it: Damage) -> None:
    """Thousands of boxes of one tensor, half of them along each axis."""
    n, piece = rng.randint(1_000, 8_000), it.piece
    boxes = it.manifest["tensors"]["optimizer"].setdefault("boxes", {**it.tensor, "shape": [n, 2 * n]})
    across = [{**piece, "offset": [i, 0], "extent": [1, n]} for i in range(n)]
    boxes["pieces"] = across + [{**piece, "offset": [0, n + i], "extent": [n, 1]} for i in range(n)]


MANIFEST_DAMAGE: dict[str, Callable[[random.Random, Damage], None]] = {
    "escape": _escape,
    "link": _link,
    "pieces": _pieces,
    "sizes": _sizes,
    "shape": _shape,
    "kinds": _kinds,
    "step": _step,
    "version": _version,
    "unlisted": _unlisted,
    "boxes": _boxes,
}


def hostile_manifest(rng: random.Random, folder: Path) -> str:
    """Damage a canonical checkpoint in a way that only our checks can notice, not the hashes. Returns what was done."""
    name = rng.choice([*MANIFEST_DAMAGE, "model", "trainer", "text"])
    outside = folder.parent / "outside.json"
    outside.write_bytes((folder / "model.json").read_bytes())

    def change(manifest: dict[str, Any]) -> None:
        weights = manifest["tensors"]["weights"]
        MANIFEST_DAMAGE[name](rng, Damage(manifest, weights[rng.choice(list(weights))], outside))

    if name == "link":
        (folder / "link.json").symlink_to(outside)
    if name in ("model", "trainer"):
        what, data = hostile_json(rng, json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
        replace_listed(folder, f"{name}.json", data)
        return f"{name}, {what}"
    if name == "text":
        what, data = hostile_json(rng, json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
        if what in ("too large", "many values", "wide characters"):  # a manifest may be larger than other JSON
            what, data = "no object", b"[]"
        (folder / "manifest.json").write_bytes(data)
        return what
    rewrite_manifest(folder, change)
    return name


def copy_tree(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, symlinks=True)
    return target


def numbers() -> Iterator[str]:
    """Numbers that no option takes."""
    yield from ("9" * 5_000, "9" * 400, str(2**63), str(-(2**63)), "nan", "0x10", "1e3", "", "-1")
