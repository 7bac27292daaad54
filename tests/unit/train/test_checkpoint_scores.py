"""Tasks and samples at checkpoints, with the numpy trainer and a stand-in for `tele eval`."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from telechat_twins.core.config import load_run_config, run_config_from_dict
from telechat_twins.core.errors import UserError
from telechat_twins.core.train import loop, records
from telechat_twins.core.train.heldout import scores
from telechat_twins.core.train.heldout.due import was_due
from telechat_twins.core.train.heldout.scores import SAMPLES, CheckpointScores, open_scores, samples_of
from telechat_twins.core.train.metrics import MEASURED, MetricsLog, last_row, plot_losses, read_metrics
from tests.campaigns.killing import ROOT
from tests.support.numpy_stepper import Cluster, MemoryBlend, NumpyStepper, run_config

# What `tele` would do: a score that grows with the step, and a continuation; it checks that the checkpoint is there.
STAND_IN = """
import json, sys, pathlib
words = sys.argv[1:]
option = lambda name: words[words.index(name) + 1]
step = int(pathlib.Path(option("--checkpoint")).name.removeprefix("step-"))
assert (pathlib.Path(option("--checkpoint")) / "manifest.json").is_file()
print("words", json.dumps(words))
if step == FAILS:
    sys.exit("tele: no such task")
out = pathlib.Path(option("--out"))
if "answers" in words:
    prompts = [json.loads(line)["prompt"] for line in open(option("--questions"))]
    out.write_text("".join(json.dumps({"prompt": p, "text": f" after {step}"}) + "\\n" for p in prompts))
else:
    out.mkdir(exist_ok=True)
    entry = lambda error: {"score": step / 100, "stderr": error, "metric": "acc,none"}
    (out / "results.json").write_text(json.dumps({"tasks": {"arc": entry(0.5), "rolling": entry(None)}}))
