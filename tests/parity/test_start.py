"""Training from the weights of another model, in both backends: every format, what travels, what is refused."""

from __future__ import annotations

import dataclasses
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.convert.copy import to_hf, to_mindformers
from telechat_twins.convert.initial import open_initial
from telechat_twins.convert.source import open_model
from telechat_twins.core import backends
from telechat_twins.core.checkpoint.fingerprint import fingerprint
from telechat_twins.core.checkpoint.read import open_checkpoint, write_checkpoint
from telechat_twins.core.commands import grow
from telechat_twins.core.config import RunConfig, load_run_config
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.train import loop, records, script
from telechat_twins.core.train.metrics import MEASURED, read_metrics
from tests.support.packed import write_packed

SEQ_LEN = 32
MODEL = load_model_config({"preset": "telechat2-tiny", "num_layers": 2})
WEIGHTS = init_weights(MODEL, 3, "strong")
FORMATS = ("released", "canonical", "mindformers", "run")
TEMPLATE = "{{ messages }}"


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "plot_losses", lambda *_: None)


@pytest.fixture(scope="module")
def trainers() -> dict[str, type]:
    pytest.importorskip("mindspore")
    pytest.importorskip("torch")
    return {name: backends.load(name, "train").Trainer for name in ("ms", "pt")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in every format, a run's YAML without a model, and packed data."""
    root = tmp_path_factory.mktemp("start")
    write_packed(root / "packed", MODEL.vocab_size, SEQ_LEN)
    write_checkpoint(root / "canonical", 0, model={"config": MODEL.to_dict()}, weights=WEIGHTS.items())
    source = open_model(root / "canonical")
    to_hf(source, root / "released")
    (root / "released" / "chat_template.jinja").write_text(TEMPLATE)
    to_mindformers(source, root / "mindformers", "plain", 2)
    (root / "run").mkdir()
    write_checkpoint(root / "run" / "step-00000007", 7, model={"config": MODEL.to_dict()}, weights=WEIGHTS.items())
    (root / "run" / "latest").write_text("step-00000007\n")
    (root / "run.yaml").write_text(
        f"data: {{sources: [{{path: packed}}], seq_len: {SEQ_LEN}}}\n"
        "train: {init: released, steps: 3, global_batch: 4, micro_batch: 2}\n"
        "optim: {lr: 1e-3}\n"
    )
    return root


def load(folder: Path, *overrides: str) -> RunConfig:
    return load_run_config(folder / "run.yaml", overrides, lambda init: open_initial(init, None).config)


def numbers(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(out)]


@pytest.mark.parametrize("backend", ["ms", "pt"])
def test_every_format_starts_the_same_run(
    backend: str, folder: Path, trainers: dict[str, type], tmp_path: Path
) -> None:
    config = load(folder)
    assert dataclasses.replace(config.model, end_token_ids=()) == MODEL, "the model of train.init"
    trainer = trainers[backend](config)
    trainer.load_weights(open_initial(str(folder / "released")).read)
    for piece in trainer.weights():
        assert np.asarray(piece.array).tobytes() == WEIGHTS[piece.name].tobytes(), piece.name
    for name in FORMATS if backend == "pt" else FORMATS[:1]:  # the readers are the same for both
        config = load(folder, f"train.init={folder / name}")
        loop.train(trainers[backend], config, tmp_path / name, open_initial=open_initial)
        assert numbers(tmp_path / name) == numbers(tmp_path / FORMATS[0]), name
        began = open_checkpoint(tmp_path / name).trainer["init"]
        assert began["fingerprint"] == fingerprint(MODEL, lambda tensor, box: WEIGHTS[tensor][box]), name


def test_a_restarted_job_goes_on_and_keeps_what_travels(
    folder: Path, trainers: dict[str, type], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainers["pt"]
    whole = load(folder)
    loop.train(trainer, whole, tmp_path / "whole", resume="auto", open_initial=open_initial)
    assert "starts from the weights of" in capsys.readouterr().err
    half = dataclasses.replace(whole, train=dataclasses.replace(whole.train, steps=2, schedule_steps=3))
    loop.train(trainer, half, tmp_path / "job", resume="auto", open_initial=open_initial)
    capsys.readouterr()
    loop.train(trainer, whole, tmp_path / "job", resume="auto", open_initial=open_initial)
    assert "is not read" in capsys.readouterr().err
    assert numbers(tmp_path / "job") == numbers(tmp_path / "whole")
    saved = open_checkpoint(tmp_path / "job")
    assert saved.trainer["init"]["path"] == str(folder / "released")
    assert (saved.path / "assets" / "chat_template.jinja").read_text() == TEMPLATE
    to_hf(open_model(tmp_path / "job"), tmp_path / "exported", "float32")
    exported = open_model(tmp_path / "exported")
    assert (tmp_path / "exported" / "chat_template.jinja").read_text() == TEMPLATE
    assert all(np.array_equal(exported.tensor(n), saved.read("weights", n)) for n in saved.names("weights"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("model.num_heads=2",), "model.num_heads: the run has 2, .* has 4"),
        (("model.norm_eps=1e-6",), "model.norm_eps: the run has 1e-06"),
        (("model.preset=teleflm-tiny",), "model.family: the run has teleflm"),
        (("model.vocab_size=4096",), "later rows must be padding"),
    ],
)
def test_another_model_is_refused(changes: tuple[str, ...], message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        loop.open_start(load(folder, *changes), open_initial)


def test_padding_and_length_may_differ(folder: Path, trainers: dict[str, type], tmp_path: Path) -> None:
    more = ("model.vocab_size=2100", "model.vocab_tokens=2048", "model.max_seqlen=4096")
    loop.train(trainers["pt"], load(folder, *more), tmp_path / "padded", open_initial=open_initial)
    loop.train(trainers["pt"], load(folder), tmp_path / "plain", open_initial=open_initial)
    apart = [
        abs(a["loss"] / b["loss"] - 1)
        for a, b in zip(*(numbers(tmp_path / n) for n in ("padded", "plain")), strict=True)
    ]
    assert max(apart) < 1e-6  # measured 1e-7: the same model, its sums in another order
    head = open_checkpoint(tmp_path / "padded").read("weights", "head.weight")
    assert head.shape == (2100, MODEL.hidden_size) and not head[2048:].any()
    to_hf(open_model(tmp_path / "padded"), tmp_path / "exported")
    exported = open_model(tmp_path / "exported").config
    assert (exported.vocab_size, exported.max_seqlen) == (2048, 4096), "the padding is left out, the length is kept"


def test_data_of_another_tokenizer_is_noted(
    folder: Path, trainers: dict[str, type], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "tokenizer.model"
    other.write_bytes(b"another one")
    described = {"config": MODEL.to_dict()}
    write_checkpoint(tmp_path / "base", 0, model=described, weights=WEIGHTS.items(), assets=[other])
    loop.train(trainers["pt"], load(folder, f"train.init={tmp_path / 'base'}"), tmp_path / "out", None, open_initial)
    assert "packed with another tokenizer.model than" in capsys.readouterr().err


def test_weights_without_training_state_name_init(folder: Path, trainers: dict[str, type], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no trainer.json.*--init {folder / 'canonical'}"):
        loop.train(trainers["pt"], load(folder), tmp_path / "x", resume=str(folder / "canonical"))


@pytest.mark.parametrize("method", ["masked", "zero"])
def test_what_grow_of_a_released_model_prints_works(
    method: str, folder: Path, trainers: dict[str, type], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = Namespace(
        source=str(folder / "canonical"), target_folder=tmp_path / "grown",
        target=None, set=["ffn_hidden_size=384", "num_layers=3"], method=method,
        anneal_steps=2, depth="insert", fresh_layers=False, multipliers="keep", grow_head_dim=False,
        seed=0, plan=False,
    )  # fmt: skip
    assert grow.run(args) == 0
    printed = re.search(r"train it with (.*)", capsys.readouterr().out)
    assert printed and "--init" in printed[1]
    argv = ["--config", str(folder / "run.yaml"), "--out", str(tmp_path / "out"), *printed[1].split()]
    assert script.main(trainers["pt"], argv, open_initial) == 0
    rows = numbers(tmp_path / "out")
    assert len(rows) == 3 and ("mask" in rows[0]) == (method == "masked")
    loop.train(trainers["pt"], load(folder), tmp_path / "before", open_initial=open_initial)
    # 1e-5: the grown model computes the same function, its sums in another order.
    assert rows[0]["loss"] == pytest.approx(numbers(tmp_path / "before")[0]["loss"], rel=1e-5)
