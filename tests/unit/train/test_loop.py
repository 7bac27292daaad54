"""The training loop with a small numpy trainer that really trains: resume, skipping, stopping, records."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from telechat_twins.core.checkpoint.read import manifest_digest, open_checkpoint
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.safetensors import file_sha256
from telechat_twins.core.launch import worker
from telechat_twins.core.train import loop, records, script
from telechat_twins.core.train.health import TrainingStopped
from telechat_twins.core.train.metrics import MEASURED, read_metrics
from telechat_twins.core.train.resume import adopt_growth
from telechat_twins.core.train.track.tags import TAGS
from tests.support.numpy_stepper import SEQ_LEN, MemoryBlend, NumpyStepper, run_config


@pytest.fixture(autouse=True)
def in_memory(monkeypatch):
    """Data from a random generator; no plotting (one test draws)."""
    monkeypatch.setattr(loop, "open_blend", lambda data, seed, vocab_size, pad_token_id: MemoryBlend(seed))
    monkeypatch.setattr(records, "plot_losses", lambda runs, path, title, marks: path)


def numbers(out):
    """metrics.jsonl without what a clock wrote."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(out)]


def tensors(out):
    checkpoint = open_checkpoint(out)
    return {(k, n): checkpoint.read(k, n) for k in ("weights", "optimizer") for n in checkpoint.names(k)}


def state(out):
    """trainer.json without the configuration."""
    return {k: v for k, v in open_checkpoint(out).trainer.items() if k != "config"}


def assert_same_run(a, b):
    """Bit for bit: every metric, every weight, m and v, the loop's state."""
    assert numbers(a) == numbers(b)
    assert state(a) == state(b)
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].tobytes() == right[key].tobytes(), key


def test_it_learns_and_records_every_step(tmp_path, capsys):
    config = run_config(train__steps=30)
    result = loop.train(NumpyStepper, config, tmp_path)
    rows = read_metrics(tmp_path)
    assert [r["step"] for r in rows] == list(range(1, 31))
    assert set(rows[0]) == {"step", "loss", "grad_norm", "lr", "tokens", *MEASURED} - {
        *("mfu", "device_peak_gib", "comm_share", "tokens_per_s_device", "restarts")  # no peak, device, ranks, deaths
    }
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert [r["tokens"] for r in rows[:2]] == [4 * SEQ_LEN, 8 * SEQ_LEN]
    assert rows[0]["lr"] == 0.025 and rows[1]["lr"] == 0.05
    assert (result.step, result.interrupted_by) == (30, None)
    assert result.checkpoint == tmp_path / "step-00000030"
    trainer = open_checkpoint(tmp_path).trainer
    assert (trainer["step"], trainer["samples"], trainer["tokens"]) == (30, 120, 120 * SEQ_LEN)
    assert trainer["optimizer_steps"] == 30 and trainer["seed"] == 7 and trainer["backend"] == "numpy"
    assert open_checkpoint(tmp_path).model["config"] == config.model.to_dict()
    assert [asset.name for asset in open_checkpoint(tmp_path).assets] == ["tokenizer.model"]
    shown = capsys.readouterr().err
    for fact in ("backend", "device", "precision", "parameters", "made in memory", "1,920 tokens to go"):
        assert fact in shown
    assert "step 30/30  loss " in shown and "tok/s  eta 0:00" in shown


def test_a_run_that_is_further_than_its_config_says_that_nothing_is_left(tmp_path, capsys):
    loop.train(NumpyStepper, run_config(train__steps=5), tmp_path)
    capsys.readouterr()
    assert loop.train(NumpyStepper, run_config(train__steps=3), tmp_path, "auto").step == 5
    shown = capsys.readouterr().err
    assert "plan        0 of 3 steps" in shown and "0 tokens to go" in shown
    assert "note: train.steps is 3, so nothing is left to train" in shown and "learning rate" not in shown


