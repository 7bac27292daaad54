"""Commands that make or replace a folder, killed while they do, and a process that saves checkpoints without pause.

`python -m tests.campaigns.killed_commands ROOT COUNT` is that process: it goes on from ROOT's latest checkpoint, says
each step once it is saved, and ends after COUNT saves.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from telechat_twins.core.checkpoint.read import Contents, open_checkpoint, save_checkpoint
from telechat_twins.core.data.packed import PackedDataset, verify
from telechat_twins.core.errors import UserError
from tests.campaigns.killed_runs import latest, unreadable
from tests.campaigns.killing import ROOT, Trial, finish, kill, leftovers, orphans, shows, start, wait_until
from tests.support.data_support import SENTENCES, tiny_tokenizer_path

KEEP = 2


def data_trials(count: int, chance: random.Random, folder: Path) -> Iterator[Trial]:
    """`tele data --force` over a data set: the old one or the new one is there."""
    folder.mkdir(parents=True)
    shutil.copy(tiny_tokenizer_path(), folder / "tokenizer.model")
    texts = []
    for number in range(2):
        texts.append(folder / f"{number}.txt")
        texts[-1].write_text("".join(f"{number} {sentence}" for sentence in SENTENCES * (400 + 400 * number)))
    out = folder / "out" / "set"

    def words(number: int) -> list[str]:
        more = ["--out", str(out), "--tokenizer", str(folder / "tokenizer.model"), "--force", "--threads", "1"]
        return ["data", str(texts[number]), *more]

    def state() -> Any:
        verify(out)
        return PackedDataset(out).digest()

    yield from _replacements("data", count, chance, out, words, state)


def convert_trials(count: int, chance: random.Random, folder: Path) -> Iterator[Trial]:
    """`tele convert --force` over a released folder: the old model or the new one is there, every file of it."""
    folder.mkdir(parents=True)
    golden = ROOT / "tests" / "goldens" / "telechat2_gqa"
    released = folder / "released"
    released.mkdir()
    shutil.copy(golden / "config.json", released)
    shutil.copy(golden / "weights.safetensors", released / "model.safetensors")
    if finish(["convert", "--from", "hf", "--to", "canonical", str(released), str(folder / "c")], folder / "log"):
        raise SystemExit(f"the conversion to start from failed; see {folder / 'log'}")
    out = folder / "out" / "model"

    def words(number: int) -> list[str]:
        way = ["convert", "--from", "canonical", "--to", "hf", str(folder / "c"), str(out), "--force"]
        return [*way, "--dtype", ("float32", "float16")[number], "--max-shard-size", "20KB"]

    def state() -> Any:
        if not out.is_dir():
            raise UserError(f"{out}: is gone")
        return {p.name: p.read_bytes() for p in out.iterdir()}

    yield from _replacements("convert", count, chance, out, words, state)


def _replacements(
    kind: str,
    count: int,
    chance: random.Random,
    out: Path,
    words: Callable[[int], list[str]],
    state: Callable[[], Any],
) -> Iterator[Trial]:
    """Replace one of two results by the other, killed on the way, then again without."""
    log = out.parent.with_suffix(".log")
    whole, seconds = [], 0.0
    for number in range(2):
        began = time.monotonic()
        if finish(words(number), log):
            raise SystemExit(f"tele {kind} failed; see {log}")
        seconds = time.monotonic() - began
        whole.append(state())
    now = 1
    for _ in range(count):
        moment, how = chance.choice(["running", "writing", "writing"]), chance.choice(["-9", "-9", "-15", "Ctrl-C"])
        process = start(words(1 - now), log)
        if moment == "running":
            time.sleep(chance.uniform(0, seconds))
        else:
            wait_until(lambda: shows(out.parent, ".tmp-tele-"), process)
            time.sleep(chance.uniform(0, 0.1))
        known = [psutil.Process(process.pid)] if process.poll() is None else []
        kill(known, how)
        process.wait(120)
        faults = orphans(str(out), known)
        for again in (False, True):
            if again and finish(words(1 - now), log):
                faults.append(f"not finished: tele {kind} failed after the kill; see {log}")
            try:
                found = state()
            except (UserError, OSError) as error:
                faults.append(f"lost: {error}")
                continue
            if found != whole[1 - now] and (again or found != whole[now]):
                faults.append("different: neither what was there nor what was to come")
        faults += leftovers(out.parent)
        now = 1 - now
        yield Trial(kind, moment if known else "ended", "command", how, faults)


def grow_trials(count: int, chance: random.Random, folder: Path) -> Iterator[Trial]:
    """`tele grow`: nothing is there, or the whole checkpoint."""
    from tests.support.growing import TINY
    from tests.unit.convert.test_grow_files import write

    source, out = write(folder / "small", TINY), folder / "out" / "grown"
    words = ["grow", str(source), str(out), "--set", f"num_layers={2 * TINY.num_layers}"]
    log = folder / "log"
    began = time.monotonic()
    if finish(words, log):
        raise SystemExit(f"tele grow failed; see {log}")
    seconds = time.monotonic() - began
    whole = _bytes(out)
    for _ in range(count):
        shutil.rmtree(out)
        moment, how = chance.choice(["running", "writing"]), chance.choice(["-9", "-15", "Ctrl-C"])
        process = start(words, log)
        if moment == "running":
            time.sleep(chance.uniform(0, seconds))
        else:
            wait_until(lambda: shows(out.parent, ".tmp-tele-"), process)
            time.sleep(chance.uniform(0, 0.1))
        known = [psutil.Process(process.pid)] if process.poll() is None else []
        kill(known, how)
        process.wait(120)
        faults = orphans(str(out), known)
        if out.exists():
            faults += [] if _bytes(out) == whole else ["different: a grown checkpoint appeared that is another one"]
            shutil.rmtree(out)
        if finish(words, log):
            faults.append(f"not finished: tele grow failed after the kill; see {log}")
        elif _bytes(out) != whole:
            faults.append("different: grown again, it is another one")
        faults += leftovers(out.parent)
        yield Trial("grow", moment if known else "ended", "command", how, faults)


def _bytes(checkpoint: Path) -> dict[str, bytes]:
    found = open_checkpoint(checkpoint)
    return {path.name: path.read_bytes() for path in found.files if path.suffix == ".safetensors"}


def save_trials(count: int, chance: random.Random, folder: Path) -> Iterator[Trial]:
    """A process that saves, replaces and prunes without pause, killed by -9."""
    out = folder / "saves"
    for _ in range(count):
        words = [sys.executable, "-m", "tests.campaigns.killed_commands", str(out)]
        process = subprocess.Popen([*words, "1000000"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = [process.stdout.readline()]  # the first save: from here on something is always there
        moment = chance.choice(["any", "any", "removing", "saving"])
        if moment != "any":
            time.sleep(chance.uniform(0, 0.1))
            prefix = ".gone-tele-" if moment == "removing" else ".tmp-tele-step-"
            wait_until(lambda prefix=prefix: shows(out, prefix), process, 30)  # type: ignore[misc]
            time.sleep(chance.choice([0.0, chance.uniform(0, 0.004)]))
        else:
            time.sleep(chance.uniform(0, 0.3))
        process.kill()
        said += process.stdout.readlines()
        process.wait()
        saved = max(int(line) for line in said if line.endswith("\n") and line.strip())
        faults = unreadable(out)
        if latest(out) < saved:
            faults.append(f"lost: step {saved} was saved, the latest is {latest(out)}")
        if subprocess.run([*words, "1"], cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
            faults.append("not finished: the next save failed")
        faults += unreadable(out) + leftovers(out)
        steps = sorted(path.name for path in out.glob("step-*"))
        if len(steps) > KEEP:
            faults.append(f"leftover: checkpoints {steps}")
        for path in out.glob("step-*") if not faults else ():
            checkpoint = open_checkpoint(path)
            for name, array in _tensors(checkpoint.step).items():
                if checkpoint.read("weights", name).tobytes() != array.tobytes():
                    faults.append(f"different: {name} of {path.name}")
        yield Trial("save", moment, "process", "-9", faults)


def _tensors(step: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(step)
    return {f"w{number}": draw.standard_normal((64, 64), np.float32) for number in range(6)}


def _save_without_pause(root: Path, count: int) -> None:
    step = latest(root)
    chance = random.Random(f"{step} {time.time_ns()}")
    for _ in range(count):
        if count == 1 or not step or chance.random() < 0.8:
            step += 1  # else the latest is replaced
        save_checkpoint(
            root,
            step,
            Contents(model={}, weights=_tensors(step).items(), max_file_bytes=30_000),
            keep_last=KEEP,
        )
        print(step, flush=True)


if __name__ == "__main__":
    _save_without_pause(Path(sys.argv[1]), int(sys.argv[2]))
