"""What a rank writes down before it waits, and what a launcher makes of it."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from telechat_twins.core.launch import heartbeat as beating
from telechat_twins.core.launch.heartbeat import (
    RECORD_BYTES,
    Heartbeat,
    HeartbeatRecord,
    Waits,
    heartbeat_path,
    open_heartbeat,
    place_heartbeat,
    read_heartbeat,
)
from tests.house import ROOT


def read(heart: Heartbeat) -> HeartbeatRecord:
    record = read_heartbeat(heart.path)
    assert record is not None
    return record


def test_what_is_written_is_read(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path / "h")
    assert read(heart) == HeartbeatRecord(0, False, 0.0, "", "", (), 0)
    before = time.time()
    heart.enter("all_reduce", "tp", (4, 5))
    first = read(heart)
    assert first[1:2] + first[3:] == (True, "all_reduce", "tp", (4, 5), 2)
    assert before <= first.since <= time.time()
    heart.leave()
    assert read(heart) == first._replace(sequence=2, inside=False), "the last one stays known"
    heart.enter("all_gather", "dp", [1, 3])
    assert read(heart)[3:] == ("all_gather", "dp", (1, 3), 2)
    assert os.path.getsize(heart.path) == RECORD_BYTES


def test_members_are_those_of_the_call(tmp_path: Path) -> None:
    """A group's bytes are kept by op and name; another tuple, or a list that was changed, must not get the old ones."""
    heart = Heartbeat(tmp_path / "h")
    members = [0, 1]
    for ranks in ((0, 1), (2, 3), members, range(4)):
        heart.enter("send", "pp", ranks)
        assert read(heart).ranks == tuple(ranks)
        heart.leave()
    members.append(7)
    heart.enter("send", "pp", members)
    assert read(heart).ranks == (0, 1, 7)


def test_long_names_and_large_groups_fit(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path / "h")
    heart.enter("o" * 100, "\u7fa4" * 100, range(1000))
    record = read(heart)
    assert (record.op, record.group) == ("o" * 32, "\u7fa4" * 21), "cut between characters"
    assert (record.ranks, record.size) == (tuple(range(64)), 1000)


def test_of_nested_collectives_the_outer_one_is_recorded(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path / "h")
    heart.enter("all_to_all", "ulysses", (0, 1))
    outer = read(heart)
    heart.enter("send", "link", (0, 1))
    assert read(heart) == outer
    heart.leave()
    assert read(heart) == outer, "still inside"
    heart.leave()
    assert not read(heart).inside
    with pytest.raises(RuntimeError, match="without enter"):
        heart.leave()


@pytest.mark.parametrize("data", [None, b"", b"\0" * 10, b"\0" * (RECORD_BYTES - 1)])
def test_no_record_where_there_is_none(data: bytes | None, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "h").write_bytes(data)
    assert read_heartbeat(tmp_path / "h") is None


def test_a_write_half_way_is_not_read(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path / "h")
    heart.enter("all_reduce", "tp", (0, 1))
    data = bytearray(heart.path.read_bytes())
    data[0] += 1
    heart.path.write_bytes(data)
    assert read_heartbeat(heart.path) is None


def write_pairs(path: str) -> None:
    heart = Heartbeat(path)
    while True:
        for number in range(8):
            heart.enter(f"op{number}" * 6, f"group{number}" * 8, (number,) * 60)
            heart.leave()


def test_a_reader_never_sees_two_records_mixed(tmp_path: Path) -> None:
    """The names, the ranks and the state belong to one write, however the two processes meet."""
    writer = multiprocessing.get_context("fork").Process(target=write_pairs, args=(str(tmp_path / "h"),), daemon=True)
    writer.start()
    try:
        seen = set()
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            record = read_heartbeat(tmp_path / "h")
            if record is None or not record.op:
                continue
            number = record.ranks[0]
            assert record.ranks == (number,) * 60
            assert (record.op, record.group) == ((f"op{number}" * 6)[:32], (f"group{number}" * 8)[:64])
            assert record.inside == (record.sequence % 2 == 1)
            seen.add(record.sequence)
        assert len(seen) > 10  # of some thousands on an idle machine
    finally:
        writer.kill()
        writer.join()


