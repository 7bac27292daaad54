"""A search: its plan, going on after a kill, what is recorded of trials, and the report. Trials are trained in numpy by
the shipped loop; tests/parity/test_mup_search.py launches real ones."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from telechat_twins.core import cli
from telechat_twins.core.commands.mup import search as command
from telechat_twins.core.config import load_run_config
from telechat_twins.core.errors import UserError
from telechat_twins.core.launch.worker import write_status
from telechat_twins.core.model.config import CONFIGS
from telechat_twins.core.mup import search as searching
from telechat_twins.core.mup import search_report
from telechat_twins.core.mup.loss_table import read_loss_table
from telechat_twins.core.mup.search import (
    DIVERGED,
    DONE,
    FAILED,
    Numbers,
    applied,
    plan,
    prepare,
    read_search,
    result_of,
)
from telechat_twins.core.mup.search_plot import plot
from telechat_twins.core.mup.search_report import (
    describe,
    judge_widths,
    loss_tables,
    ordered,
    over_seeds,
    report_of,
    results_csv,
    to_json,
    varied,
)
from telechat_twins.core.train import loop, records
from telechat_twins.core.train.metrics import MetricsLog, read_metrics
from tests.support.numpy_stepper import SEQ_LEN, VOCAB, NumpyStepper
from tests.support.packed import write_packed

STEPS = 24
SEARCH: dict[str, Any] = {"config": "run.yaml", "grid": {"lr": [0.05, 0.1], "logit_mult": [1.0, 2.0]}, "window": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """run.yaml, the narrow run on packed data, and search.yaml, four trials on it."""
    data = write_packed(tmp_path / "data", VOCAB, SEQ_LEN, sequences=60)
    run = {
        "model": {
            "vocab_size": VOCAB, "hidden_size": 8, "ffn_hidden_size": 16, "num_layers": 1, "num_heads": 2,
            "num_kv_heads": 2, "norm_eps": 1e-5, "training_seqlen": SEQ_LEN, "base_seqlen": SEQ_LEN,
            "max_seqlen": SEQ_LEN, "logit_mult": 2.0,
        },
        "data": {"sources": [{"path": str(data)}], "seq_len": SEQ_LEN},
        "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 2},
        "optim": {"lr": 0.05, "min_lr": 0.005, "warmup_steps": 4},
        "checkpoint": {"every": 8},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    write_search(tmp_path)
    return tmp_path


def write_search(folder: Path, **changes: Any) -> Path:
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**SEARCH, **changes}.items() if v is not None}))
    return path


class Killed(BaseException):
    """The search's own process is gone: nothing after it runs."""


Factory = Callable[[str], Any]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], dict[str, Factory]]:
    """In place of processes the shipped loop in this one, on a numpy model. Names of the trials in the order in which
    they were launched; by name, the stepper of a trial that is to be another than NumpyStepper."""
    order: list[str] = []
    steppers: dict[str, Factory] = {}

    def launch(backend: str, words: list[str], nproc: int, log_dir: Path, *, instead: Callable[[], None]) -> int:
        name = Path(log_dir).parent.name
        order.append(name)
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        instead()
        try:
            code = loop.main(steppers.get(name, NumpyStepper), words)
        except SystemExit as stop:
            write_status(log_dir, 0, 1, str(stop.code))
            return 1
        except OSError as error:
            write_status(log_dir, 0, 1, f"OSError: {error}")
            return 1
        write_status(log_dir, 0, code)
        return code

    monkeypatch.setattr(searching, "launch", launch)
    monkeypatch.setattr(records, "plot_losses", lambda *_: None)  # drawing takes longer than training
    monkeypatch.setattr(command, "plot", lambda *_: [])
    return order, steppers


def tele(folder: Path, out: str = "out") -> int:
    return cli.main(["mup", "search", str(folder / "search.yaml"), "--backend", "pt", "--out", str(folder / out)])


