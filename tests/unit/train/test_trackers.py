"""Trackers: the local files of each are read back by its own library; none can slow or end a training."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.train import loop, records
from telechat_twins.core.train.metrics import read_metrics
from telechat_twins.core.train.track import open as opening
from telechat_twins.core.train.track.background import Background
from telechat_twins.core.train.track.tags import points
from tests.support.numpy_stepper import MemoryBlend, NumpyStepper, run_config

ROOT = Path(__file__).resolve().parents[3]

# Each prints {tag: {step: value}} of a run's folder, by the tracker's own code and messages.
READ = {
    "swanlab": """
from swanlab.proto.swanlab.record.v1.record_pb2 import Record
from swanlab.sdk.internal.core_python.store import DataStoreReader
reader = DataStoreReader()
(path,) = folder.glob("swanlab/run-*/*.swanlab")
reader.open(path)
for piece in reader:
    record = Record()
    record.ParseFromString(piece)
    if record.HasField("scalar"):
        found.setdefault(record.scalar.key, {})[record.scalar.step] = record.scalar.value.number
""",
    # The package has no reader of its own files in Python: the frames of its log (LevelDB's) are taken apart here.
    "wandb": """
from wandb.proto.wandb_internal_pb2 import Record
(path,) = folder.glob("wandb/offline-run-*/*.wandb")
raw, at, held = path.read_bytes(), 7, b""
assert raw[:4] == b":W&B"
while at + 7 <= len(raw):
    if 32768 - at % 32768 < 7:
        at += 32768 - at % 32768
        continue
    size, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
    held, at = held + raw[at + 7 : at + 7 + size], at + 7 + size
    if kind in (1, 4):
        record, held = Record.FromString(held), b""
        if record.HasField("history"):
            for item in record.history.item:
                key, value = item.key or "/".join(item.nested_key), json.loads(item.value_json)
                found.setdefault(key, {})[record.history.step.num] = value
""",
    "mlflow": """
from mlflow.tracking import MlflowClient
client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
(run,) = client.search_runs([client.get_experiment_by_name("telechat-twins").experiment_id])
assert run.info.status == "FINISHED" and run.data.params["train.steps"] == "12", run
for key in run.data.metrics:
    found[key] = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, key)}
""",
}
TRAIN = """
import sys
from pathlib import Path
from telechat_twins.core.train import loop
from tests.support.numpy_stepper import MemoryBlend, NumpyStepper, run_config
loop.open_blend = lambda data, seed, vocab_size, pad_token_id: MemoryBlend(seed)
loop.train(NumpyStepper, run_config(track=[sys.argv[1]]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("name", ["swanlab", "wandb", "mlflow"])
def test_what_a_tracker_wrote_is_read_back_by_its_own_library(name: str, tmp_path: Path) -> None:
    """In processes of their own: MindSpore cannot be imported where protobuf was first."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install -e '.[{name}]'")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path)}
    for key in list(env):
        if key.startswith(("WANDB", "SWANLAB", "MLFLOW")):
            del env[key]
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, name, str(out)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    code = f"import json, sys\nfrom pathlib import Path\nfolder, found = Path(sys.argv[1]), {{}}\n{READ[name]}\n"
    code += "print('FOUND' + json.dumps(found))"
    read = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    found = json.loads(read.stdout.rpartition("FOUND")[2]) if "FOUND" in read.stdout else read.stderr
    rows = read_metrics(out)
    for tag in points(rows[0]):
        wanted = {str(row["step"]): points(row)[tag] for row in rows}
        assert found[tag] == pytest.approx(wanted, rel=1e-12), tag


class Slow:
    """A tracker that takes a second a step, and fails at its second."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self, row: dict) -> None:
        self.steps += 1
        if self.steps == 2:
            raise ConnectionError("the server\nis gone")
        time.sleep(0.3)

    def close(self) -> None: ...


def test_a_tracker_neither_slows_nor_ends_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "open_blend", lambda data, seed, vocab_size, pad_token_id: MemoryBlend(seed))
    monkeypatch.setattr(records, "plot_losses", lambda runs, path, title, marks: path)
    monkeypatch.setattr(opening, "require_trackers", lambda names: None)
    monkeypatch.setattr(opening, "_open", lambda name, run: Slow())
    loop.train(NumpyStepper, run_config(track=["wandb"]), tmp_path)
    rows = read_metrics(tmp_path)
    assert len(rows) == 12 and sum(row["step_ms"] for row in rows) < 300
    shown = capsys.readouterr().err
    assert "warning: wandb has stopped (ConnectionError: the server); training goes on" in shown
    assert not (tmp_path / "tensorboard").exists()


def test_rows_that_a_tracker_cannot_take_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("telechat_twins.core.train.track.background.HELD", 1)
    monkeypatch.setattr("telechat_twins.core.train.track.background.CLOSE_S", 5.0)
    said: list[str] = []

    class Busy(Slow):
        def step(self, row: dict) -> None:
            time.sleep(0.2)

    tracker = Background("slow", Busy, said.append)
    for step in range(50):
        tracker.step({"step": step})
    tracker.close()
    assert len(said) == 1 and said[0].startswith("warning: slow was too slow for 4")


def test_a_missing_package_and_a_name_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"track: swanlab is not installed; run: pip install .*swanlab"):
        opening.require_trackers(["tensorboard", "swanlab"])
    with pytest.raises(UserError, match=r"track\[0\]: 'wandbb' is not one of .* \(did you mean 'wandb'\?\)"):
        run_config(track=["wandbb"])
    with pytest.raises(UserError, match="track: names a tracker twice"):
        run_config(track=["wandb", "wandb"])