def test_a_grown_checkpoint_names_the_file_of_its_model(tmp_path):
    config, model = run_config(train__steps=3), tmp_path / "assets" / "model.yaml"
    masks = {"mask": 0.0, "start_step": 0, "anneal_steps": 5, "new_layers": [99]}
    masks |= {
        name: getattr(config.model, name) for name in ("hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads")
    }
    grown = SimpleNamespace(path=tmp_path, model={"config": {**config.model.to_dict(), "growth": masks}})
    with pytest.raises(UserError, match="^model: not the grown model of .* use the config it was trained with$"):
        adopt_growth(grown, config)
    model.parent.mkdir()
    model.touch()
    with pytest.raises(UserError, match=f"outside the model's .* use its own, --set model={model}$"):
        adopt_growth(grown, config)


def test_micro_batches_do_not_change_the_gradient(tmp_path):
    """With very different numbers of targets a row: the shares add up to the global mean, not to a mean of means."""
    for micro in (1, 2, 4):
        loop.train(NumpyStepper, run_config(train__micro_batch=micro, train__steps=5), tmp_path / str(micro))
    whole = read_metrics(tmp_path / "4")
    for micro in ("1", "2"):
        for a, b in zip(read_metrics(tmp_path / micro), whole, strict=True):
            # 1e-6: fp32 sums in another order; measured 2e-8.
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)


def test_the_same_seed_gives_the_same_run(tmp_path):
    for name in ("a", "b"):
        loop.train(NumpyStepper, run_config(), tmp_path / name)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    loop.train(NumpyStepper, run_config(train__seed=8), tmp_path / "c")
    assert numbers(tmp_path / "c") != numbers(tmp_path / "a")


class Killed(BaseException):
    """Stands for SIGKILL: nothing is saved on the way out."""


def killed_at(call):
    class Stepper(NumpyStepper):
        def update(self, lr, grad_scale):
            if self.calls == call:
                raise Killed
            super().update(lr, grad_scale)

    return Stepper


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resume_after_a_kill_is_bit_equal(tmp_path, precision):
    """Killed at step 9, between the saves at 8 and 12: steps 1 to 8 stay, 9 is made again. A spike at step 10 must be
    judged by the window from before the kill, and fp16 must find its loss scale."""
    config = run_config(
        train__precision=precision, checkpoint__every=4, health__spike_policy="skip", checkpoint__keep_last=9
    )
    faults = {3: math.inf, 10: 50.0} if precision == "fp16" else {10: 50.0}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.train(lambda c: NumpyStepper(c, faults), config, whole)
    with pytest.raises(Killed):
        loop.train(lambda c: killed_at(9)(c, {k: f for k, f in faults.items() if k < 9}), config, parts)
    assert len(read_metrics(parts)) == 8
    # The stepper counts its own calls from 1 again after a resume.
    loop.train(lambda c: NumpyStepper(c, {2: 50.0}), config, parts, resume="auto")
    assert_same_run(whole, parts)
    rows = numbers(parts)
    assert rows[9]["skipped"] is True and "skipped" not in rows[8]


def test_resume_is_not_trivially_equal(tmp_path):
    """The comparison goes red when a resume loses Adam's moments, the data position or the spike window."""
    config = run_config(checkpoint__every=4)
    whole = tmp_path / "whole"
    loop.train(NumpyStepper, config, whole)

    class Forgets(NumpyStepper):
        def load(self, checkpoint, optimizer):
            super().load(checkpoint, optimizer=False)
            self.step = checkpoint.trainer["optimizer_steps"]

    parts = tmp_path / "parts"
    with pytest.raises(Killed):
        loop.train(killed_at(6), config, parts)
    loop.train(Forgets, config, parts, resume="auto")
    with pytest.raises(AssertionError):
        assert_same_run(whole, parts)


def test_metrics_beyond_the_checkpoint_are_made_again(tmp_path):
    config = run_config(checkpoint__every=5)
    with pytest.raises(Killed):
        loop.train(killed_at(9), config, tmp_path)
    assert len(read_metrics(tmp_path)) == 8  # steps 6 to 8 are not in any checkpoint
    loop.train(NumpyStepper, config, tmp_path, resume="auto")
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(1, 13))


