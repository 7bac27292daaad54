"""metrics.jsonl, the plot, the FLOP count."""

import json
import math

import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.flops import flops_per_token
from telechat_twins.core.train.metrics import (
    FEW,
    LONGEST_ROW,
    MetricsLog,
    column,
    last_row,
    last_step,
    plot_losses,
    read_metrics,
)


def row(step, **more):
    return {"step": step, "loss": 5.0 / step, "grad_norm": 1.0, "lr": 1e-3, **more}


def test_rows_come_back_bit_for_bit(tmp_path):
    rows = [row(1, loss=0.1 + 0.2), row(2, loss=math.pi)]
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for r in rows:
            log.append(r)
            assert read_metrics(tmp_path)[-1] == r  # readable at once, without closing
    assert read_metrics(tmp_path) == rows


def test_reopening_keeps_only_the_steps_before_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, 8):
            log.append(row(step))
    with MetricsLog(path, keep_until=4) as log:
        log.append(row(5, loss=9.0))
    rows = read_metrics(path)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["loss"] == 9.0
    assert last_step(path) == 5 and last_step(tmp_path / "absent.jsonl") == 0


def test_a_line_torn_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2))[:-7])
    assert [r["step"] for r in read_metrics(path)] == [1]
    with MetricsLog(path, keep_until=1) as log:
        log.append(row(2))
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


def test_the_last_row_of_a_growing_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_row(path) is None
    path.write_text("")
    assert last_row(path) is None
    lines = [json.dumps(row(step)) + "\n" for step in range(1, 1200)]
    path.write_text("".join(lines) + json.dumps(row(1200))[:-7])
    assert path.stat().st_size > 4 * LONGEST_ROW
    assert last_row(path) == row(1199)


def test_many_scores_are_read_again_however_often_the_file_is_written_anew(tmp_path):
    """As of 170 subjects at a checkpoint; a run that is resumed writes the rows that it keeps anew."""
    scores = {f"tasks/{'subject' * 8}_{n}/{kind}": 0.123456789 for n in range(170) for kind in ("acc", "stderr")}
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append(row(1))
        log.append({"step": 1, **scores})
        log.append(row(2))
    for _ in range(2):
        with MetricsLog(path, keep_until=2):
            pass
        assert read_metrics(path) == [row(1) | scores, row(2)]
        lines = path.read_bytes().splitlines()
        assert len(lines) == 2 + -(-len(scores) // FEW) and max(map(len, lines)) < 4096
        assert last_row(path) == row(2)


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(1)) + "\nhello\n" + json.dumps(row(2)) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        read_metrics(path)
    with pytest.raises(UserError, match="no such file"):
        read_metrics(tmp_path / "absent.jsonl")


def test_numbers_json_does_not_have_become_null(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append(row(1, loss=math.nan, grad_norm=math.inf))
    (read,) = read_metrics(tmp_path)
    assert read["loss"] is None and read["grad_norm"] is None
    assert math.isnan(column([read], "loss")[0])


def test_plot_is_a_png_and_takes_gaps(tmp_path):
    rows = [row(1), row(2, loss=None, grad_norm=None, skipped=True), row(3)]
    path = plot_losses({"MindSpore": rows, "PyTorch": rows[:1]}, tmp_path / "a" / "loss.png", "title")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_flops_by_hand():
    config = load_model_config("telechat2-tiny")
    E, F, L, V, S = 128, 320, 4, 2048, 64
    matmul = L * (2 * E * E + 2 * E * 64 + 3 * E * F) + V * E  # q, o; k, v of 2 heads x 32; gate, up, down; head
    assert flops_per_token(config, S) == 6 * matmul + 12 * L * E * S
    assert flops_per_token(config, S, causal=True) == 6 * matmul + 6 * L * E * S


def test_flops_of_the_115b():
    # 6N rule: within 10% of 6 x 113.3e9 at the trained length.
    assert flops_per_token(load_model_config("telechat2-115b"), 8192, causal=True) == pytest.approx(
        6 * 113.3e9, rel=0.1
    )
