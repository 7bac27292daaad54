"""The loss law: published figures, brute force, coverage of the interval, and the command around it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from telechat_twins.core import cli
from telechat_twins.core.commands.mup.predict import predict
from telechat_twins.core.errors import UserError
from telechat_twins.core.mup import loss_prediction
from telechat_twins.core.mup.loss_prediction import fit_law, forecast, student_quantile, weaknesses
from telechat_twins.core.mup.loss_table import LARGEST, SMALLEST, read_loss_table
from tests.house import ROOT
from tests.support.docs_workspace import loss_table_of_the_page

TABLES = ROOT / "tests" / "loss_tables"

# a, b, c, their standard deviations, relative errors of the held-out sizes, whether the fit is called poor. Computed
# with scipy 1.17.1's curve_fit from (1, -1, 3), as the scripts do that the tables come from. The last digit is
# rounding; curve_fit itself stops within about 1e-5 of the minimum.
PUBLISHED = {
    "mu-scaling-gpt2-20k": ((2.4694, -0.4231, 2.9233), (0.0710, 0.0283, 0.0380), (0.0029, -0.0017, -0.0018), False),
    "nanolm-gpt-7k": ((2.0702, -0.5176, 3.8469), (0.1774, 0.0618, 0.0406), (-0.0002,), False),
    "nanolm-gpt-20k": ((2.1256, -0.3803, 3.5272), (0.1532, 0.0860, 0.1258), (-0.0080,), False),
    "nanolm-llama-20k": ((1.3295, -0.4603, 4.0179), (0.2358, 0.1347, 0.0728), (0.0054,), False),
    "nanolm-gpt-standard-7k": ((1.3539, -0.3221, 4.0440), (0.1951, 0.2811, 0.3774), (-0.0049,), True),
}


def figures(name: str) -> list[tuple[str, float, float]]:
    """(what, found, published) of a published table; the two must agree to their last shown digit."""
    law, deviations, errors, _ = PUBLISHED[name]
    fit, forecasts, _ = predict(read_loss_table(TABLES / f"{name}.yaml"), len(errors), name)
    found = [("a", fit.a), ("b", fit.b), ("c", fit.c), ("a sd", fit.a_sd), ("b sd", fit.b_sd), ("c sd", fit.c_sd)]
    found += [(f"error at {one.size:g}", one.error) for one in forecasts]
    return [(what, got, want) for (what, got), want in zip(found, (*law, *deviations, *errors), strict=True)]


def wrong(rows: list[tuple[str, float, float]]) -> list[str]:
    return [what for what, got, want in rows if not abs(got - want) <= 1.01e-4]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures_are_found_again(name: str) -> None:
    assert wrong(figures(name)) == []
    table = read_loss_table(TABLES / f"{name}.yaml")
    _, forecasts, poor = predict(table, len(PUBLISHED[name][2]), name)
    assert bool(poor) == PUBLISHED[name][3]
    assert all(one.inside for one in forecasts)


def test_a_fit_in_logarithms_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the floor is left out of the regression (the line goes through the origin)."""

    def through_origin(b: float, u: np.ndarray, loss: np.ndarray) -> tuple[float, float, np.ndarray]:
        z = np.exp(b * u) / b
        slope = float(z @ loss / (z @ z))
        return slope, slope / b, loss - slope * z

    monkeypatch.setattr(loss_prediction, "_line", through_origin)
    assert {"b", "c", "error at 1446.72"} <= set(wrong(figures("mu-scaling-gpt2-20k")))


