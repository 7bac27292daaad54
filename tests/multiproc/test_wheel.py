"""An installed wheel, away from the checkout, beside a package `kernels` of another project.

The tests are in order: the last one removes what the first ones installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from telechat_twins.core.data.demo_text import CHINESE_PAGES
from tests.house import ROOT

FOLDERS = ("core", "convert", "kernels", "telechat_ms", "pt_reference", "configs", "telechat_twins")
TEXTS = ("argparse.py", "ast.py", "inspect.py", "typing.py")  # of the standard library: enough for 2,048 pieces
STAND_IN = "NAME = 'the kernels package of another project'\n"
# Every process that starts with the wheel's path notes at its end where each of its modules came from.
WATCH = """\
import atexit, json, os, sys

def note():
    found = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    with open(os.path.join(os.environ["LOADED"], f"{os.getpid()}.json"), "w") as out:
        json.dump({name: file for name, file in found.items() if isinstance(file, str)}, out)

atexit.register(note)
"""


@dataclass(frozen=True)
class Installed:
    """Folders of the test: ``site`` is on the path of every process, ``work`` is where each of them starts."""

    wheel: Path
    site: Path
    work: Path
    loaded: Path

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join((str(self.site), str(self.loaded.parent / "watch")))
        return {**os.environ, "PYTHONPATH": path, "LOADED": str(self.loaded), "OMP_WAIT_POLICY": "PASSIVE"}

    def python(self, *words: str, **settings: object) -> subprocess.CompletedProcess[str]:
        options = {"cwd": self.work, "env": self.environment, "capture_output": True, "text": True, "timeout": 240}
        return subprocess.run([sys.executable, *words], **{**options, **settings})

    def tele(self, *words: str) -> str:
        done = self.python(str(self.site / "bin" / "tele"), *words)
        assert done.returncode == 0, f"tele {' '.join(words)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def kernels(self, first: str = "") -> str:
        """The file that ``import kernels`` leads to, after the imports in ``first``."""
        done = self.python("-c", f"{first}\nimport kernels; print(kernels.NAME); print(kernels.__file__)")
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PIP_NO_INDEX": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: a build/ left in the checkout by an earlier build would go into the wheel.
    source = folder / "source"
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "docs").mkdir()
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md", *CHINESE_PAGES):
        shutil.copy(ROOT / name, source / name)
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder / "dist"), str(source))
    (wheel,) = (folder / "dist").glob("*.whl")
    made = Installed(wheel, folder / "site", folder / "work", folder / "loaded")
    for path in (made.site / "kernels", made.work, made.loaded, folder / "watch"):
        path.mkdir(parents=True)
    (made.site / "kernels" / "__init__.py").write_text(STAND_IN)
    assert made.kernels() == str(made.site / "kernels" / "__init__.py")
    # --upgrade: what the wheel has under the same name would replace what is there, as in site-packages.
    pip("install", "-q", "--no-deps", "--upgrade", "--target", str(made.site), str(wheel))
    (folder / "watch" / "sitecustomize.py").write_text(WATCH)
    return made


@pytest.fixture(scope="module")
def packed(installed: Installed) -> Installed:
    """The tokenizer and data that the bundled run telechat2-tiny names, made by the installed command."""
    corpus = installed.work / "corpus"
    corpus.mkdir()
    for name in TEXTS:
        shutil.copy(Path(sysconfig.get_path("stdlib")) / name, corpus)
    installed.tele("tokenize", "train", "corpus", "--out", "tokenizer.model", "--vocab-size", "2048")
    installed.tele("data", "corpus", "--tokenizer", "tokenizer.model", "--out", "data/tiny")
    return installed


def test_the_wheel_has_one_import_name(installed: Installed) -> None:
    names = {name.partition("/")[0] for name in zipfile.ZipFile(installed.wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"telechat_twins"}


def test_import_kernels_is_the_other_projects(installed: Installed) -> None:
    expected = str(installed.site / "kernels" / "__init__.py")
    assert installed.kernels() == installed.kernels("import telechat_twins.kernels.dispatch") == expected


def test_a_checkout_as_working_folder_hides_no_other_kernels(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(STAND_IN)
    code = "import telechat_twins.kernels.dispatch as ours, kernels; print(ours.__file__, kernels.__file__)"
    done = installed.python("-c", code, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(ROOT / "kernels" / "dispatch.py"), str(tmp_path / "kernels" / "__init__.py")]


def test_every_verb_shows_its_help(installed: Installed) -> None:
    code = "from telechat_twins.core.cli import VERBS, main; print(sum(main([verb, '--help']) for verb in VERBS))"
    done = installed.python("-c", code)
    assert done.stdout.splitlines()[-1:] == ["0"], done.stderr
    assert done.returncode == 0, done.stderr
    assert not re.search(r"configs/\w+/[\w.-]+\.yaml|pip install -e", done.stdout + installed.tele("--help"))


def test_doctor_and_plan(installed: Installed) -> None:
    report = json.loads(installed.tele("doctor", "--json"))
    assert not report["mistakes"] and not any("not known" in str(ops) for ops in report["operators"].values()), report
    assert "total" in installed.tele("plan", "--config", "telechat2-tiny")
    assert "growth from" in installed.tele("plan", "--config", "flm-101b", "--growth", "flm-101b")


def test_a_missing_part_is_asked_for_by_the_distributions_name(installed: Installed) -> None:
    done = installed.python("-c", "from telechat_twins.core.backends import *; print(install_command('ms'))")
    assert done.stdout == "pip install 'telechat-twins[ms]'\n"


@pytest.mark.parametrize(("backend", "framework"), [("ms", "mindspore"), ("pt", "torch")])
def test_two_steps_of_a_bundled_run(packed: Installed, backend: str, framework: str) -> None:
    pytest.importorskip(framework)
    words = ("train", "--backend", backend, "--config", "telechat2-tiny", "--out", f"runs/{backend}")
    packed.tele(*words, "--set", "train.steps=2", "optim.warmup_steps=1")
    rows = (packed.work / "runs" / backend / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]
    twin = {"ms": "telechat_ms", "pt": "pt_reference"}[backend]
    assert any(name.startswith(f"telechat_twins.{twin}.") for name, _ in loaded(packed))


@contextmanager
def server(installed: Installed) -> Iterator[int]:
    """`tele serve` on the trained checkpoint; yields its port."""
    words = ("serve", "--backend", "pt", "--checkpoint", "runs/pt", "--tokenizer", "tokenizer.model", "--port", "0")
    command = [sys.executable, str(installed.site / "bin" / "tele"), *words]
    with open(installed.work / "serve.log", "w+") as log:
        settings = {"cwd": installed.work, "env": installed.environment, "text": True}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, **settings)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            assert found, line + Path(log.name).read_text()
            yield int(found[1])
        finally:
            process.terminate()
            process.wait(60)


def test_serve_answers(packed: Installed) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("fastapi")
    assert (packed.work / "runs" / "pt").is_dir(), "the run of the test above is not there"
    with server(packed) as port:
        body = json.dumps({"model": "pt", "prompt": "def main", "max_tokens": 4}).encode()
        address = f"http://127.0.0.1:{port}"
        models = json.load(urllib.request.urlopen(f"{address}/v1/models", timeout=60))
        body = body.replace(b'"pt"', json.dumps(models["data"][0]["id"]).encode())
        asked = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
        answer = json.load(urllib.request.urlopen(asked, timeout=60))
        assert answer["usage"]["completion_tokens"] in range(1, 5)
        assert b"<html" in urllib.request.urlopen(f"{address}/", timeout=60).read()


def loaded(installed: Installed) -> set[tuple[str, str]]:
    """(module, file) of all processes so far."""
    notes = [json.loads(note.read_text()) for note in installed.loaded.glob("*.json")]
    return {pair for note in notes for pair in note.items()}


def test_nothing_was_loaded_from_the_checkout(installed: Installed) -> None:
    found = loaded(installed)
    ours = {file for name, file in found if name.partition(".")[0] == "telechat_twins"}
    assert ours and all(Path(file).is_relative_to(installed.site / "telechat_twins") for file in ours), ours
    checkout = tuple(f"{ROOT / name}{os.sep}" for name in FOLDERS)
    assert not [file for _, file in found if file.startswith(checkout)]


def test_removing_the_wheels_files_leaves_the_other_kernels(installed: Installed) -> None:
    """By RECORD, as pip does it; the last test."""
    (record,) = installed.site.glob("telechat_twins-*.dist-info/RECORD")
    for line in record.read_text().splitlines():
        path = (installed.site / line.partition(",")[0]).resolve()
        if path.is_relative_to(installed.site.resolve()):  # the script's entry counts from another scheme's folder
            path.unlink(missing_ok=True)
    assert not list((installed.site / "telechat_twins").rglob("*.py"))
    assert (installed.site / "kernels" / "__init__.py").read_text() == STAND_IN
    assert installed.kernels() == str(installed.site / "kernels" / "__init__.py")
