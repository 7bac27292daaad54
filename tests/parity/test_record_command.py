"""``tele parity record`` as a user runs it, with a real launcher, and runs in progress that record themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.core import cli
from telechat_twins.core.backends import load
from telechat_twins.core.config import load_run_config
from telechat_twins.core.parity.record.format import MAX_BYTES
from telechat_twins.core.parity.record.read import open_record, read_full
from telechat_twins.core.parity.record.recorder import open_recorder
from telechat_twins.core.parity.record.sketch import Projection
from telechat_twins.core.train.loop import train
from tests.support.launching import one_rank_here
from tests.support.packed import write_packed
from tests.support.records import apart

SEQ_LEN = 32


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mindspore")
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("run")
    write_packed(folder / "packed", 2048, SEQ_LEN, sequences=50)
    tree = {
        "model": "telechat2-tiny",
        "data": {"sources": [{"path": "packed"}], "seq_len": SEQ_LEN},
        "train": {"steps": 100, "global_batch": 4, "micro_batch": 2},
        "optim": {"lr": 1e-4, "min_lr": 1e-5, "warmup_steps": 2, "eps": 1e-3},
    }
    (folder / "run.yaml").write_text(json.dumps(tree))  # JSON is YAML
    return folder / "run.yaml"


def test_a_command_and_a_run_in_progress_record_the_same(config, tmp_path, capfd):
    out = tmp_path / "rec"
    words = ["--backend", "pt", "--config", str(config), "--steps", "4", "--at", "2", "4", "--out", str(out)]
    full = ["--full", "layers.1.ffn.*", "gradient:embed.weight@2"]
    assert cli.main(["parity", "record", *words, *full]) == 0
    record = open_record(out)
    shown = capfd.readouterr()
    assert "726 quantities and 4 steps" in shown.out
    assert (
        "plan        4 of 100 steps, each 4 x 32 tokens in micro-batches of 2: 512 tokens to go"
        in shown.err + shown.out
    )
    assert record.header.steps == [2, 4] and [row["step"] for row in record.trace] == [1, 2, 3, 4]
    assert record.header.loss == record.trace[1]["loss"] == record.quantities["activation:loss@2"].sum
    assert sum(f.stat().st_size for f in out.iterdir() if f.name != "full.safetensors") < MAX_BYTES
    assert [path.name for path in tmp_path.iterdir()] == ["rec"]  # no checkpoint, and nothing of the run is left
    assert cli.main(["parity", "record", *words]) == 2 and open_record(out).full
    assert "holds a record; give another folder, or --force to replace it" in capfd.readouterr().err
    # Whole tensors are what was sketched.
    assert {"activation:layers.1.ffn.act@4", "gradient:embed.weight@2", "moment2:layers.1.ffn.up.weight@2"} <= set(
        record.full
    )
    for key, shape in record.full.items():
        values, row = read_full(record, key), record.quantities[key]
        name = row.name
        sketch = Projection(name, shape, record.header.buckets).box(values, (0,) * len(shape)).sketch
        np.testing.assert_allclose(sketch, row.sketch, rtol=0, atol=1e-12 * row.norm)

    # The other backend's run records its second and fourth step itself, and is saved as any run is.
    run = load_run_config(config, ["train.record_every=2", "train.steps=5", "train.schedule_steps=100"])
    recorder = open_recorder(run, tmp_path / "run")
    assert (
        recorder is not None and recorder.last is None and open_recorder(load_run_config(config, []), tmp_path) is None
    )
    result = train(load("ms", "train").Trainer, run, tmp_path / "run", open_recorder=open_recorder)
    assert result.checkpoint is not None and result.step == 5
    assert len(list((tmp_path / "run" / "records").iterdir())) == 2
    for step in (2, 4):
        other = open_record(tmp_path / "run" / "records" / f"step-{step:08d}")
        assert other.quantities.keys() == {key for key in record.quantities if key.endswith(f"@{step}")}
        assert other.header.digests["config"] == record.header.digests["config"]
        assert max(apart(other, record).values()) < 1e-5
    assert other.header.backend == "ms" and record.header.backend == "pt"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps: must be at least 1"),
        (["--steps", "101"], "at most the run's train.steps 100"),
        (["--at", "2"], "--at: must name steps from 1 to --steps 1"),
        (["--full", "norm.*", "layers.9.*"], "--full: 'layers.9.*' matches no quantity of the"),
        (["--full", "gradient:embed.weight@2"], "--full: 'gradient:embed.weight@2' matches no quantity"),
        (["--rows", "-1"], "--rows: must be at least 1"),
        (["--layout", "tp3"], "--layout tp3"),
        (["--resume", "nowhere"], "nowhere"),
        (["--out", "{config}"], "must be a new folder"),
        (["--confg", "x"], "unknown argument '--confg'"),
        (["--set", "data.sources=[{{path: nowhere}}]"], "data.sources[0].path: nowhere: no such packed folder"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_anything_starts(config, capfd, options, message):
    words = [word.format(config=config) for word in options]
    assert cli.main(["parity", "record", "--backend", "pt", "--config", str(config), *words]) == 2
    shown = capfd.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_a_mistake_that_a_rank_finds_leaves_nothing_behind(config, tmp_path, capfd, monkeypatch):
    one_rank_here(monkeypatch)
    words = ["--backend", "pt", "--config", str(config), "--out", str(tmp_path / "rec")]
    with pytest.raises(SystemExit, match="^2$"):
        cli.main(["parity", "record", *words, "--set", "kernels.attention=triton"])
    assert "triton" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_prints_the_sizes(capfd):
    assert (
        cli.main(["parity", "record", "--backend", "ms", "--config", "telechat2-115b", "--dry", "--full", "norm.*"])
        == 0
    )
    shown = capfd.readouterr().out
    assert (
        "8,183 a recorded step, 256 numbers each" in shown and "limit 32.0 MB" in shown and "512, with shares" in shown
    )