def test_resume_from_another_folder_and_auto_without_one(tmp_path):
    config = run_config(checkpoint__every=6, checkpoint__keep_last=5)
    loop.train(NumpyStepper, config, tmp_path / "a", resume="auto")  # nothing there: starts anew
    loop.train(NumpyStepper, config, tmp_path / "b", resume=str(tmp_path / "a" / "step-00000006"))
    assert [r["step"] for r in read_metrics(tmp_path / "b")] == list(range(7, 13))
    assert numbers(tmp_path / "b") == numbers(tmp_path / "a")[6:]
    left, right = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(left[k].tobytes() == right[k].tobytes() for k in left)


def test_resume_of_a_finished_run_does_nothing(tmp_path):
    config = run_config(train__steps=3, optim__warmup_steps=0)
    loop.train(NumpyStepper, config, tmp_path)
    before = numbers(tmp_path)
    assert loop.train(NumpyStepper, config, tmp_path, resume="auto").step == 3
    assert numbers(tmp_path) == before


def test_an_earlier_run_is_not_overwritten(tmp_path):
    loop.train(NumpyStepper, run_config(), tmp_path)
    before = numbers(tmp_path)
    with pytest.raises(UserError, match="already holds a run.*--resume auto"):
        loop.train(NumpyStepper, run_config(), tmp_path)
    other = tmp_path / "other"
    loop.train(NumpyStepper, run_config(train__seed=1), other)
    with pytest.raises(UserError, match="already holds a run"):  # going on from elsewhere would mix two runs
        loop.train(NumpyStepper, run_config(), tmp_path, resume=str(other))
    assert numbers(tmp_path) == before


