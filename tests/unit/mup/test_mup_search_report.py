"""The report of a muP search: comparison of widths, means over seeds, trends, the loss table and the order of rows."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.core import cli
from telechat_twins.core.mup import search_report
from telechat_twins.core.mup.loss_table import read_loss_table
from telechat_twins.core.mup.search import (
    DIVERGED,
    DONE,
    plan,
    prepare,
    read_search,
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
from telechat_twins.core.train.metrics import MetricsLog
from tests.support.mup_search import STEPS, write_search


def made_up(
    folder: Path,
    losses: dict[int, Callable[[int], float]],
    norm: Callable[[int], float] = lambda s: 1.0,
    luck: dict[int, list[float]] | None = None,
) -> list[search_report.TrialReport]:
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
    assert "8 -> 16: better in 100% of 5 windows of 4 steps, beyond noise in 100%; never worse beyond noise; at" in text
    assert f"; at the end {pairs[0].last:+.4f} (noise {pairs[0].noise:.4f})" in text
    assert pairs[0].last == pytest.approx(-0.1, abs=0.01)
    assert text.endswith(
        "noise: estimated from the scatter inside a window; one seed does not show the scatter of initial weights"
    )


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
    assert said[6] == "values are means over the seeds 0, 1, 2; +-: standard deviation of the loss over seeds"
    assert said[-1] == "  noise: estimated from the scatter between 3 seeds, over all widths"
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
