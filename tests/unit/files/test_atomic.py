"""Files and folders that appear complete or not at all, with the process killed at each place where that matters."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from telechat_twins.core.data.packed import PackedDataset, PackedWriter, verify
from telechat_twins.core.errors import UserError, disk_full
from telechat_twins.core.files import atomic
from telechat_twins.core.files.atomic import (
    clean_stale,
    mark_lives,
    new_file,
    new_folder,
    process_mark,
    remove_folder,
    standing,
    write_text,
)
from tests.support.data_support import tiny_tokenizer


def killed_at(place: str, action: Callable[[], Any], call: int = 1) -> None:
    """Do ``action`` in a process that ends, as by a kill, at the ``call``-th call of ``place``."""
    pid = os.fork()
    if pid == 0:
        owner, name = (os, place[3:]) if place.startswith("os.") else (atomic, place)
        original, calls = getattr(owner, name), 0

        def counted(*words: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os._exit(9)
            return original(*words, **more)

        setattr(owner, name, counted)
        try:
            action()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9, "the place was not reached"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(path: Path, text: str) -> None:
    with new_folder(path) as building:
        (building / "a").write_text(text)
        (building / "b").write_text(text)


def texts(path: Path) -> set[str]:
    return {(standing(path) / name).read_text() for name in ("a", "b")}


def test_a_folder_is_exchanged_in_one_step(tmp_path: Path) -> None:
    make(tmp_path / "f", "old")
    killed_at("_exchange", lambda: make(tmp_path / "f", "new"))
    assert texts(tmp_path / "f") == {"old"}
    killed_at("_take_away", lambda: make(tmp_path / "f", "new"), call=2)  # the first is of what the kill before left
    assert (tmp_path / "f").is_dir() and texts(tmp_path / "f") == {"new"}
    assert len(names(tmp_path)) == 2, "the old one, under the hidden name"
    make(tmp_path / "g", "other")
    assert names(tmp_path) == ["f", "g"]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_where_names_cannot_be_exchanged_two_steps_do(call: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    make(tmp_path / "f", "old")
    killed_at("os.rename", lambda: make(tmp_path / "f", "new"), call)
    assert texts(tmp_path / "f") == {"new" if call == 3 else "old"}, "found under its name, where another command reads"
    clean_stale(tmp_path)
    assert names(tmp_path) == ["f"] and texts(tmp_path / "f") == {"new" if call == 3 else "old"}
    make(tmp_path / "f", "newer")
    assert names(tmp_path) == ["f"] and texts(tmp_path / "f") == {"newer"}


def test_the_old_folder_stays_when_the_new_one_cannot_come(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    make(tmp_path / "f", "old")
    rename = os.rename

    def refused(source: Any, target: Any, **more: Any) -> None:
        if Path(source).name.startswith(".tmp-tele-"):
            raise OSError(5, "Input/output error")
        rename(source, target, **more)

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(OSError, match="Input/output error"):
        make(tmp_path / "f", "new")
    assert names(tmp_path) == ["f"] and texts(tmp_path / "f") == {"old"}


def test_a_half_deleted_folder_never_comes_back(tmp_path: Path, monkeypatch: Any) -> None:
    make(tmp_path / "f", "x")
    monkeypatch.setattr(shutil, "rmtree", lambda path, **more: (Path(path) / "a").unlink() or os._exit(9))
    pid = os.fork()
    if pid == 0:
        remove_folder(tmp_path / "f")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    monkeypatch.undo()
    assert not (tmp_path / "f").exists() and standing(tmp_path / "f") == tmp_path / "f"
    clean_stale(tmp_path)
    assert names(tmp_path) == []


def test_what_earlier_versions_left_half_deleted_does_not_come_back_either(tmp_path: Path) -> None:
    """They deleted under the name from which a replaced folder is brought back."""
    without, short, whole = (tmp_path / f".old-tele-step-0000000{n}" for n in range(3))
    for folder in (without, short, whole):
        folder.mkdir()
        (folder / "weights").write_text("x" * (1 if folder == short else 4))
    for folder in (short, whole):
        (folder / "manifest.json").write_text('{"files": {"weights": {"size": 4, "sha256": ""}}}')
    assert standing(tmp_path / "step-00000001") == tmp_path / "step-00000001"
    clean_stale(tmp_path)
    assert names(tmp_path) == ["step-00000002"]


def test_a_small_file_is_whole_and_its_leftovers_go(tmp_path: Path) -> None:
    write_text(tmp_path / "latest", "one")
    killed_at("os.replace", lambda: write_text(tmp_path / "latest", "two"))
    assert len(names(tmp_path)) == 2 and (tmp_path / "latest").read_text() == "one"
    host = socket.gethostname()
    living = tmp_path / f".tmp-tele-latest-{host}-{process_mark(os.getppid())}"
    foreign = tmp_path / ".tmp-tele-latest-elsewhere-1.1"
    for path in (living, foreign):
        path.touch()
    write_text(tmp_path / "latest", "three")
    assert names(tmp_path) == sorted([living.name, foreign.name, "latest"])
    assert (tmp_path / "latest").read_text() == "three"


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(RuntimeError), new_file(tmp_path / "f") as beside:
        beside.write_text("ne")
        raise RuntimeError
    assert names(tmp_path) == ["f"] and (tmp_path / "f").read_text() == "old"


def test_a_process_is_not_taken_for_a_later_one_with_its_number(tmp_path: Path) -> None:
    assert mark_lives(process_mark()) and mark_lives(str(os.getpid()))
    number, _, start = process_mark().partition(".")
    for none in ("9" * 30, "9" * 5000, "\u00b2", "-1", ""):  # as a foreign file's name may end
        assert not mark_lives(none) and not mark_lives(f"{none}.5")
    assert not mark_lives(f"{number}.{int(start) - 1}") and not mark_lives("999999999.1") and not mark_lives("x")
    reused = tmp_path / f".tmp-tele-f-{socket.gethostname()}-{number}.{int(start) - 1}"
    reused.mkdir()
    clean_stale(tmp_path)
    assert names(tmp_path) == []


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    make(tmp_path / "disk" / "f", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "f")
    make(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and texts(tmp_path / "disk" / "f") == {"new"}
    assert names(tmp_path) == ["disk", "link"] and names(tmp_path / "disk") == ["f"]


def pack(out: Path, ids: list[int]) -> None:
    with PackedWriter(out, tiny_tokenizer(), "text", force=True) as writer:
        writer.start_document()
        writer.add_tokens(ids)
        writer.finish()


@pytest.mark.parametrize(
    ("exchange", "place", "call", "left"),
    [
        (True, "_exchange", 1, 20),
        (True, "_take_away", 1, 30),
        (False, "os.rename", 1, 20),
        (False, "os.rename", 2, 20),
        (False, "os.rename", 3, 30),
    ],
)
def test_a_data_set_is_never_lost(
    exchange: bool, place: str, call: int, left: int, tmp_path: Path, monkeypatch: Any
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    pack(tmp_path / "d", [20, 21, 2])
    killed_at(place, lambda: pack(tmp_path / "d", [30, 31, 2]), call)
    verify(tmp_path / "d")
    found = PackedDataset(tmp_path / "d")
    assert found.tokens.tolist() == [left, left + 1, 2]
    pack(tmp_path / "d", [40, 41, 2])
    assert names(tmp_path) == ["d"] and PackedDataset(tmp_path / "d").tokens.tolist() == [40, 41, 2]


def test_a_data_set_that_an_earlier_version_lost_is_found_again(tmp_path: Path) -> None:
    pack(tmp_path / "d", [20, 21, 2])
    (tmp_path / "d").rename(tmp_path / ".d.999999999.old")
    with pytest.raises(Exception, match="exists already"):
        PackedWriter(tmp_path / "d", tiny_tokenizer(), "text")
    assert names(tmp_path) == ["d"] and PackedDataset(tmp_path / "d").tokens.tolist() == [20, 21, 2]


def test_this_file_system_exchanges_names(tmp_path: Path) -> None:
    """Else the tests above have shown the second best way twice."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not atomic._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("renameat2 with RENAME_EXCHANGE is not to be had here")
    assert names(tmp_path / "a") == ["b"] and names(tmp_path / "b") == ["a"]
    assert not atomic._exchange(tmp_path / "a", tmp_path / "c") and names(tmp_path) == ["a", "b"]


def test_the_process_mark_outlives_a_clock_that_is_set(tmp_path: Path) -> None:
    """It counts from the machine's start: the same for as long as the process lives, whoever reads it."""
    other = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from telechat_twins.core.files.atomic import process_mark; print(process_mark({os.getpid()}))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == process_mark()


def test_a_write_that_fails_names_the_file_that_was_to_be(tmp_path: Path) -> None:
    """The error of a write has no file name, that of opening has the hidden one."""
    for name in (None, "hidden"):
        with pytest.raises(OSError) as error, new_file(tmp_path / "f.png") as beside:
            raise OSError(errno.ENOSPC, "No space left on device", *([str(beside)] if name else []))
        assert error.value.filename == str(tmp_path / "f.png") and not os.listdir(tmp_path)
        said = disk_full(error.value)
        assert said is not None and said.startswith(f"{tmp_path / 'f.png'}: cannot be written (the disk is full)")


def test_a_folder_in_place_of_a_text_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    with pytest.raises(UserError, match=r"best: cannot be written \(Is a directory\); choose another path"):
        write_text(tmp_path / "best", "step-00000004\n")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
