"""float64 as the judge of the other precisions: MindSpore within 1e-12 of PyTorch, and both of definitions in numpy.

Some of MindSpore's float64 kernels are float32's, and Python numbers become float32 (kernels/mindspore/composite.py).
One of these anywhere in the model puts a result 1e-9 to 1e-6 off. Layouts are in test_layouts.py, the released code's
numbers in test_goldens.py and test_families.py.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from telechat_twins.core.backends import load
from telechat_twins.core.checkpoint.read import open_checkpoint
from telechat_twins.core.commands import forward as forward_command
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.model.batch import IGNORE, Batch, shift_labels
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.growth_mask import GrowthMask
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.parity.bounds import compare_tensors, compare_traces, relative_frobenius
from telechat_twins.core.train import loop
from telechat_twins.core.train.metrics import read_metrics
from telechat_twins.core.train.recipe import clip_factor
from telechat_twins.kernels import reference
from telechat_twins.kernels.adamw import AdamWStep
from tests.parity import test_operators
from tests.support import numpy_decoder
from tests.support.frameworks import BACKENDS, differentiate, golden_arrays, golden_source
from tests.support.packed import write_packed

# What fp64 promises, relative Frobenius. Operators stay within 2e-15, a model's logits within 2e-15, its gradients
# within 5e-15 and the changes of its weights within 5e-14: those are differences of weights rounded on a larger scale.
LIMIT = 1e-12
NEAR = 1e-13  # what is no such difference
B, S = 2, 41

PLAIN = ModelConfig(
    vocab_size=307, hidden_size=32, ffn_hidden_size=48, num_layers=2, num_heads=4, num_kv_heads=2, norm_eps=1e-5,
    training_seqlen=64, base_seqlen=64, max_seqlen=64,
)  # fmt: skip
# Factors that neither float32 nor float64 holds exactly, so that a rounding of one shows.
FLM = dict(
    family="flm", norm="layernorm", activation="gelu", biases="all", position="xpos", input_mult=1.1, logit_mult=0.3
)  # fmt: skip
GROWING = dict(
    vocab_size=320,
    vocab_tokens=307,
    growth=GrowthMask(
        mask=0.3, anneal_steps=8, hidden_size=24, ffn_hidden_size=32, num_heads=2, num_kv_heads=2, new_layers=(1,)
    ),
)  # fmt: skip
FAMILIES = {
    "telechat2": PLAIN,
    "telechat2, past the trained length": replace(PLAIN, training_seqlen=24, base_seqlen=16),
    "telechat-52b": replace(PLAIN, position="ntk-theta", training_seqlen=24, base_seqlen=16),
    "teleflm": replace(PLAIN, family="flm", position="rope", biases="none", input_mult=1.1, logit_mult=0.3),
    "flm-101b": replace(PLAIN, **FLM),
    "half-grown": replace(PLAIN, **GROWING),
    "half-grown flm-101b": replace(PLAIN, **FLM, **GROWING, tied_embeddings=True),
    "grown without masks": replace(PLAIN, **FLM, vocab_size=320, vocab_tokens=307, norm_divisor=24.0),
}


@cache
def weights(family: str) -> dict[str, np.ndarray]:
    return init_weights(FAMILIES[family], 3, "strong")


def batch(isolated: bool = False) -> Batch:
    """With unequal numbers of targets a row, or as documents that start at different places in each row."""
    ids = np.random.default_rng(0).integers(0, 307, (B, S)).astype(np.int32)
    positions, targets = np.tile(np.arange(S, dtype=np.int32), (B, 1)), shift_labels(ids)
    targets[0, 5:12] = IGNORE
    if not isolated:
        return Batch(ids, targets, positions)
    starts = np.array([[0, 17, 30], [0, 1, 20]])
    doc_ids = (np.arange(S)[None, :, None] >= starts[:, None, :]).sum(-1).astype(np.int32)
    restarted = positions - np.take_along_axis(starts, doc_ids - 1, 1)
    return Batch(ids, targets, restarted.astype(np.int32), doc_ids)


@cache
def forward(backend: str, family: str, isolated: bool = False) -> dict[str, Any]:
    get = weights(family).__getitem__
    return load(backend, "forward").run(FAMILIES[family], get, batch(isolated), "fp64", grads=True)


def furthest(got: dict[str, Any], truth: dict[str, Any], config: ModelConfig) -> float:
    """The largest error of logits (of columns that stand for a token), loss and gradients; all must be float64."""
    arrays = [got["logits"], *got["grads"].values()]
    assert {array.dtype for array in arrays} == {np.dtype(np.float64)}
    real = slice(0, config.num_tokens)
    return max(
        relative_frobenius(got["logits"][..., real], truth["logits"][..., real]),
        abs(got["loss"] / truth["loss"] - 1),
        compare_tensors(got["grads"], truth["grads"]).worst(),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward(family: str) -> None:
    """Of MindSpore against PyTorch, whose backward passes are written out where MindSpore's come from its autograd."""
    isolated = family == "telechat2"  # its whole rows are held against numpy below
    found = furthest(forward("ms", family, isolated), forward("pt", family, isolated), FAMILIES[family])
    print(f"{family}: {found:.1e}")
    assert found <= NEAR


