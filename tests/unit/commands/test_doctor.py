"""`tele doctor` against environments that are right, wrong and half empty."""

from __future__ import annotations

import json
import re
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from telechat_twins.core import cli
from telechat_twins.core.commands import doctor
from telechat_twins.kernels.cpu import build

PINS = {"numpy": "1.26.4", "mindspore": "2.9.0", "torch": "2.13.0", "safetensors": "0.8.0"}


def having(**versions: str) -> Callable[[str], str | None]:
    table = {**PINS, **versions}
    return lambda name: table.get(name) or None


def test_the_right_versions_pass() -> None:
    report = doctor.examine(having(torch="2.13.0+cpu", numpy="1.26.3"), PINS, (3, 11, 9))
    assert report["mistakes"] == [] and report["mend"] is None and report["missing_backends"] == {}


@pytest.mark.parametrize(
    ("versions", "mistake", "mend"),
    [
        ({"numpy": "2.1.0"}, "numpy must be 1.26.4, found 2.1.0", "'numpy==1.26.4'"),
        ({"numpy": ""}, "numpy must be 1.26.4, found none", "'numpy==1.26.4'"),
    ],
)
def test_a_wrong_version_is_named_with_its_mend(versions: dict[str, str], mistake: str, mend: str) -> None:
    report = doctor.examine(having(**versions), PINS, (3, 11, 9))
    assert report["mistakes"] == [mistake]
    assert report["mend"] == f"{sys.executable} -m pip install {mend}"


def test_a_framework_outside_the_tested_versions_is_a_warning() -> None:
    for versions in ({"torch": "2.13.0+cpu"}, {"torch": "2.14.1", "mindspore": "2.10.0"}):
        tested = doctor.examine(having(**versions), PINS, (3, 11, 9))
        assert tested["mistakes"] == tested["warnings"] == []
    report = doctor.examine(having(mindspore="2.8.0"), PINS, (3, 11, 9))
    said = "mindspore 2.8.0 is not among the tested versions (2.9.0, 2.10.0); see docs/matrix.md"
    assert (report["mistakes"], report["warnings"]) == ([], [said])
    assert f"warning: {said}" in doctor._text(report) and "(tested with 2.9.0)" in doctor._text(report)


def test_wrong_python() -> None:
    assert doctor.examine(having(), PINS, (3, 12, 1))["mistakes"] == ["Python must be 3.11, found 3.12.1"]


def test_one_missing_backend_is_reported_but_no_mistake() -> None:
    report = doctor.examine(having(mindspore=""), PINS, (3, 11, 9))
    assert report["mistakes"] == []
    assert list(report["missing_backends"]) == ["mindspore"] and "mindspore==2.9.0" in doctor._text(report)


def test_no_backend_at_all_is_a_mistake() -> None:
    report = doctor.examine(having(mindspore="", torch=""), PINS, (3, 11, 9))
    assert report["mistakes"] == ["mindspore or torch must be installed, found neither"]
    assert "'mindspore==2.9.0' 'torch==2.13.0'" in report["mend"]


def test_exit_codes_and_the_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pins = doctor.pinned_versions()
    # Each framework is started for its list; the line of docs/tour.md does that (tests/unit/house/test_docs.py).
    monkeypatch.setattr(doctor, "_operators", lambda backend: ["rms_norm"])
    monkeypatch.setattr(doctor.examine, "__defaults__", (lambda name: pins.get(name), None, (3, 11, 9)))
    assert cli.main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"numpy +1\.26\.4  ok", out) and err == ""
    monkeypatch.setattr(doctor.examine, "__defaults__", (having(numpy="2.0.2"), None, (3, 11, 9)))
    assert cli.main(["doctor", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["packages"]["numpy"] == {"installed": "2.0.2", "wanted": pins["numpy"]}
    assert err.startswith("tele: numpy must be 1.26.4, found 2.0.2. Run: ") and err.count("\n") == 1


def test_the_pins_come_from_the_project() -> None:
    pins = doctor.pinned_versions()
    assert pins["numpy"].startswith("1.26.") and {"mindspore", "torch", "ml-dtypes", "mindformers"} <= pins.keys()


def test_extras_disk_and_cann_are_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "version.info").write_text("Version=8.5.0\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    report = doctor.examine(having(fastapi="1", uvicorn="1", llguidance="1"), PINS, (3, 11, 9))
    assert report["extras"]["serve"] == {"missing": [], "install": None}
    assert report["extras"]["eval"]["missing"][0] == "lm-eval" and "[eval]" in report["extras"]["eval"]["install"]
    text = doctor._text(report)
    assert re.search(r"serve +installed", text) and re.search(r"eval +lacks lm-eval, ", text)
    assert re.search(r"disk +[\d.]+ GiB free", text) and f"CANN          8.5.0  {tmp_path}" in text


def test_missing_python_headers_are_said_with_their_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "Python.h" not in doctor._text(doctor.examine(having(), PINS, (3, 11, 9)))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert re.search(r"Python.h +none found; .*python3-dev", doctor._text(doctor.examine(having(), PINS, (3, 11, 9))))
    with pytest.raises(build.BuildError, match=f"no Python.h in {tmp_path}; .* the package python3-dev"):
        build._python_include()
