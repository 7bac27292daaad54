"""The completion script of `tele --print-completion`, asked as the shell asks it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from telechat_twins.core import cli
from telechat_twins.core.commands import completion

pytest.importorskip("shtab")
ASK = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_tele 2>/dev/null; echo "${COMPREPLY[@]}"'


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "tele.bash"
    path.write_text(completion.script("bash"))
    return path


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("tele tr", "train"),
        ("tele train --res", "--restarts --resume"),
        ("tele train --backend ", "ms pt"),
        ("tele train --resume ru", "runs"),
        ("tele merge ru", "runs"),
        ("tele train --config telechat2-ti", "telechat2-tiny telechat2-tiny-lora"),
        ("tele train --config own", "own.yaml"),
        ("tele train --growth flm-r", "flm-replica"),
        ("tele plan --machine h2", "h200-sxm"),
        ("tele plan --model telechat2-1", "telechat2-115b"),
        ("tele bench step --seq-len ru", ""),
    ],
)
def test_verbs_options_paths_and_bundled_names_are_completed(
    line: str, completed: str, script: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "own.yaml").touch()
    words = ["bash", "-c", ASK, "bash", str(script), *line.split(" ")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == completed.split()


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--print-completion", shell]) == 0
    assert "tele" in capsys.readouterr().out
