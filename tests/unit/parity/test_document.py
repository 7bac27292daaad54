"""The formats of a parity report: the page in a browser, JUnit XML, the documented JSON, and the plots."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from telechat_twins.core.parity.bounds import Bound
from telechat_twins.core.parity.document.data import to_data
from telechat_twins.core.parity.document.html import MOST_ROWS, to_html
from telechat_twins.core.parity.document.junit import to_junit, write_junit
from telechat_twins.core.parity.document.model import Curve, Document, Limit, Plot, Section, Table, share
from telechat_twins.core.parity.document.svg import BOTTOM, HEIGHT, to_figure
from telechat_twins.core.parity.report import to_document, to_json, write_report
from telechat_twins.core.parity.traces import trace_figure, trace_plot
from tests.support import browser
from tests.support.parity_samples import HOSTILE, breaks_schema, complaints, report, trace


def a_document(bounds: list[Bound], title: str = "one batch") -> Document:
    return Document("backends", "Parity", {}, {}, [Section(title, bounds)])


@pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """Readable at a phone's width, sorts and filters, loads nothing, and runs no name as markup."""
    made = report(noise=3e-3, further=HOSTILE)
    write_report(made, tmp_path, {"MindSpore": trace(noise=1e-6), "PyTorch": trace()})
    text = (tmp_path / "report.html").read_text(encoding="utf-8", errors="surrogatepass")
    assert not re.search(r"(?:src|href)=(?!\"(?:data:|#))|url\(|@import|<img", text.replace("&lt;img src", ""))
    with browser.browser(tmp_path / "profile") as window:
        window.open((tmp_path / "report.html").as_uri())
        for width in (390, 1280):
            metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            window._call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics})
            assert window.run("return document.documentElement.scrollWidth <= innerWidth"), f"{width} px: scrolls"
            top = window.run("return document.getElementById('verdict').getBoundingClientRect().bottom")
            assert top < 400, "the verdict is seen without scrolling"
        assert window.texts("#verdict")[0].startswith("\u2717 NOT EQUAL: 5 of 10 bounds broken: logits")
        assert len(window.texts("#bounds tbody tr")) == len(made.bounds()) == 10
        assert window.texts("#bounds tbody tr:first-child td:first-child") == ["\u2717 BROKEN"], "broken ones first"
        window.click("#bounds th:nth-child(4) button")
        values = [float(v) for v in window.texts("#bounds td:nth-child(4)")]
        assert values == sorted(values) and values[-1] > values[0]
        window.click("#bounds th:nth-child(4) button")
        assert [float(v) for v in window.texts("#bounds td:nth-child(4)")] == values[::-1]
        visible = "return [...document.querySelectorAll('#bounds tbody tr')].filter(r => !r.hidden).length"
        window.click("#only")
        assert window.run(visible) == 5
        window.type("#filter", "logits")
        assert window.run(visible) == 1
        assert window.run("return document.querySelectorAll('figure svg').length") == 2
        assert window.log() == [], "no complaint of the content policy, no script that was injected"


def test_junit_is_strict_xml_with_a_case_for_every_bound(tmp_path: Path) -> None:
    bounds = [Bound(HOSTILE, math.nan, 1.0, HOSTILE), Bound("holds", 0.5, 1.0, "x"), Bound("holds", 0.5, 1.0, "x")]
    write_junit(a_document(bounds, f"part {HOSTILE}"), tmp_path / "junit.xml")
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (root.tag, root.attrib["tests"], root.attrib["failures"]) == ("testsuites", "3", "1")
    cases = root.findall("testsuite/testcase")
    assert [case.find("failure") is not None for case in cases] == [True, False, False]
    assert [case.attrib["name"] for case in cases[1:]] == ["holds", "holds-2"]
    assert "nan exceeds 1" in cases[0].find("failure").attrib["message"]  # type: ignore[union-attr]

    whole = report(noise=3e-3)
    root = ElementTree.fromstring(to_junit(to_document(whole)))
    names = [suite.attrib["name"] for suite in root.findall("testsuite")]
    assert names == ["one batch", "training", "export"]
    assert len(root.findall(".//testcase")) == len(whole.bounds())
    assert len(root.findall(".//failure")) == len(whole.broken) == 5


def test_report_json_is_what_the_page_documents(tmp_path: Path) -> None:
    for noise in (3e-7, 3e-3, math.nan):
        write_report(report(noise), tmp_path)
        assert breaks_schema(tmp_path / "report.json") == []
    data = json.loads((tmp_path / "report.json").read_text())
    for planted in (
        {k: v for k, v in data.items() if k != "verdict"},
        data | {"equal": "no"},
        data | {"bounds": [data["bounds"][0] | {"value": "large"}]},
        data | {"bounds": [data["bounds"][0] | {"margin": 1.0}]},
        data | {"kind": "guess"},
    ):
        assert complaints(planted)