def test_a_rounded_factor_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore's product with a Python number, in the one place where the model multiplies by a factor."""
    model, config = load("ms", "model"), FAMILIES["teleflm"]
    monkeypatch.setattr(model, "multiplied", lambda x, factor: x if factor == 1.0 else x * factor)
    got = load("ms", "forward").run(config, weights("teleflm").__getitem__, batch(), "fp64", grads=True)
    assert furthest(got, forward("pt", "teleflm"), config) > 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_numpy_agrees(backend: str) -> None:
    """Logits of a decoder in numpy, and every gradient along a direction: the derivative of that decoder by a step in
    the imaginary direction, which no difference of two values rounds."""
    config, held, given = FAMILIES["telechat2"], weights("telechat2"), batch()
    found = forward(backend, "telechat2")
    expected = numpy_decoder.logits(config, held.__getitem__, given.input_ids)
    assert relative_frobenius(found["logits"], expected) <= NEAR
    assert found["loss"] == pytest.approx(loss_of(expected, given).real, rel=NEAR)
    random, step = np.random.default_rng(1), 1e-30
    for name, gradient in found["grads"].items():
        direction = random.standard_normal(gradient.shape)
        moved = {**held, name: held[name] + 1j * step * direction}
        slope = loss_of(numpy_decoder.logits(config, moved.__getitem__, given.input_ids, np.complex128), given)
        apart = abs((gradient * direction).sum() - slope.imag / step)
        assert apart <= LIMIT * np.linalg.norm(gradient) * np.linalg.norm(direction), name


def loss_of(logits: np.ndarray, given: Batch) -> np.complexfloating | np.floating:
    counted = given.targets != IGNORE
    rows = logits[counted]
    rows = rows - rows.real.max(-1, keepdims=True)
    picked = rows[np.arange(len(rows)), given.targets[counted]]
    return (np.log(np.exp(rows).sum(-1)) - picked).sum() / counted.sum()


