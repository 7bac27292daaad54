"""Adapters in both backends: every gradient against float64, 50 steps side by side, resume, refusals, planted faults.

Layouts are in tests/parity/test_layouts.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from telechat_twins.convert.copy import to_hf
from telechat_twins.convert.hf.peft import open_peft, write_peft
from telechat_twins.convert.initial import open_initial
from telechat_twins.convert.source import open_model
from telechat_twins.core import backends
from telechat_twins.core.checkpoint.adapter import open_adapter
from telechat_twins.core.checkpoint.fingerprint import fingerprint
from telechat_twins.core.checkpoint.read import open_checkpoint, write_checkpoint
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.batch import Batch, shift_labels
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.model.lora import LoraConfig, init_adapter, is_adapter, lora_table, read_adapter
from telechat_twins.core.model.lora_dropout import LoraDropout
from telechat_twins.core.parity.bounds import compare_tensors, compare_traces, relative_frobenius
from telechat_twins.core.train import loop, records
from telechat_twins.core.train.metrics import read_metrics
from tests.support import numpy_lora
from tests.support.frameworks import BACKENDS
from tests.support.packed import write_packed

SMALL = {"hidden_size": 16, "ffn_hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2, "vocab_size": 32}
MODEL = load_model_config({"preset": "telechat2-tiny", **SMALL})
LORA = LoraConfig(rank=2, alpha=3.0, dropout=0.25, targets=["all-linear"])
SEED, STEPS, HALF, SEQ_LEN = 5, 50, 25, 32
# Sums in another order through every layer twice: 3e-6 is used in fp32, 4e-13 in fp64.
LIMITS = {"fp64": 1e-11, "fp32": 2e-5}
Weights = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "plot_losses", lambda *_: None)


@pytest.fixture(scope="module")
def trainers() -> dict[str, type]:
    pytest.importorskip("mindspore")
    pytest.importorskip("torch")
    return {name: backends.load(name, "train").Trainer for name in BACKENDS}


def weights() -> Weights:
    adapters = {n: init_adapter(n, MODEL, LORA, SEED, scheme="strong") for n in lora_table(MODEL, LORA)}
    return {n: w.astype(np.float64) for n, w in (init_weights(MODEL, SEED, "strong") | adapters).items()}


def small_batch() -> Batch:
    ids = np.random.default_rng(1).integers(0, MODEL.vocab_size, (2, 5)).astype(np.int32)
    return Batch(ids, shift_labels(ids), np.tile(np.arange(5, dtype=np.int32), (2, 1)))


def masks() -> LoraDropout:
    """Those of a first step of small_batch."""
    return LoraDropout(LORA.dropout, SEED, 0, np.arange(2), np.arange(5)[None])


def run_config(precision: str, recompute: str = "none", lora: LoraConfig = LORA) -> RunConfig:
    return run_config_from_dict(
        {
            "model": MODEL.to_dict(),
            "data": {"sources": [], "seq_len": 5},
            "train": {"steps": 9, "global_batch": 2, "micro_batch": 1, "seed": SEED}
            | {"precision": precision, "recompute": recompute},
            "optim": {"lr": 1e-3},
            "lora": lora.to_dict(),
        }
    )


def computed(trainer: Any) -> Weights:
    """The gradients that a trainer has after one batch, with the weights of this file."""
    held = weights()
    trainer.load_weights(lambda name, box: held[name][box])
    trainer.optimizer.load_masters(lambda name, box: held[name][box])
    batch = small_batch()
    trainer.gradients(batch, batch.num_targets, 1.0)
    return {piece.name: np.array(piece.array) for piece in trainer.optimizer.export_gradients()}


@pytest.fixture(scope="module")
def exact() -> Weights:
    return numpy_lora.gradients(MODEL, LORA, weights(), small_batch(), masks())


def worst(found: Weights, exact: Weights) -> float:
    assert sorted(found) == sorted(exact)  # adapters and nothing else
    return max(relative_frobenius(found[name], exact[name]) for name in exact)


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_gradient_is_the_definition_s(
    trainers: dict[str, type], exact: Weights, backend: str, precision: str
) -> None:
    """Dropout included, and through recomputation, where the masks are drawn a second time."""
    for recompute in ("none", "selective", "full"):
        if precision == "fp32" or recompute == "none":
            assert worst(computed(trainers[backend](run_config(precision, recompute))), exact) <= LIMITS[precision]


def scale_missed(held: Weights) -> Weights:
    return {n: w * (LORA.rank / LORA.alpha) if n.endswith("lora_b") else w for n, w in held.items()}


def roles_swapped(held: Weights) -> Weights:
    """A read as if it lay the other way round, which fits where a matrix is square."""
    out = dict(held)
    for name in held:
        if name.endswith("q.lora_a"):
            other = name.replace("lora_a", "lora_b")
            out |= {name: held[other].T, other: held[name].T}
    return out


def key_and_value_swapped(held: Weights) -> Weights:
    """The adapter of k on v and that of v on k: the other half of a packed key_value."""
    swapped = {".k.lora": ".v.lora", ".v.lora": ".k.lora"}
    return {re.sub(r"\.[kv]\.lora", lambda m: swapped[m[0]], n): w for n, w in held.items()}


@pytest.mark.parametrize("fault", [scale_missed, roles_swapped, key_and_value_swapped], ids=lambda f: f.__name__)
def test_planted_mistakes_turn_the_comparison_red(
    trainers: dict[str, type], exact: Weights, fault: Callable[[Weights], Weights]
) -> None:
    """A trainer that takes its weights for what ``fault`` makes of them."""
    pt = trainers["pt"](run_config("fp64"))
    held = fault(weights())
    pt.load_weights(lambda name, box: held[name][box])
    pt.optimizer.load_masters(lambda name, box: held[name][box])
    batch = small_batch()
    pt.gradients(batch, batch.num_targets, 1.0)
    found = {piece.name: np.array(piece.array) for piece in pt.optimizer.export_gradients()}
    assert worst(found, exact) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_masks_of_another_step_turn_it_red(
    trainers: dict[str, type], exact: Weights, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainers[backend], "step", 1)
    assert worst(computed(trainers[backend](run_config("fp32"))), exact) > 1e-2


BEYOND = np.array([1.0, np.inf, -np.inf, np.nan, 60_000.0])  # the last times 4/3 is beyond fp16's largest number


@pytest.mark.parametrize("precision", ["fp64", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_dropped_is_zero_whatever_it_was(backend: str, precision: str) -> None:
    """Forward and backward: a mask that multiplied would make NaN of what is infinite."""
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    drop = {"ms": dropped_in_mindspore, "pt": dropped_in_pytorch}[backend]
    zeros = np.zeros(BEYOND.size)
    for keep, x, grad in ((False, BEYOND, BEYOND), (True, np.ones(BEYOND.size), np.full(BEYOND.size, 3.0))):
        out, dx = drop(np.full((1, 1, BEYOND.size), keep), x[None, None], grad[None, None], precision)
        limit = {"fp64": 1e-15, "fp32": 1e-7, "fp16": 1e-3, "bf16": 4e-3}[precision]
        np.testing.assert_allclose(out[0, 0], zeros if not keep else x * 4 / 3, rtol=limit)
        np.testing.assert_allclose(dx[0, 0], zeros if not keep else grad * 4 / 3, rtol=limit)


class Drawn:
    """A block's dropout with a given mask."""

    factor = 4 / 3

    def __init__(self, keep: np.ndarray):
        self.keep = lambda target: keep


