"""Whole training runs over several processes, as a user starts them: other layouts, the other backend, killed ranks.

A run of one process is the judge. Rounding differs between layouts, and updates let it grow: the bound on a trace is
that of two backends (core.parity.bounds.TRACE_LIMIT, 1e-4 relative, of which 40 steps use 2e-5). At the same layout a
resumed run must give the same bits. The runs that nothing disturbs share their ranks (tests.support.warm_ranks).
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from telechat_twins.convert.copy import to_hf
from telechat_twins.convert.source import open_model
from telechat_twins.core.checkpoint.read import open_checkpoint, write_checkpoint
from telechat_twins.core.checkpoint.retention import saved_step
from telechat_twins.core.cli import main
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.parity.bounds import TRACE_LIMIT, compare_tensors, compare_traces
from telechat_twins.core.train.metrics import MEASURED, read_metrics
from telechat_twins.core.train.watch.environment import read_environment
from tests.multiproc.test_nodes import free_ports
from tests.support.data_support import VOCAB_SIZE, tiny_tokenizer
from tests.support.launching import one_rank_here
from tests.support.packed import write_packed
from tests.support.warm_ranks import Pool

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN, HALF, LONGER, ALL = 32, 12, 18, 24  # steps: of the checkpoint, of the change of length, in all
OTHER = {"ms": "pt", "pt": "ms"}
TRIALS = [pytest.param(backend, 0, id=f"{backend}-0") for backend in ("ms", "pt")] + [
    pytest.param(backend, trial, id=f"{backend}-{trial}", marks=pytest.mark.full)
    for backend in ("ms", "pt")
    for trial in range(1, 10)
]


class Tele:
    """`tele train` in a folder of its own; all runs share one config and begin with the weights of a release, which
    gives the model as well: ranks of every layout read their own boxes of it. Rows become longer on the way."""

    def __init__(self, folder: Path, pool: Pool) -> None:
        self.folder, self.pool = folder, pool
        for name, sequences in (("packed", 400), ("held", 13)):
            write_packed(folder / name, VOCAB_SIZE, SEQ_LEN, sequences, sequences, tiny_tokenizer())
        model = load_model_config({"preset": "telechat2-tiny", "num_layers": 2, "vocab_size": VOCAB_SIZE})
        weights = init_weights(model, 1234).items()
        write_checkpoint(folder / "canonical", 0, model={"config": model.to_dict()}, weights=weights)
        to_hf(open_model(folder / "canonical"), folder / "released")
        (folder / "run.yaml").write_text(
            f"data: {{sources: [{{path: packed}}], seq_len: {SEQ_LEN}}}\n"
            f"train: {{init: released, global_batch: 8, micro_batch: 4, stages: [{{steps: {LONGER}}}, "
            f"{{steps: {ALL - LONGER}, seq_len: {SEQ_LEN + 16}, micro_batch: 2}}]}}\n"
            "optim: {lr: 1e-3, warmup_steps: 2}\n"
            "eval: {sources: [{path: held}], every: 9}\n"
            f"checkpoint: {{every: {HALF}, keep_last: 9}}\n"
        )

    def command(self, backend: str, layout: str, name: str, *more: str) -> list[str]:
        train = [sys.executable, "-m", "telechat_twins.core.cli", "train", "--backend", backend, "--layout", layout]
        return [*train, "--config", str(self.folder / "run.yaml"), "--out", str(self.folder / name), *more]

    def train(self, backend: str, layout: str, name: str, *more: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            one_rank_here(patch, pool=self.pool)
            patch.chdir(ROOT)
            assert main(self.command(backend, layout, name, *more)[3:]) == 0
        return self.folder / name


@pytest.fixture(scope="module")
def tele(tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> Tele:
    return Tele(tmp_path_factory.mktemp("parallel"), pool)


@pytest.fixture(scope="module")
def single(tele: Tele) -> Path:
    return tele.train("pt", "single", "single")


@pytest.fixture(scope="module", params=["ms", "pt"])
def first_half(request: pytest.FixtureRequest, tele: Tele) -> tuple[str, Path]:
    """All steps at tp2.pp2 in one backend, with a checkpoint in the middle, written in the background."""
    backend = request.param
    return backend, tele.train(backend, "tp2.pp2", f"first-{backend}", "--set", "checkpoint.asynchronous=true")


def broken(part: Path, whole: Path, first: int = 0) -> list[str]:
    report = compare_traces(read_metrics(part), read_metrics(whole)[first:])
    assert len(report.steps) == ALL - first
    return [f"{bound.what}: {bound.value:.1e}" for bound in report.bounds if not bound.holds]


def without_clock(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def test_a_layout_trains_like_one_process(first_half: tuple[str, Path], single: Path) -> None:
    assert broken(first_half[1], single) == []


def test_held_out_losses_are_those_of_one_process(first_half: tuple[str, Path], single: Path) -> None:
    """13 rows in batches of 8, over ranks; the run's own limit, since the weights differ by that."""
    found, judge = ([row for row in read_metrics(run) if "eval/held/loss" in row] for run in (first_half[1], single))
    assert [row["step"] for row in found] == [row["step"] for row in judge] == [9, 18, ALL]
    for row, one in zip(found, judge, strict=True):
        for key in ("loss", "perplexity", "bits_per_byte"):
            assert row[f"eval/held/{key}"] == pytest.approx(one[f"eval/held/{key}"], rel=10 * TRACE_LIMIT)
    assert judge[-1]["eval/held/loss"] < judge[0]["eval/held/loss"]


