"""The Triton kernels where no device is: under the interpreter, in a process of its own, and lowered for Ascend."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from telechat_twins.kernels.triton import blocks, lower
from tests.house import ROOT


def test_operators_under_the_interpreter() -> None:
    """tests/unit/kernels/test_triton_interpreted.py with TRITON_INTERPRET=1: no failure, and nothing left out."""
    pytest.importorskip("triton", reason="triton is not installed, so its interpreter is not either")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/unit/kernels/test_triton_interpreted.py", "-q", "-x"]
        + ["-p", "no:xdist", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    report = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, report
    summary = done.stdout.strip().splitlines()[-1]
    assert "passed" in summary and "skipped" not in summary, report


def test_shipped_configurations_lower_for_ascend() -> None:
    """All of them where `make ascend-lower` has just run over these sources, else one of every kernel."""
    if not lower.installed():
        pytest.skip("the environment of triton-ascend is not there; `make ascend-lower` makes it")
    rows, _ = lower.lower_for_ascend(one_each=lower.kept_rows() is None)
    assert not [row for row in rows if row.why]
    assert {row.kernel for row in rows} >= {"norm_forward", "rotate", "attention_dkdv", "row_gradient", "update"}
    assert min(row.memory for row in rows) > 0 and max(row.memory for row in rows) <= blocks.UNIFIED_BUFFER


BROKEN = """
import json
import torch
import triton
import triton.language as tl
from telechat_twins.kernels.triton import lower, shipped
from telechat_twins.kernels.triton.blocks import Tiles
from telechat_twins.kernels.triton.launch import Launch

@triton.jit
def broken(x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(x_ptr + tl.arange(0, 2 * BLOCK), x)

x = torch.empty(64, device="meta")
shipped.launches = lambda target: [Launch(broken, 1, {"x_ptr": x}, {"BLOCK": 32}, Tiles({}, 1, 1, 1, 128))]
print(json.dumps(lower.compile_all(False)))
"""


def test_a_kernel_that_cannot_be_lowered_is_found(tmp_path: Path) -> None:
    if not lower.installed():
        pytest.skip("the environment of triton-ascend is not there; `make ascend-lower` makes it")
    (tmp_path / "broken.py").write_text(BROKEN)
    path = os.pathsep.join((str(lower.ENVIRONMENT), str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "broken.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row[0] == "broken" and "Cannot broadcast" in row[4]


SIZES = {
    "E": (1, 2, 37, 512, 1000, 3072, 4096, 8192, 20000),
    "D": (2, 64, 80, 128, 256),
    "H": (1, 7, 40, 128),
    "C": (1, 100, 131072),
    "residual": (0, 1),
}


@pytest.mark.parametrize("operator", blocks.RULES)
@pytest.mark.parametrize("target", [blocks.ASCEND_910B3, blocks.H200, blocks.INTERPRETER], ids=lambda t: t.kind)
def test_tiles_fit_whatever_the_sizes(operator: str, target: blocks.Target) -> None:
    for itemsize in (2, 4):
        for E, D, H, C, residual in itertools.product(*SIZES.values()):
            sizes = {"E": E, "D": D, "H": H, "C": C, "residual": residual}
            tiles = blocks.choose(operator, itemsize, sizes, target)
            numbers = [n for name, n in tiles.constants.items() if name not in ("PRECISION", "WHOLE")]
            assert all(n >= 1 and n & (n - 1) == 0 for n in numbers), tiles
            assert tiles.buffer <= blocks.TILE_BUDGET
            assert (tiles.buffer > 0) == (target.kind == "ascend")
            if tiles.constants.get("WHOLE"):
                assert tiles.constants["BLOCK"] >= E


def test_tiles_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.RULES, "rope", lambda *_: blocks.Tiles({}, 1, 1, 1, blocks.UNIFIED_BUFFER))
    with pytest.raises(AssertionError, match="exceeds .* bytes of the unified buffer"):
        blocks.choose("rope", 2, {"D": 128, "H": 8}, blocks.ASCEND_910B3)
    with pytest.raises(ValueError, match="operator: got 'swish', needs one of"):
        blocks.choose("swish", 2, {}, blocks.ASCEND_910B3)


def test_the_count_of_a_norm_is_that_of_its_tiles() -> None:
    """One row of 4096 in float16: x and out twice, two bytes each; three float32 tiles; three vectors twice."""
    tiles = blocks.choose("norm_forward", 2, {"E": 4096}, blocks.ASCEND_910B3)
    per_channel = 2 * 2 * tiles.constants["ROWS"] * 2 + 3 * 4 * tiles.constants["ROWS"] + 3 * 4 * 2
    assert tiles.buffer == per_channel * tiles.constants["BLOCK"]


def test_a_configuration_that_does_not_lower_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = (
        lower.Row("rotate", "fp16", "HEADS=8", 4096, ""),
        lower.Row("merge", "fp32", "ROWS=8", 4096, "error: no"),
    )
    monkeypatch.setattr(lower, "install", lambda: None)
    for rows, code in (([good], 0), ([good, bad], 1), ([], 1)):
        monkeypatch.setattr(lower, "lower_for_ascend", lambda *_, rows=rows: (rows, False))
        assert lower.main([]) == code
    assert "error: no" in capsys.readouterr().out


def test_an_installation_that_breaks_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lower, "ENVIRONMENT", tmp_path / "build" / "triton-ascend")

    def breaks(command: list[str], **_) -> None:
        folder = command[command.index("--target") + 1]
        with open(os.path.join(folder, "half"), "w") as file:
            file.write("half a package")
        raise subprocess.CalledProcessError(1, command, stderr="no network")

    monkeypatch.setattr(subprocess, "run", breaks)
    assert lower.main([]) == 2
    assert not lower.installed() and not list((tmp_path / "build").iterdir())


def test_a_broken_environment_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment = tmp_path / "build" / "triton-ascend"
    environment.mkdir(parents=True)
    (environment / "half").write_text("")
    monkeypatch.setattr(lower, "ENVIRONMENT", environment)
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(command))
    lower.install()
    assert lower.installed() and not (environment / "half").exists()
    lower.install()
    assert len(calls) == 1
    monkeypatch.setattr(lower, "REQUIREMENTS", ("triton-ascend==9.9.9",))
    assert not lower.installed()
