"""The lock file fits the project and every machine."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement

from tests.house import ROOT
from tests.lock import extras, lock, normal


def locked() -> dict[str, str]:
    """Version of each locked package."""
    return dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if line[0] != "#")


def unmet(requirements: Iterable[str], pins: dict[str, str]) -> list[str]:
    """Those of a distribution's ``requirements`` that the pins break; what is not pinned or not for here holds."""
    broken = []
    for text in requirements:
        wanted = Requirement(text)
        pin = pins.get(normal(wanted.name))
        here = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if here and pin is not None and not wanted.specifier.contains(pin, prereleases=True):
            broken.append(f"{text} (locked: {pin})")
    return broken


def test_every_pin_of_the_project_is_locked_at_that_version() -> None:
    """Of all extras: any of them can then be installed together, which is how `make lock` resolves them."""
    pins, project = locked(), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) - set(extras(project)) == {"mindformers"}
    wanted = [name for extra in extras(project) for name in project["optional-dependencies"][extra]]
    for requirement in [*project["dependencies"], *wanted]:
        requirement, _, platform = requirement.partition(";")
        if platform:
            continue  # a lock for every machine leaves out what some of them lack
        name, version = requirement.split("==")
        found = pins.get(normal(name.partition("[")[0]))
        assert found == version, f"{requirement} is locked as {found}; run make lock"


def test_locked_packages_fit_each_other() -> None:
    """As far as packages are installed here at the locked version and say what they require."""
    pins, checked = locked(), 0
    for found in metadata.distributions():
        if pins.get(normal(found.metadata["Name"])) == found.version.partition("+")[0]:
            checked += 1
            assert unmet(found.requires or (), pins) == [], found.metadata["Name"]
    assert checked > 30
    assert unmet(["fsspec[http]<=2026.2.0,>=2023.1.0", 'x>9; extra == "y"'], {"fsspec": "2026.9.0", "x": "1"}) == [
        "fsspec[http]<=2026.2.0,>=2023.1.0 (locked: 2026.9.0)"
    ]


def test_the_lock_holds_on_every_machine() -> None:
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", line), line
            assert not re.match(r"nvidia|triton|cuda", line), line


def test_lines_of_pips_report() -> None:
    found = {
        "torch": "2.13.0+cpu",
        "PyYAML": "6.0.3",
        "ml_dtypes": "0.5.4",
        "ruamel.yaml": "0.18",
        "nvidia-cublas": "13.1",
        "pip": "26.3",
        "triton": "3.5",
        "telechat-twins": "0.1.0",
    }
    report = {"install": [{"metadata": {"name": name, "version": version}} for name, version in found.items()]}
    assert lock(report) == ["ml-dtypes==0.5.4", "pyyaml==6.0.3", "ruamel-yaml==0.18", "torch==2.13.0"]