def test_a_pair_of_calls_is_cheap(tmp_path: Path) -> None:
    heart, ranks = Heartbeat(tmp_path / "h"), tuple(range(64))
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(1000):
            heart.enter("all_reduce", "tp", ranks)
            heart.leave()
        best = min(best, (time.perf_counter() - started) / 1000)
    assert best < 5e-6, "measured 0.7 microseconds"


def test_the_heartbeat_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beating, "_path", None)
    monkeypatch.setattr(beating, "_opened", None)
    assert open_heartbeat() is None, "a raw launcher says no place"
    place_heartbeat(tmp_path / "no such folder" / "h")
    assert open_heartbeat() is None, "a report less, not a run less"
    place_heartbeat(heartbeat_path(tmp_path, 3))
    heart = open_heartbeat()
    assert heart is not None and heart is open_heartbeat()
    assert heart.path == tmp_path / "heartbeat_3.bin" and heart.path.exists()


def test_a_launched_script_has_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from telechat_twins.core.launch.heartbeat import open_heartbeat\n"
        "open_heartbeat().enter('recv', 'pp', (1, 2))\n"
    )
    command = [sys.executable, str(ROOT / "core" / "launch" / "worker.py"), "--status-dir", str(tmp_path), str(script)]
    subprocess.run(command, check=True, env={**os.environ, "RANK": "2"})
    record = read_heartbeat(heartbeat_path(tmp_path, 2))
    assert record is not None and (record.op, record.ranks, record.inside) == ("recv", (1, 2), True)


def test_who_waits_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(beating.time, "monotonic", lambda: clock[0])
    waits = Waits(tmp_path, range(4, 8))
    assert waits.look(range(4, 8)) == (-1, 0.0)
    hearts = {rank: Heartbeat(heartbeat_path(tmp_path, rank)) for rank in (4, 5, 6)}
    assert waits.look(range(4, 8)) == (-1, 0.0), "in no collective"
    hearts[4].enter("all_reduce", "tp", (4, 5))
    hearts[5].enter("all_gather", "dp", (1, 5))
    hearts[5].leave()
    waits.look(range(4, 8))
    clock[0] = 103.0
    hearts[6].enter("barrier", "world", range(8))
    assert waits.look(range(4, 8)) == (4, 3.0)
    clock[0] = 112.5
    assert waits.look(range(4, 8)) == (4, 12.5)
    assert waits.look([5, 6, 7]) == (6, 9.5), "a rank that has ended waits for nothing"
    assert waits.describe(4) == "all_reduce over tp (ranks 4 5)"
    assert waits.table({4: "ops.py:7 wait", 5: "model.py:1 f"}) == [
        "rank  seconds  waits in                                                    at",
        "   4     12.5  all_reduce over tp (ranks 4 5)                              ops.py:7 wait",
        "   5        -  not in a collective (last: all_gather over dp (ranks 1 5))  model.py:1 f",
        "   6      9.5  barrier over world (ranks 0 1 2 3 4 5 6 7)                  unknown",
        "   7        -  (has entered no collective yet)                             unknown",
    ]
    # The same call once more is another wait.
    hearts[4].leave()
    hearts[4].enter("all_reduce", "tp", (4, 5))
    assert waits.look([4]) == (4, 0.0)


def test_the_wait_is_counted_by_the_watcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start time that lies (a clock that was set) changes nothing."""
    heart = Heartbeat(heartbeat_path(tmp_path, 0))
    with monkeypatch.context() as patched:
        patched.setattr(beating.time, "time", lambda: 1.0)
        heart.enter("all_reduce", "tp", (0, 1))
    rank, seconds = Waits(tmp_path, [0]).look([0])
    assert (rank, seconds) == (0, 0.0)
