"""`tele generate --layout`: the processes of a layout give the tokens of one process, in both backends.

A layout sums in another order, so logits differ by some 1e-6; the golden's margins are 5e-3 and more. One command is a
process with a launch of its own; the ranks of the others stay (tests.support.warm_ranks).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from telechat_twins.convert.source import open_model
from telechat_twins.core import cli
from telechat_twins.core.checkpoint.adapter import write_adapter
from tests.support.adapters import modules, random_adapter
from tests.support.launching import one_rank_here
from tests.support.warm_ranks import Pool

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
RUN = json.loads((GOLDENS / "generation" / "generation.json").read_text())["runs"][0]

ALONE = (("ms", "ring2.tp2"),)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("telechat2_gqa")
    shutil.copy(GOLDENS / "telechat2_gqa" / "config.json", folder)
    shutil.copy(GOLDENS / "telechat2_gqa" / "weights.safetensors", folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def adapter(checkpoint: Path) -> Path:
    source = open_model(checkpoint)
    write_adapter(checkpoint / "adapter", random_adapter(source, modules(source.config, rank=3, alpha=1.5), 4))
    return checkpoint / "adapter"


Tele = Callable[..., subprocess.CompletedProcess[str]]


def by_itself(*argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "telechat_twins.core.cli", "generate", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)


@pytest.fixture
def tele(pool: Pool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tele:
    """The command in this process, a layout's part of it by ranks that stay."""
    one_rank_here(monkeypatch, pool=pool)

    def here(*argv: object) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        words = ["generate", *map(str, argv)]
        return subprocess.CompletedProcess(words, cli.main(words), *capsys.readouterr())

    return here


@pytest.mark.parametrize(
    ("backend", "layout"),
    [
        *(("ms", layout) for layout in ("tp2", "pp2", "ring2.tp2")),
        *(("pt", layout) for layout in ("tp2", "pp2", "tp2.pp2", "ring2.pp2")),
    ],
)
def test_tokens_are_those_of_one_process(checkpoint: Path, backend: str, layout: str, tele: Tele) -> None:
    """So are the log-probabilities of the prompt; its rotary scaling is that of the request's length."""
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    ids = ",".join(map(str, RUN["prompt"]))
    common = ("--backend", backend, "--checkpoint", checkpoint, "--ids", ids, "--ignore-eos", "--json")
    scored = ("--prompt-logprobs", 0)
    started = by_itself if (backend, layout) in ALONE else tele
    done = started(*common, *scored, "--max-new-tokens", 30, "--layout", layout)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ids"] == RUN["fp32table"]["tokens"][:30]
    alone = json.loads(tele("--backend", "pt", *common[2:], *scored, "--max-new-tokens", 30).stdout)
    assert report["prompt_logprobs"][1:] == pytest.approx(alone["prompt_logprobs"][1:], abs=5e-5)
    assert max(abs(a - b) for a, b in zip(report["top2_margins"], RUN["fp32table"]["top2_margin"], strict=False)) < 5e-4


@pytest.mark.parametrize(("backend", "layout"), [("ms", "tp2"), ("pt", "tp2.pp2"), ("pt", "ring2")])
def test_an_adapter_is_the_same_in_a_layout(
    checkpoint: Path, adapter: Path, backend: str, layout: str, tele: Tele
) -> None:
    """A of o and down is cut by columns, B of the others by rows; every stage has its layers', a ring each token's."""
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    ids = ",".join(map(str, RUN["prompt"]))
    common = ("--checkpoint", checkpoint, "--adapter", adapter, "--ids", ids, "--ignore-eos", "--json")
    done = tele("--backend", backend, *common, "--max-new-tokens", 12, "--layout", layout)
    assert done.returncode == 0, done.stderr
    one = tele("--backend", "pt", *common, "--max-new-tokens", 12)
    found, alone = json.loads(done.stdout), json.loads(one.stdout)
    assert found["ids"] == alone["ids"] != RUN["fp32table"]["tokens"][:12]
    assert max(abs(a - b) for a, b in zip(found["top2_margins"], alone["top2_margins"], strict=True)) < 5e-4


def test_8_bits_are_the_same_in_a_layout(checkpoint: Path, tele: Tele) -> None:
    """In stages. A tensor-parallel split of this small model cuts the groups of columns that share a scale."""
    pytest.importorskip("torch")
    drawn = ("--temperature", 0.9, "--samples", 2, "--seed", 5, "--max-new-tokens", 12, "--json")
    common = ("--backend", "pt", "--checkpoint", checkpoint, "--ids", "5,6,7", "--quantize", "int8", "--ignore-eos")
    alone, shared = tele(*common, *drawn), tele(*common, *drawn, "--nproc", 2, "--layout", "pp2")
    assert shared.returncode == 0, shared.stderr
    rows = [[json.loads(line) for line in done.stdout.splitlines()] for done in (alone, shared)]
    assert [row["ids"] for row in rows[0]] == [row["ids"] for row in rows[1]] and len(rows[0]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("--layout", "dp2"),
            "tele: --layout: generation has the axes tp, pp and ring only, found dp 2 in 'dp2'; leave it out",
        ),
        (("--nproc", "2"), "tele: --nproc: 2 processes need a layout; add e.g. --layout tp2"),
        (("--layout", "tp16"), "tele: parallel.tp: 16 does not divide"),
    ],
)
def test_layouts_that_cannot_work_are_refused_in_one_line(
    checkpoint: Path, argv: tuple[str, ...], message: str, tele: Tele
) -> None:
    pytest.importorskip("torch")
    done = tele("--backend", "pt", "--checkpoint", checkpoint, "--ids", "1", *argv)
    *notes, last = done.stderr.splitlines()
    assert done.returncode == 2 and last.startswith(message) and all(note.startswith("note: ") for note in notes)