LAYER = SimpleNamespace(lora_a=object())


def dropped_in_mindspore(keep: Any, x: np.ndarray, grad: np.ndarray, precision: str) -> tuple[np.ndarray, np.ndarray]:
    ms, model = pytest.importorskip("mindspore"), backends.load("ms", "model")
    dtype = {"fp64": ms.float64, "fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}[precision]
    given, back = (ms.Tensor(one.astype(np.float32)).astype(dtype) for one in (x, grad))
    out = model.dropped(given, Drawn(keep), "q", LAYER)
    dx = ms.ops.GradOperation(sens_param=True)(lambda v: model.dropped(v, Drawn(keep), "q", LAYER))(given, back)
    assert out.dtype == dx.dtype == dtype
    return out.astype(ms.float64).asnumpy(), dx.astype(ms.float64).asnumpy()


def dropped_in_pytorch(keep: Any, x: np.ndarray, grad: np.ndarray, precision: str) -> tuple[np.ndarray, np.ndarray]:
    torch, model = pytest.importorskip("torch"), backends.load("pt", "model")
    dtype = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    given = torch.tensor(x).to(dtype).requires_grad_()
    out = model.dropped(given, Drawn(keep), "q", LAYER)
    out.backward(torch.tensor(grad).to(dtype))
    assert out.dtype == given.grad.dtype == dtype
    return out.detach().double().numpy(), given.grad.double().numpy()


PATTERNS = LoraConfig(
    rank=2, alpha=3.0, targets=["all-linear"], use_rslora=True, rank_pattern={"q": 4, "layers.1.ffn.*": 3},
    alpha_pattern={"layers.0.attn.[vo]": 5.0},
)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_and_alphas_by_layer(trainers: dict[str, type], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients as of one rank, each within its bound; a missed pattern and alpha / rank in place of its root turn
    the comparison red."""
    monkeypatch.setattr(f"{__name__}.LORA", PATTERNS)
    held = weights()
    assert {n: w.shape[0] for n, w in held.items() if n.endswith("lora_a")} == {
        f"layers.{i}.{part}.lora_a": 4 if part == "attn.q" else 3 if i and part.startswith("ffn") else 2
        for i in range(2)
        for part in (*(f"attn.{name}" for name in "qkvo"), "ffn.gate", "ffn.up", "ffn.down")
    }
    found = computed(trainers[backend](run_config("fp32", lora=PATTERNS)))
    assert worst(found, numpy_lora.gradients(MODEL, PATTERNS, held, small_batch())) <= LIMITS["fp32"]
    for other in ({"alpha_pattern": {}}, {"use_rslora": False}):
        wrong = dataclasses.replace(PATTERNS, **other)
        assert worst(found, numpy_lora.gradients(MODEL, wrong, held, small_batch())) > 1e-2


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        ({"rank_pattern": {"gate": 4}}, "lora.rank_pattern: 'gate' names no layer with an adapter"),
        ({"rank_pattern": {"layers.7.*": 4}}, "lora.rank_pattern: 'layers.7..' names no layer"),
        ({"rank_pattern": {"q": 4, "layers.0.*": 2}}, "'q' gives layers.0.attn.q 4 and 'layers.0..' 2"),
        ({"rank_pattern": {"q": 4.5}}, "lora.rank_pattern: 'q': needs a whole number"),
        ({"alpha_pattern": {"q": 0}}, "lora.alpha_pattern: 'q': needs a number above 0"),
        ({"alpha_pattern": {"q": True}}, "lora.alpha_pattern: 'q': needs a number above 0"),
        ({"rank_pattern": {0: 4}}, "lora.rank_pattern: 0 is no name of a layer"),
        ({"rank_pattern": [4]}, "lora.rank_pattern: expected a mapping, found list"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(patterns: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        tuning(tmp_path, **{"targets": ["q", "v"], **patterns})


def test_masks_do_not_depend_on_how_they_are_cut() -> None:
    whole = LoraDropout(0.3, 1, 2, np.arange(6), np.arange(50)[None])
    part = LoraDropout(0.3, 1, 2, np.arange(2, 4), np.array([[3, 40, 7]]))
    kept = whole.keep(3, "down", slice(0, 37))
    assert np.array_equal(part.keep(3, "down", slice(5, 31)), kept[2:4][:, [3, 40, 7], 5:31])
    assert abs(kept.mean() - 0.7) < 0.01
    assert abs((kept * whole.factor).mean() - 1.0) < 0.02
    others = [whole.keep(2, "down", slice(0, 37)), whole.keep(3, "q", slice(0, 37))]
    others.append(dataclasses.replace(whole, step=3).keep(3, "down", slice(0, 37)))
    assert all(abs((other == kept).mean() - 0.58) < 0.02 for other in others)  # independent: 0.7^2 + 0.3^2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in two formats, another model of the same shapes, and packed data."""
    root = tmp_path_factory.mktemp("lora")
    write_packed(root / "packed", 2048, SEQ_LEN)
    model = load_model_config({"preset": "telechat2-tiny", "num_layers": 2})
    for name, seed in (("base", 3), ("other", 4)):
        held = init_weights(model, seed).items()
        write_checkpoint(root / name, 0, model={"config": model.to_dict()}, weights=held)
    to_hf(open_model(root / "base"), root / "released")
    return root


def tuning(folder: Path, base: str = "base", **lora: Any) -> RunConfig:
    return run_config_from_dict(
        {
            "model": {"preset": "telechat2-tiny", "num_layers": 2},
            "data": {"sources": [{"path": str(folder / "packed")}], "seq_len": SEQ_LEN},
            "train": {"init": str(folder / base), "steps": STEPS, "global_batch": 4, "micro_batch": 2},
            "optim": {"lr": 5e-3, "warmup_steps": 5},
            "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": ["all-linear"], **lora},
            "checkpoint": {"every": HALF, "keep_last": 9},
        }
    )


@pytest.fixture(scope="module")
def runs(folder: Path, trainers: dict[str, type]) -> Path:
    for name, trainer in trainers.items():
        loop.train(trainer, tuning(folder), folder / name, open_initial=open_initial)
    return folder


def test_50_steps_of_both_agree(runs: Path) -> None:
    report = compare_traces(read_metrics(runs / "ms"), read_metrics(runs / "pt"))
    assert [b for b in report.bounds if not b.holds] == []
    assert max(report.loss) <= 1e-4
    assert len(report.steps) == STEPS
    losses = [row["loss"] for row in read_metrics(runs / "pt")]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.02  # they learn; two constant runs would agree too


def test_a_checkpoint_holds_the_adapter_and_names_its_base(runs: Path) -> None:
    checkpoint = open_checkpoint(runs / "ms")
    record = read_adapter(checkpoint.model, "model.json")
    assert record is not None
    config = tuning(runs)
    lora = config.lora
    assert lora is not None
    assert (record.rank, record.alpha, record.dropout, record.targets) == (4, 8.0, 0.1, lora.targets)
    base = open_model(runs / "base")
    assert record.base.path == str(runs / "base")
    assert record.base.fingerprint == fingerprint(base.config, base.read)
    released = open_model(runs / "released")
    assert record.base.fingerprint == fingerprint(released.config, released.read)
    assert checkpoint.names("weights") == list(lora_table(config.model, lora))
    assert sorted(checkpoint.names("optimizer")) == sorted(
        f"{m}.{n}" for n in checkpoint.names("weights") for m in "mv"
    )
    assert all(map(is_adapter, checkpoint.names("weights")))


@pytest.mark.parametrize(("source", "target"), [("ms", "pt"), ("pt", "ms"), ("pt", "pt")])
def test_resume(runs: Path, trainers: dict[str, type], source: str, target: str, tmp_path: Path) -> None:
    """In the other backend, on the base in another format; in the same one bit for bit."""
    saved = str(runs / source / f"step-{HALF:08d}")
    config = tuning(runs, "base" if source == target else "released")
    loop.train(trainers[target], config, tmp_path / "on", saved, open_initial)
    rows, whole = read_metrics(tmp_path / "on"), read_metrics(runs / source)[HALF:]
    apart = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(rows, whole, strict=True)]
    assert max(apart) <= (0.0 if source == target else 1e-4)
    ends = [open_checkpoint(place) for place in (tmp_path / "on", runs / source)]
    a, b = ({n: end.read("weights", n) for n in end.names("weights")} for end in ends)
    assert compare_tensors(a, b).worst() <= (0.0 if source == target else 1e-3)


