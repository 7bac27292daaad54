"""The lock file fits the project and every machine."""

from __future__ import annotations

import re
import tomllib

from tests.house import ROOT
from tests.lock import lock


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def test_every_pin_of_the_project_is_locked_at_that_version() -> None:
    locked = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if line[0] != "#")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    installed = [name for extra in ("ms", "pt", "serve", "data", "tokenizers", "dev") for name in extras[extra]]
    for requirement in [*project["dependencies"], *installed]:
        requirement, _, platform = requirement.partition(";")
        if platform:
            continue  # a lock for every machine leaves out what some of them lack
        name, version = requirement.split("==")
        assert locked.get(normal(name)) == version, (
            f"{requirement} is locked as {locked.get(normal(name))}; run make lock"
        )


def test_the_lock_holds_on_every_machine() -> None:
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(r"[a-z0-9.-]+==[0-9][\w.]*", line), line
            assert not re.match(r"nvidia|triton|cuda", line), line


def test_lines_of_pip_freeze() -> None:
    frozen = [
        "torch==2.13.0+cpu",
        "PyYAML==6.0.3",
        "ml_dtypes==0.5.4",
        "nvidia-cublas==13.1",
        "pip==26.3",
        "triton==3.5",
        "telechat-twins==0.1.0",
        "telechat-twins @ file:///somewhere",
        "-e git+somewhere",
    ]
    assert lock(frozen) == ["ml-dtypes==0.5.4", "pyyaml==6.0.3", "torch==2.13.0"]