"""
GIVEN = {"tasks": ["arc", "rolling"], "task_limit": 3, "samples": ["Once", "你"], "sample_tokens": 5}


class Stepper(NumpyStepper):
    def implementation(self):
        return {"backend": "PyTorch 0", "device": "cpu"}


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "open_blend", lambda data, seed, vocab_size, pad_token_id: MemoryBlend(seed))
    monkeypatch.setattr(records, "plot_losses", lambda runs, path, title, marks: path)
    monkeypatch.setattr(scores, "MOMENT_S", 0.05)


def stand_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    real = open_scores

    def opened(config, out, stepper):
        return real(config, out, stepper, lambda words: [sys.executable, "-S", "-c", code, *words])

    monkeypatch.setattr(loop, "open_scores", opened)


def config_of(**more):
    return run_config(train__steps=5, checkpoint={"every": 2}, eval=GIVEN | more)


def test_every_checkpoint_is_scored_and_a_failure_is_a_warning(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, STAND_IN.replace("FAILS", "4"))
    loop.train(Stepper, config_of(), tmp_path)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and all("loss" in row for row in rows)
    found = {row["step"]: {key: row[key] for key in row if key.startswith("tasks/")} for row in rows}
    columns = {"tasks/arc/acc": 0.05, "tasks/arc/stderr": 0.5, "tasks/rolling/acc": 0.05}
    assert found == {1: {}, 2: {key: 0.5 if "err" in key else 0.02 for key in columns}, 3: {}, 4: {}, 5: columns}
    said = capsys.readouterr().err
    assert "tasks after step 2: arc acc 0.0200 ± 0.5000; rolling acc 0.0200" in said
    assert "sample after step 5: Once ->  after 5" in said and "sample after step 5: 你 ->  after 5" in said
    for name in ("tasks", "samples"):
        log = tmp_path / "evaluations" / "step-00000004" / f"{name}.log"
        why = f"exit code 1: tele: no such task; log: {log}"
        assert f"step 4: eval.{name} could not be evaluated ({why}); training goes on" in said
    (words,) = (json.loads(line[6:]) for line in _log(tmp_path, 2, "tasks").splitlines())
    folder = tmp_path / "evaluations" / "step-00000002"
    assert words == [
        *("eval", "--backend", "pt", "--checkpoint", str(tmp_path / "step-00000002"), "--precision", "fp32", "--quiet"),
        *("--out", str(folder / "tasks"), "--tasks", "arc", "rolling", "--limit", "3"),
    ]
    last = last_row(tmp_path / "metrics.jsonl")
    assert last is not None and last["step"] == 5 and "loss" in last
    plot_losses({"run": rows}, tmp_path / "loss.png", "scores")  # with the panel of scores
    # TensorBoard's own reader gives these scalars and texts (checked by hand: it cannot be imported beside MindSpore).
    (events,) = (tmp_path / "tensorboard").iterdir()
    for text in ("tasks/arc/acc", "samples/1", "你 after 2", "你 after 5"):
        assert text.encode() in events.read_bytes()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("place", ["evaluations", "evaluations/step-00000002/prompts.jsonl"])
def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, capsys, world, place):
    """On every rank training goes on, as after any other evaluation that fails."""
    code = STAND_IN.replace("FAILS", "-1")
    if place == "evaluations":  # a file in place of the folder
        (tmp_path / place).write_text("")
    else:  # a folder in place of the file
        real = CheckpointScores._begin

        def begin(self, step, checkpoint):
            unmade = real(self, step, checkpoint)
            if step == 2:
                (tmp_path / place).mkdir()
            return unmade

        monkeypatch.setattr(CheckpointScores, "_begin", begin)
    stand_in(monkeypatch, code)
    cluster = Cluster(world)
    parallel = config_of().to_dict() | ({"parallel": {"dp": 2}} if world == 2 else {})
    config = run_config_from_dict(parallel)
    results = cluster.run(
        lambda rank: loop.train(lambda given: Stepper(given, cluster=cluster, rank=rank), config, tmp_path)
    )
    assert [result.step for result in results] == [5] * world
    said, rows = capsys.readouterr().err, read_metrics(tmp_path)
    scored = [row["step"] for row in rows if "tasks/arc/acc" in row]
    if place == "evaluations":
        assert scored == [] and said.count("eval.tasks could not be evaluated (") == 3
        assert f"{tmp_path / place}/step-00000002: Not a directory); training goes on" in said
    else:
        assert scored == [2, 4, 5] and said.count("could not be evaluated") == 1
        assert "step 2: eval.samples could not be evaluated (" in said


def _log(run: Path, step: int, name: str) -> str:
    return (run / "evaluations" / f"step-{step:08d}" / f"{name}.log").read_text()


def test_a_continuation_may_hold_line_ends_of_unicode(tmp_path):
    rows = [{"prompt": "a", "text": "one\u2028two\x85three\r\x0b"}, {"prompt": "b", "text": ""}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / SAMPLES).write_text(text, encoding="utf-8")
    assert samples_of(tmp_path) == rows
    assert samples_of(tmp_path / "none") == []


def test_an_interrupted_evaluation_is_finished_by_the_resumed_run(tmp_path, monkeypatch):
    """A run that ends in an evaluation begins it anew when it goes on; one that had finished stays as it is."""
    stand_in(monkeypatch, STAND_IN.replace("FAILS", "-1"))
    loop.train(Stepper, config_of(), tmp_path)
    whole = (tmp_path / "metrics.jsonl").read_text()
    mark = tmp_path / "evaluations" / "step-00000005" / "finished"
    mark.unlink()
    for part in (tmp_path / "evaluations" / "step-00000005" / "tasks").iterdir():
        part.unlink()
    (tmp_path / "evaluations" / "step-00000005" / "tasks").rmdir()
    kept = [line for line in whole.splitlines(keepends=True) if "tasks/" not in line or '"step": 2' in line]
    (tmp_path / "metrics.jsonl").write_text("".join(kept))
    loop.train(Stepper, config_of(), tmp_path, resume="auto")
    assert mark.is_file() and read_metrics(tmp_path)[4]["tasks/arc/acc"] == 0.05
    before = mark.stat().st_mtime_ns
    loop.train(Stepper, config_of(), tmp_path, resume="auto")
    assert mark.stat().st_mtime_ns == before


class OtherStepper(Stepper):
    def implementation(self):
        return {"backend": "MindSpore 0", "device": "cpu"}


REFUSES = """
import pathlib, sys
for name in ("--out",):
    out = pathlib.Path(sys.argv[1:][sys.argv[1:].index(name) + 1])
    if out.exists():
        sys.exit("tele: was begun with other options")