def test_a_place_that_cannot_be_written_is_told_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    for resume in (None, "auto"):
        with pytest.raises(UserError, match="cannot be made"):
            loop.train(NumpyStepper, run_config(), tmp_path / "file", resume)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    class Full(records.MetricsLog):
        def append(self, row):
            if row["step"] == 7:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().append(row)

    config = run_config(checkpoint__every=5)
    with monkeypatch.context() as patch:
        patch.setattr(records, "MetricsLog", Full)
        with pytest.raises(UserError, match="disk is full.*after step 7.*--resume auto.*step-00000005"):
            loop.train(NumpyStepper, config, tmp_path / "parts")
    loop.train(NumpyStepper, config, tmp_path / "parts", "auto")
    loop.train(NumpyStepper, config, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resume_with_another_model_is_refused(tmp_path):
    loop.train(NumpyStepper, run_config(), tmp_path)
    with pytest.raises(UserError, match=r"norm_eps: 1e-05 -> 0\.01"):
        loop.train(NumpyStepper, run_config(model=run_config().model.to_dict() | {"norm_eps": 0.01}), tmp_path, "auto")


def test_resume_with_other_data_or_options_warns(tmp_path, capsys, monkeypatch):
    loop.train(NumpyStepper, run_config(), tmp_path)
    monkeypatch.setattr(loop, "open_blend", lambda *_: MemoryBlend(99))
    capsys.readouterr()
    loop.train(NumpyStepper, run_config(optim__lr=0.04, train__steps=14), tmp_path, "auto")
    shown = capsys.readouterr().err
    assert "warning: the data differs" in shown
    assert "optim.lr: 0.05 -> 0.04" in shown and "train.steps: 12 -> 14" in shown


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_non_finite_gradients_stop_before_the_update(tmp_path, fault):
    config = run_config(checkpoint__every=4)
    steppers = []

    def factory(config):
        steppers.append(NumpyStepper(config, {7: fault}))
        return steppers[-1]

    with pytest.raises(
        TrainingStopped, match=r"stopped at step 7: the gradient norm is (nan|inf).*intact: .*step-00000004"
    ):
        loop.train(factory, config, tmp_path)
    assert steppers[0].step == 6
    assert all(np.isfinite(p).all() for p in steppers[0].params.values())
    assert open_checkpoint(tmp_path).step == 4
    assert len(read_metrics(tmp_path)) == 6


def test_a_non_finite_loss_stops(tmp_path):
    class Diverges(NumpyStepper):
        def gradients(self, batch, num_targets, loss_scale):
            loss = super().gradients(batch, num_targets, loss_scale)
            return math.nan if self.calls == 2 else loss

    ways = (
        (0, None, r"No checkpoint had been saved \(set checkpoint\.every\)"),
        (5, None, r"No checkpoint had been saved: the first would have come after step 5 \(checkpoint\.every\)"),
        (7, "from", r"No checkpoint had been saved since; the one this run went on from is intact: .*step-00000003"),
        (1, None, r"The last checkpoint is intact: .*step-00000002"),
    )
    loop.train(NumpyStepper, run_config(train__steps=3), tmp_path / "from")
    for number, (every, resume, says) in enumerate(ways):
        start = tmp_path / resume if resume else None
        with pytest.raises(TrainingStopped, match=rf"step {6 if resume else 3}: the loss is nan\. {says}$"):
            config = run_config(checkpoint__every=every, train__schedule_steps=12)
            loop.train(Diverges, config, tmp_path / str(number), str(start) if start else None)


@pytest.mark.parametrize("policy", ["stop", "skip", "warn"])
def test_spike_policies(tmp_path, capsys, policy):
    config = run_config(health__spike_policy=policy)
    stepper = NumpyStepper(config, {8: 100.0})
    if policy == "stop":
        with pytest.raises(TrainingStopped, match="step 8: the gradient norm .* above 4 times the median"):
            loop.train(lambda c: stepper, config, tmp_path)
        # The weights before the spike are good and were saved; the run can go on past it with another policy.
        assert open_checkpoint(tmp_path).step == 7
        resumed = run_config(health__spike_policy="skip")
        loop.train(lambda c: NumpyStepper(c, {1: 100.0}), resumed, tmp_path, "auto")
        straight = tmp_path / "straight"
        loop.train(lambda c: NumpyStepper(c, {8: 100.0}), resumed, straight)
        assert_same_run(tmp_path, straight)
        return
    loop.train(lambda c: stepper, config, tmp_path)
    rows = read_metrics(tmp_path)
    assert len(rows) == 12 and "warning: step 8: the gradient norm" in capsys.readouterr().err
    assert stepper.step == (11 if policy == "skip" else 12)
    assert rows[7].get("skipped", False) is (policy == "skip")
    assert rows[7]["grad_norm"] > 20 * rows[6]["grad_norm"]
    assert open_checkpoint(tmp_path).trainer["optimizer_steps"] == stepper.step


def test_fp16_skips_and_halves_on_overflow(tmp_path):
    config = run_config(train__precision="fp16")
    stepper = NumpyStepper(config, {3: math.inf, 4: math.nan})
    loop.train(lambda c: stepper, config, tmp_path)
    rows = read_metrics(tmp_path)
    assert stepper.scales[:6] == [65536.0, 65536.0, 65536.0, 32768.0, 16384.0, 16384.0]
    assert [r["loss_scale"] for r in rows] == stepper.scales
    assert [r["step"] for r in rows if r.get("skipped")] == [3, 4]
    assert rows[2]["grad_norm"] is None and rows[2]["loss"] is not None
    assert stepper.step == 10
    # The scale cancels: the same faultless steps without fp16's scale give nearly the same losses.
    plain = tmp_path / "plain"
    loop.train(NumpyStepper, run_config(), plain)
    assert [r["loss"] for r in rows[:3]] == pytest.approx([r["loss"] for r in read_metrics(plain)[:3]], rel=1e-6)


def test_fp16_stops_when_scaling_cannot_help(tmp_path):
    config = run_config(train__precision="fp16", train__steps=40)
    with pytest.raises(TrainingStopped, match="overflow even with loss scale 1"):
        loop.train(lambda c: NumpyStepper(c, {i: math.inf for i in range(1, 41)}), config, tmp_path)


def test_a_batch_without_targets_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "open_blend", lambda *_: MemoryBlend(7, empty=(8, 9, 10, 11)))
    stepper = NumpyStepper(run_config())
    loop.train(lambda c: stepper, run_config(), tmp_path)
    rows = read_metrics(tmp_path)
    assert rows[2]["loss"] is None and rows[2]["skipped"] is True and stepper.step == 11
    assert "no position of this batch counts" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_resumes(tmp_path, number, capfd):
    class Interrupted(NumpyStepper):
        def update(self, lr, grad_scale):
            if self.calls == 5:
                os.kill(os.getpid(), number)
            super().update(lr, grad_scale)

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    result = loop.train(Interrupted, run_config(), tmp_path / "parts")
    assert (result.step, result.interrupted_by) == (5, number)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert "finishing this step" in capfd.readouterr().err
    loop.train(NumpyStepper, run_config(), tmp_path / "parts", resume="auto")
    loop.train(NumpyStepper, run_config(), tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(("name", "number", "relayed"), [("SIGTERM", 15, True), ("SIGINT", 2, True), ("no", 2, False)])
def test_a_signal_that_a_launcher_passed_on_has_its_name(tmp_path, monkeypatch, capfd, name, number, relayed):
    """Launchers send their ranks SIGINT whatever they were sent; the exit code is then theirs."""

    class Told(NumpyStepper):
        def update(self, lr, grad_scale):
            if self.calls == 5:
                worker.relayed_path(tmp_path).write_text(name)
                os.kill(os.getpid(), signal.SIGINT)
            super().update(lr, grad_scale)

    monkeypatch.setattr(worker, "_folder", tmp_path)
    result = loop.train(Told, run_config(), tmp_path / "run")
    assert (result.step, result.interrupted_by, result.relayed) == (5, number, relayed)
    shown, said = capfd.readouterr().err, signal.Signals(number).name
    assert f"{said}: finishing this step" in shown and f"stopped by {said} after step 5" in shown
    monkeypatch.setattr(script, "train", lambda *_: result)
    monkeypatch.setattr(script, "load_run_config", lambda *_: run_config())
    monkeypatch.setattr(script, "check_stages", lambda *_: None)
    assert script.main(Told, ["--config", "any"]) == 130


READ_EVENTS = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1])
events.Reload()
print(json.dumps({tag: [(p.step, p.value) for p in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
"""


def test_tensorboard_reads_what_was_written(tmp_path):
    """In a process of its own: the reader imports protobuf, after which MindSpore could not be imported here."""
    config = run_config(checkpoint__every=5, train__precision="fp16", optim__matrix_lr=0.1, train__peak_tflops=1e-3)
    with pytest.raises(Killed):
        loop.train(killed_at(8), config, tmp_path)
    loop.train(lambda c: NumpyStepper(c, {3: math.inf}), config, tmp_path, resume="auto")
    read = [sys.executable, "-c", READ_EVENTS, str(tmp_path / "tensorboard")]
    points = json.loads(subprocess.run(read, capture_output=True, text=True, check=True).stdout)
    rows = read_metrics(tmp_path)
    tags = {key: tag for key, tag in TAGS.items() if key in rows[0]}  # none of preference training, of many ranks
    assert {"loss", "matrix_lr", "loss_scale", "mfu", "eta_s", "host_peak_gib"} <= set(tags)
    assert set(points) == set(tags.values())
    # Steps 6 and 7 were written twice, and TensorBoard shows the second writing only.
    assert [step for step, _ in points["train/loss"]] == list(range(1, 13))
    for key, tag in tags.items():
        shown = {step: pytest.approx(value, rel=1e-6) for step, value in points[tag]}  # stored as float32
        assert shown == {row["step"]: row[key] for row in rows if row[key] is not None}
    assert rows[7]["grad_norm"] is None and len(points["train/grad_norm"]) == 11


def test_the_matrix_rate_is_recorded_where_it_differs(tmp_path):
    """Every step as many times the rate as its peak is; a peak equal to lr adds nothing to the row."""
    for name, peak, ratio in (("apart", 0.2, 4.0), ("alike", 0.05, None)):
        loop.train(NumpyStepper, run_config(optim__matrix_lr=peak), tmp_path / name)
        rows = read_metrics(tmp_path / name)
        assert [row.get("matrix_lr") for row in rows] == [ratio and pytest.approx(ratio * row["lr"]) for row in rows]


def test_training_imports_no_protobuf(tmp_path):
    """MindSpore cannot be imported after it; see core/train/track/tensorboard.py."""
    code = "import sys, telechat_twins.core.train.loop, telechat_twins.core.train.track.tensorboard as board\n"
    code += "board.TensorBoard(sys.argv[1]).close(); print('google.protobuf' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(loop.__file__).parents[2])
    assert done.stdout.strip() == "False", done.stderr


def test_the_plot_is_drawn(tmp_path, monkeypatch):
    from telechat_twins.core.train.metrics import plot_losses

    monkeypatch.setattr(records, "plot_losses", plot_losses)
    loop.train(NumpyStepper, run_config(), tmp_path)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def config_file(tmp_path, **changes):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(run_config(**changes).to_dict()))  # JSON is YAML
    return str(path)


def test_main_and_its_exit_codes(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config, out = config_file(tmp_path), str(tmp_path / "out")
    assert script.main(NumpyStepper, ["--config", config, "--out", out, "--set", "train.steps=4"]) == 0
    assert len(read_metrics(out)) == 4
    capsys.readouterr()
    assert script.main(NumpyStepper, ["--config", config, "--out", out]) == 2
    shown = capsys.readouterr().err
    assert "already holds a run" in shown and len(shown.strip().splitlines()) == 1
    assert script.main(NumpyStepper, ["--config", config, "--out", out, "--set", "train.stpes=4"]) == 2
    assert "steps" in capsys.readouterr().err
    assert script.main(NumpyStepper, ["--config", config, "--out", out, "--resume", str(tmp_path / "no")]) == 2
    with pytest.raises(SystemExit) as stop:
        script.main(lambda c: NumpyStepper(c, {2: math.nan}), ["--config", config, "--out", str(tmp_path / "nan")])
    assert "stopped at step 2" in str(stop.value.code)  # text: Python prints it and exits with 1

    class Interrupted(NumpyStepper):
        def update(self, lr, grad_scale):
            os.kill(os.getpid(), signal.SIGTERM)
            super().update(lr, grad_scale)

    assert script.main(Interrupted, ["--config", config, "--out", str(tmp_path / "term")]) == 143


def test_a_layout_for_other_processes_is_refused_before_anything_is_built(tmp_path, capsys, monkeypatch):
    config, out = config_file(tmp_path), str(tmp_path / "out")

    def never(config):
        raise AssertionError("a stepper was asked for")

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert script.main(never, ["--config", config, "--out", out]) == 2
    assert "1 ranks but 2 processes were started" in capsys.readouterr().err
    assert script.main(never, ["--config", config, "--out", out, "--set", "parallel.dp=2", "parallel.tp=2"]) == 2
    assert "dp2.tp2 has 4 ranks but 2 processes were started" in capsys.readouterr().err
    assert script.main(never, ["--config", config, "--out", out, "--set", "parallel.cp=2", "train.micro_batch=3"]) == 2
    assert "micro_batch" in capsys.readouterr().err
    assert not Path(out).exists()


def test_one_process_says_nothing_of_layouts(tmp_path, capsys):
    loop.train(NumpyStepper, run_config(), tmp_path)
    shown = capsys.readouterr().err
    assert "layout" not in shown and "ranks" not in shown


def test_options_that_came_later_are_no_change(tmp_path, capsys):
    """A checkpoint from before an option existed resumes without a warning about it."""
    loop.train(NumpyStepper, run_config(train__steps=4), tmp_path)
    folder = tmp_path / "step-00000004"
    trainer = json.loads((folder / "trainer.json").read_text())
    model = json.loads((folder / "model.json").read_text())
    del trainer["layout"], trainer["config"]["parallel"], trainer["config"]["checkpoint"]["asynchronous"]
    del model["config"]["table_dtype"]
    for name, tree in (("trainer", trainer), ("model", model)):
        (folder / f"{name}.json").write_text(json.dumps(tree))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["digest"]
    for name in ("trainer.json", "model.json"):
        manifest["files"][name] = {"size": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": manifest_digest(manifest)}))
    capsys.readouterr()
    loop.train(NumpyStepper, run_config(train__steps=5), tmp_path, "auto")
    lines = [line for line in capsys.readouterr().err.splitlines() if "changed" in line or "note:" in line]
    assert lines == [
        "note: the learning rate of step 5 is 1.625e-02; by the checkpoint's schedule it would be 5.000e-03 (its "
        "schedule spans 4 steps, this one 5); --set train.schedule_steps=4 keeps to it, at 5.000e-03 beyond its end",
        "warning: changed since the checkpoint: train.steps: 4 -> 5",
    ]
