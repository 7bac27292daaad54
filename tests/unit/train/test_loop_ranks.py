"""The training loop on several ranks: numpy trainers in threads that agree over a barrier."""

import dataclasses
import errno
import json
import math
import os
import re
import signal
import threading

import numpy as np
import pytest

from telechat_twins.core.checkpoint import save as checkpoint_save
from telechat_twins.core.checkpoint.read import open_checkpoint
from telechat_twins.core.errors import UserError
from telechat_twins.core.train import loop, records, script
from telechat_twins.core.train.health import TrainingStopped
from telechat_twins.core.train.metrics import read_metrics
from tests.support.numpy_stepper import SEQ_LEN, Cluster, MemoryBlend, NumpyStepper, run_config
from tests.unit.train.test_loop import Killed, assert_same_run, numbers, tensors


@pytest.fixture(autouse=True)
def in_memory(monkeypatch):
    """Data from a random generator; no plotting."""
    monkeypatch.setattr(loop, "open_blend", lambda data, seed, vocab_size, pad_token_id: MemoryBlend(seed))
    monkeypatch.setattr(records, "plot_losses", lambda runs, path, title, marks: path)


def ranked(world, **changes):
    return run_config(parallel={"dp": world}, train__micro_batch=1, **changes)


def train(config, out, resume=None, *, stepper=NumpyStepper, faults=None, main=0, change=lambda rank, config: config):
    """One run on all ranks of ``config``'s layout; each rank's result or exception."""
    cluster = Cluster(config.parallel.world, timeout_s=20)

    def one(rank):
        given = change(rank, config)
        return loop.train(lambda made: stepper(made, faults, cluster, rank), given, out, resume)

    return cluster.run(one, main)


def line_of_all(results, kind=UserError):
    """The one line with which every rank ended."""
    assert all(type(result) is kind for result in results), results
    assert len({str(result) for result in results}) == 1, results
    return str(results[0])


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_train_as_one_does(tmp_path, world, capsys):
    loop.train(NumpyStepper, run_config(), tmp_path / "one")
    capsys.readouterr()
    results = train(ranked(world), tmp_path / "many")
    assert [r.step for r in results] == [12] * world and len({r.checkpoint for r in results}) == 1
    for a, b in zip(read_metrics(tmp_path / "many"), read_metrics(tmp_path / "one"), strict=True):
        # 1e-5: fp32 sums in another order, which 12 steps of AdamW carry on; measured 1e-7.
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert a["tokens"] == b["tokens"] == a["step"] * 4 * SEQ_LEN
    shown = capsys.readouterr().err
    assert shown.count("finished 12 steps") == shown.count("made in memory") == 1
    assert f"dp{world} ({world} ranks: pp 1 x dp {world} x cp 1 x tp 1)" in shown and "bubble" not in shown
    assert f"4 sequences over {world} data-parallel ranks, each {4 // world} micro-batches of 1" in shown
    assert len(list((tmp_path / "many" / "tensorboard").iterdir())) == 1
    checkpoint = open_checkpoint(tmp_path / "many")
    assert checkpoint.trainer["layout"] == f"dp{world}" and checkpoint.trainer["samples"] == 48
    assert len(list(checkpoint.path.glob("weights-*"))) == world


def test_a_rank_draws_its_own_rows_only(tmp_path, monkeypatch):
    drawn = []

    class Blend(MemoryBlend):
        def batch(self, first_sample, count):
            drawn.append((first_sample, count))
            return super().batch(first_sample, count)

    monkeypatch.setattr(loop, "open_blend", lambda *_: Blend(7))
    train(ranked(2, train__steps=3), tmp_path)
    assert sorted(drawn) == [(first, 2) for first in range(0, 12, 2)]


def test_the_divisor_counts_the_targets_of_all_ranks(tmp_path):
    """Planted: the local count. The masks leave the ranks very different numbers of targets."""

    class Local(NumpyStepper):
        def count_targets(self, num_targets):
            return num_targets * self.world

    train(ranked(2, train__steps=3), tmp_path / "right")
    train(ranked(2, train__steps=3), tmp_path / "wrong", stepper=Local)
    right, wrong = (read_metrics(tmp_path / name) for name in ("right", "wrong"))
    assert abs(wrong[0]["grad_norm"] / right[0]["grad_norm"] - 1) > 1e-3


