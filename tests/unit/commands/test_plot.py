"""`tele plot`: runs, growth stages and pairs of a parity job beside one another; the page zooms and loads nothing."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest

from telechat_twins.core import cli
from telechat_twins.core.errors import UserError
from telechat_twins.core.train.metrics import MetricsLog, plot_losses
from telechat_twins.core.train.plots import fonts
from telechat_twins.core.train.plots.page import to_page
from telechat_twins.core.train.plots.series import MOST_POINTS, panels, read_runs
from tests.support import browser


def write_run(folder: Path, steps: int = 40, shift: float = 0.0, **more: float) -> Path:
    with MetricsLog(folder / "metrics.jsonl") as log:
        for step in range(1, steps + 1):
            loss = 2.0 + 5.0 * math.exp(-step / 20) + shift
            row = {"step": step, "loss": loss, "grad_norm": 1.0 + shift, "lr": 1e-3, "tokens": step * 64}
            if step == 7:
                row |= {"loss": None, "skipped": True}
            held = {"eval/web/loss": 3.0} if step % 10 == 0 else {}
            log.append(row | held | more)
            if step == steps:  # a checkpoint's scores come later, in a row of their own
                log.append({"step": step, "tasks/arc/acc": 0.5, "tasks/arc/stderr": 0.1})
    return folder


def test_runs_growth_and_a_parity_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "first", mfu=0.4)
    write_run(tmp_path / "grown")
    stages = [{"name": "small", "steps": [0, 20]}, {"name": "large", "steps": [20, 40]}]
    (tmp_path / "grown" / "report.json").write_text(json.dumps({"stages": stages}))
    for name, shift in (("ms", 0.0), ("pt", 1e-6)):
        write_run(tmp_path / "parity" / name, shift=shift)
    runs = read_runs([tmp_path / "first", tmp_path / "grown", tmp_path / "parity"])
    assert [run.label for run in runs] == ["first", "grown", "parity/ms", "parity/pt"]
    assert runs[1].marks == {1: "small", 21: "large"}
    shown = panels(runs, ["loss", "mfu"], "tokens", True)
    assert [panel.title.split()[0] for panel in shown] == [
        "loss",
        "MFU",
        "web/loss",
        "tasks/arc/acc",
        *["relative"] * 2,
    ]
    assert [curve.label for curve in shown[1].curves] == ["first"]
    assert shown[0].curves[0].x[:2] == [64.0, 128.0] and math.isnan(shown[0].curves[0].y[6])
    assert (shown[3].curves[0].x, shown[3].curves[0].y) == ([40 * 64.0], [0.5])
    last = shown[4].curves[-1]
    assert last.label == "parity/pt" and last.y[0] == pytest.approx(1e-6 / runs[0].rows[0]["loss"])
    out = tmp_path / "shown" / "plot"
    words = ["plot", *(str(tmp_path / name) for name in ("first", "grown", "parity")), "--out", f"{out}.SVG"]
    assert cli.main([*words, "--difference"]) == 0
    assert "4 runs: " in capsys.readouterr().out
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in out.with_suffix(".svg").read_text()[:1000]


def test_a_long_run_keeps_its_spikes(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step in range(1, 3 * MOST_POINTS + 1):
            log.append({"step": step, "loss": 99.0 if step == 5001 else 1.0 + step % 3})
    (panel,) = panels(read_runs([tmp_path]), ["loss"], "step", False)
    assert len(panel.curves[0].x) <= MOST_POINTS and 99.0 in panel.curves[0].y
    assert panel.curves[0].x == sorted(panel.curves[0].x)


def test_what_cannot_be_shown_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no metrics.jsonl here or one folder below"):
        read_runs([tmp_path])
    runs = read_runs([write_run(tmp_path / "a")])
    with pytest.raises(
        UserError, match="no run has 'los'; did you mean 'loss'. there are: eval.web.loss, grad_norm, loss, lr"
    ):
        panels(runs, ["los"], "step", False)
    (tmp_path / "a" / "step-00000003").mkdir()
    with pytest.raises(UserError, match="name the folder of a run, .*/a$"):
        read_runs([tmp_path / "a" / "step-00000003"])
    write_run(tmp_path / "deep" / "sweep" / "b")
    with pytest.raises(UserError, match="runs are in .*/deep/sweep$"):
        read_runs([tmp_path / "deep"])
    assert cli.main(["plot", str(tmp_path / "a"), "--difference", "--out", str(tmp_path / "x")]) == 2
    twins = read_runs([write_run(tmp_path / "x" / "a"), tmp_path / "a"])
    assert [run.label for run in twins] == ["1: a", "2: a"]


def test_files_that_are_no_runs_and_formats_that_are_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a")
    (tmp_path / "loss.png").write_bytes(b"\x89PNG")
    for words, says in (
        ([str(tmp_path / "loss.png")], "loss.png: not a run; name the folder of a run"),
        ([str(run), "--out", str(tmp_path / "b.jpg")], "b.jpg: .png, .svg, .html are written, no .jpg"),
    ):
        assert cli.main(["plot", *words]) == 2
        assert says in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "loss.png"]
    assert cli.main(["plot", str(run), "--out", str(tmp_path / "lr-1.5")]) == 0
    assert capsys.readouterr().out.startswith("1 run: ")
    assert (tmp_path / "lr-1.5.png").is_file()


def test_a_label_cannot_leave_its_place(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    run = read_runs([write_run(tmp_path / "a")])[0]
    shown = panels([run.__class__(name, run.rows)], ["loss"], "step", False)
    page = to_page(shown, name, "step", {3.0: name})
    assert (
        name not in page
        and "default-src 'none'" in page
        and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    )


def test_chinese_names_of_runs_warn_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed fonts that have the characters are used; where there is none, nothing is printed at each refresh."""
    import matplotlib

    rows = [{"step": step, "loss": 1.0, "grad_norm": 1.0, "lr": 1e-3} for step in (1, 2)]
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_losses({"微调": rows}, tmp_path / "loss.png", "微调")
        assert (tmp_path / "loss.png").stat().st_size > 10_000
        # A font that is there for sure stands for a Chinese one.
        monkeypatch.setattr(fonts, "CHINESE", ("Not There", "DejaVu Serif"))
        fonts.any_script()
        assert matplotlib.rcParams["font.sans-serif"] == ["DejaVu Sans", "DejaVu Serif"]


@pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))
def test_the_page_zooms_in_a_browser(tmp_path: Path) -> None:
    for name, shift in (("first", 0.0), ("second", 0.5)):
        write_run(tmp_path / name, shift=shift, mfu=0.4 + shift / 10)
    out = tmp_path / "plot"
    words = ["plot", str(tmp_path / "first"), str(tmp_path / "second"), "--columns", "loss", "mfu", "--difference"]
    assert cli.main([*words, "--out", str(out)]) == 0
    with browser.browser(tmp_path / "profile") as window:
        window.open(out.with_suffix(".html").as_uri())
        assert window.texts("h2")[:3] == ["loss (nats per token)", "MFU", "web/loss"]
        assert window.run("return document.querySelectorAll('path.curve').length") == 10
        before = window.run("return span.slice()")
        window.run(
            "const svg = document.querySelector('svg'), box = svg.getBoundingClientRect();"
            "const send = (type, share) => svg.dispatchEvent(new PointerEvent(type, {pointerId: 1, button: 0,"
            " clientX: box.left + share * box.width, clientY: box.top + 50, bubbles: true}));"
            "svg.setPointerCapture = () => {}; send('pointerdown', 0.3); send('pointermove', 0.6);"
            "send('pointerup', 0.6)"
        )
        after = window.run("return span.slice()")
        assert before == [1, 40] and 8 < after[0] < 14 and 20 < after[1] < 26
        assert "step" in window.texts(".read")[0] or window.texts(".read")[0] == ""
        window.click("#all")
        window.click("#runs button:nth-child(2)")
        assert window.run("return span.slice()") == before
        assert window.run("return document.querySelectorAll('path.curve').length") == 4
        assert window.log() == []