def test_resume_in_the_other_backend_at_another_layout(first_half: tuple[str, Path], single: Path, tele: Tele) -> None:
    """tp2.pp2 for half of the steps, then dp2.cp2 in the other framework, optimizer included."""
    backend, run = first_half
    saved = str(run / f"step-{HALF:08d}")
    resumed = tele.train(OTHER[backend], "dp2.cp2", f"other-{backend}", "--resume", saved)
    assert broken(resumed, single, HALF) == []
    ends = [open_checkpoint(folder) for folder in (resumed, single)]
    a, b = ({name: end.read("weights", name) for name in end.names("weights")} for end in ends)
    # Weights near zero (biases after a few updates) are all update, and Adam's first updates are signs of gradients.
    assert compare_tensors(a, b).worst() <= 10 * TRACE_LIMIT


def test_resume_at_the_same_layout_gives_the_same_bits(first_half: tuple[str, Path], tele: Tele) -> None:
    backend, run = first_half
    saved = str(run / f"step-{HALF:08d}")
    resumed = tele.train(backend, "tp2.pp2", f"same-{backend}", "--resume", saved)
    assert without_clock(read_metrics(resumed)) == without_clock(read_metrics(run)[HALF:])
    a, b = open_checkpoint(run), open_checkpoint(resumed)
    for kind in ("weights", "optimizer"):
        assert a.names(kind) == b.names(kind)
        for name in a.names(kind):
            assert a.read(kind, name).tobytes() == b.read(kind, name).tobytes(), name


@pytest.mark.parametrize(("backend", "trial"), TRIALS)
def test_a_killed_worker_ends_the_job_and_nothing_is_lost(backend: str, trial: int, tele: Tele) -> None:
    """kill -9 of a random rank at a random moment; resume continues from the last whole checkpoint."""
    chance = random.Random(f"{backend}{trial}")
    name, layout = f"killed-{backend}-{trial}", chance.choice(["tp2", "dp2", "pp2", "cp2"])
    more = (
        "--set",
        "train.stages=null",
        "train.steps=12",
        "checkpoint.every=2",
        f"checkpoint.asynchronous={chance.choice(['true', 'false'])}",
    )
    out = tele.folder / name
    rows, delay, victim = chance.randint(1, 9), chance.uniform(0, 0.5), chance.randint(0, 1)
    job = subprocess.Popen(
        tele.command(backend, layout, name, *more), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not (out / "metrics.jsonl").exists() or len(read_metrics(out)) < rows):
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    time.sleep(delay)
    below = psutil.Process(job.pid).children(recursive=True)
    status = json.loads((out / "logs" / f"status_{victim}.json").read_text())
    alive = psutil.pid_exists(status["pid"]) and status["state"] == "running"
    if alive:
        os.kill(status["pid"], signal.SIGKILL)
    started = time.monotonic()
    _, error = job.communicate(timeout=90)
    if alive:
        assert job.returncode == 1, error
        assert re.search(rf"rank {victim} was killed or crashed", error), error
        assert time.monotonic() - started < 60
    assert [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    if (out / "latest").exists():
        open_checkpoint(out)  # verifies every file
    resumed = tele.train(backend, layout, name, "--resume", "auto", *more)
    rows_now = read_metrics(resumed)
    assert [row["step"] for row in rows_now] == list(range(1, 13))


@pytest.mark.parametrize("backend", ["ms", "pt"])
def test_a_rank_killed_on_one_of_two_nodes_is_restarted_to_the_same_bits(backend: str, tele: Tele) -> None:
    """``--restarts 2`` on two nodes of one machine, by the launch lines of deploy/ssh: weights, moments and rows of a
    run that was left alone."""
    short = ("--set", "train.stages=null", "train.steps=8", "checkpoint.every=2", "eval=null")
    out = tele.folder / f"restarted-{backend}"
    programs = tele.folder / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "ssh").write_text('#!/usr/bin/env bash\nexec bash -c "${*: -1}"\n')
    (programs / "ssh").chmod(0o755)
    program, *words = tele.command(backend, "dp2", out.name, "--restarts", "2", *short)
    env = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "HOSTS": "127.0.0.1 127.0.0.1",
        "PORT": str(free_ports()),
        "TELE": f"{program} -m telechat_twins.core.cli",
    }
    script = [str(ROOT / "deploy" / "ssh" / "train.sh"), *words[words.index("train") + 1 :]]
    job = subprocess.Popen(script, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    victim = out / "logs-node1" / "status_1.json"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and saved_step(out) < 2:
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    os.kill(json.loads(victim.read_text())["pid"], signal.SIGKILL)
    said = job.communicate(timeout=200)[0]
    assert job.returncode == 0, said
    found = re.findall(r"tele: restart 1 of 2 in 2 s, from the checkpoint of step [246] \(the launch", said)
    assert len(found) == 2, said
    assert (out / "logs" / "attempt-0" / "worker_0.log").exists()
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[0].get("restarts") is None and rows[-1]["restarts"] == 1
    assert [start["restarts"] for start in read_environment(out)] == [0, 1]
    alone = tele.train(backend, "dp2", f"alone-{backend}", *short)
    assert without_clock(rows) == without_clock(read_metrics(alone))
    a, b = open_checkpoint(out), open_checkpoint(alone)
    for kind in ("weights", "optimizer"):
        for name in a.names(kind):
            assert a.read(kind, name).tobytes() == b.read(kind, name).tobytes(), name