"""


def test_an_evaluation_that_another_backend_began_is_begun_anew(tmp_path, monkeypatch, capsys):
    """As is one of a step that is passed again from an earlier checkpoint: `tele eval` would refuse both."""
    stand_in(monkeypatch, REFUSES + STAND_IN.replace("FAILS", "-1"))
    config = run_config(train__steps=5, checkpoint={"every": 2, "keep_last": 9}, eval=GIVEN)
    loop.train(Stepper, config, tmp_path)
    last = tmp_path / "evaluations" / "step-00000005"
    (last / "finished").unlink()
    loop.train(OtherStepper, config, tmp_path, resume="auto")
    assert "could not be evaluated" not in capsys.readouterr().err and (last / "finished").is_file()
    assert '"--backend", "ms"' in _log(tmp_path, 5, "tasks") and '"--backend", "pt"' in _log(tmp_path, 4, "tasks")
    loop.train(Stepper, config, tmp_path, resume=str(tmp_path / "step-00000002"))
    assert "could not be evaluated" not in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(tmp_path) if "tasks/arc/acc" in row] == [2, 4, 5]
    assert '"--backend", "pt"' in _log(tmp_path, 5, "samples")


class Killed(BaseException):
    """In place of a kill: nothing of the run goes on behind it."""


def killed_at(monkeypatch: pytest.MonkeyPatch, where: str, step: int) -> None:
    """End a run before, in or after the evaluation of one checkpoint."""
    owner, name = {
        "before": (CheckpointScores, "judge"),
        "in": (CheckpointScores, "_scores"),
        "between": (CheckpointScores, "_texts"),
        "after": (CheckpointScores, "judged"),
    }[where]
    real = getattr(owner, name)

    def instead(self, now, *more):
        if now == step:
            raise Killed
        return real(self, now, *more)

    monkeypatch.setattr(owner, name, instead)


@pytest.mark.parametrize("where", ["before", "in", "between", "after"])
@pytest.mark.parametrize("backend", ["same", "other"])
@pytest.mark.parametrize("spelling", ["auto", "relative"])
def test_a_kill_neither_loses_nor_doubles_an_evaluation(tmp_path, monkeypatch, where, backend, spelling):
    stand_in(monkeypatch, STAND_IN.replace("FAILS", "-1"))
    loop.train(Stepper, config_of(), tmp_path / "whole")
    for step in (4, 5):
        out = tmp_path / f"killed-{step}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, where, step)
            loop.train(Stepper, config_of(), out)
        assert not (out / "evaluations" / f"step-{step:08d}" / "finished").exists()
        monkeypatch.chdir(tmp_path)
        resume = "auto" if spelling == "auto" else out.name
        loop.train(OtherStepper if backend == "other" else Stepper, config_of(), out, resume=resume)
        assert figures_of(out) == figures_of(tmp_path / "whole")
        for key in ('"tasks/arc/acc"', '"tasks/arc/stderr"'):  # no line of the file says it twice
            assert (out / "metrics.jsonl").read_text().count(key) == 3


def figures_of(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(run)]


@pytest.mark.parametrize("step", [3, 4])
def test_a_signal_before_the_evaluation_leaves_it_to_the_resumed_run(tmp_path, monkeypatch, step):
    """The checkpoint of step 4 was due, that of step 3 only the signal's: a run without interruption has none."""
    stand_in(monkeypatch, STAND_IN.replace("FAILS", "-1"))
    real = records.Records.step

    def recorded(kept, row):
        if row["step"] == step:
            os.kill(os.getpid(), 15)
        real(kept, row)

    with monkeypatch.context() as patch:
        patch.setattr(records.Records, "step", recorded)
        assert loop.train(Stepper, config_of(), tmp_path).interrupted_by == 15
    assert not (tmp_path / "evaluations" / f"step-{step:08d}").exists()
    loop.train(Stepper, config_of(), tmp_path, resume="auto")
    assert [row["step"] for row in read_metrics(tmp_path) if "tasks/arc/acc" in row] == [2, 4, 5]