def killed_at(call):
    class Stepper(NumpyStepper):
        def update(self, lr, grad_scale):
            if self.calls == call and self.rank == 1:
                raise Killed
            super().update(lr, grad_scale)

    return Stepper


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resume_at_the_same_layout_is_bit_equal(tmp_path, precision, asynchronous, capsys):
    config = ranked(
        3,
        train__global_batch=6,
        train__precision=precision,
        checkpoint__every=4,
        checkpoint__asynchronous=asynchronous,
        health__spike_policy="skip",
    )
    faults = {3: math.inf, 11: 50.0} if precision == "fp16" else {11: 50.0}
    train(config, tmp_path / "whole", faults=faults)
    results = train(config, tmp_path / "parts", faults=faults, stepper=killed_at(10))
    assert isinstance(results[1], Killed)
    for thread in threading.enumerate():  # what was being written when the rank was killed
        if thread.name.startswith("save-"):
            thread.join(20)
    assert open_checkpoint(tmp_path / "parts").step == 8
    capsys.readouterr()
    train(config, tmp_path / "parts", "auto", faults={3: 50.0})
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert "note:" not in capsys.readouterr().err
    assert numbers(tmp_path / "parts")[10]["skipped"] is True


@pytest.mark.parametrize("worlds", [(2, 1), (1, 4), (4, 2)])
def test_resume_at_another_layout(tmp_path, worlds, capsys):
    """Whole tensors from shares and other shares from whole tensors; the rest of the run within rounding."""

    def config(world, **changes):
        return ranked(world, checkpoint__every=6, checkpoint__keep_last=9, **changes)

    train(config(worlds[0]), tmp_path / "a")
    capsys.readouterr()
    train(config(worlds[1]), tmp_path / "b", str(tmp_path / "a" / "step-00000006"))
    shown = capsys.readouterr().err
    names = ["single" if world == 1 else f"dp{world}" for world in worlds]
    assert shown.count(f"note: written at {names[0]}, now {names[1]}: ") == 1 and "warning" not in shown
    left, right = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert left.keys() == right.keys()
    for key in left:
        assert np.abs(left[key] - right[key]).max() < 1e-5, key  # measured 1e-7
    for a, b in zip(read_metrics(tmp_path / "a")[6:], read_metrics(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_the_name_of_a_signal_reaches_all_nodes(tmp_path, monkeypatch, capfd):
    """The launcher of one node was sent SIGTERM; the ranks of the others stop by agreement before they hear of it."""

    class Told(NumpyStepper):
        def update(self, lr, grad_scale):
            if self.calls == 5 and self.rank == 1:
                os.kill(os.getpid(), signal.SIGINT)
            super().update(lr, grad_scale)

    monkeypatch.setattr(records, "relayed_signal", lambda: signal.SIGTERM)
    results = train(ranked(3, train__global_batch=6), tmp_path, stepper=Told, main=1)
    assert [(r.step, r.interrupted_by, r.relayed) for r in results] == [(5, signal.SIGTERM, True)] * 3
    assert capfd.readouterr().err.count("stopped by SIGTERM after step 5") == 1


@pytest.mark.parametrize("hears", [0, 1])
def test_a_signal_to_one_rank_stops_all(tmp_path, hears, capfd):
    class Interrupted(NumpyStepper):
        def update(self, lr, grad_scale):
            if self.calls == 5 and self.rank == hears:
                os.kill(os.getpid(), signal.SIGTERM)
            super().update(lr, grad_scale)

    config = ranked(3, train__global_batch=6)
    results = train(config, tmp_path / "parts", stepper=Interrupted, main=hears)
    assert [(r.step, r.interrupted_by) for r in results] == [(5, signal.SIGTERM)] * 3
    shown = capfd.readouterr().err
    assert shown.count("stopped by SIGTERM after step 5") == 1
    assert shown.count("finishing this step") == (1 if hears == 0 else 0)
    train(config, tmp_path / "parts", "auto")
    train(config, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_ranks_started_with_different_options_are_refused(tmp_path):
    def change(rank, config):
        if rank != 2:
            return config
        optim = dataclasses.replace(config.optim, lr=0.04)
        return dataclasses.replace(config, optim=optim, train=dataclasses.replace(config.train, seed=8))

    line = line_of_all(train(ranked(4), tmp_path, change=change))
    assert line.startswith("optim.lr, train.seed: not the same on all ranks: rank 2 differ")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_ranks_started_with_different_folders_are_refused(tmp_path):
    cluster, config = Cluster(3, timeout_s=20), ranked(3, train__global_batch=6)

    def one(rank):
        return loop.train(lambda c: NumpyStepper(c, None, cluster, rank), config, tmp_path / str(min(rank, 1)))

    assert line_of_all(cluster.run(one)).startswith("--out: not the same on all ranks: ranks 1, 2 differ")


def test_an_earlier_run_is_refused_by_all(tmp_path):
    train(ranked(2), tmp_path)
    before = numbers(tmp_path)
    assert "already holds a run" in line_of_all(train(ranked(2), tmp_path))
    assert numbers(tmp_path) == before


def test_an_altered_checkpoint_is_refused_by_all(tmp_path):
    """Each rank hashes a share of the files, so one of them sees it; all end with its line."""
    train(ranked(4), tmp_path)
    victim = next(tmp_path.glob("step-*/optimizer-00002-*"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"\xff")
    line = line_of_all(train(ranked(4), tmp_path, "auto"))
    assert line.startswith(f"{victim}: altered: SHA-256 should be")


def test_a_rank_that_cannot_load_ends_all(tmp_path):
    class Lacks(NumpyStepper):
        def load(self, checkpoint, optimizer):
            if self.rank == 1:
                checkpoint.read("weights", "gone")
            super().load(checkpoint, optimizer)

    train(ranked(2), tmp_path)
    assert "has no weights tensor 'gone'" in line_of_all(train(ranked(2), tmp_path, "auto", stepper=Lacks))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_of_the_records_ends_all(tmp_path, monkeypatch, asynchronous):
    class Full(records.MetricsLog):
        def append(self, row):
            if row["step"] == 7:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().append(row)

    config = ranked(3, train__global_batch=6, checkpoint__every=6, checkpoint__asynchronous=asynchronous)
    with monkeypatch.context() as patch:
        patch.setattr(records, "MetricsLog", Full)
        line = line_of_all(train(config, tmp_path / "parts"))
    assert re.search("disk is full.*after step 7.*--resume auto.*step-00000006", line)
    train(config, tmp_path / "parts", "auto")
    train(config, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_save_that_fails_on_one_rank_ends_all(tmp_path, monkeypatch, culprit, asynchronous):
    real = checkpoint_save.PieceWriter.add

    def add(writer, kind, piece):
        if "step-00000008" in str(writer.folder) and f"rank-{culprit:05d}" in str(writer.folder):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(writer, kind, piece)

    monkeypatch.setattr(checkpoint_save.PieceWriter, "add", add)
    config = ranked(3, train__global_batch=6, checkpoint__every=4, checkpoint__asynchronous=asynchronous)
    line = line_of_all(train(config, tmp_path))
    assert re.search(f"step-00000008: rank {culprit}: the disk is full while saving; it needs", line)
    assert open_checkpoint(tmp_path).step == 4 and len(read_metrics(tmp_path)) <= 12


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_non_finite_gradients_stop_all(tmp_path, fault):
    line = line_of_all(train(ranked(2, checkpoint__every=4), tmp_path, faults={7: fault}), TrainingStopped)
    assert re.search(r"stopped at step 7: the gradient norm is (nan|inf).*intact: .*step-00000004", line)
    assert open_checkpoint(tmp_path).step == 4 and len(read_metrics(tmp_path)) == 6


def test_a_spike_stops_all_with_a_checkpoint_before_it(tmp_path):
    results = train(ranked(2, health__spike_policy="stop"), tmp_path, faults={8: 100.0})
    assert "step 8: the gradient norm" in line_of_all(results, TrainingStopped)
    assert open_checkpoint(tmp_path).step == 7


def test_a_batch_without_targets_is_skipped_by_all(tmp_path, monkeypatch, capsys):
    """Rows 8 to 11 are one batch. Row 0 alone leaves one rank without targets: that is no reason to skip."""
    monkeypatch.setattr(loop, "open_blend", lambda *_: MemoryBlend(7, empty=(0, 1, 8, 9, 10, 11)))
    results = train(ranked(2), tmp_path)
    assert [r.step for r in results] == [12, 12]
    assert [r["step"] for r in read_metrics(tmp_path) if r.get("skipped")] == [3]
    assert capsys.readouterr().err.count("no position of this batch counts") == 1


def test_only_rank_0_draws(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        records, "plot_losses", lambda runs, path, title, marks: drawn.append(threading.current_thread())
    )
    train(ranked(2), tmp_path)
    assert drawn == [threading.main_thread()]


def test_main_shows_the_pipeline(tmp_path, capsys, monkeypatch):
    """Two threads as two launched processes: codes, and a header with the bubble (1 / (4 + 1))."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = run_config().model.to_dict() | {"num_layers": 2}
    tree = run_config(model=model, parallel={"pp": 2}, train__micro_batch=1).to_dict()
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    cluster = Cluster(2, timeout_s=20)

    def one(rank):
        argv = ["--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]
        # This trainer is data parallel, whatever its layout is called.
        return script.main(lambda config: NumpyStepper(config, None, cluster, rank), argv)

    assert cluster.run(one) == [0, 0]
    shown = capsys.readouterr().err
    assert "20.0% of a step, by the formula of 1f1b" in shown and shown.count("finished 12 steps") == 1
    assert cluster.run(one) == [2, 2]
    assert "already holds a run" in capsys.readouterr().err