@pytest.mark.parametrize(("source", "target"), [("ms", "pt"), ("pt", "ms")])
def test_adapters_of_several_ranks_are_resumed_and_go_to_peft(
    folder: Path, trainers: dict[str, type], source: str, target: str, tmp_path: Path
) -> None:
    """Saved by one backend, resumed by the other, written for PEFT and read back: ranks and scales as they were."""
    patterns = {"rank_pattern": {"q": 6, "down": 2}, "alpha_pattern": {"layers.1.*": 5.0}, "use_rslora": True}
    config = tuning(folder, dropout=0.0, **patterns)
    short = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=6, schedule_steps=STEPS))
    loop.train(trainers[source], short, tmp_path / "first", open_initial=open_initial)
    adapter = open_adapter(tmp_path / "first")
    expected = {
        n.removesuffix(".lora_a"): s.shape[0] for n, s in lora_table(config.model, config.lora).items() if "_a" in n
    }
    assert {name: module.rank for name, module in adapter.modules.items()} == expected
    assert adapter.modules["layers.1.attn.q"].scale == pytest.approx(5.0 / 6**0.5, rel=1e-12)
    write_peft(adapter, tmp_path / "peft")
    back = open_peft(tmp_path / "peft", config.model)
    for name, module in adapter.modules.items():
        rank = back.modules[name].rank
        assert (rank, back.modules[name].scale) == (module.rank, pytest.approx(module.scale, rel=1e-12))
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=8, schedule_steps=STEPS))
    loop.train(trainers[target], longer, tmp_path / "on", str(tmp_path / "first"), open_initial)
    assert len(read_metrics(tmp_path / "on")) == 2
    other = tuning(folder, dropout=0.0, **{**patterns, "rank_pattern": {"q": 6}})
    with pytest.raises(UserError, match="gives layers.0.ffn.down rank 4, .* rank 2, .*rank_pattern"):
        loop.train(trainers[target], other, tmp_path / "no", str(tmp_path / "first"), open_initial)