def test_a_failed_evaluation_is_tried_again_by_the_run_that_goes_on_from_it(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, STAND_IN.replace("FAILS", "5"))
    loop.train(Stepper, config_of(), tmp_path)
    assert "tasks/arc/acc" not in read_metrics(tmp_path)[4]
    stand_in(monkeypatch, STAND_IN.replace("FAILS", "-1"))
    loop.train(Stepper, config_of(), tmp_path, resume="auto")
    assert read_metrics(tmp_path)[4]["tasks/arc/acc"] == 0.05
    assert "step 4: " not in capsys.readouterr().err.replace("after step 4: ", "")


@pytest.mark.parametrize("world", [1, 2])
def test_a_disk_that_is_full_of_scores_ends_all_ranks_and_loses_none(tmp_path, monkeypatch, world):
    stand_in(monkeypatch, STAND_IN.replace("FAILS", "-1"))
    real = MetricsLog.append

    def append(log, row):
        if row["step"] == 4 and "tasks/arc/acc" in row:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(log, row)

    parallel = config_of().to_dict() | ({"parallel": {"dp": 2}} if world == 2 else {})
    config = run_config_from_dict(parallel)

    def train(out: Path, resume: str | None = None) -> list:
        cluster = Cluster(world, timeout_s=20)
        return cluster.run(lambda rank: loop.train(lambda c: Stepper(c, None, cluster, rank), config, out, resume))

    train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", append)
        ends = train(tmp_path / "full")
    for end in ends:
        assert isinstance(end, UserError) and "the disk is full (No space left on device) after step 4" in str(end)
        assert "go on with --resume auto" in str(end) and f"intact: {tmp_path / 'full' / 'step-00000004'}" in str(end)
    train(tmp_path / "full", "auto")
    assert figures_of(tmp_path / "full") == figures_of(tmp_path / "whole")


def test_a_run_in_another_folder_says_what_was_left_unfinished(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, STAND_IN.replace("FAILS", "-1"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, "before", 4)
        loop.train(Stepper, config_of(), tmp_path / "first")
    loop.train(OtherStepper, config_of(), tmp_path / "second", resume=str(tmp_path / "first"))
    said = capsys.readouterr().err
    assert f"note: the tasks or samples of {tmp_path / 'first' / 'step-00000004'} were not evaluated to the end" in said
    loop.train(Stepper, config_of(), tmp_path / "third", resume=str(tmp_path / "first" / "step-00000002"))
    assert "were not evaluated" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trainer", "due"),
    [
        ({"step": 4}, True),
        ({"step": 5}, False),
        ({"step": 9}, True),
        ({"step": 5, "held_out": {"value": 1.0, "step": 5, "since": 0}}, True),
        ({"step": 5, "held_out": {"value": None, "step": 0, "since": 3}}, True),  # patience has ended it
        ({"step": 5, "held_out": {"value": 1.0, "step": 3, "since": 2}}, False),
    ],
)
def test_which_checkpoints_are_evaluated(trainer, due):
    config = {"checkpoint": {"every": 4}, "train": {"steps": 9}}
    section = {"tasks": ["arc"], "keep_best": True, "patience": 3}
    assert was_due({**trainer, "config": {**config, "eval": section}}) is due
    for without in (None, {**section, "tasks": []}):
        assert not was_due({**trainer, "config": {**config, "eval": without}})


def test_all_ranks_wait_for_rank_0(tmp_path, monkeypatch):
    stand_in(monkeypatch, STAND_IN.replace("FAILS", "-1"))
    cluster = Cluster(2)
    parallel = config_of(tasks=["arc"], samples=[]).to_dict() | {"parallel": {"dp": 2}}
    config = run_config_from_dict(parallel)

    def on_rank(rank: int):
        return loop.train(lambda config: Stepper(config, cluster=cluster, rank=rank), config, tmp_path)

    results = cluster.run(on_rank)
    assert [result.step for result in results] == [5, 5]
    assert [row["step"] for row in read_metrics(tmp_path) if "tasks/arc/acc" in row] == [2, 4, 5]


