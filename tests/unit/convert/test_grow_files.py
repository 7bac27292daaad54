"""Growing checkpoints on disk: any pieces in, optimizer state along, complete or not at all; the command's mistakes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import telechat_twins.convert.growth.weights
from telechat_twins.convert.growth.files import grow_checkpoint, plan_checkpoint
from telechat_twins.convert.growth.gradients import old_entries
from telechat_twins.convert.growth.plan import GrowthPlan, Options
from telechat_twins.core.checkpoint.read import Checkpoint, TensorPiece, open_checkpoint, whole, write_checkpoint
from telechat_twins.core.cli import main
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import show_bytes
from telechat_twins.core.files.prefetch import ahead
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.model.growth import read_history
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.model.params import count_parameters, parameter_table
from tests.support.growing import FAMILIES, TINY, strong
from tests.support.numpy_stepper import run_config

TARGET = replace(TINY, hidden_size=40, ffn_hidden_size=57, num_heads=8, num_layers=3, vocab_size=60)


def state(config: ModelConfig) -> dict[str, np.ndarray]:
    other = init_weights(config, 11, "strong")
    return {f"{k}.{name}": array * (i + 1) for i, k in enumerate("mv") for name, array in other.items()}


def write(
    folder: Path, config: ModelConfig, *, optimizer: bool = True, dtype: type = np.float32, cut: bool = False
) -> Path:
    """A checkpoint of step 30 after 28 updates; ``cut``: every matrix in four uneven pieces, as ranks leave them."""

    def pieces(tensors: dict[str, np.ndarray]) -> Iterator[TensorPiece | tuple[str, np.ndarray]]:
        for name, array in tensors.items():
            if not cut or array.ndim == 1:
                yield name, array
                continue
            rows, columns = array.shape[0] // 3, array.shape[1] // 2
            for r, c in itertools.product(
                (slice(0, rows), slice(rows, None)), (slice(0, columns), slice(columns, None))
            ):
                yield TensorPiece(name, array[r, c], (r.start, c.start), array.shape)

    run = run_config().to_dict() | {"model": config.to_dict()}
    trainer = {"step": 30, "optimizer_steps": 28, "samples": 120, "tokens": 7, "config": run, "layout": "tp2"}
    weights = {name: array.astype(dtype) for name, array in strong(config).items()}
    return write_checkpoint(
        folder, 30, model={"config": config.to_dict()}, weights=pieces(weights),
        optimizer=pieces(state(config)) if optimizer else (), trainer=trainer,
    )  # fmt: skip


def grow(source: Path, target: Path, config: ModelConfig = TARGET, **options: object) -> tuple[GrowthPlan, Checkpoint]:
    checkpoint = open_checkpoint(source)
    plan = plan_checkpoint(checkpoint, config, Options(scheme="strong", seed=5, **options))
    grow_checkpoint(checkpoint, target, plan)
    return plan, open_checkpoint(target)


def test_pieces_and_bands_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tensors from whole and from cut ones, in one band and in bands of three rows."""
    _, whole = grow(write(tmp_path / "a", TINY), tmp_path / "grown-a")
    monkeypatch.setattr(telechat_twins.convert.growth.weights, "BAND_BYTES", 3 * 4 * 40)
    _, banded = grow(write(tmp_path / "b", TINY, cut=True), tmp_path / "grown-b")
    entries = banded._entries["weights"]["layers.0.attn.q.weight"].pieces
    assert len(entries) == 16  # 48 rows
    for kind in ("weights", "optimizer"):
        assert whole.names(kind) == banded.names(kind)
        for name in whole.names(kind):
            assert np.array_equal(whole.read(kind, name), banded.read(kind, name)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_optimizer_state_of_old_entries_is_kept_and_new_is_zero(family: str, tmp_path: Path) -> None:
    source = FAMILIES[family]
    sizes = {"hidden_size": 40, "num_layers": 3, "num_heads": 8, "num_kv_heads": min(source.num_kv_heads * 2, 8)}
    plan, grown = grow(write(tmp_path / "a", source), tmp_path / "b", replace(source, **sizes))
    before = state(source)
    for name, spec in parameter_table(plan.config).items():
        for k in "mv":
            expected = np.zeros(spec.shape, np.float32)
            old = old_entries(plan, name)
            if old is not None:
                expected[old[1]] = before[f"{k}.{old[0]}"][old[2]]
            assert np.array_equal(grown.read("optimizer", f"{k}.{name}"), expected), name
    assert grown.trainer is not None
    assert (grown.trainer["step"], grown.trainer["optimizer_steps"], grown.step) == (30, 28, 30)
    assert load_model_config(grown.trainer["config"]["model"]) == plan.config


def test_state_of_scaled_and_copied_tensors_is_rescaled(tmp_path: Path) -> None:
    """W multiplied by k has gradients divided by k; two copies of a kv head have half of its each."""
    source = replace(TINY, logit_mult=0.5)
    target = replace(source, num_kv_heads=4, logit_mult=0.125)
    plan, grown = grow(write(tmp_path / "a", source), tmp_path / "b", target, multipliers="fold")
    before, weights = state(source), strong(source)
    assert np.array_equal(grown.read("weights", "head.weight"), weights["head.weight"] * 4)
    assert np.array_equal(grown.read("optimizer", "m.head.weight"), before["m.head.weight"] / 4)
    assert np.array_equal(grown.read("optimizer", "v.head.weight"), before["v.head.weight"] / 16)
    old = before["m.layers.1.attn.v.weight"].reshape(2, 6, 24)
    copied = grown.read("optimizer", "m.layers.1.attn.v.weight").reshape(4, 6, 24)
    assert np.array_equal(copied, old[[0, 0, 1, 1]] / 2)
    old = before["v.layers.1.attn.k.weight"].reshape(2, 6, 24)
    copied = grown.read("optimizer", "v.layers.1.attn.k.weight").reshape(4, 6, 24)
    assert np.array_equal(copied, old[[0, 0, 1, 1]] / 4)
    assert plan.config.growth is None  # nothing is new


def test_growing_twice_keeps_the_history(tmp_path: Path) -> None:
    first, middle = grow(write(tmp_path / "a", TINY), tmp_path / "b", method="zero")
    larger = replace(first.config, hidden_size=50, norm_divisor=None, vocab_tokens=None)
    second, large = grow(middle.path, tmp_path / "c", larger, method="zero")
    history = read_history(large.model, "model.json")
    assert [g.after.hidden_size for g in history] == [40, 50]
    assert second.config.norm_divisor == 24.0  # channels that were zero at both growths are not counted
    assert second.config.vocab_tokens == 53
    with pytest.raises(UserError, match=r"model.json: grown\[1\].method: 'net2net' is not one of"):
        read_history({"grown": [history[0].to_dict(), {**history[1].to_dict(), "method": "net2net"}]}, "model.json")


def test_weights_alone_grow_too_and_keep_their_dtype(tmp_path: Path) -> None:
    source = write(tmp_path / "a", TINY, optimizer=False, dtype=ml_dtypes.bfloat16)
    _, grown = grow(source, tmp_path / "b", fresh_layers=True)
    assert {grown.dtype("weights", name).name for name in grown.names("weights")} == {"bfloat16"}
    assert grown.names("optimizer") == []


def test_the_model_file_names_the_grown_model(tmp_path: Path) -> None:
    plan, grown = grow(write(tmp_path / "a", TINY), tmp_path / "b")
    (path,) = (asset for asset in grown.assets if asset.name == "model.yaml")
    assert load_model_config(str(path)) == replace(plan.config, growth=None)


def test_an_interrupted_growth_leaves_the_source_and_no_target(tmp_path: Path) -> None:
    """Killed in the middle of writing: nothing readable under the target's name, and a later growth succeeds."""
    source, target = write(tmp_path / "a", TINY), tmp_path / "b"
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    script = (
        "import sys, time, telechat_twins.convert.growth.files as files\n"
        "real = files.grow_weights\n"
        "def slow(*rest):\n"
        "    for piece in real(*rest):\n"
        "        yield piece\n"
        "        print(piece.name, flush=True)\n"
        "        time.sleep(0.2)\n"
        "files.grow_weights = slow\n"
        "from telechat_twins.core.cli import main\n"
        f"sys.exit(main(['grow', {str(source)!r}, {str(target)!r}, '--set', 'hidden_size=40']))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("layers.0.attn.k"):
                break
        os.kill(process.pid, signal.SIGKILL)
    assert not target.exists()
    with pytest.raises(UserError, match="no such folder"):
        open_checkpoint(target)
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    assert main(["grow", str(source), str(target), "--set", "hidden_size=40"]) == 0
    assert open_checkpoint(target).step == 30
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_the_command_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a", TINY)
    arguments = ["grow", str(source), str(tmp_path / "b"), "--set", "hidden_size=40", "num_layers=4", "logit_mult=0.3"]
    assert main([*arguments, "--plan"]) == 0
    planned = capsys.readouterr().out
    for text in (
        "hidden_size         24      40  x 1.667",
        "blocks          0 0+ 1 1+  (+ copy, * fresh)",
        "method          masked, c from 0 to 1 in 1000 steps",
        "note: logit_mult stays 0.7; the target says 0.3 (--multipliers fold takes that)",
    ):
        assert text in planned
    assert "writes " in planned
    assert not (tmp_path / "b").exists()
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert told.startswith(planned.partition("writes ")[0])
    assert f"train it with --set model={tmp_path / 'b'}/assets/model.yaml --resume {tmp_path / 'b'}" in told
    assert main(["grow", "teleflm-tiny", "nowhere", "--set", "num_layers=8", "--plan"]) == 0
    preset = load_model_config("teleflm-tiny")
    before, after = (12 * count_parameters(model) for model in (preset, replace(preset, num_layers=8)))
    assert f"writes {show_bytes(after)} from {show_bytes(before)}, in about 0:00:0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "hidden_size=16"], "target.hidden_size: 16 is smaller than the 24 of the model; growth only adds"),
        (["--set", "num_kv_heads=1"], "target.num_kv_heads: 1 is smaller than the 2 of the model"),
        (["--set", "num_heads=5"], "num_kv_heads: 2 does not divide num_heads 5"),
        (["--set", "family=flm"], "target.family: the model has 'telechat2', the target 'flm'; growth stays within a"),
        (["--target", "teleflm-tiny"], "target.family"),
        (["--set", "head_dim=12"], "target.head_dim: 12"),
        (["--set", "hidden=40"], "target: unknown key 'hidden'; did you mean 'hidden_size'?"),
        (["--target", "telechat2-tinny"], "no model preset 'telechat2-tinny'; did you mean 'telechat2-tiny'?"),
        (["--target", "nothing.yaml"], "nothing.yaml: no such file"),
        ([], "--target: the sizes to grow to are required"),
        (
            ["--set", "hidden_size=40", "--depth", "0,x"],
            "blocks such as 0,0,1,2, found '0,x'",
        ),
        (["--set", "hidden_size=40", "--anneal-steps", "0"], "--anneal-steps: must be at least 1, found 0"),
        (["--set", "hidden_size=40", "--seed", "-1"], "--seed: must be at least 0, found -1"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a", TINY)
    assert main(["grow", str(source), str(tmp_path / "b"), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "b").exists()


def test_places_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a", TINY)
    for arguments, says in (
        ([str(source), str(source)], "DST must not contain SRC or lie inside it"),
        ([str(source), str(source / "inside")], "DST must not contain SRC or lie inside it"),
        ([str(source), str(tmp_path)], "DST must not contain SRC or lie inside it"),
        ([str(tmp_path / "none"), str(tmp_path / "b")], "no such folder"),
        ([str(tmp_path / "none"), str(tmp_path / "b"), "--plan"], "no such folder; give a checkpoint, a run, a preset"),
    ):
        assert main(["grow", *arguments, "--set", "hidden_size=40"]) == 2
        assert says in capsys.readouterr().err
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    assert main(["grow", str(source), str(full), "--set", "hidden_size=40"]) == 2
    assert "DST must be new or empty, found files" in capsys.readouterr().err
    released = tmp_path / "released"
    released.mkdir()
    (released / "config.json").write_text(json.dumps({}))
    assert main(["grow", str(released), str(tmp_path / "b"), "--set", "hidden_size=40"]) == 2
    assert "must be a canonical checkpoint, found a released folder" in capsys.readouterr().err
    adapter = {"config": TINY.to_dict(), "adapter": {"rank": 4}}
    write_checkpoint(tmp_path / "adapter", 1, model=adapter, weights=[whole("lora", np.zeros(2, np.float32))])
    assert main(["grow", str(tmp_path / "adapter"), str(tmp_path / "b"), "--set", "hidden_size=40"]) == 2
    assert "adapter: is an adapter, not a model; grow its base" in capsys.readouterr().err


def test_a_damaged_source_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a", TINY)
    file = next(source.glob("weights-*"))
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    assert main(["grow", str(source), str(tmp_path / "b"), "--set", "hidden_size=40"]) == 2
    assert "altered: SHA-256 should be" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_working_ahead() -> None:
    assert list(ahead(iter(range(100)))) == list(range(100))

    def fails() -> Iterator[int]:
        yield 1
        raise UserError("no more")

    items = ahead(fails())
    assert next(items) == 1
    with pytest.raises(UserError, match="no more"):
        next(items)
    made = []

    def endless() -> Iterator[int]:
        for i in itertools.count():
            made.append(i)
            yield i

    few = ahead(endless())
    assert [next(few) for _ in range(3)] == [0, 1, 2]
    few.close()  # type: ignore[attr-defined]
    count = len(made)
    time.sleep(0.05)
    assert len(made) == count  # its thread has ended
