"""What each step of the training loop works with: its rows, its learning rate, its gradients without the loss scale."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from telechat_twins.core.checkpoint.read import open_checkpoint
from telechat_twins.core.model.growth import Growth, sizes_of
from telechat_twins.core.train import loop, records
from telechat_twins.core.train.metrics import read_metrics
from telechat_twins.core.train.run import state as run_state
from telechat_twins.core.train.run.hooks import Hook
from tests.support.numpy_stepper import SEQ_LEN, MemoryBlend, NumpyStepper, run_config


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Data from a random generator, no plotting; a list of the rows that each step drew."""
    seen: list[tuple[int, int]] = []

    class Blend(MemoryBlend):
        def batch(self, first_sample, count):
            seen.append((first_sample, first_sample + count))
            return super().batch(first_sample, count)

    monkeypatch.setattr(loop, "open_blend", lambda data, seed, vocab_size, pad_token_id: Blend(seed))
    monkeypatch.setattr(records, "plot_losses", lambda runs, path, title, marks: path)
    return seen


def tensors(out):
    checkpoint = open_checkpoint(out)
    return {(k, n): checkpoint.read(k, n) for k in ("weights", "optimizer") for n in checkpoint.names(k)}


@pytest.mark.parametrize("later", [2, 6])
def test_resume_at_another_global_batch_draws_the_next_rows(tmp_path, drawn, later):
    """Every row once: the place in the data is the number of samples drawn, whatever the steps before were made of."""
    loop.train(NumpyStepper, run_config(train__steps=3, train__schedule_steps=6), tmp_path)
    config = run_config(train__steps=6, train__global_batch=later)
    loop.train(NumpyStepper, config, tmp_path, resume="auto")
    rows = 3 * 4 + 3 * later
    assert [row for first, last in drawn for row in range(first, last)] == list(range(rows))
    trainer = open_checkpoint(tmp_path).trainer
    assert (trainer["step"], trainer["samples"], trainer["tokens"]) == (6, rows, rows * SEQ_LEN)
    assert [row["tokens"] for row in read_metrics(tmp_path)][-1] == rows * SEQ_LEN


@pytest.mark.parametrize(("eps", "clip"), [(1.0, 0.0), (1.0, 0.05), (1e-8, 0.0)])
def test_updates_are_made_of_gradients_without_the_loss_scale(tmp_path, eps, clip):
    """Powers of two cancel exactly, so every weight and moment is bit for bit that of the run without a scale. With a
    large eps an update is nearly proportional to its gradient; with the usual one Adam divides any scale out again, and
    only the moments tell."""
    faults = {3: math.inf, 4: math.inf}
    changes = {"optim__eps": eps, "optim__clip_grad": clip, "train__steps": 8}
    scaled = NumpyStepper(run_config(train__precision="fp16", **changes), faults)
    loop.train(lambda config: scaled, scaled.config, tmp_path / "scaled")
    assert scaled.scales == [2.0**16] * 3 + [2.0**15] + [2.0**14] * 4  # halved at each overflow, whose step is skipped

    class Skips(NumpyStepper):
        """Without a scale, the same two steps left out."""

        def update(self, lr, grad_scale):
            if self.calls in faults:
                self.discard()
            else:
                super().update(lr, grad_scale)

    loop.train(Skips, run_config(**changes), tmp_path / "plain")
    left, right = tensors(tmp_path / "scaled"), tensors(tmp_path / "plain")
    assert left.keys() == right.keys()
    for key in left:
        if key[1].endswith(".weight"):
            np.testing.assert_array_equal(left[key], right[key], err_msg=str(key))
    rows = [read_metrics(tmp_path / name) for name in ("scaled", "plain")]
    assert [a["grad_norm"] for a in rows[0][4:]] == [b["grad_norm"] for b in rows[1][4:]]


@pytest.mark.parametrize("restart", [None, 0.02])
def test_a_grown_model_warms_up_again_from_the_step_it_grew_at(tmp_path, monkeypatch, restart):
    """The rates themselves, by the formula of docs/growth.md: a checkpoint that grew at step 5 goes on at step 7."""
    optim = {"lr": 0.04, "min_lr": 0.004, "warmup_steps": 2, "rewarmup_steps": 4}
    optim |= {} if restart is None else {"restart_lr": restart}
    loop.train(NumpyStepper, run_config(train__steps=7, train__schedule_steps=12, optim=optim), tmp_path)
    before = [row["lr"] for row in read_metrics(tmp_path)]
    sizes = sizes_of(run_config().model)
    grown = Growth(method="zero", step=5, optimizer_steps=5, seed=0, before=sizes, after=sizes, layers=(0,))
    older = dataclasses.replace(grown, step=1)
    monkeypatch.setattr(run_state, "read_history", lambda model, where: (older, grown))
    loop.train(NumpyStepper, run_config(train__steps=12, optim=optim), tmp_path, resume="auto")
    rates = [row["lr"] for row in read_metrics(tmp_path)]
    assert rates[:7] == before

    def cosine(peak, step, steps):
        return 0.004 + 0.5 * (peak - 0.004) * (1 + math.cos(math.pi * step / steps))

    for step in range(7, 12):
        warm = min(1.0, (step - 5 + 1) / 4)
        whole = cosine(0.04, step - 2, 10) if restart is None else cosine(restart, max(0, step - 9), 3)
        assert rates[step] == pytest.approx(warm * whole, rel=1e-14), step


class Watcher(Hook):
    """Notes what it is called with."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, object]] = []

    def before_step(self, step):
        self.seen.append(("before", step, None))

    def after_step(self, row, saves, note):
        row["extra"] = row["step"] / 2
        self.seen.append(("after", row["step"], saves))

    def at_checkpoint(self, step, folder, note):
        self.seen.append(("checkpoint", step, (folder / "manifest.json").is_file()))

    def close(self):
        self.seen.append(("close", 0, None))


def test_a_hook_takes_part_in_every_step_and_checkpoint(tmp_path):
    hook = Watcher()
    config = run_config(train__steps=5, checkpoint={"every": 2})
    loop.train(NumpyStepper, config, tmp_path, open_hooks=lambda config, out, stepper: [hook])
    after = [("before", n, None) for n in range(1, 6)]
    saved = {2: True, 4: True, 5: True}
    expected = []
    for step in range(1, 6):
        expected += [after[step - 1], ("after", step, step in saved)]
        expected += [("checkpoint", step, True)] if step in saved else []
    assert hook.seen == [*expected, ("close", 0, None)]
    assert [row["extra"] for row in read_metrics(tmp_path)] == [n / 2 for n in range(1, 6)]