def test_a_covariance_without_the_exponent_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: b taken as known when the errors are computed."""
    right = loss_prediction._jacobian

    def fixed(alpha: float, b: float, u: np.ndarray) -> np.ndarray:
        return right(alpha, b, u) * np.array([1, 30, 1])

    monkeypatch.setattr(loss_prediction, "_jacobian", fixed)
    assert {"b sd", "a sd"} <= set(wrong(figures("mu-scaling-gpt2-20k")))


def brute_force(sizes: np.ndarray, losses: np.ndarray) -> float:
    """The smallest sum of squares over 1,000 exponents, each with its own linear least squares."""
    best = math.inf
    for b in -np.geomspace(1e-3, 8, 1000):
        columns = np.stack([(sizes / sizes.min()) ** b, np.ones_like(sizes)], axis=1)
        best = min(best, float(np.sum((losses - columns @ np.linalg.lstsq(columns, losses, rcond=None)[0]) ** 2)))
    return best


@settings(max_examples=15, deadline=None)
@given(
    logs=st.lists(st.floats(0, 3), min_size=4, max_size=9, unique_by=lambda v: round(v, 2)),
    noise=st.lists(st.floats(-0.1, 0.1), min_size=9, max_size=9),
    b=st.floats(-2, -0.05),
)
def test_no_exponent_does_better(logs: list[float], noise: list[float], b: float) -> None:
    sizes = 10 ** np.array(logs)
    assume(len(np.unique(sizes)) == len(sizes))
    losses = 2 * sizes**b + 3 + np.array(noise[: len(sizes)])
    fit = fit_law(sizes, losses)
    found = float(np.sum((losses - [fit.loss(size) for size in sizes]) ** 2))
    # 1e-12: rounding of sums of squares of losses near 5.
    assert found <= brute_force(sizes, losses) * (1 + 1e-6) + 1e-12


LAWS = {
    "a": st.floats(0.3, 5),
    "b": st.floats(-1.5, -0.1),
    "c": st.floats(0.5, 4),
    "points": st.integers(4, 12),
    "span": st.floats(5, 200),
}


@settings(max_examples=60, deadline=None)
@given(**LAWS)
def test_a_table_made_from_a_law_gives_it_back(a: float, b: float, c: float, points: int, span: float) -> None:
    sizes = np.geomspace(1, span, points)
    fit = fit_law(sizes, a * sizes**b + c)
    # Rounding of the losses, 1e-15, is amplified by the fit's condition, up to 1e6 on these ranges.
    assert (fit.a, fit.b, fit.c) == pytest.approx((a, b, c), rel=1e-6)
    ahead = forecast(fit, 10 * span)
    assert ahead.predicted == pytest.approx(a * (10 * span) ** b + c, rel=1e-7)
    assert weaknesses(fit, sizes, a * sizes**b + c) == []


@settings(max_examples=40, deadline=None)
@given(unit=st.floats(1e-3, 1e6), shift=st.floats(-1, 1), order=st.permutations(range(7)))
def test_units_and_order_do_not_matter(unit: float, shift: float, order: list[int]) -> None:
    """Another unit of size changes a alone; a constant on all losses changes c alone; rows may stand in any order."""
    table = read_loss_table(TABLES / "mu-scaling-gpt2-20k.yaml")
    sizes, losses = np.array(table.sizes[:7]), np.array(table.losses[:7], float)
    one, two = fit_law(sizes, losses), fit_law(unit * sizes[order], losses[order] + shift)
    # The minimum is flat: b is found to the root of the rounding of the sum of squares.
    assert (two.b, two.c - shift, two.b_sd, two.c_sd) == pytest.approx((one.b, one.c, one.b_sd, one.c_sd), rel=1e-5)
    near, far = forecast(one, 1000), forecast(two, 1000 * unit)
    assert (far.predicted - shift, far.high - far.low) == pytest.approx(
        (near.predicted, near.high - near.low), rel=1e-5
    )


def test_the_interval_holds_what_it_says() -> None:
    """400 simulated tables of seven sizes; a new measurement at eight times the largest. The share inside has a
    standard deviation of 1.1 %.
    """
    random = np.random.default_rng(1)
    sizes = np.array([8.53, 21.56, 39.09, 61.12, 87.65, 118.68, 154.21])
    law, new, scatter = 2.47 * sizes**-0.423 + 2.92, 2.47 * 1234.0**-0.423 + 2.92, 0.007
    hits = narrow = 0
    for _ in range(400):
        fit = fit_law(sizes, law + scatter * random.standard_normal(7))
        measured = new + scatter * random.standard_normal()
        hits += bool(forecast(fit, 1234.0, measured).inside)
        # What a planted normal quantile, 1.96 for 2.78, would give: the same count must fail.
        half = (forecast(fit, 1234.0).high - forecast(fit, 1234.0).predicted) * 1.96 / student_quantile(0.95, 4)
        narrow += abs(measured - fit.loss(1234.0)) <= half
    assert abs(hits / 400 - 0.95) < 0.035
    assert not abs(narrow / 400 - 0.95) < 0.035


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (30, 2.0423)]
)
def test_student_quantiles_of_the_printed_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(0.95, freedom) == pytest.approx(quantile, abs=5e-5)


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ([4.0, 3.6, 3.7, 3.4, 3.3], "it rises from size 2 to 4"),
        ([3.0, 3.1, 3.3, 3.4, 3.45], "a is not positive"),
        ([4.0, 3.9, 3.75, 3.5, 3.0], "show no limit"),
        ([4.0, 3.0, 3.0, 3.0, 3.0], "so b is arbitrary"),
        ([4.0, 3.95, 3.7, 3.7, 3.55], "do not determine how the loss flattens"),
    ],
)
def test_a_poor_fit_is_called_poor(losses: list[float], says: str) -> None:
    sizes = [1, 2, 4, 8, 16]
    assert any(says in reason for reason in weaknesses(fit_law(sizes, losses), sizes, losses))


@pytest.mark.parametrize(
    ("sizes", "losses", "says"),
    [
        ([1, 2, 3], [3, 2, 1], "at least 4"),
        ([1, 2, 3, 3], [4, 3, 2, 1], "twice"),
        ([0, 1, 2, 3], [4, 3, 2, 1], "positive"),
        ([1, 2, 3, 4], [4, 3, math.nan, 1], "finite"),
        ([1, 2, 3, 4], [3, 3, 3, 3], "does not change with size"),
        ([1e-9, 1, 1e5, 1e13], [4, 3, 3.1, 2.95], "its exponent has no effect"),
        ([1, 1 + 1e-15, 1 + 2e-15, 1 + 3e-15], [4, 3, 3.1, 2.9], "are not identifiable"),
    ],
)
def test_what_cannot_be_fitted_is_refused(sizes: list[float], losses: list[float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        fit_law(sizes, losses)


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a refused command."""
    assert cli.main(["mup", "predict", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("tele: ")
    return err


HEAD = "parameters,loss\n"
FOUR = "1,4\n2,3.5\n4,3.2\n8,3.1\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD + "1,4\n2,3\n3,2\n", "must have at least 4 losses for a fit, found 3"),
        (
            HEAD + FOUR,
            "--hold-out 1: must leave at least 4 of 4 losses in losses.csv for the fit, leaves 3; hold out at most 0",
        ),
        (HEAD + FOUR + "0,3\n", "losses.csv:6: parameters: must be positive, found 0"),
        (HEAD + FOUR + "-2,3\n", "losses.csv:6: parameters: must be positive, found -2"),
        (HEAD + FOUR + "16,nan\n", "losses.csv:6: loss: must be a finite number, found nan"),
        (HEAD + FOUR + "inf,3\n", "losses.csv:6: parameters: must be a finite number, found inf"),
        (HEAD + FOUR + "16,x\n", "losses.csv:6: loss: expected a number, found 'x'"),
        (HEAD + FOUR + "16,-1\n", "losses.csv:6: loss: expected a loss between"),
        (HEAD + FOUR + "1e30,3\n", "must be 1e-09 to 1e+13, found 1e30"),
        (HEAD + FOUR + "8,3\n", "parameters 8 appears twice"),
        (HEAD + FOUR + '"16,3\n32,3\n', "losses.csv:6: must have 2 values, one for each column, found 1"),
        (HEAD + FOUR + "8\n", "losses.csv:6: must have 2 values, one for each column, found 1"),
        (HEAD + "1,3\n2,3\n4,3\n8,3\n9,3\n", "losses.csv: the loss does not change with size"),
        ("parameters,los\n" + FOUR, "unknown column 'los'; legal: parameters, width, loss, step"),
        ("loss,loss\n" + FOUR, "column 'loss' appears twice"),
        ("width,step\n" + FOUR, "must have a column loss"),
        ("step,loss\n" + FOUR, "must have a column parameters (in millions) or width"),
        ("width,loss,step\n1,4,10\n2,3,20\n", "all losses must be of one step, found steps 10, 20"),
        ("# nothing\n", "must have rows below a first line"),
    ],
)
def test_a_wrong_table_is_one_line(
    text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("losses.csv").write_text(text)
    assert says in told(["losses.csv"], capsys)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2]", "expected 'parameters' or 'width' and 'loss'"),
        ("width: 3\nloss: [1]", "width: expected a list, found 3"),
        ("width: [1, 2]\nloss: [1]", "all lists must have the same length, found width 2, loss 1"),
        ("width: [1, 2, 4, true]\nloss: [4, 3, 2, 1]", "entry 4: width: expected a number, found True"),
        ("width: [1, 2, 4, 8]\nloss: [4, 3, .nan, 1]", "entry 3: loss: must be a finite number, found nan"),
        ("width: [1, 2", "not valid YAML"),
    ],
)
def test_a_wrong_yaml_table_is_one_line(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "losses.yaml").write_text(text)
    assert says in told([str(tmp_path / "losses.yaml")], capsys)


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet='0123456789.,-e"#\n naif', max_size=60), ending=st.sampled_from(["csv", "yaml"]))
def test_any_text_is_a_table_or_one_line(text: str, ending: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzzed.{ending}"
    path.write_text((HEAD if ending == "csv" else "loss: [3]\nwidth: ") + text)
    try:
        table = read_loss_table(path)
    except UserError as error:
        assert "\n" not in str(error) and "fuzzed" in str(error)
    else:
        assert list(table.sizes) == sorted(set(table.sizes)) and len(table.losses) == len(table.sizes)


@pytest.mark.filterwarnings("error")
@settings(max_examples=100, deadline=None)
@given(
    points=st.lists(
        st.tuples(st.floats(SMALLEST, LARGEST), st.floats(1e-3, 1e5)),
        min_size=4,
        max_size=8,
        unique_by=lambda point: point[0],
    )
)
def test_any_points_give_finite_numbers_or_one_line(points: list[tuple[float, float]]) -> None:
    sizes, losses = zip(*points, strict=True)
    try:
        fit = fit_law(sizes, losses)
    except UserError as error:
        assert "check the table" in str(error)
    else:
        ahead = forecast(fit, 2 * max(sizes))
        numbers = [fit.a, fit.b, fit.c, fit.a_sd, fit.b_sd, fit.c_sd, ahead.predicted, ahead.low, ahead.high]
        assert np.isfinite(numbers).all() and ahead.low <= ahead.predicted <= ahead.high


def test_wrong_options_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = str(TABLES / "mu-scaling-gpt2-20k.yaml")
    assert "--hold-out: must be at least 0" in told([table, "--hold-out=-1"], capsys)
    assert "hold out at most 6" in told([table, "--hold-out", "99"], capsys)
    assert "no such file" in told([str(tmp_path / "gone.csv")], capsys)
    assert "a table must be .csv or .yaml, found '.txt'" in told([str(tmp_path / "losses.txt")], capsys)
    (tmp_path / "file").write_text("")
    assert "there is a file in place of its folder" in told([table, "--out", str(tmp_path / "file")], capsys)
    assert not list(tmp_path.glob("*.json"))


def test_the_command_prints_what_the_page_shows_and_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("losses.csv").write_text(loss_table_of_the_page())
    page, published = read_loss_table("losses.csv"), read_loss_table(TABLES / "mu-scaling-gpt2-20k.yaml")
    assert (page.sizes, page.losses, page.widths) == (published.sizes, published.losses, published.widths)
    assert cli.main(["mup", "predict", "losses.csv", "--hold-out", "3", "--out", "forecast"]) == 0
    printed, wrote = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert f"```text\n{printed}\n```" in (ROOT / "docs" / "mup.md").read_text(encoding="utf-8")
    assert wrote == "wrote forecast/prediction.json and prediction.png"
    report = json.loads(Path("forecast/prediction.json").read_text())
    assert report["fit"]["b"] == pytest.approx(-0.4231, abs=1e-4) and report["poor"] == []
    assert [row["size"] for row in report["forecasts"]] == [194.24, 676.48, 1446.72]
    assert len(report["fitted"]) == 7 and all(row["inside"] for row in report["forecasts"])
    assert Path("forecast/prediction.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_page_states_the_published_figures(name: str) -> None:
    (_, b, _), (_, b_sd, _), errors, poor = PUBLISHED[name]
    cell = f"| {b:.3f} ({b_sd:.3f}){', poor fit' if poor else ''} | {', '.join(f'{100 * e:+.2f} %' for e in errors)} |"
    assert cell in (ROOT / "docs" / "mup.md").read_text(encoding="utf-8")


def test_a_row_without_a_loss_is_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "losses.csv").write_text("width,loss,step\n64,,9\n" + "1,4,9\n2,3.5,9\n4,3.2,9\n8,3.05,9\n16,2.9,9\n")
    assert cli.main(["mup", "predict", str(tmp_path / "losses.csv"), "--out", str(tmp_path / "out")]) == 0
    assert "losses at step 9: L = a * C^b + c over 5 models, C = width, 1 to 16" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out" / "prediction.json").read_text())["forecasts"]
    assert row["size"] == 64 and row["measured"] is row["error"] is row["inside"] is None
    assert row["low"] < row["predicted"] < row["high"]


def test_a_poor_fit_and_a_miss_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["mup", "predict", str(TABLES / "nanolm-gpt-standard-7k.yaml")]) == 0
    out = capsys.readouterr().out
    assert out.count("poor fit: ") == 2 and "no weakness" not in out
    text = (TABLES / "mu-scaling-gpt2-20k.yaml").read_text(encoding="utf-8").replace("3.0425", "3.2425")
    (tmp_path / "losses.yaml").write_text(text)
    assert cli.main(["mup", "predict", str(tmp_path / "losses.yaml"), "--hold-out", "3"]) == 0
    assert capsys.readouterr().out.count("outside the interval") == 1
