"""Length stages: where each begins, which order it draws from, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from telechat_twins.core.config import load_run_config, run_config_from_dict
from telechat_twins.core.errors import UserError
from telechat_twins.core.train.stages import check_stages, marks, plan_stages, samples_at, stage_of
from tests.support.numpy_stepper import run_config

STAGES = [
    {"steps": 5},
    {"steps": 3, "global_batch": 8},
    {"steps": 4, "seq_len": 8, "micro_batch": 4},
    {"steps": 2, "seq_len": 8, "sources": [{"path": "other"}]},
]


def staged(stages: list[dict], **changes: object):
    return run_config(train={"global_batch": 4, "micro_batch": 2, "stages": stages}, **changes)


def test_stages_follow_one_another() -> None:
    config = staged(STAGES)
    stages = plan_stages(config)
    assert config.train.steps == 14
    assert [(s.begin, s.end, s.global_batch, s.micro_batch, s.data.seq_len) for s in stages] == [
        (0, 5, 4, 2, 16),
        (5, 8, 8, 2, 16),
        (8, 12, 4, 4, 8),
        (12, 14, 4, 2, 8),
    ]
    # A larger batch goes on in the same order; another length or source begins one of its own.
    assert [(s.order, s.drawn) for s in stages] == [(0, 0), (0, 0), (1, 44), (2, 60)]
    assert [stage_of(stages, step).number for step in (0, 4, 5, 7, 8, 13, 99)] == [1, 1, 2, 2, 3, 4, 4]
    assert [samples_at(stages, step) for step in (0, 5, 6, 8, 12, 14)] == [0, 20, 28, 44, 60, 68]
    assert marks(stages) == {1: "4 x 16 tokens", 6: "8 x 16 tokens", 9: "4 x 8 tokens", 13: "4 x 8 tokens"}
    assert plan_stages(run_config())[0].end == 12 and not marks(plan_stages(run_config()))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "train.stages: empty"),
        ([{"steps": 3, "seq_len": 17}], r"train.stages\[0\].seq_len: 17 is above the model's max_seqlen 16"),
        ([{"steps": 3}, {"steps": 3, "micro_batch": 3}], r"train.stages\[1\].micro_batch: 3 does not divide"),
        ([{"steps": 3, "length": 3}], r"train.stages\[0\]: unknown key 'length'"),
    ],
)
def test_what_cannot_be_trained_is_refused(stages: list[dict], message: str) -> None:
    with pytest.raises(UserError, match=message):
        staged(stages)


def test_every_stage_is_held_against_the_layout() -> None:
    config = staged([{"steps": 3}, {"steps": 3, "global_batch": 6}], parallel={"dp": 2})
    with pytest.raises(UserError, match=r"train.stages\[1\]: "):
        check_stages(config)


def test_held_out_text_is_held_against_the_layout_in_the_runs_own_batch() -> None:
    """It is evaluated in batches of train.global_batch rows, of which dp 2 would leave out every second."""
    stages = [{"steps": 3, "global_batch": 4}, {"steps": 3, "global_batch": 8}]
    given = run_config(train={"global_batch": 2, "micro_batch": 2, "stages": stages}, parallel={"dp": 2}).to_dict()
    check_stages(run_config_from_dict(given))  # nobody uses the run's own batch
    with pytest.raises(UserError, match=r"^train.global_batch: 2 is not a multiple of dp 2 x micro_batch 2"):
        check_stages(run_config_from_dict(given | {"eval": {"sources": [{"path": "held"}]}}))


def test_paths_of_a_stage_count_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: telechat2-tiny\ndata: {sources: [{path: a}], seq_len: 64}\noptim: {lr: 1e-3}\n"
        "train: {init: base, global_batch: 2, micro_batch: 2, stages: [{steps: 2}, {steps: 2, sources: [{path: b}]}]}\n"
    )
    config = load_run_config(tmp_path / "run.yaml")
    assert config.train.init == str(tmp_path / "base")
    assert [s.data.sources[0].path for s in plan_stages(config)] == [str(tmp_path / "a"), str(tmp_path / "b")]
