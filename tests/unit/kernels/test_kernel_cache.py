"""The cache of compiled operators loads nothing that another user could have put there; what is planted is harmless."""

from __future__ import annotations

import grp
import os
import pwd
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from telechat_twins.kernels.cpu import build, cache
from tests.unit.kernels.test_cpu_kernels import ROOT

PLANTED = "planted.so"
BUILD = """
import sys
from telechat_twins.kernels.cpu import build
def compile_instead(cxx, library, *_):
    library.write_bytes(b"a library")
    library.chmod(0o700)
build._compile = compile_instead
print(build.build("small", ("registry.cc",), ["-std=c++17"], ["-shared"], ""))
"""


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home and a temporary folder of the test's own, and nothing said so far."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(cache, "_said", set())


def owned_by_another(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    """What lies at ``paths`` now seems to belong to user 4711."""
    inodes = {os.lstat(path).st_ino for path in paths}

    def status(path: Path) -> os.stat_result:
        found = list(os.lstat(path))
        if found[stat.ST_INO] in inodes:
            found[stat.ST_UID] = 4711
        return os.stat_result(found)

    monkeypatch.setattr(cache, "_status", status)


def plant_link(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = folder.parent / "elsewhere"
    target.mkdir(parents=True)
    folder.symlink_to(target)


def plant_group(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o770)


def plant_world(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def plant_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    owned_by_another(monkeypatch, folder)


def plant_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("not a folder")


PLANTS = {
    plant_link: "is a symbolic link",
    plant_group: "can be written by other users (mode 770)",
    plant_world: "can be written by other users (mode 777)",
    plant_other: "belongs to user 4711, not to user",
    plant_file: "is not a folder",
}
Plant = Callable[[Path, pytest.MonkeyPatch], None]


def read_only_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not stop root, so a file stands where the cache folder would be made."""
    (tmp_path / "home" / ".cache").write_text("")


def assert_private(folder: Path) -> None:
    found = folder.lstat()
    assert stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o700 and found.st_uid == os.geteuid()


def test_the_homes_cache_is_made_for_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0)
    try:
        folder = cache.cache_folder()
    finally:
        os.umask(before)
    assert folder == tmp_path / "home" / ".cache" / "telechat-twins"
    assert_private(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "given"))
    assert cache.cache_folder() == tmp_path / "given" / "telechat-twins"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.cache_folder() == folder


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("where", ["home", "given", "temporary"])
def test_a_planted_folder_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], plant: Plant, where: str
) -> None:
    folder = tmp_path / "home" / ".cache" / "telechat-twins"
    if where == "given":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "given"))
        folder = tmp_path / "given" / "telechat-twins"
    elif where == "temporary":
        read_only_home(tmp_path, monkeypatch)
        folder = tmp_path / "tmp" / f"telechat-twins-{os.geteuid()}"
    plant(folder, monkeypatch)
    used = cache.cache_folder()
    assert used.parent == folder.parent and used != folder
    assert_private(used)
    said = capsys.readouterr().err
    assert said.count("note:") == 1 and PLANTS[plant] in said and str(folder) in said and str(used) in said
    assert cache.cache_folder() == used  # the second start finds the first one's
    assert capsys.readouterr().err == ""


def test_planted_stand_ins_are_not_used_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "home" / ".cache" / "telechat-twins"
    names = [folder, *(folder.with_name(f"telechat-twins-{n}") for n in range(1, 20))]
    for path in names:
        plant_world(path, monkeypatch)
    used = cache.cache_folder()
    assert used not in names and used.parent == folder.parent
    assert_private(used)


def test_a_cache_home_that_all_can_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others could rename what is made there. A sticky one, as temporary folders are, they cannot."""
    given = tmp_path / "given"
    given.mkdir()
    given.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(given / "deeper"))
    assert cache.cache_folder() == tmp_path / "tmp" / f"telechat-twins-{os.geteuid()}"
    assert f"all users can write {given} (mode 777)" in capsys.readouterr().err
    given.chmod(0o1777)
    assert cache.cache_folder() == given / "deeper" / "telechat-twins"


def test_a_cache_home_that_a_shared_group_can_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    given.chmod(0o775)
    monkeypatch.setenv("XDG_CACHE_HOME", str(given))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_private_group", lambda gid: False)
        assert cache.cache_folder() == tmp_path / "tmp" / f"telechat-twins-{os.geteuid()}"
    assert f"group {given.stat().st_gid} can write {given} (mode 775)" in capsys.readouterr().err
    monkeypatch.setattr(cache, "_private_group", lambda gid: True)
    assert cache.cache_folder() == given / "telechat-twins"


def test_a_private_group_has_the_users_name_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_gid=7, pw_name="ada"))
    groups = {7: ("ada", []), 8: ("ada", []), 9: ("staff", [])}
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=groups[gid][0], gr_mem=groups[gid][1]))
    assert [cache._private_group(gid) for gid in (0, 7, 8, 9, 10)] == [True, True, False, False, False]
    groups[7] = ("ada", ["ada", "bob"])
    assert not cache._private_group(7)


