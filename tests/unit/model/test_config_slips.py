"""Slips in a run's YAML: each is one line with the file, the line, the key and how it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from telechat_twins.core.config import load_run_config, naming_lines
from telechat_twins.core.errors import UserError

RUN = """\
model: telechat2-tiny
data:
  sources:
    - path: packed
  seq_len: 128
train:
  steps: 300
  global_batch: 8
  micro_batch: 4
  precision: fp32
optim:
  lr: 3e-3
  min_lr: 3e-4
"""
SLIPS = [
    # what is written, in place of what; line; what the message says
    ("  lr: 3e-3", "  lr：3e-3", 12, "wide one"),
    ("  lr: 3e-3", "  lr:\u00a03e-3", 12, "U+00A0"),
    ("  steps: 300", "\u3000\u3000steps: 300", 7, "U+3000"),
    ("  steps: 300", "\tsteps: 300", 7, "tab"),
    ("steps: 300", "steps:300", 7, "no space behind 'steps:'"),
    ("  lr: 3e-3", "  lr = 3e-3", 12, "write 'lr: 3e-3'"),
    ("  steps: 300", "   steps: 300", 8, "indented differently"),
    ("telechat2-tiny", '"telechat2-tiny', 1, "quote that is not closed"),
    ("  lr: 3e-3", "  betas: {beta1: 0.9", 12, "bracket that is not closed"),
    ("  lr: 3e-3\n", "<<<<<<< HEAD\n  lr: 3e-3\n=======\n  lr: 1e-3\n>>>>>>> b\n", 12, "merge conflict"),
    ("  lr: 3e-3", '  lr: "3e-3"', 12, "optim.lr: expected a number, found str '3e-3'; take the quotes away"),
    ("  lr: 3e-3", "  lr: 3%", 12, "write 0.03"),
    ("steps: 300", "steps: 3e2", 7, "write 300"),
    ("steps: 300", "steps: 300k", 7, "; write 300000 or 307200"),
    ("seq_len: 128", "seq_len: 8k", 5, "; write 8192 or 8000"),
    ("seq_len: 128", "seq_len: 8KiB", 5, "; write 8192"),
    ("seq_len: 128", "seq_len: 8,192", 5, "; write 8192"),
    ("seq_len: 128", "seq_len: 128 tokens", 5, "; write the number alone"),
    ("  lr: 3e-3", "  lr: 0,003", 12, "; write 0.003"),
    ("  lr: 3e-3", "  lr: 0.3%", 12, "; write 0.003"),
    ("min_lr: 3e-4\n", "min_lr: 3e-4\ntrack: wandb\n", 14, "track: expected a list, found str 'wandb'; write [wandb]"),
    ("min_lr: 3e-4\n", "min_lr: 3e-4\ntrack: wandb, swanlab\n", 14, "; write [wandb, swanlab]"),
    ("    - path: packed", "    packed", 3, "; write [{path: packed}]"),
    ("  lr: 3e-3", "  lr:", 12, "optim.lr: nothing stands behind it"),
    ("precision: fp32", "precision: BF16", 10, "did you mean 'bf16'?"),
    ("precision: fp32", "precision: 16", 10, "expected one of fp32, bf16"),
    ("min_lr: 3e-4\n", "min_lr: 3e-4\nlora:\n", 14, "lora: nothing stands behind it"),
    ("micro_batch: 4", "micro_batch: 4\n  lora: {rank: 4}", 10, "a section of its own"),
    ("  lr: 3e-3\n  min_lr: 3e-4", "  lr = 3e-3", 11, "write 'lr: 3e-3'"),
    ("path: packed\n  seq_len: 128", 'path: "a\u3000b"\n  seq_len 128', 6, "not valid YAML"),
    ("steps: 300", "optim.lr: 1e-3", 7, "write 'lr' in the section 'optim'"),
    ("min_lr: 3e-4\n", "min_lr: 3e-4\nparallel: {TP: 2}\n", 14, "did you mean 'tp'?"),
    ("model: telechat2-tiny", "model: {name: telechat2-tiny}", 1, "did you mean 'preset'?"),
    ("model: telechat2-tiny", "model: gone.yaml", 1, "model.preset: "),
    ("path: packed", 'path: ""', 4, "data.sources[0].path: empty"),
    ("path: packed", "path: $HOME/packed", 4, "variables are not filled in"),
    ("path: packed", "path: hdfs://cluster/packed", 4, "is an address"),
]


@pytest.mark.parametrize("right, wrong, line, says", SLIPS)
def test_a_slip_is_named_with_its_line(right: str, wrong: str, line: int, says: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    assert RUN.count(right) == 1
    file.write_text(RUN.replace(right, wrong), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_run_config(file)
    message = str(error.value)
    assert message.startswith(f"{file}:{line}: ") and says in message and "\n" not in message


def test_a_blank_that_an_override_fills_is_no_slip(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN.replace("steps: 300", "steps: # --set"))
    assert load_run_config(file, ["train.steps=7"]).train.steps == 7
    file.write_text(RUN + "lora: null\n")
    assert load_run_config(file).lora is None


def test_home_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/somebody")
    file = tmp_path / "run.yaml"
    file.write_text(RUN.replace("path: packed", "path: ~/packed").replace("steps: 300", "steps: 300\n  init: ~/model"))
    config = load_run_config(file)
    assert (config.data.sources[0].path, config.train.init) == ("/users/somebody/packed", "/users/somebody/model")


def test_what_is_found_later_has_its_line_too(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    for message, begins in (
        ("data.sources[0].path: packed: no such packed folder", f"{file}:4: data.sources[0].path"),
        ("train.freeze[0]: 'x' matches nothing", f"{file}:6: train.freeze[0]"),
        ("packed/meta.json: broken", "packed/meta.json: broken"),
        ("data/packed/tokens.bin: broken", "data/packed/tokens.bin: broken"),
        ("model-00001.safetensors: broken", "model-00001.safetensors: broken"),
    ):
        with pytest.raises(UserError) as error, naming_lines(file):
            raise UserError(message)
        assert str(error.value).startswith(begins)
    with pytest.raises(UserError) as error, naming_lines(file, ["data.sources=[{path: y}]"]):
        raise UserError("data.sources[0].path: y: no such packed folder")
    assert str(error.value).startswith("data.sources[0].path: y")
    # The run's own error outlives a file that was changed or taken away while it ran.
    for change in (lambda: file.write_text("data: ["), file.unlink):
        change()
        with pytest.raises(UserError) as error, naming_lines(file):
            raise UserError("data.sources[0].path: packed: changed")
        assert str(error.value) == f"{file}: data.sources[0].path: packed: changed"


def test_a_slip_in_a_models_own_file_has_that_files_line(tmp_path: Path) -> None:
    own, file = tmp_path / "own.yaml", tmp_path / "run.yaml"
    for text, says in (
        ("num_layers: x", "num_layers: expected a whole number"),
        ("num_layerz: 3", "unknown key 'num_layerz'; did you mean 'num_layers'?"),
        ("num_heads: 7", "num_heads: 7 does not divide"),
    ):
        own.write_text(f"preset: telechat2-tiny\n{text}\n")
        file.write_text(RUN.replace("model: telechat2-tiny", "model: own.yaml"))
        with pytest.raises(UserError) as error:
            load_run_config(file)
        assert str(error.value).startswith(f"{own}:2: ") and says in str(error.value)
        # What the run itself says of the model is looked for in the run.
        own.write_text("preset: telechat2-tiny\n")
        file.write_text(RUN.replace("model: telechat2-tiny", f"model: {{preset: own.yaml, {text}}}"))
        with pytest.raises(UserError) as error:
            load_run_config(file)
        assert str(error.value).startswith(f"{file}:1: model") and says in str(error.value)
