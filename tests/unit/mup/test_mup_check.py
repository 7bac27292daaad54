"""The coordinate check's arithmetic and verdict; tests/parity/test_mup_check.py trains."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from telechat_twins.core import cli
from telechat_twins.core.commands.mup.check import describe, plot
from telechat_twins.core.config import load_run_config
from telechat_twins.core.model.config import CONFIGS
from telechat_twins.core.mup.coordinates import (
    FLAT,
    GROUPS,
    MUP,
    STANDARD,
    WidthRecord,
    configs,
    group_of,
    judge,
    slope,
    to_json,
    token_batch,
)
from telechat_twins.core.mup.transfer import at_width, transfer

NARROW = CONFIGS / "train" / "teleflm-tiny.yaml"
WIDTHS = (64, 128, 256, 512)


def records(mup: dict[str, tuple[float, float]] | None = None, contrast: float = 1.0) -> list[WidthRecord]:
    """Sizes that are powers of the width: (at the start, in change), by group; flat but for the logits' start."""
    powers = {group: (0.0, 0.0) for group in GROUPS} | {"logits": (-0.5, 0.0)} | (mup or {})
    made = []
    for name in (MUP, STANDARD):
        for width in WIDTHS:
            of = powers if name == MUP else {group: (0.5, contrast) for group in GROUPS}
            scales = {group: [3.0 * width ** of[group][0]] * 3 for group in GROUPS}
            changes = {group: [0.0, 9.0, 0.1 * width ** of[group][1]] for group in GROUPS}
            made.append(WidthRecord(name, width, scales, changes, [5.0, 4.0, 3.0]))
    return made


def test_the_slope_is_the_power() -> None:
    made = [r for r in records({"attn": (0.25, -0.75)}) if r.parametrisation == MUP]
    assert slope(made, "scales", "attn", 0) == pytest.approx(0.25)
    assert slope(made, "changes", "attn", 2) == pytest.approx(-0.75)
    gone = [*made[:3], replace(made[3], changes={**made[3].changes, "attn": [0.0, 0.0, math.nan]})]
    assert math.isnan(slope(gone, "changes", "attn", 2)) and math.isnan(slope(made, "changes", "attn", 0))


BROKEN = {
    "muP, at the start: ffn": {"mup": {"ffn": (FLAT + 0.01, 0.0)}},
    "muP, change after 2: stream": {"mup": {"stream": (0.0, -FLAT - 0.01)}},
    "muP, at the start: logits": {"mup": {"logits": (0.5, 0.0)}},
    "muP, change after 2: logits": {"mup": {"logits": (-0.5, 1.0)}},
    "muP, at the start: logits -1": {"mup": {"logits": (-1.0, -0.5)}},
    "muP, change after 2: embed": {"mup": {"embed": (0.0, math.nan)}},
    "standard, change after 2": {"contrast": 0.4},
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_slope_out_of_its_range_is_named(what: str) -> None:
    made = records(**BROKEN[what])
    broken = [f"{one.what}: {one.group} {one.slope:+.0f}" for one in judge(made) if not one.holds]
    assert len(broken) == 1 and broken[0].startswith(what)
    assert f"BROKEN  {what}" in describe("title", made, judge(made))


def test_flat_holds(tmp_path) -> None:
    made = records({"attn": (FLAT - 0.01, 0.0)})
    judged = judge(made)
    assert all(one.holds for one in judged)
    text = describe("title", made, judged)
    assert "BROKEN" not in text and "+0.29" in text
    report = to_json(made, judged, {"backend": "pt"})
    assert report["holds"] and len(report["records"]) == 8 and report["judged"][-1]["high"] is None
    assert plot("title", made, tmp_path / "check.png").read_bytes()[:4] == b"\x89PNG"


def test_muP_is_transferred_and_the_contrast_is_not() -> None:  # noqa: N802
    narrow = load_run_config(NARROW)
    made = configs(narrow, WIDTHS, 4, 32)
    assert [(name, run.model.hidden_size) for name, run in made] == [(n, w) for n in (MUP, STANDARD) for w in WIDTHS]
    for name, run in made:
        shape = at_width(narrow.model, run.model.hidden_size)
        numbers = transfer(narrow.model, narrow.optim, shape) if name == MUP else (shape, narrow.optim)
        assert (run.model, run.optim) == numbers
        assert (run.train.global_batch, run.train.precision, run.data.seq_len) == (4, "fp32", 32)


def test_groups() -> None:
    names = ("embed", "layers.0", "layers.11", "layers.11.attn", "layers.0.ffn", "logits")
    assert [group_of(name) for name in names] == ["embed", "stream", "stream", "attn", "ffn", "logits"]


def test_tokens_are_as_unequal_as_words() -> None:
    ids = token_batch(100, 50, 200, 1).input_ids
    assert ids.dtype == np.int32 and (ids.min(), ids.max()) == (0, 99)
    shares = np.bincount(ids.ravel(), minlength=100) / ids.size
    assert shares[0] == pytest.approx(1 / sum(1 / k for k in range(1, 101)), rel=0.1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--widths", "64", "128"], "--widths: give at least 3 different widths, found 64 128"),
        (["--widths", "64", "64", "128", "256"], "different widths"),
        (["--widths", "64", "100", "128"], "--widths: width 100: must be a multiple of 32"),
        (["--steps", "0"], "--steps: must be from 1 to 100, found 0"),
        (["--out", str(NARROW)], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["mup", "check", "--backend", "pt", "--config", str(NARROW), *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