@pytest.mark.parametrize(("best", "step"), [(None, 2), (1, 1)])
def test_a_signal_ends_the_evaluation_and_the_run(tmp_path, monkeypatch, capsys, best, step):
    """The stand-in interrupts its parent and would then take a minute; the resumed run scores that checkpoint, which
    was due, or is that of the ``best`` evaluation of held-out text."""
    monkeypatch.setattr(loop.HeldOut, "evaluate", lambda held_out, row, stepper, note: row["step"] == best)
    stand_in(monkeypatch, "import os, time; os.kill(os.getppid(), 15); time.sleep(60)")
    started = time.monotonic()
    result = loop.train(Stepper, config_of(), tmp_path)
    assert (result.step, result.interrupted_by) == (step, 15) and time.monotonic() - started < 30
    assert "could not be evaluated" not in capsys.readouterr().err
    stand_in(monkeypatch, STAND_IN.replace("FAILS", "-1"))
    loop.train(Stepper, config_of(), tmp_path, resume="auto")
    assert [row["step"] for row in read_metrics(tmp_path) if "tasks/arc/acc" in row] == sorted({step, 2, 4, 5})


def test_an_evaluation_ends_with_a_killed_run(tmp_path: Path) -> None:
    """A stand-in for the rank starts `tele` as a run does, here one that would take a minute, and is killed."""
    code = "import subprocess, time; from telechat_twins.core.train.heldout.scores import tele; words = tele(['x'])\n"
    code += "words[2] = words[2].replace('from telechat_twins.core.cli import main', "
    code += "'import time; print(1, flush=True); main = lambda: time.sleep(60)')\n"
    code += "print(subprocess.Popen(words).pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as rank:
        assert rank.stdout is not None
        child = psutil.Process(int(rank.stdout.readline()))
        assert rank.stdout.readline() == "1\n"  # it runs, and is bound
        rank.kill()
        child.wait(30)


def test_folders_of_tasks_count_from_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    file = tmp_path / "runs" / "run.yaml"
    file.parent.mkdir()
    section = "eval: {tasks: [arc], task_data: ../sets, task_include: [mine, ~/more, /all]}\n"
    train = "train: {steps: 2, global_batch: 2, micro_batch: 1}\noptim: {lr: 1e-3}\n"
    data = "model: {preset: telechat2-tiny}\ndata: {sources: [{path: packed}], seq_len: 16}\n"
    file.write_text(data + train + section)
    found = load_run_config(file).eval
    assert found.task_data == str(tmp_path / "sets")
    assert found.task_include == [str(tmp_path / "runs" / "mine"), str(Path.home() / "more"), "/all"]
    file.write_text(file.read_text().replace("../sets", "hdfs://sets"))
    with pytest.raises(UserError, match="eval.task_data: hdfs://sets is an address"):
        load_run_config(file)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": ["arc"], "task_data": "nowhere"}, "eval.task_data: nowhere: no such folder"),
        ({"tasks": ["arc"], "every": 5}, "eval.every, keep_best, patience: need held-out text"),
        ({"samples": ["a"], "task_data": "x"}, "belong to eval.tasks"),
        ({}, "eval.sources: must be 1 to 16 folders"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_training(tmp_path, monkeypatch, given, message):
    def build(config):
        raise AssertionError("the model is built before the refusal")

    stand_in(monkeypatch, STAND_IN)
    with pytest.raises(UserError) as caught:
        loop.train(build, run_config(eval=given), tmp_path)
    assert message in str(caught.value)


def test_a_missing_harness_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(scores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="eval.tasks: lm-evaluation-harness is not installed; run: pip install"):
        loop.train(Stepper, run_config_from_dict(run_config(eval={"tasks": ["arc"]}).to_dict()), tmp_path)
