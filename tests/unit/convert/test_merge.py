"""``tele merge`` and ``tele average``, and ``tele convert`` of adapters: arithmetic, form of the output, refusals."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from telechat_twins.convert.copy import cast
from telechat_twins.convert.hf.peft import write_peft
from telechat_twins.convert.rounding import rounded
from telechat_twins.convert.source import open_model
from telechat_twins.core.checkpoint.adapter import open_adapter, write_adapter
from telechat_twins.core.checkpoint.read import open_checkpoint
from telechat_twins.core.commands import average, convert, merge
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.safetensors import SafetensorsFile
from telechat_twins.core.train.resume import require_training_state
from tests.support.adapters import deltas, modules, random_adapter, tensors
from tests.support.frameworks import GOLDENS

BF16 = np.dtype(ml_dtypes.bfloat16)


def tele(command: ModuleType, *words: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def released(place: Path, case: str, change: Callable[[np.ndarray], np.ndarray] = lambda array: array) -> Path:
    """A golden model as a released folder, in bfloat16."""
    place.mkdir()
    shutil.copy(GOLDENS / case / "config.json", place)
    held = load_file(GOLDENS / case / "weights.safetensors")
    save_file({n: change(a).astype(BF16) for n, a in held.items()}, place / "model.safetensors", {"format": "pt"})
    return place


def nearest_bf16(values: np.ndarray) -> np.ndarray:
    """float64 in bfloat16 by comparing both neighbours, ties to the even one: the definition."""
    near = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    low, high = near.view(np.float32), (near + np.uint32(1 << 16)).view(np.float32)  # towards zero, and away from it
    down, up = np.abs(values - low), np.abs(high - values)
    even = (near >> np.uint32(16)) % 2 == 0
    return np.where((down < up) | ((down == up) & even), low, high).astype(np.float32)


def test_bfloat16_is_rounded_once() -> None:
    rng = np.random.default_rng(0)
    middle = rng.integers(0x3F00, 0x4100, 4000).astype(np.uint32) << np.uint32(16)
    values = (middle | np.uint32(0x8000)).view(np.float32).astype(np.float64)  # halfway between two neighbours
    values *= 1 + np.repeat([0.0, 2.0**-40, -(2.0**-40), 2.0**-20], 1000)
    values *= rng.choice([-1.0, 1.0], 4000)
    found = rounded(values, BF16).astype(np.float32)
    np.testing.assert_array_equal(found, nearest_bf16(values))
    np.testing.assert_array_equal(cast(values, "bfloat16", "w").astype(np.float32), found)
    assert (values.astype(BF16).astype(np.float32) != found).sum() > 500  # what the library's own cast would do
    special = rounded(np.array([np.inf, -np.inf, np.nan, 0.0, 1e39, -1e300]), BF16).astype(np.float32)
    np.testing.assert_array_equal(special, [np.inf, -np.inf, np.nan, 0.0, np.inf, -np.inf])


@pytest.mark.parametrize("case", ["telechat2_gqa", "teleflm", "telechat52b_like", "flm101b_like"])
def test_merged_weights_are_the_sum_rounded_once(case: str, tmp_path: Path) -> None:
    base = released(tmp_path / "base", case)
    source = open_model(base)
    adapter = random_adapter(source, modules(source.config, ("q", "v", "down"), 3, 5.0))
    write_adapter(tmp_path / "adapter", adapter)
    assert tele(merge, base, tmp_path / "adapter", tmp_path / "merged", "--sums") == 0
    found, added = open_model(tmp_path / "merged"), deltas(adapter)
    for name in source.names():
        weight = source.tensor(name)
        expected = rounded(weight.astype(np.float64) + added[name], BF16) if name in added else weight
        assert found.tensor(name).tobytes() == expected.tobytes(), name
    # The form of SRC: the same config.json, the same names in the same order, nothing added but the sums.
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert {p.name for p in (tmp_path / "merged").iterdir()} == {p.name for p in base.iterdir()} | {"SHA256SUMS"}
    # A canonical SRC becomes a canonical DST with the same numbers; a PEFT folder serves as well.
    tele(convert, "--from", "hf", "--to", "canonical", base, tmp_path / "c")
    tele(convert, "--from", "canonical", "--to", "peft", tmp_path / "adapter", tmp_path / "peft")
    tele(merge, tmp_path / "c", tmp_path / "peft", tmp_path / "merged-c")
    tele(convert, "--from", "canonical", "--to", "hf", tmp_path / "merged-c", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "merged" / "model.safetensors"
    ).read_bytes()


def test_convert_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = released(tmp_path / "base", "telechat2_gqa")
    source = open_model(base)
    adapter = random_adapter(source, modules(source.config, ("k", "v", "o")))
    write_adapter(tmp_path / "ours", adapter)
    peft, ms, again = tmp_path / "peft", tmp_path / "ms", tmp_path / "again"
    tele(convert, "--from", "canonical", "--to", "peft", tmp_path / "ours", peft, "--base", base)
    assert json.loads((peft / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    tele(convert, "--from", "peft", "--to", "mindformers", peft, ms, "--base", base, "--qkv-concat", "--mp", 2)
    tele(convert, "--from", "mindformers", "--to", "canonical", ms, again, "--base", base)
    found = open_adapter(again)
    assert tensors(found) == tensors(adapter) and found.modules == adapter.modules
    assert found.base.fingerprint == adapter.base.fingerprint and found.base.path == str(base)
    assert "6 linears" not in capsys.readouterr().err
    tele(convert, "--from", "canonical", "--to", "peft", tmp_path / "ours", peft, "--force", "--dtype", "bfloat16")
    assert {info.code for info in SafetensorsFile(peft / "adapter_model.safetensors").tensors.values()} == {"BF16"}
    for words, says in (
        (["--from", "peft", "--to", "canonical", peft, tmp_path / "x"], "--base: peft does not say which model"),
        (["--from", "peft", "--to", "hf", peft, tmp_path / "x", "--base", base], "--to hf: .*`tele merge`"),
        (["--from", "hf", "--to", "canonical", base, tmp_path / "x", "--base", base], "--base: goes with an adapter"),
        (
            ["--from", "canonical", "--to", "mindformers", again, tmp_path / "x", "--alpha", 8],
            "--alpha: a number above",
        ),
        (["--from", "canonical", "--to", "hf", again, tmp_path / "x"], "--to hf: a release is a whole model"),
        (["--from", "peft", "--to", "canonical", peft, tmp_path / "x", "--base", again], "is an adapter, not a model"),
        (["--from", "peft", "--to", "canonical", peft, tmp_path / "x", "--base", peft], "is an adapter of PEFT's"),
        (["--from", "canonical", "--to", "peft", again, tmp_path / "x", "--whole"], "--whole: goes with --to mind"),
    ):
        with pytest.raises(UserError, match=says):
            tele(convert, *words)
    assert not (tmp_path / "x").exists()


def test_an_adapter_of_other_weights_is_refused(tmp_path: Path) -> None:
    base = released(tmp_path / "base", "teleflm")
    source = open_model(base)
    write_adapter(tmp_path / "adapter", random_adapter(source, modules(source.config, ("q",))))
    other = released(tmp_path / "other", "teleflm", lambda array: array * 1.01)
    with pytest.raises(UserError, match=r"was trained on base with fingerprint \w{16}, and .*other has \w{16}"):
        tele(merge, other, tmp_path / "adapter", tmp_path / "x")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "input_mult": 2.0}))
    with pytest.raises(UserError, match=r"belongs to a model with input_mult 1.7, and .*other has 2.0"):
        tele(merge, other, tmp_path / "adapter", tmp_path / "x")
    with pytest.raises(UserError, match="DST must not be, contain or lie in SRC"):
        tele(merge, base, tmp_path / "adapter", tmp_path / "adapter" / "x")
    with pytest.raises(UserError, match="is a released model, not an adapter"):
        tele(merge, base, other, tmp_path / "x")
    with pytest.raises(UserError, match="holds a whole model, not an adapter"):
        tele(convert, "--from", "hf", "--to", "canonical", base, tmp_path / "c")
        tele(merge, base, tmp_path / "c", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_adapter_that_no_model_takes_is_refused_by_its_own_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = released(tmp_path / "base", "teleflm")
    source = open_model(base)
    adapter = random_adapter(source, modules(source.config, ("q",)))
    adapter.read("layers.1.attn.q.lora_b")[0, 0] = np.nan
    write_adapter(tmp_path / "adapter", adapter)
    with pytest.raises(UserError, match=r"adapter: layers.1.attn.q.lora_b: holds values that are not finite"):
        tele(merge, base, tmp_path / "adapter", tmp_path / "x")
    with pytest.raises(UserError, match=r"is an adapter, not a model; .* tele merge BASE .*adapter DST"):
        open_model(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"no training state to resume; merge it into its base \(tele merge BASE "):
        require_training_state(open_checkpoint(tmp_path / "adapter"))
    write_peft(random_adapter(source, modules(source.config, ("q",))), tmp_path / "peft")
    tele(merge, base, tmp_path / "peft", tmp_path / "merged")
    assert "does not record the weights it was trained on, but the name 'base'; that" in capsys.readouterr().out
    # transformers would load the named base and the adapter; here a model's folder is the model.
    for file in (tmp_path / "peft").iterdir():
        shutil.copyfile(file, base / file.name)
    assert any(
        "has an adapter of PEFT's beside the model, which acts only as" in note for note in open_model(base).notes
    )


def test_templates_that_do_not_travel_are_noted(tmp_path: Path) -> None:
    base = released(tmp_path / "base", "teleflm")
    assert not any("additional_chat_templates" in note for note in open_model(base).notes)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    assert any(
        "its additional_chat_templates are not copied to what is made" in note for note in open_model(base).notes
    )


def test_average_is_the_weighted_sum_rounded_once(tmp_path: Path) -> None:
    scales = {"a": 1.0, "b": 1.25, "c": 0.3}
    folders = [released(tmp_path / n, "telechat2_gqa", lambda a, s=s: a * s) for n, s in scales.items()]  # type: ignore[misc]
    tele(average, *folders, "--weights", 3, 1, 0.5, "--out", tmp_path / "mean")
    sources, found = [open_model(folder) for folder in folders], open_model(tmp_path / "mean")
    for name in found.names():
        parts = [source.tensor(name).astype(np.float64) for source in sources]
        total = sum(share / 4.5 * part for share, part in zip((3, 1, 0.5), parts, strict=True))
        assert found.tensor(name).tobytes() == rounded(np.asarray(total), BF16).tobytes(), name
    assert (tmp_path / "mean" / "config.json").read_bytes() == (folders[0] / "config.json").read_bytes()
    # Of equal models the average is the model, bit for bit; canonical ones too.
    tele(convert, "--from", "hf", "--to", "canonical", folders[0], tmp_path / "ck")
    tele(average, tmp_path / "ck", folders[0], "--out", tmp_path / "same")
    one, same = open_model(tmp_path / "ck"), open_model(tmp_path / "same")
    assert all(one.tensor(name).tobytes() == same.tensor(name).tobytes() for name in one.names())
    other = released(tmp_path / "d", "telechat2_mha")
    for words, says in (
        ([folders[0]], "an average needs two checkpoints or more"),
        ([*folders, "--weights", 1, 2], "--weights: 2 for 3 checkpoints"),
        ([*folders, "--weights", 1, -1, 1], "--weights: must be 0 or more"),
        ([*folders, "--weights", 1e308, 1e308, 1], "--weights: must be 0 or more"),
        ([folders[0], other], "only checkpoints of one config have an average"),
        ([folders[0], GOLDENS / "peft" / "plain"], "is an adapter of PEFT's, not a model"),
    ):
        with pytest.raises(UserError, match=says):
            tele(average, *words, "--out", tmp_path / "x")
    held = load_file(folders[1] / "model.safetensors")
    save_file({n: a.astype(np.float32) for n, a in held.items()}, folders[1] / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="is float32, and bfloat16 in .*say with --dtype"):
        tele(average, *folders, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    tele(average, *folders, "--out", tmp_path / "wide", "--dtype", "float32")
    assert open_model(tmp_path / "wide").dtype("norm.weight") == np.float32
