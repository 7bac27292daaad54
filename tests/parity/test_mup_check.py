"""The coordinate check in both backends: it holds, it goes red on a rule left out, and observing changes nothing."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.core import cli
from telechat_twins.core.backends import load
from telechat_twins.core.config import load_run_config
from telechat_twins.core.model.config import CONFIGS
from telechat_twins.core.mup import transfer as rules
from telechat_twins.core.mup.activations import observed
from telechat_twins.core.mup.coordinates import MUP, STANDARD, WidthRecord, configs, judge, measure, token_batch
from tests.support.frameworks import BACKENDS

NARROW = CONFIGS / "train" / "teleflm-tiny.yaml"
WIDTHS, STEPS, ROWS, LENGTH = (64, 128, 256), 3, 2, 48
# A short warm-up and a small vector-like rate: in three updates the matrices then do enough for a fault to show.
SMALLER = (
    "model.num_layers=2", "model.vocab_size=512", "optim.lr=3e-3", "optim.min_lr=3e-4", "optim.warmup_steps=2",
)  # fmt: skip


def records(backend: str, names: tuple[str, ...] = (MUP, STANDARD)) -> list[WidthRecord]:
    narrow = load_run_config(NARROW, SMALLER)
    batch = token_batch(narrow.model.vocab_size, ROWS, LENGTH, 1)
    runs = configs(narrow, WIDTHS, ROWS, LENGTH)
    return [measure(backend, name, run, batch, STEPS, lambda: None) for name, run in runs if name in names]


@cache
def right(backend: str) -> list[WidthRecord]:
    return records(backend)


def broken(made: list[WidthRecord]) -> set[tuple[str, str]]:
    return {(one.what, one.group) for one in judge(made) if not one.holds}


@pytest.mark.parametrize("backend", BACKENDS)
def test_muP_is_flat_and_the_contrast_grows(backend: str) -> None:  # noqa: N802
    assert broken(right(backend)) == set()


def test_both_backends_see_the_same() -> None:
    """Every size of every group, width and step within 1e-4 (measured 5e-6): four fp32 forwards, three updates."""
    worst = 0.0
    for ms, pt in zip(right("ms"), right("pt"), strict=True):
        assert (ms.parametrisation, ms.width) == (pt.parametrisation, pt.width)
        for kind in ("scales", "changes"):
            for group, sizes in getattr(pt, kind).items():
                ours, theirs = np.array(getattr(ms, kind)[group]), np.array(sizes)
                worst = max(worst, float(np.max(np.abs(ours - theirs) / np.maximum(theirs, 1e-12))))
    print(f"sizes of the two backends: {worst:.1e} apart")
    assert worst <= 1e-4


# What is left out, and where it must show.
RULES = {
    "matrix rate not scaled": ("optim.matrix_lr", 0.0, {("change", g) for g in ("attn", "ffn", "stream")}),
    "logit multiplier not scaled": ("model.logit_mult", 0.0, {("start", "logits"), ("change", "logits")}),
    "matrix deviation not scaled": ("model.matrix_init_std", 0.0, {("start", g) for g in ("attn", "ffn", "stream")}),
}


@pytest.mark.parametrize("fault", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rule_left_out_turns_it_red(backend: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    option, power, where = RULES[fault]
    planted = tuple(replace(rule, power=power) if rule.option == option else rule for rule in rules.RULES)
    monkeypatch.setattr(rules, "RULES", planted)
    found = broken([*records(backend, (MUP,)), *(r for r in right(backend) if r.parametrisation == STANDARD)])
    seen = {("start" if "start" in what else "change", group) for what, group in found}
    assert where <= seen
    if option == "model.logit_mult":
        assert seen == where


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizer_without_classes_turns_it_red(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules are right and the backend does not follow them."""
    monkeypatch.setattr(load(backend, "optim"), "class_rate", lambda optim, lr, mup_class: lr)
    found = broken([*records(backend, (MUP,)), *(r for r in right(backend) if r.parametrisation == STANDARD)])
    assert (f"muP, change after {STEPS}", "attn") in found and (f"muP, change after {STEPS}", "ffn") in found


def gradients_of(backend: str, looks: bool) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Loss, gradients and, when it looks, activations of one backward pass; the logits as the pipeline's watcher saw
    them are in the last under "watched"."""
    narrow = load_run_config(NARROW, (*SMALLER, "model.input_mult=3.0"))
    _, run = configs(narrow, (128,), ROWS, LENGTH)[0]
    batch, trainer = token_batch(512, ROWS, LENGTH, 2), load(backend, "train").Trainer(run)
    to_numpy, kept = load(backend, "model").to_numpy, dict[str, np.ndarray]()

    def watch(micro: int, logits: object) -> None:
        kept["watched"] = to_numpy(logits).copy()

    with ExitStack() as stack:
        seen = stack.enter_context(observed(trainer.stages[0], to_numpy)) if looks else {}
        loss = trainer.gradients(batch, batch.num_targets, 1.0, watch=watch)
    kept |= seen
    gradients = {piece.name: piece.array.copy() for piece in trainer.optimizer.export_gradients()}
    weights = {piece.name: piece.array for piece in trainer.weights()}
    kept["embedded"] = 3.0 * weights["embed.weight"][batch.input_ids]
    seen.clear()
    trainer.gradients(batch, batch.num_targets, 1.0, backward=False)
    assert not seen, "looking ends with the context"
    return loss, gradients, kept


@pytest.mark.parametrize("backend", BACKENDS)
def test_observing_changes_nothing(backend: str) -> None:
    loss, gradients, kept = gradients_of(backend, True)
    plain_loss, plain, _ = gradients_of(backend, False)
    assert loss == plain_loss and sorted(gradients) == sorted(plain)
    assert [name for name in plain if gradients[name].tobytes() != plain[name].tobytes()] == []
    blocks = [f"layers.{i}{part}" for i in (0, 1) for part in ("", ".attn", ".ffn")]
    assert sorted(kept) == sorted(["embed", "embedded", "logits", "watched", *blocks])
    np.testing.assert_array_equal(kept["logits"], kept["watched"])
    np.testing.assert_allclose(kept["embed"], kept["embedded"], rtol=1e-6)
    np.testing.assert_allclose(
        kept["layers.0"], kept["embed"] + kept["layers.0.attn"] + kept["layers.0.ffn"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_command(backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--backend", backend, "--config", str(NARROW), "--set", *SMALLER, "--steps", "3", "--out", str(tmp_path)]
    assert cli.main(["mup", "check", *words, "--widths", "256", "512", "128"]) == 0
    assert "ok: flat within 0.3 under muP, growing in the contrast" in capsys.readouterr().out
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["holds"] and [r["width"] for r in report["records"]] == [128, 256, 512] * 2
    assert (tmp_path / "check.png").read_bytes()[:4] == b"\x89PNG"