@pytest.mark.parametrize("whose", ["given", "given/deeper"])
def test_a_cache_home_within_another_users_folder_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], whose: str
) -> None:
    """That user could rename what lies there, between our look and our loading."""
    (tmp_path / "given" / "deeper").mkdir(parents=True)
    owned_by_another(monkeypatch, tmp_path / whose)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "given" / "deeper"))
    assert cache.cache_folder() == tmp_path / "tmp" / f"telechat-twins-{os.geteuid()}"
    assert f"{tmp_path / whose} belongs to user 4711" in capsys.readouterr().err


def test_without_a_home_the_temporary_folder_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    folder = cache.cache_folder()
    assert folder == tmp_path / "tmp" / f"telechat-twins-{os.geteuid()}"
    assert_private(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "home" / "none" / "\0"))
    with pytest.raises((OSError, ValueError)):
        cache.cache_folder()


def small_build() -> Path:
    return build.build("small", ("registry.cc",), ["-std=c++17"], ["-shared"], "")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The libraries that were compiled; nothing is, really."""
    done: list[Path] = []

    def compile_instead(cxx: str, library: Path, *_: object) -> None:
        library.write_bytes(b"a library")
        library.chmod(0o700)
        done.append(library)

    monkeypatch.setattr(build, "_compile", compile_instead)
    return done


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_folder_of_a_build_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[Path], plant: Plant
) -> None:
    """As a cache may hold that once was open to others and no longer is."""
    library = small_build()
    for path in library.parent.iterdir():
        path.unlink()
    library.parent.rmdir()
    plant(library.parent, monkeypatch)
    if library.parent.is_dir():
        (library.parent / library.name).write_bytes(b"planted")
    assert small_build() == library and library.read_bytes() == b"a library" and len(compiled) == 2
    assert_private(library.parent)
    assert small_build() == library and len(compiled) == 2


@pytest.mark.parametrize("kind", ["link", "writable", "other"])
def test_a_planted_library_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[Path], kind: str
) -> None:
    library = small_build()
    assert small_build() == library and len(compiled) == 1
    if kind == "link":
        (tmp_path / PLANTED).write_bytes(b"planted")
        library.unlink()
        library.symlink_to(tmp_path / PLANTED)
    else:
        library.write_bytes(b"planted")
        library.chmod(0o770 if kind == "writable" else 0o700)
    if kind == "other":
        owned_by_another(monkeypatch, library)
        kept = os.open(library, os.O_RDONLY)  # or the new file could get its inode, by which it is known here
    assert small_build() == library and library.read_bytes() == b"a library" and len(compiled) == 2
    if kind == "other":
        os.close(kept)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path, compiled: list[Path]) -> None:
    library = small_build()
    library.unlink()
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (library.parent / "lock").unlink()
    (library.parent / "lock").symlink_to(precious)
    with pytest.raises(build.BuildError, match="the compiled library cannot be stored"):
        small_build()
    assert precious.read_text() == "kept"


def test_starts_at_once_agree_on_one_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes beside a planted folder: one compiles, and all load the same library."""
    plant_world(tmp_path / "home" / ".cache" / "telechat-twins", monkeypatch)
    command = [sys.executable, "-c", BUILD]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(4)
    ]
    told = [process.communicate() for process in started]
    assert len({out for out, _ in told}) == 1 and "telechat-twins-1" in told[0][0]
    assert sum("building" in err for _, err in told) == 1


@pytest.mark.parametrize("installed", [True, False])
def test_the_command_compiles_what_each_twin_loads(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: object() if installed else None)
    for name in ("load_plain", "load_extension"):
        monkeypatch.setattr(build, name, lambda name=name: made.append(name))
    assert build.main() == 0
    assert made == (["load_plain", "load_extension"] if installed else ["load_plain"])
