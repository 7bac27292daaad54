"""A muP search: its plan, resuming after a kill, and the record of each trial.

Trials are trained in numpy by the shipped loop; tests/parity/test_mup_search.py launches real ones.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from telechat_twins.core import cli
from telechat_twins.core.commands.mup import search as command
from telechat_twins.core.config import load_run_config
from telechat_twins.core.errors import UserError
from telechat_twins.core.launch.worker import write_status
from telechat_twins.core.model.config import CONFIGS
from telechat_twins.core.mup import search as searching
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
    report_of,
)
from telechat_twins.core.train import records, script
from telechat_twins.core.train.metrics import MetricsLog, read_metrics
from tests.support.mup_search import write_search
from tests.support.numpy_stepper import NumpyStepper


class Killed(BaseException):
    """The search's own process is gone: nothing after it runs."""


Factory = Callable[[str], NumpyStepper]  # what script.main makes a trial's stepper with
Launched = tuple[list[str], dict[str, Factory]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
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
            code = script.main(steppers.get(name, NumpyStepper), words)
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


def numbers(run: Path) -> list[tuple[object, ...]]:
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


def test_a_search(folder: Path, launched: Launched, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_a_killed_search_goes_on(
    folder: Path, launched: Launched, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_a_result_without_its_cleaning_up_is_kept(
    folder: Path, launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_trials_may_be_added_but_not_changed(
    folder: Path, launched: Launched, capsys: pytest.CaptureFixture[str]
) -> None:
    order, _ = launched
    assert tele(folder) == 0
    order.clear()
    write_search(folder, trials=[{"lr": 0.2}])
    assert tele(folder) == 0 and order == ["w8-lr0.2"]
    write_search(folder, set=["train.seed=5"])
    capsys.readouterr()
    assert tele(folder) == 2
    error = capsys.readouterr().err
    assert "w8-lr0.05-logit_mult1 has a trial with other values (train.seed: 1234 -> 5); give another folder" in error
    assert order == ["w8-lr0.2"] and error.count("\n") == 1


def test_seeds_may_be_added(folder: Path, launched: Launched) -> None:
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
    folder: Path, launched: Launched, capsys: pytest.CaptureFixture[str]
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


def test_a_full_disk_ends_the_search(folder: Path, launched: Launched, capsys: pytest.CaptureFixture[str]) -> None:
    """Every further trial would end alike, each with lines of its own."""
    order, steppers = launched
    names = [trial.name for trial in plan(read_search(folder / "search.yaml"), folder / "out")]

    class Full(NumpyStepper):
        def update(self, lr, grad_scale):
            raise OSError("step-00000002: the disk is full while saving; nothing was replaced; free some space")

    steppers[names[1]] = Full
    assert tele(folder) == 2 and order == names[:2]
    assert "the disk is full" not in capsys.readouterr().err, "the launch says it"
    assert not (folder / "out" / names[1] / "result.json").exists()
    del steppers[names[1]]
    order.clear()
    assert tele(folder) == 0 and order == names[1:]


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
        ({"window": 20}, "window: must be at most half of the 24 steps of a trial, found 20"),
        ({"config": "gone.yaml"}, "gone.yaml: no such file"),
        ({"config": None}, "config: missing"),
        ({"set": ["train.stepz=3"]}, "train: unknown key 'stepz'"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, launched: Launched, changes: dict[str, object], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_search(folder, **changes)
    assert tele(folder) == 2
    error = capsys.readouterr().err
    assert "search.yaml: " in error and says in error and error.count("\n") == 1
    assert not launched[0] and not (folder / "out").exists()


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