def gelu_case(random: np.random.Generator) -> test_operators.Case:
    def define(grad: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        return reference.gelu(x), [reference.gelu_backward(grad, x)]

    return test_operators.Case([2 * random.normal(size=(3, 37))], (3, 37), lambda ops, t, x: ops.gelu(x), define)


def layer_norm_case(random: np.random.Generator, counted: int | None = None) -> test_operators.Case:
    shape, mask = (5, 37), np.where(np.arange(37) < 30, 1.0, 0.3)

    def define(
        grad: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        out = reference.layer_norm(x, weight, bias, 1e-5, mask, counted)
        return out, list(reference.layer_norm_backward(grad, x, weight, 1e-5, mask, counted))

    def call(ops: Any, dtype: Any, x: Any, weight: Any, bias: Any) -> Any:
        return ops.layer_norm(x, weight, bias, 1e-5, dtype, dtype, _like(ops, mask), counted)

    arrays = [3 + random.normal(size=shape), random.uniform(0.6, 1.4, 37), random.normal(size=37)]
    return test_operators.Case(arrays, shape, call, define)


def rope_case(random: np.random.Generator) -> test_operators.Case:
    """Of queries, with xPos."""
    angle, scale = random.uniform(0, 6, (1, 11, 1, 3)), random.uniform(0.5, 2, (1, 11, 1, 3))
    cos, sin, shape = np.cos(angle), np.sin(angle), (2, 11, 3, 6)

    def define(grad: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        wide = np.concatenate((scale, scale), -1)
        return reference.rope(x, cos, sin) * wide, [reference.rope_backward(grad * wide, cos, sin)]

    def call(ops: Any, dtype: Any, x: Any) -> Any:
        tables = [_like(ops, table) for table in (cos, sin, scale, 1 / scale)]
        return ops.rope_qk(x, _like(ops, np.ones((2, 11, 1, 6))), *tables)[0]

    return test_operators.Case([random.normal(size=shape)], shape, call, define)


def z_loss_case(random: np.random.Generator) -> test_operators.Case:
    targets = random.integers(0, 151, 26).astype(np.int32)
    targets[::5] = IGNORE

    def define(grad: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        loss = np.asarray(reference.cross_entropy(logits, targets, 1e-3))
        return loss, [grad * reference.cross_entropy_backward(logits, targets, 1e-3)]

    def call(ops: Any, dtype: Any, logits: Any) -> Any:
        return ops.cross_entropy(logits, _like(ops, targets), 1e-3)

    return test_operators.Case([3 * random.normal(size=(26, 151))], (), call, define)


_LEFT_OUT = ("rope/one", "rope/odd half", "rope/keys", "attention/several blocks")
Make = Callable[[np.random.Generator], test_operators.Case]
OPERATORS: dict[str, Make] = {
    # Its rotations take float32 tables; many keys take long in numpy's widest type.
    **{name: make for name, make in test_operators.CASES.items() if name not in _LEFT_OUT},
    "gelu": gelu_case,
    "layer_norm": layer_norm_case,
    "layer_norm/counted": lambda random: layer_norm_case(random, 30),
    "rope/xpos": rope_case,
    "cross_entropy/z-loss": z_loss_case,
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_equals_its_definition(backend: str, name: str) -> None:
    random = np.random.default_rng(5)
    case = OPERATORS[name](random)
    grad = random.normal(size=case.out_shape)
    out, gradients = differentiate(backend, case.call, case.arrays, np.asarray(grad))
    expected, truth = case.define(np.asarray(grad, np.longdouble), *(a.astype(np.longdouble) for a in case.arrays))
    assert {array.dtype for array in (out, *gradients)} == {np.dtype(np.float64)}
    for number, (got, wanted) in enumerate(zip((out, *gradients), (expected, *truth), strict=True)):
        apart = np.linalg.norm((got - wanted).astype(np.float64))  # of zeros (a softmax over one key) as it is
        assert apart <= 1e-14 * max(np.linalg.norm(wanted.astype(np.float64)), 1.0), number


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_of_the_vocabulary(backend: str) -> None:
    """Columns [100, 151) of the vocabulary and five that pad, as a tensor rank has them."""
    random = np.random.default_rng(2)
    logits, lse = 3 * random.normal(size=(26, 56)), 9 + random.random(26)
    targets = random.integers(0, 151, 26).astype(np.int32)
    targets[::5] = IGNORE
    ops, wide = load(backend, "ops"), logits.astype(np.longdouble)
    own, picked = (_numpy(x) for x in ops.shard_statistics(_like(ops, logits), _like(ops, targets), 100, 51))
    expected = reference.cross_entropy_shard(wide, targets, 100, 51)
    assert relative_frobenius(own, expected[0]) <= 1e-15 and relative_frobenius(picked, expected[1]) == 0.0
    factor = _like(ops, np.array(0.3))
    gradient = ops.shard_gradient(_like(ops, logits), _like(ops, targets), 100, 51, _like(ops, lse), factor)
    truth = 0.3 * reference.cross_entropy_shard_backward(wide, targets, 100, 51, lse.astype(np.longdouble))
    assert relative_frobenius(_numpy(gradient), truth) <= 1e-14


def test_adamw_in_mindspore() -> None:
    """Of every step of a run's first seven; PyTorch's is in test_kernels_pytorch.py."""
    import mindspore as ms

    from telechat_twins.kernels.mindspore import composite as mindspore_composite

    random, size = np.random.default_rng(3), 999
    held = [random.normal(size=size), np.zeros(size), np.zeros(size)]
    truth = [array.astype(np.longdouble) for array in held]
    master, m, v = (ms.Parameter(ms.Tensor(array)) for array in held)
    for step in range(1, 8):
        grad = 1e-3 * random.normal(size=size)
        scalars = AdamWStep(step, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.37)
        mindspore_composite.adamw(master, ms.Tensor(grad), m, v, scalars)
        w, first, second = truth
        truth = list(reference.adamw(w, grad.astype(np.longdouble), first, second, scalars))
    found = [parameter.asnumpy() for parameter in (master, m, v)]
    assert {array.dtype for array in found} == {np.dtype(np.float64)}
    assert max(relative_frobenius(a, b) for a, b in zip(found, truth, strict=True)) <= 1e-15
    assert relative_frobenius(found[0] - held[0], truth[0] - held[0]) <= 1e-14


@pytest.mark.parametrize("family", ["telechat2", "flm-101b"])
def test_updates(family: str) -> None:
    """Three updates with clipping, of two micro-batches each: gradient norms, and what became of every weight."""
    outcomes = [updated(backend, family) for backend in BACKENDS]
    (norms, moved), (their_norms, theirs) = outcomes
    assert norms == pytest.approx(their_norms, rel=NEAR)
    assert clip_factor(norms[0], 0.5) < 1.0  # or clipping took no part
    assert compare_tensors(moved, theirs).worst() <= LIMIT


def updated(backend: str, family: str) -> tuple[list[float], dict[str, np.ndarray]]:
    config, held, given = FAMILIES[family], weights(family), batch()
    trainer = load(backend, "train").Trainer(run_config(config, eps=1e-2))
    trainer.optimizer.load_masters(lambda name, box: held[name][box])
    norms = []
    for _ in range(3):
        trainer.gradients(given, given.num_targets, 1.0)
        norms.append(trainer.grad_norm(1.0))
        trainer.update(1e-2, clip_factor(norms[-1], 0.5))
    return norms, {piece.name: piece.array - held[piece.name].astype(np.float64) for piece in trainer.weights()}


def run_config(model: ModelConfig, data: Path | None = None, **optim: float) -> RunConfig:
    """Without ``data`` nothing is trained on; a large eps keeps AdamW from taking the sign of rounding for a step."""
    return run_config_from_dict(
        {
            "model": model.to_dict(),
            "data": {"sources": [{"path": str(data)}] if data else [], "seq_len": S},
            "train": {"steps": 6, "global_batch": B, "micro_batch": 1, "precision": "fp64"},
            "optim": {"lr": 1e-2, "warmup_steps": 2, **optim},
            "checkpoint": {"every": 3, "keep_last": 2},
        }
    )


def test_training_saving_and_resuming(tmp_path: Path) -> None:
    """Both backends train alike, keep float64 in their checkpoints, go on bit for bit, and take up each other's."""
    config = run_config(PLAIN, write_packed(tmp_path / "packed", PLAIN.vocab_size, S), eps=1e-4)
    trainers = {backend: load(backend, "train").Trainer for backend in BACKENDS}
    for backend, trainer in trainers.items():
        loop.train(trainer, config, tmp_path / backend)
    report = compare_traces(read_metrics(tmp_path / "ms"), read_metrics(tmp_path / "pt"), precision="fp64")
    assert [bound for bound in report.bounds if not bound.holds] == []
    assert max(report.loss + report.grad_norm) <= NEAR
    ends = {backend: dict(tensors(tmp_path / backend)) for backend in BACKENDS}
    assert {array.dtype for end in ends.values() for array in end.values()} == {np.dtype(np.float64)}
    assert compare_tensors(ends["ms"], ends["pt"]).worst() <= LIMIT
    middle = str(tmp_path / "ms" / "step-00000003")
    for backend, trainer in trainers.items():
        loop.train(trainer, config, tmp_path / f"{backend}-resumed", resume=middle)
    again, crossed = (dict(tensors(tmp_path / f"{backend}-resumed")) for backend in BACKENDS)
    assert [name for name in again if again[name].tobytes() != ends["ms"][name].tobytes()] == []
    assert compare_tensors(crossed, ends["pt"]).worst() <= LIMIT


def test_the_forward_command(tmp_path: Path) -> None:
    """Its file holds float64, as computed."""
    source = golden_source("flm101b_like/weights.safetensors", "flm101b_like/config.json", str(tmp_path))
    io, inputs, found = golden_arrays("flm101b_like/io.safetensors"), tmp_path / "inputs.safetensors", {}
    save_file({name: io[name] for name in ("input_ids", "labels")}, inputs)
    parser = argparse.ArgumentParser()
    forward_command.add_arguments(parser)
    for backend in BACKENDS:
        out = str(tmp_path / f"{backend}.safetensors")
        words = ["--backend", backend, "--checkpoint", str(source.path), "--inputs", str(inputs), "--out", out]
        assert forward_command.run(parser.parse_args([*words, "--grads", "--precision", "fp64"])) == 0
        found[backend] = load_file(out)
    assert {array.dtype for arrays in found.values() for array in arrays.values()} == {np.dtype(np.float64)}
    assert len(found["ms"]) > 10 and compare_tensors(found["ms"], found["pt"]).worst() <= NEAR


def tensors(run: Path) -> Iterator[tuple[str, np.ndarray]]:
    checkpoint = open_checkpoint(run)
    for kind in ("weights", "optimizer"):
        for name in checkpoint.names(kind):
            yield f"{kind}/{name}", checkpoint.read(kind, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operators_that_serve_are_named(backend: str) -> None:
    """In float64 those of the composite form where a fused implementation has none."""
    trainer = load(backend, "train").Trainer(run_config(PLAIN))
    said = trainer.implementation()["operators"]
    assert ("composite: linear" in said) is (backend == "ms") and "cpp: " not in said and "amx: " not in said
    single = dataclasses.replace(trainer.config, train=dataclasses.replace(trainer.config.train, precision="fp32"))
    assert "has no float64" not in load(backend, "train").Trainer(single).implementation()["operators"]


def _like(ops: Any, array: np.ndarray) -> Any:
    return test_operators._like(ops, array)


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.asnumpy() if hasattr(tensor, "asnumpy") else tensor.detach().numpy()
