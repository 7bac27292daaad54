"""Background saves and the notice between ranks: one save at a time, errors that surface once, lost ranks."""

from __future__ import annotations

import errno
import os
import threading

import numpy as np
import pytest

from telechat_twins.core.checkpoint import notice as checkpoint_notice
from telechat_twins.core.checkpoint import save as checkpoint_save
from telechat_twins.core.checkpoint.read import Contents, Saver, SaveRanks, TensorPiece
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.direct_io import DirectFile
from tests.support.numpy_stepper import Cluster
from tests.unit.checkpoint.test_checkpoint_ranks import TENSORS, arguments, assert_complete, failing, names, save


class Gate:
    """Holds the writing of files until it is opened."""

    def __init__(self, monkeypatch):
        self.open, self.reached = threading.Event(), threading.Event()
        real = DirectFile.store

        def store(file, data, place):
            self.reached.set()
            assert self.open.wait(20)
            real(file, data, place)

        monkeypatch.setattr(DirectFile, "store", store)


def test_a_save_in_the_background_is_of_the_moment_it_was_asked_for(tmp_path, monkeypatch):
    gate, saver = Gate(monkeypatch), Saver()
    arrays = {name: array.copy() for name, array in TENSORS.items()}
    saver.save(tmp_path / "a", 1, Contents({}, arrays.items(), trainer={}), keep_last=3, asynchronous=True)
    for array in arrays.values():
        array[...] = 0  # training goes on
    assert gate.reached.wait(20) and saver.last is None and not (tmp_path / "a" / "latest").exists()
    gate.open.set()
    saver.wait()
    assert saver.last == tmp_path / "a" / "step-00000001"
    saver.save(tmp_path / "b", 1, Contents({}, TENSORS.items(), trainer={}), keep_last=3, asynchronous=False)
    left, right = ({p.name: p.read_bytes() for p in (tmp_path / x / "step-00000001").iterdir()} for x in "ab")
    assert left == right


def test_one_save_at_a_time(tmp_path, monkeypatch):
    """The second waits for the first, although it could be written at once."""
    gate, saver = Gate(monkeypatch), Saver()
    contents = Contents({}, TENSORS.items(), trainer={})
    saver.save(tmp_path, 1, contents, keep_last=3, asynchronous=True)
    second = threading.Thread(target=lambda: saver.save(tmp_path, 2, contents, keep_last=3, asynchronous=True))
    second.start()
    second.join(0.3)
    assert second.is_alive() and names(tmp_path) != [] and not (tmp_path / "step-00000001").exists()
    gate.open.set()
    second.join(20)
    assert not second.is_alive() and (tmp_path / "step-00000001").exists()
    saver.wait()
    assert saver.last == tmp_path / "step-00000002"
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


def test_the_error_of_a_background_save_comes_up_once(tmp_path, monkeypatch):
    def full(file, data, place):
        raise OSError(errno.ENOSPC, "No space left on device")

    saver, contents = Saver(), Contents({}, TENSORS.items(), trainer={})
    saver.save(tmp_path, 1, contents, keep_last=3, asynchronous=True)
    saver.wait()
    for surfaces in ("wait", "save"):
        with monkeypatch.context() as patch:
            patch.setattr(DirectFile, "store", full)
            saver.save(tmp_path, 2, contents, keep_last=3, asynchronous=True)
            saver._thread.join(20)
        assert saver.failed
        with pytest.raises(UserError, match="step-00000002: the disk is full while saving; it needs"):
            if surfaces == "wait":
                saver.wait()
            else:
                saver.save(tmp_path, 3, contents, keep_last=3, asynchronous=True)
        assert not saver.failed and saver.last == tmp_path / "step-00000001"
    saver.wait()
    assert names(tmp_path) == ["latest", "step-00000001"]


@pytest.mark.parametrize("culprit", [None, 0, 1])
def test_all_ranks_save_in_the_background(tmp_path, culprit):
    """After the one barrier no rank needs another's presence; the failure of one is the failure of all."""
    cluster = Cluster(3, timeout_s=20)
    savers = [Saver() for _ in range(3)]

    def contradicting(rank):
        return [TensorPiece("norm.weight", np.zeros(3, np.float16), (0,), (7,))]

    def one(rank):
        savers[rank].save(tmp_path, 3, asynchronous=True, **arguments(cluster, rank))
        savers[rank].wait()
        if rank == culprit:
            ranks = SaveRanks(rank, 3, lambda: cluster.agree(rank, [0.0], "max"), 20.0)
            given = arguments(cluster, rank, 4, contradicting(rank), ranks=ranks)
        else:
            given = arguments(cluster, rank, 4)
        savers[rank].save(tmp_path, 4, asynchronous=True, **given)
        savers[rank].wait()

    results = cluster.run(one)
    if culprit is None:
        assert results == [None] * 3
        assert_complete(tmp_path, 4)
    else:
        assert [type(r) for r in results] == [ValueError, UserError, UserError]
        assert {saver.last for saver in savers} == {tmp_path / "step-00000003"}
        assert_complete(tmp_path, 3)
    assert os.listdir(tmp_path)


def test_a_notice_that_cannot_be_read_for_a_moment_is_no_outcome(tmp_path, monkeypatch):
    """As on a network file system while the file is replaced: the other rank goes on waiting for rank 0."""
    gate = Gate(monkeypatch)
    real, unreadable = checkpoint_save.Notice.read, iter([True, True, True])
    monkeypatch.setattr(checkpoint_save.Notice, "read", lambda n: None if next(unreadable, False) else real(n))
    timer = threading.Timer(0.5, gate.open.set)
    timer.start()
    assert len(set(save(tmp_path, 2))) == 1
    assert_complete(tmp_path)


def test_rank_0_that_vanishes_without_a_word(tmp_path, monkeypatch):
    """Rank 1 ends with one line, whichever of the traces it happened to see before they were gone."""
    for module in (checkpoint_save, checkpoint_notice):
        monkeypatch.setattr(module, "VISIBILITY_S", 0.3)
    real = checkpoint_save.Notice.refuse
    monkeypatch.setattr(checkpoint_save.Notice, "refuse", lambda notice, told: (real(notice, told), notice.withdraw()))
    results = save(tmp_path, 2, weights=lambda rank: failing(0, 2, RuntimeError("lost")) if rank == 0 else None)
    assert isinstance(results[0], RuntimeError)
    told = "rank 0 abandoned the save|RuntimeError: lost|written .No such file|rank 0 did not finish the save within"
    with pytest.raises(UserError, match=told):
        raise results[1]
