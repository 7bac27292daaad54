"""tele bench: the arithmetic of a paired measurement, its table, and the two workers' turns."""

import argparse
import io
import json
from pathlib import Path

import pytest

from telechat_twins.core.bench import step as bench_step
from telechat_twins.core.bench.worker import bench_config, random_batch, spread, timed_steps
from telechat_twins.core.cli import main
from telechat_twins.core.commands import bench
from telechat_twins.core.errors import UserError

OPTIONS = {"model": "telechat2-tiny", "seq_len": 32, "micro_batch": 2, "micro_batches": 3, "precision": "fp32"}


def arguments(*argv, what="step"):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([what, *argv])


class Recorder:
    """A Trainer that notes what it is asked."""

    def __init__(self, first=0, rows=6):
        self.calls, self.part = [], (first, rows)

    def share(self, global_batch):
        return self.part

    def gradients(self, batch, num_targets, loss_scale):
        self.calls.append(("gradients", batch.input_ids.shape, num_targets))
        return 0.5

    def grad_norm(self, loss_scale):
        self.calls.append(("norm",))
        return 4.0

    def update(self, lr, grad_scale):
        self.calls.append(("update", round(grad_scale, 3)))


class TwoWorkers:
    """Stands for the worker processes: the first takes twice as long, both slow down from round to round."""

    turns: list[tuple[str, int]] = []

    def __init__(self, name, options):
        self.name, self.implementation = name, {"backend": f"{name} 1.0", "device": "CPU"}
        self.done = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def steps(self, count):
        TwoWorkers.turns.append((self.name, count))
        self.done += 1
        return {"seconds": [{"ms": 0.2, "pt": 0.1, "eager": 0.16}[self.name] * self.done] * count, "loss": 7.6}


def test_a_step_is_a_whole_optimizer_step():
    trainer, config = Recorder(), bench_config(OPTIONS)
    seconds, loss = timed_steps(trainer, config, 0, 2)
    assert len(seconds) == 2 and loss == 0.5
    assert trainer.calls == [("gradients", (6, 32), 192), ("norm",), ("update", 0.25)] * 2


def test_a_data_parallel_rank_gets_its_rows_and_the_targets_of_all():
    trainer = Recorder(first=4, rows=2)
    timed_steps(trainer, bench_config(OPTIONS), 0, 1)
    assert trainer.calls[0] == ("gradients", (2, 32), 192)


def test_both_backends_get_the_same_tokens():
    config = bench_config(OPTIONS)
    first, again, other = random_batch(config, 3), random_batch(config, 3), random_batch(config, 4)
    assert (first.input_ids == again.input_ids).all() and (first.input_ids != other.input_ids).any()
    assert (first.input_ids[:, 1:] == first.targets[:, :-1]).all() and first.num_targets == 6 * 32


def test_turns_ratio_and_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_step, "Worker", TwoWorkers)
    TwoWorkers.turns = []
    out = tmp_path / "a" / "bench.json"
    assert bench.run(arguments("--steps", "12", "--block", "5", "--seq-len", "32", "--out", str(out))) == 0
    # A block to warm up, then rounds in alternating order, 12 steps of each in all.
    expected = [("ms", 5), ("pt", 5), ("ms", 5), ("pt", 5), ("pt", 5), ("ms", 5), ("ms", 2), ("pt", 2)]
    assert TwoWorkers.turns == expected
    result = json.loads(out.read_text())
    # Both slow down together, which the pairing takes out.
    assert result["ratios"] == [{"of": "ms", "to": "pt", "median": 2.0, "low": 2.0, "high": 2.0}]
    shown = capsys.readouterr().out
    assert "| ms 1.0 | CPU | 600.0 ms | 400.0 to 800.0 ms | 213 |" in shown
    assert "MindSpore takes 2.00 times PyTorch's step time" in shown


def test_three_contestants_have_three_ratios(monkeypatch, capsys):
    monkeypatch.setattr(bench_step, "Worker", TwoWorkers)
    TwoWorkers.turns = []
    assert bench.run(arguments("--steps", "2", "--block", "1", "--backends", "ms", "pt", "eager")) == 0
    order = [name for name, _ in TwoWorkers.turns]
    assert order == ["ms", "pt", "eager", "ms", "pt", "eager", "eager", "pt", "ms"]
    shown = capsys.readouterr().out
    assert "PyTorch takes 0.62 times the eager composition's step time" in shown
    assert "MindSpore takes 1.25 times the eager composition's step time" in shown


def test_a_model_file_is_found_by_workers_that_start_elsewhere(monkeypatch, tmp_path, capsys):
    given = []

    class Worker(TwoWorkers):
        def __init__(self, name, options):
            super().__init__(name, options)
            given.append(options["model"])

    monkeypatch.setattr(bench_step, "Worker", Worker)
    (tmp_path / "long.yaml").write_text("preset: telechat2-tiny\nmax_seqlen: 4096\n")
    monkeypatch.chdir(tmp_path)
    assert bench.run(arguments("--steps", "1", "--block", "1", "--seq-len", "4096", "--model", "long.yaml")) == 0
    assert given == [str(tmp_path / "long.yaml")] * 2
    assert "`long.yaml` (" in capsys.readouterr().out


def test_spread():
    assert spread([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert spread(list(range(1, 21))) == {"median": 10.5, "low": 3, "high": 18}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "--steps: must be at least 1"),
        (["--model", "telechat2-tyni"], "did you mean 'telechat2-tiny'"),
        (["--seq-len", "100000"], r"100000 is above max_seqlen \d+ of telechat2-tiny; give --model FILE.yaml"),
        (["--peers", "hf", "--precision", "fp16"], "--peers: need"),
        (["--layouts", "tp2"], "--layouts: is an option of `tele bench parallel`"),
        (["--operators", "rope"], "--operators: is an option of `tele bench kernels`, not of `tele bench step`"),
        (["--prompt", "3"], "--prompt: is an option of `tele bench decode and serve`"),
        (["--rows", "3"], "--rows: is an option of `tele bench decode`"),
        (
            ["--backends", "eager", "--precision", "bf16"],
            "--precision: must be fp32 for the eager composition, found bf16",
        ),
    ],
)
def test_mistakes_are_told_before_anything_starts(argv, message):
    with pytest.raises(UserError, match=message):
        bench.run(arguments(*argv))


def test_a_machine_of_another_backend_is_refused() -> None:
    with pytest.raises(UserError, match="cpu-epyc-ms was measured with ms, which is not among --backends pt"):
        bench.run(arguments("--machine", "cpu-epyc-ms", "--backends", "pt", what="parallel"))


def test_a_bad_out_is_found_before_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for out, says in (
        (tmp_path / "file/x.json", "there is a file in place of its folder"),
        (tmp_path, "found a folder"),
    ):
        assert main(["bench", "step", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("tele: --out") and says in error and error.count("\n") == 1


def test_turns_are_counted_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(bench_step, "Worker", TwoWorkers)
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", screen)
    assert bench.run(arguments("--steps", "4", "--block", "2")) == 0
    assert "6/6 [" in screen.getvalue() and "PyTorch" in screen.getvalue()
    screen = io.StringIO()  # in a log the report is all
    monkeypatch.setattr("sys.stderr", screen)
    assert bench.run(arguments("--steps", "4", "--block", "2")) == 0
    assert screen.getvalue() == ""