@pytest.mark.parametrize(("source", "target"), [("ms", "pt"), ("pt", "ms")])
def test_frozen_adapters_are_drawn_saved_and_resumed(
    folder: Path, trainers: dict[str, type], source: str, target: str, tmp_path: Path
) -> None:
    """Some stay as they are drawn; others are trained, then frozen where the other backend goes on."""

    def run(out: str, steps: int, frozen: list[str], backend: str, resume: str | None) -> Weights:
        config = tuning(folder)
        train = dataclasses.replace(config.train, steps=steps, schedule_steps=STEPS, freeze=frozen)
        loop.train(trainers[backend], dataclasses.replace(config, train=train), tmp_path / out, resume, open_initial)
        found = open_checkpoint(tmp_path / out)
        assert config.lora is not None and sorted(found.names("weights")) == sorted(
            lora_table(config.model, config.lora)
        )
        return {name: found.read("weights", name) for name in found.names("weights")}

    first = run("first", 7, ["layers.1.ffn.*"], source, None)
    second = run("on", 9, ["layers.0.*", "layers.1.ffn.*"], target, str(tmp_path / "first"))
    config = tuning(folder)
    assert config.lora is not None
    drawn = {name: init_adapter(name, config.model, config.lora, config.train.seed) for name in first}
    for name in first:
        drawn_still = name.startswith("layers.1.ffn.")
        assert np.array_equal(first[name], drawn[name]) == drawn_still, name
        assert np.array_equal(second[name], first[name]) == (drawn_still or name.startswith("layers.0.")), name


def test_refusals_name_what_to_do(runs: Path, trainers: dict[str, type], tmp_path: Path) -> None:
    saved = str(runs / "pt" / f"step-{HALF:08d}")

    def refused(config: RunConfig, resume: str | None, match: str) -> None:
        with pytest.raises(UserError, match=match):
            loop.train(trainers["pt"], config, tmp_path / "out", resume, open_initial)

    refused(tuning(runs, "other"), saved, "train.init: .*other .* is not the base of the adapter .*set train.init")
    refused(tuning(runs, rank=8), saved, "lora.rank: the run has 8, the adapter of .* 4; set 4")
    whole = dataclasses.replace(tuning(runs), lora=None)
    refused(whole, saved, "holds an adapter of .*; resume it with the `lora:`")
    free = dataclasses.replace(tuning(runs), train=dataclasses.replace(tuning(runs).train, init=None))
    refused(free, None, "lora: adapters are trained on the weights of a model; set train.init")
