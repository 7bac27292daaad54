"""Amounts as people write them, and searches that find nothing: one line with the way out."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from telechat_twins.core import cli
from telechat_twins.core.files import ROOT
from telechat_twins.core.planner.amounts import amount, whole


def test_amounts() -> None:
    wanted = {"2e12": 2e12, "2T": 2e12, "1.5b": 1.5e9, "10 trillion": 1e13, "3,000": 3000.0, ".5 G": 5e8, "1_0k": 1e4}
    assert {text: amount(text) for text in wanted} == pytest.approx(wanted)
    for text in ("", "T", "ten", "1e", "nan", "inf", "1 quadrillion", "1T2", "1,5T", "1,00", "1,0000"):
        with pytest.raises(argparse.ArgumentTypeError, match="such as 2e12, 2T"):
            amount(text)
    assert whole("-3") == -3
    wrong = {"128K": "128000 or 131072", "1 Mi": "1000000 or 1048576", "1.5": "whole number, found '1.5'"}
    for text, says in wrong.items():
        with pytest.raises(argparse.ArgumentTypeError, match=says):
            whole(text)


MODEL = "family: telechat2\nvocab_size: 50\nhidden_size: 48\nffn_hidden_size: 64\nnum_layers: two\n"


def test_mistakes_in_ones_own_files_have_their_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.yaml").write_text(MODEL)
    machine = (ROOT / "configs" / "machines" / "h100-sxm.yaml").read_text()
    (tmp_path / "nolink.yaml").write_text(re.sub(r"(?ms)^cluster:.*?(?=^scaling:)", "", machine))
    (tmp_path / "small.yaml").write_text(re.sub(r"(?ms)(^memory:\n  value: )\d+", r"\1 2", machine))
    search = ["--model", "telechat2-7b", "--search", "--devices", "1", "--machine"]
    for words, says in (
        (["--model", str(tmp_path / "own.yaml")], "own.yaml:5: num_layers: expected a whole number, found str 'two'"),
        (["--model", "telechat2-7b", "--machine", str(tmp_path / "nolink.yaml")], "nolink.yaml: cluster: missing"),
        ([*search, str(tmp_path / "small.yaml")], "memory is 2 GiB, of which communicators, kernels and driver take 4"),
        (["--model", "telechat2-7b", "--seq-len", "128K"], "found '128K'; write 128000 or 131072"),
    ):
        assert cli.main(["plan", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert cli.main(["plan", *search, "h100-sxm", "--seq-len", "4096"]) == 1
    text = capsys.readouterr().out
    assert "on at most 1 device of" in text and "none fits; the smallest, single with recompute none, needs at" in text
    assert cli.main(["plan", *search, "h100-sxm", "--target", "latency", "--prompt-len", "1000000"]) == 1
    assert "give more --devices, --quantize int8, a shorter --prompt-len" in capsys.readouterr().out
