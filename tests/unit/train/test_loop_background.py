"""Training with background saves: the same run and checkpoints, and a failed save that ends training."""

import errno
import threading
import time

import pytest

from telechat_twins.core.checkpoint import save as checkpoint_save
from telechat_twins.core.checkpoint.read import open_checkpoint
from telechat_twins.core.errors import UserError
from telechat_twins.core.train import loop
from telechat_twins.core.train.metrics import read_metrics
from tests.support.numpy_stepper import NumpyStepper, run_config
from tests.unit.train.test_loop import Killed, assert_same_run, in_memory, killed_at, tensors  # noqa: F401


@pytest.mark.parametrize("interrupted", [False, True])
def test_saving_in_the_background_changes_nothing(tmp_path, interrupted):
    """The same records, the same checkpoints; killed and resumed as well."""
    config = run_config(checkpoint__every=3, checkpoint__keep_last=9)
    background = run_config(checkpoint__every=3, checkpoint__keep_last=9, checkpoint__asynchronous=True)
    loop.train(NumpyStepper, config, tmp_path / "whole")
    if interrupted:
        with pytest.raises(Killed):
            loop.train(killed_at(9), background, tmp_path / "parts")
        assert open_checkpoint(tmp_path / "parts").step == 6
    result = loop.train(NumpyStepper, background, tmp_path / "parts", "auto")
    assert result.checkpoint == tmp_path / "parts" / "step-00000012"
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    for step in (3, 6, 9, 12):
        left, right = (tensors(tmp_path / run / f"step-{step:08d}") for run in ("whole", "parts"))
        assert all(left[key].tobytes() == right[key].tobytes() for key in left)


def test_a_background_save_that_fails_ends_training_at_the_next_step(tmp_path, monkeypatch):
    real = checkpoint_save.PieceWriter.add
    failed = threading.Event()

    def add(writer, kind, piece):
        if "step-00000008" in str(writer.folder):
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        real(writer, kind, piece)

    monkeypatch.setattr(checkpoint_save.PieceWriter, "add", add)

    class Waits(NumpyStepper):
        def update(self, lr, grad_scale):
            if self.calls == 10:
                assert failed.wait(20)
                time.sleep(0.2)  # the thread has only to take its leave
            super().update(lr, grad_scale)

    config = run_config(train__steps=100, checkpoint__every=4, checkpoint__asynchronous=True)
    with pytest.raises(UserError, match="step-00000008: the disk is full while saving"):
        loop.train(Waits, config, tmp_path)
    assert len(read_metrics(tmp_path)) <= 10
    assert open_checkpoint(tmp_path).step == 4