def numbers(run: Path) -> list[tuple[Any, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in read_metrics(run)]


def test_the_plan(folder: Path) -> None:
    search = read_search(write_search(folder, trials=[{"min_lr_ratio": 0.5}, {"lr": 0.1, "logit_mult": 2.0}]))
    trials = plan(search, folder / "out")
    combinations = [(t.numbers.lr, t.numbers.logit_mult, t.numbers.min_lr_ratio) for t in trials]
    grid = [(0.05, 1.0, None), (0.05, 2.0, None), (0.1, 1.0, None), (0.1, 2.0, None)]
    assert combinations == [*grid, (None, None, 0.5)], "each combination once"
    assert trials[0].name == "w8-lr0.05-logit_mult1" and trials[0].folder == folder / "out" / trials[0].name
    assert trials[2].config.optim.lr == 0.1 and trials[2].config.optim.min_lr == pytest.approx(0.01)
    assert trials[4].config.optim.min_lr == 0.025 and trials[4].config.model.logit_mult == 2.0
    assert {(t.config.train.seed, t.config.data.sources[0].path) for t in trials} == {(1234, str(folder / "data"))}


def test_widths_are_carried_over_by_mup(folder: Path) -> None:
    trials = plan(read_search(write_search(folder, widths=[32, 8, 16], grid={"matrix_lr": [0.04]})), folder)
    assert [trial.width for trial in trials] == [8, 16, 32], "narrow ones first: their losses come soon"
    assert [trial.config.optim.matrix_lr for trial in trials] == [0.04, 0.02, 0.01]
    assert [trial.config.model.logit_mult for trial in trials] == [2.0, 1.0, 0.5]
    assert [trial.config.model.matrix_init_std for trial in trials] == [None, pytest.approx(0.02 / 2**0.5), 0.01]
    assert [trial.work for trial in trials] == sorted(trial.work for trial in trials)


def test_a_combination_changes_what_it_names(folder: Path) -> None:
    base = load_run_config(folder / "run.yaml")
    said = Numbers(lr=0.2, matrix_lr=0.1, init_std=0.3, matrix_init_std=0.4, input_mult=5.0, logit_mult=6.0)
    made = applied(base, said)
    assert (made.optim.lr, made.optim.min_lr, made.optim.matrix_lr) == (0.2, pytest.approx(0.02), 0.1)
    model = made.model
    assert (model.init_std, model.matrix_init_std, model.input_mult, model.logit_mult) == (0.3, 0.4, 5.0, 6.0)
    assert applied(base, Numbers()) == base and Numbers().label == "config"
    assert applied(base, Numbers(min_lr_ratio=1.0)).optim.min_lr == 0.05
    assert said.label.startswith("lr0.2-matrix_lr0.1-init_std0.3")


@pytest.mark.parametrize("path", sorted((CONFIGS / "mup").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_search_loads(path: Path) -> None:
    trials = plan(read_search(path), Path("out"))
    assert len({trial.folder for trial in trials}) == len(trials) >= 4


def test_a_search(folder: Path, launched: Any, capsys: pytest.CaptureFixture[str]) -> None:
    order, _ = launched
    assert tele(folder) == 0
    assert order == [trial.name for trial in plan(read_search(folder / "search.yaml"), folder)]
    out = capsys.readouterr()
    lines = out.out.splitlines()
    assert lines[0] == "4 trials with PyTorch, 0 of them ended before"
    assert lines[1].split() == ["width", "lr", "logit_mult", "loss", "gradient", "norm", "minutes"]
    assert "trial 4/4 w8-lr0.1-logit_mult2: done, all in 0:0" in out.err
    rows = list(csv.DictReader(io.StringIO((folder / "out" / "results.csv").read_text())))
    losses = [float(row["loss"]) for row in rows]
    assert len(rows) == 4 and losses == sorted(losses)
    assert {row["state"] for row in rows} == {DONE}
    report = json.loads((folder / "out" / "results.json").read_text())
    assert report["trials"][0]["at this width"]["optim.lr"] == float(rows[0]["lr"])
    pictures = plot(
        [report_of(trial, 4) for trial in plan(read_search(folder / "search.yaml"), folder / "out")], 4, folder
    )
    assert [picture.name for picture in pictures] == ["losses.png", "hyperparameters.png"]
    assert all(picture.read_bytes()[:4] == b"\x89PNG" for picture in pictures)
    assert not list((folder / "out").glob("*/step-*")), "checkpoints go when a trial has ended"


@pytest.mark.parametrize("step", [2, 10])
def test_a_killed_search_goes_on(folder: Path, launched: Any, step: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed in the third trial, before and after its first checkpoint; the whole equals a search that was not."""
    order, steppers = launched
    assert tele(folder, "whole") == 0
    third = order[2]
    order.clear()

    class Dies(NumpyStepper):
        def update(self, lr, grad_scale):
            super().update(lr, grad_scale)
            if self.step == step:
                raise Killed

    steppers[third] = Dies
    with pytest.raises(Killed):
        tele(folder)
    out = folder / "out"
    kept = {name: (out / name / "metrics.jsonl").stat().st_mtime_ns for name in order[:2]}
    assert [result_of(t) is not None for t in plan(read_search(folder / "search.yaml"), out)] == [
        True,
        True,
        False,
        False,
    ]
    del steppers[third]
    order.clear()
    assert tele(folder) == 0
    assert order == [trial.name for trial in plan(read_search(folder / "search.yaml"), out)][2:], (
        "the rest, and only it"
    )
    assert {name: (out / name / "metrics.jsonl").stat().st_mtime_ns for name in kept} == kept
    for name in [*kept, *order]:
        assert numbers(out / name) == numbers(folder / "whole" / name)
    assert ("(step 8, written by numpy)" in capsys.readouterr().err) is (step == 10), (
        "from its checkpoint, if it had one"
    )
    order.clear()
    assert tele(folder) == 0 and order == [], "nothing is left to do"


def test_a_result_without_its_cleaning_up_is_kept(folder: Path, launched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the result and the removal of checkpoints."""
    order, _ = launched

    def killed(folder: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(searching, "forget_checkpoints", killed)
        with pytest.raises(Killed):
            tele(folder)
    first = folder / "out" / order[0]
    assert list(first.glob("step-*"))
    order.clear()
    assert tele(folder) == 0 and len(order) == 3
    assert not list(first.glob("step-*")) and not (first / "latest").exists()


def test_trials_may_be_added_but_not_changed(folder: Path, launched: Any, capsys: pytest.CaptureFixture[str]) -> None:
    order, _ = launched
    assert tele(folder) == 0
    order.clear()
    write_search(folder, trials=[{"lr": 0.2}])
    assert tele(folder) == 0 and order == ["w8-lr0.2"]
    write_search(folder, set=["train.seed=5"])
    capsys.readouterr()
    assert tele(folder) == 2
    error = capsys.readouterr().err
    assert "w8-lr0.05-logit_mult1 was made with other numbers (train.seed: 1234 -> 5); give another folder" in error
    assert order == ["w8-lr0.2"] and error.count("\n") == 1


def test_seeds_may_be_added(folder: Path, launched: Any) -> None:
    """A search made without them goes on with what it has; the config's own seed is 1234."""
    order, _ = launched
    write_search(folder, grid={"lr": [0.05]}, widths=[8, 16])
    assert tele(folder) == 0 and order == ["w8-lr0.05", "w16-lr0.05"]
    order.clear()
    write_search(folder, grid={"lr": [0.05]}, widths=[8, 16], seeds=[5, 1234, 5])
    assert tele(folder) == 0 and order == ["w8-lr0.05-seed5", "w16-lr0.05-seed5"]
    out = folder / "out"
    assert [row["lr"] for row in read_metrics(out / order[0])] == [row["lr"] for row in read_metrics(out / "w8-lr0.05")]
    assert numbers(out / order[0]) != numbers(out / "w8-lr0.05")
    record = json.loads((out / "results.json").read_text())
    assert [mean["seeds"] for mean in record["means over seeds"]] == [[5, 1234], [5, 1234]]
    assert {trial["seed"] for trial in record["trials"]} == {5, 1234} and len(record["trials"]) == 4
    order.clear()
    write_search(folder, grid={"lr": [0.05]}, widths=[8, 16], seeds=[7])
    assert tele(folder) == 0 and order == ["w8-lr0.05-seed7", "w16-lr0.05-seed7"], "the config's own may be left out"


def test_the_last_bit_of_a_computed_number_changes_no_trial(folder: Path) -> None:
    """0.009 * (0.003 / 0.03) is 0.0009 or the double below it, by the order of the operations."""
    trials = plan(read_search(folder / "search.yaml"), folder / "out")
    prepare(trials, "pt")
    file = trials[0].folder / "trial.json"
    made = json.loads(file.read_text())
    lr = made["optim"]["min_lr"]
    file.write_text(json.dumps(made | {"optim": made["optim"] | {"min_lr": math.nextafter(lr, 0.0)}}))
    prepare(trials, "pt")
    file.write_text(json.dumps(made | {"optim": made["optim"] | {"min_lr": lr * (1 - 1e-11)}}))
    with pytest.raises(UserError, match="optim.min_lr: 0.00499"):
        prepare(trials, "pt")


def test_an_option_born_later_changes_no_trial(folder: Path) -> None:
    trials = plan(read_search(folder / "search.yaml"), folder / "out")
    prepare(trials, "pt")
    file = trials[0].folder / "trial.json"
    older = json.loads(file.read_text())
    del older["optim"]["matrix_lr"]
    file.write_text(json.dumps(older))
    prepare(trials, "pt")
    with pytest.raises(UserError, match="backend: pt -> ms"):
        prepare(trials, "ms")


def test_what_diverges_or_fails_is_recorded_and_not_fatal(
    folder: Path, launched: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    order, steppers = launched
    names = [trial.name for trial in plan(read_search(folder / "search.yaml"), folder / "out")]

    class Full(NumpyStepper):
        def update(self, lr, grad_scale):
            raise OSError(28, "out of something")

    steppers[names[0]] = lambda config: NumpyStepper(config, {9: math.nan})
    steppers[names[1]] = Full
    assert tele(folder) == 0 and order == names
    states = {r["trial"]: r for r in json.loads((folder / "out" / "results.json").read_text())["trials"]}
    assert [states[name]["state"] for name in names] == [DIVERGED, FAILED, DONE, DONE]
    assert states[names[0]]["steps"] == 8 and "training stopped at step 9" in states[names[0]]["reason"]
    text = capsys.readouterr().out
    assert "diverged at step 8: training stopped at step 9" in text and "out of something" in text
    # Started again: what failed for another reason than its numbers is tried once more, what diverged is not.
    del steppers[names[1]]
    order.clear()
    assert tele(folder) == 0 and order == [names[1]]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"grid": {"learning_rate": [1.0]}}, "grid: unknown key 'learning_rate'"),
        ({"grid": {"lr": [0.1, -0.1]}}, "grid.lr[1]: must be above 0"),
        ({"grid": {"lr": 0.1}}, "grid.lr: expected a list"),
        ({"trials": [{"min_lr_ratio": 1.5}]}, "trials[0].min_lr_ratio: must be at most 1"),
        ({"widths": [8, 10]}, "widths: width 10: must be a multiple of 4"),
        ({"seeds": [1, -2]}, "seeds[1]: must be at least 0"),
        ({"seeds": 3}, "seeds: expected a list"),
        ({"window": 20}, "window: 20 is more than half of the 24 steps"),
        ({"config": "gone.yaml"}, "gone.yaml: no such file"),
        ({"config": None}, "config: missing"),
        ({"set": ["train.stepz=3"]}, "train: unknown key 'stepz'"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, launched: Any, changes: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_search(folder, **changes)
    assert tele(folder) == 2
    error = capsys.readouterr().err
    assert "search.yaml: " in error and says in error and error.count("\n") == 1
    assert not launched[0] and not (folder / "out").exists()


def made_up(
    folder: Path,
    losses: dict[int, Callable[[int], float]],
    norm: Callable[[int], float] = lambda s: 1.0,
    luck: dict[int, list[float]] | None = None,
) -> list[Any]:
    """Ended trials of given widths whose loss at step s is ``losses[width](s)``, with ``luck`` plus luck[width][i] from
    seed i, whose batches are also harder by i than the first's."""
    seeds = list(range(len(next(iter(luck.values()))))) if luck else None
    trials = plan(read_search(write_search(folder, grid=None, widths=list(losses), seeds=seeds)), folder / "out")
    prepare(trials, "pt")
    for trial in trials:
        lucky = luck[trial.width][trial.seed] + trial.seed if luck else 0.0
        with MetricsLog(trial.folder / "metrics.jsonl") as log:
            for step in range(1, STEPS + 1):
                row = {"loss": losses[trial.width](step) + lucky, "grad_norm": norm(step), "lr": 0.05}
                log.append({"step": step, **row, "step_ms": 500.0})
        (trial.folder / "result.json").write_text(json.dumps({"state": DONE, "reason": ""}))
    return [report_of(trial, 4) for trial in trials]


def falling(floor: float, noise: float = 0.0) -> Callable[[int], float]:
    """3 / s + floor, with a wobble that all widths share and a smaller one of each."""
    return lambda step: 3.0 / step + floor + 0.1 * math.sin(9.0 * step) + noise * math.sin(7.0 * step + floor * 100)


def test_wider_is_better(folder: Path) -> None:
    reports = made_up(folder, {8: falling(2.0), 16: falling(1.9, 0.01), 32: falling(1.85, 0.01)})
    ((_, pairs),) = judge_widths(reports, 4).items()
    assert [(pair.narrow, pair.wide, pair.windows, pair.better, pair.worse) for pair in pairs] == [
        (8, 16, 5, 1.0, []),
        (16, 32, 5, 1.0, []),
    ]
    text = describe(reports, judge_widths(reports, 4), 4)
    assert "wider is better (config): holds" in text
    assert "8 -> 16: better in 100% of 5 windows of 4 steps, beyond noise in 100%; never worse beyond it; at" in text
    assert f"; at the end {pairs[0].last:+.4f} (noise {pairs[0].noise:.4f})" in text
    assert pairs[0].last == pytest.approx(-0.1, abs=0.01)
    assert text.endswith("noise: the scatter inside a window; one seed says nothing of the luck of initial weights")


def test_a_wider_model_that_falls_behind_is_seen(folder: Path) -> None:
    """As with a matrix rate that was not divided: behind from step 17 on."""
    behind = falling(1.9, 0.01)
    reports = made_up(folder, {8: falling(2.0), 16: lambda s: behind(s) + (0.3 if s > 16 else 0.0)})
    ((_, (pair,)),) = judge_widths(reports, 4).items()
    assert (pair.worse, pair.better) == ([20, 24], 0.6)
    assert "DOES NOT HOLD" in describe(reports, judge_widths(reports, 4), 4)
    assert plot(reports, 4, folder)[-1].name == "widths.png"


def test_a_warm_up_that_leaves_no_window(folder: Path) -> None:
    reports = made_up(folder, {8: falling(2.0), 16: falling(1.9)}, luck={8: [0.0, 0.1], 16: [0.1, 0.0]})
    ((_, (pair,)),) = judge_widths(reports, 21).items()
    assert (pair.windows, pair.worse, pair.last, pair.noise) == (0, [], None, None)
    assert "of 0 windows" in describe(reports, judge_widths(reports, 21), 21)
    json.dumps(to_json(reports, judge_widths(reports, 21), 21), allow_nan=False)


def test_noise_is_not_taken_for_worse(folder: Path) -> None:
    reports = made_up(folder, {8: falling(2.0), 16: falling(2.0, 0.2)})
    ((_, (pair,)),) = judge_widths(reports, 4).items()
    assert pair.worse == [] and 0.0 < pair.better < 1.0


def test_the_loss_table_is_what_predict_takes(folder: Path) -> None:
    floors = {8: 2.0, 16: 1.9, 32: 1.85, 64: 1.83}
    reports = made_up(folder, {width: falling(floor) for width, floor in floors.items()})
    ((name, text),) = loss_tables(reports, 4).items()
    (folder / name).write_text(text)
    table = read_loss_table(folder / name)
    assert (name, table.measure, table.step, table.widths) == ("losses.csv", "parameters", STEPS, (8, 16, 32, 64))
    assert table.losses[0] == pytest.approx(sum(falling(2.0)(s) for s in range(21, 25)) / 4, abs=1e-6)
    assert cli.main(["mup", "predict", str(folder / name), "--hold-out", "0"]) == 0
    unfinished = [replace(report, state="begun") if report.trial.width == 64 else report for report in reports]
    assert "\n64," not in loss_tables(unfinished, 4)["losses.csv"], "a run that has not ended has another step"


LUCK = {8: [0.0, 0.05, -0.05], 16: [0.06, -0.04, 0.01], 32: [-0.05, 0.02, 0.0], 64: [0.03, 0.0, -0.04]}
FLOORS = {8: 2.0, 16: 1.985, 32: 1.8, 64: 1.79}


def test_the_mean_over_seeds(folder: Path) -> None:
    reports = made_up(folder, {width: falling(floor) for width, floor in FLOORS.items()}, luck=LUCK)
    assert len(reports) == 12
    means = over_seeds(reports, 4)
    assert [mean.trial.width for mean in means] == [8, 16, 32, 64] and over_seeds(means, 4) == means
    plain = sum(falling(2.0)(s) for s in range(21, 25)) / 4
    assert means[0].loss == pytest.approx(plain + 1.0) and means[0].scatter == pytest.approx(1 - 0.05 / 2, abs=2e-3)
    assert means[0].seconds == 3 * 0.5 * STEPS and means[0].steps == STEPS and reports[0].scatter is None
    ((_, text),) = loss_tables(reports, 4).items()
    assert text.startswith("# config: mean loss of the last 4 steps, mean over seeds 0, 1, 2\n")
    assert text.splitlines()[2].split(",")[2] == f"{means[0].loss:.6f}" and len(text.splitlines()) == 6
    rows = list(csv.DictReader(io.StringIO(results_csv(reports))))
    assert len(rows) == 12 and {row["seed"] for row in rows} == {"0", "1", "2"}, "a line a trial"
    said = describe(reports, judge_widths(reports, 4), 4).splitlines()
    assert said[0].split() == ["width", "loss", "+-", "gradient", "norm", "minutes"]
    assert said[1].split()[:3] == ["64", f"{means[3].loss:.4f}", f"{means[3].scatter:.4f}"] and len(said) == 13
    assert said[6] == "all of the mean over seeds 0, 1, 2; +-: standard deviation of the loss between them"
    assert said[-1] == "  noise: the scatter between 3 seeds, all widths together"
    record = to_json(reports, judge_widths(reports, 4), 4)["means over seeds"]
    assert record[0]["place"] == "w64-config" and record[0]["seeds"] == [0, 1, 2]
    assert [p.name for p in plot(reports, 4, folder)] == ["losses.png", "hyperparameters.png", "widths.png"]


def test_luck_of_one_seed_is_not_taken_for_worse(folder: Path) -> None:
    """8 -> 16 is worse by 0.045 at seed 0, for its luck alone; of three seeds the mean is better by 0.005."""
    losses = {width: falling(floor) for width, floor in FLOORS.items()}
    reports = made_up(folder, losses, luck=LUCK)
    ((_, lucky),) = judge_widths([r for r in reports if r.trial.seed == 0], 4).items()
    assert lucky[0].worse == [8, 12, 16, 20, 24]
    ((_, pairs),) = judge_widths(reports, 4).items()
    assert [pair.worse for pair in pairs] == [[], [], []]
    # Two-way analysis of variance by hand: the deviation is 0.04628, Student's 3-sigma quantile of 6 degrees 4.904.
    assert pairs[0].noise == pytest.approx(0.04628 * 4.904 * (2 / 3) ** 0.5, rel=1e-3)
    assert [pair.better for pair in pairs] == [1.0, 1.0, 1.0] and [pair.surely for pair in pairs] == [0.0, 1.0, 0.0]


def test_a_wider_model_that_falls_behind_is_seen_through_luck(folder: Path) -> None:
    losses = {width: falling(floor) for width, floor in FLOORS.items()}
    losses[32] = lambda s: falling(1.8)(s) + (0.5 if s > 16 else 0.0)
    reports = made_up(folder, losses, luck=LUCK)
    ((_, pairs),) = judge_widths(reports, 4).items()
    assert [pair.worse for pair in pairs] == [[], [20, 24], []]
    assert "DOES NOT HOLD" in describe(reports, judge_widths(reports, 4), 4)


@pytest.mark.parametrize(("widths", "seeds"), [(2, 2), (2, 3), (8, 3), (3, 5)])
def test_how_often_luck_is_called_worse(widths: int, seeds: int) -> None:
    """Widths that differ by luck alone, under batches that differ far more: beyond noise in 0.135 %, what three sigma
    leave on one side, whatever the number of seeds. 200,000 windows, so a count of 270 with a deviation of 16."""
    draw = np.random.default_rng(7).normal
    means = draw(size=(widths, seeds, 200_000)) + 10.0 * draw(size=(1, seeds, 200_000))
    beyond = (means[1] - means[0]).mean(axis=0) > search_report._luck(means)
    assert np.count_nonzero(beyond) == pytest.approx(270, abs=65)


def test_a_seed_that_diverges_takes_its_width_out_of_the_comparison(folder: Path) -> None:
    reports = made_up(folder, {width: falling(floor) for width, floor in FLOORS.items()}, luck=LUCK)
    at = next(i for i, r in enumerate(reports) if (r.trial.width, r.trial.seed) == (16, 2))
    short = reports[at].rows[:20]
    reports[at] = replace(reports[at], state=DIVERGED, reason="training stopped at step 21: x", rows=short)
    ((_, pairs),) = judge_widths(reports, 4).items()
    assert [(pair.narrow, pair.wide) for pair in pairs] == [(8, 32), (32, 64)]
    text = describe(reports, judge_widths(reports, 4), 4)
    assert "diverged at step 20: seed 2 diverged training stopped at step 21: x" in text.splitlines()[4]
    assert "\n16," not in loss_tables(reports, 4)["losses.csv"]


TRENDS = {
    "rising": (lambda s: 1.0 + 0.05 * s, True, 1.556),
    "falling": (lambda s: 3.0 - 0.05 * s, False, 0.72),
    "up and down": (lambda s: 1.0 + (s > 12) * (s < 19) * 1.0 + 0.01 * s, False, 1.15),
}


@pytest.mark.parametrize("name", TRENDS)
def test_the_trend_of_the_gradient_norm(folder: Path, name: str) -> None:
    norm, rising, ratio = TRENDS[name]
    (report,) = made_up(folder, {8: falling(2.0)}, norm)
    assert report.rising is rising and report.trend == pytest.approx(ratio, abs=0.01)
    assert ("rising" in describe([report], {}, 4).splitlines()[1]) is rising


def test_order_and_what_is_said(folder: Path) -> None:
    (good, worse) = made_up(folder, {8: falling(2.0), 16: lambda s: 2.0 + 0.1 * s})
    begun = replace(good, state="begun", loss=0.1, trial=replace(good.trial, width=32))
    gone = replace(begun, state=DIVERGED, loss=1.0, reason="training stopped at step 9: x")
    gone = replace(gone, trial=replace(good.trial, width=64))
    assert ordered([begun, gone, worse, good]) == [good, worse, gone, begun]
    text = describe([begun, gone, worse, good], {}, 4).splitlines()
    assert text[2].endswith("ended above its start") and text[3].endswith(
        "diverged at step 24: training stopped at step 9: x"
    )
    assert varied([good.trial, worse.trial]) == []
    assert results_csv([good]).splitlines()[0].startswith("trial,state,reason,width,parameters,lr,matrix_lr")
    empty = report_of(plan(read_search(write_search(folder)), folder / "none")[0], 4)
    assert (empty.state, empty.loss, empty.steps) == ("waiting", None, 0)
    assert plot([empty], 4, folder) == []


def test_time_left(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Told from the work done in this session; steps made in an earlier one are not work."""
    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    trials = plan(read_search(folder / "search.yaml"), folder / "out")
    prepare(trials, "pt")
    (trials[0].folder / "step-00000012").mkdir()
    progress = command.Progress(trials)
    progress.begin(trials[0])

    def step_at(seconds: float, step: int) -> str:
        now[0] = seconds
        with MetricsLog(trials[0].folder / "metrics.jsonl", 10**6) as log:
            log.append({"step": step, "loss": None})
        progress.look()
        return capsys.readouterr().err

    capsys.readouterr()
    assert step_at(10.0, 13).endswith("step 13/24 loss -, time left not known yet\n")
    assert step_at(12.0, 14) == "", "not at every look"
    # 6 of 24 steps in 30 s, so 18 s left of this trial's 6 and three times 120 s.
    assert step_at(30.0, 18).endswith("step 18/24 loss -, about 6:30 left\n")
    now[0] = 60.0
    progress.end("done")
    assert capsys.readouterr().err == f"trial 1/4 {trials[0].name}: done, about 6:00 left\n"