def test_keys_stay_when_the_worst_tensor_changes() -> None:
    """A server follows a bound by its key, whichever gradient or backend is the worst today."""
    runs = [to_json(report(noise, seed)) for noise, seed in ((3e-7, 1), (1e-8, 5), (3e-3, 9))]
    texts = [[bound["what"] for bound in run["bounds"]] for run in runs]
    keys = [[bound["key"] for bound in run["bounds"]] for run in runs]
    assert texts[0] != texts[1] and keys[0] == keys[1] == keys[2]
    assert "training/trace.loss" in keys[0] and "one-batch/worst-gradient-against-float64" in keys[0]


def test_exact_zeros_are_gaps_and_marks_and_the_limit_is_drawn() -> None:
    zeros = [1e-7, 0.0, 2e-7, 3e-7, 0.0]
    plot = Plot("t", "step", "y", [Curve("loss", [1.0, 2.0, 3.0, 4.0, 5.0], zeros)], [], logarithmic=True)
    limited = to_figure(dataclasses.replace(plot, limits=[Limit("limit 1e-4", 1e-4, 1.0, 5.0)]))
    lines = re.findall(r'<polyline class="curve c0" points="([^"]*)"', limited)
    assert [len(line.split()) for line in lines] == [2], "the single point is a dot, the zeros are no points"
    heights = [float(point.split(",")[1]) for line in lines for point in line.split()]
    assert max(heights) < HEIGHT - BOTTOM
    (marks,) = re.findall(r'<path class="zeros c0" d="([^"]*)"', limited)
    assert marks.count("M") == 2 and "exactly equal: 2 of 5" in limited
    assert re.search(r'<line class="limit"[^>]*y1="(\d+\.\d)"', limited)
    legend = limited.index("<figcaption>")
    assert "limit 1e-4" in limited[legend:] and "<text" not in limited[legend:], "the legend is outside the picture"
    assert "No finite number" in to_figure(Plot("t", "x", "y", [Curve("a", [1.0], [math.nan])]))
    assert "exactly equal: 1 of 1" in to_figure(Plot("t", "x", "y", [Curve("a", [1.0], [0.0])], logarithmic=True))
    long = Curve("a", [float(i) for i in range(20_000)], [1.0 + (i == 7777) for i in range(20_000)])
    (line,) = re.findall(r'points="([^"]*)"', to_figure(Plot("t", "x", "y", [long])))
    assert len(line.split()) < 500 and len({point.split(",")[1] for point in line.split()}) == 2, "the peak stays"


def test_the_picture_s_legend_covers_no_limit() -> None:
    """Also where the limit is the highest thing in the panel; a legend inside the panel fails this."""
    made = report()
    assert made.trace is not None and 0.0 in made.trace.loss
    figure = trace_figure({"MindSpore": trace(noise=1e-6), "PyTorch": trace()}, made.trace)
    figure.canvas.draw()

    def covered() -> bool:
        panel = figure.axes[1]
        return panel.get_legend().get_window_extent().overlaps(panel.get_window_extent().padded(-2))

    curve = figure.axes[1].get_lines()[0].get_ydata()
    assert not covered()
    assert sum(math.isnan(value) for value in curve) == made.trace.loss.count(0.0), "zeros are gaps"
    assert min(value for value in curve if value == value) > 0
    figure.axes[1].legend(loc="upper left")  # as it was
    figure.canvas.draw()
    assert covered()
    assert {limit.label for limit in trace_plot(made.trace).limits} == {
        "limit of loss, 0.0001",
        "limit of gradient norm, 0.0001",
    }


def test_a_very_long_report_shows_the_nearest_bounds() -> None:
    bounds = [Bound(f"b{i}", float(i), 1e4, "x") for i in range(MOST_ROWS + 50)]
    text = to_html(a_document(bounds))
    assert text.count("<tr data-key") == MOST_ROWS and f"b{MOST_ROWS + 49}<" in text and ">b0<" not in text
    assert len(to_data(a_document(bounds))["bounds"]) == MOST_ROWS + 50
    assert share(Bound("x", math.nan, 1.0, "")) == share(Bound("x", 1.0, 0.0, "")) == math.inf
    table = Table("t", ["a", "b"], [["x", 1.0], ["y", math.inf]])
    assert "Infinity" in to_html(dataclasses.replace(a_document(bounds[:1]), tables=[table]))
