"""Token weights and preference pairs: loss and every gradient, by name, of both twins against the independent float64
decoder of tests/campaigns with the two losses written here from their definitions."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.backends import load
from telechat_twins.core.config import DataConfig, OptimConfig, PreferenceConfig, RunConfig, TrainConfig
from telechat_twins.core.model.batch import IGNORE, Batch, shift_labels
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.model.lora import LoraConfig, lora_table
from telechat_twins.core.parity.bounds import compare_tensors
from telechat_twins.core.train import preference
from tests.campaigns.float64_decoder import Shape
from tests.campaigns.float64_run import Criterion, Inputs, run
from tests.support.frameworks import BACKENDS

MODEL = ModelConfig(
    family="flm", norm="rmsnorm", activation="swiglu", biases="none", position="rope", vocab_size=83, hidden_size=32,
    ffn_hidden_size=48, num_layers=2, num_heads=4, num_kv_heads=2, norm_eps=1e-5, rope_theta=10000.0,
    training_seqlen=64, base_seqlen=64, max_seqlen=64, input_mult=1.2, logit_mult=0.7, tied_embeddings=False,
)  # fmt: skip
SHAPE = Shape(
    family="teleflm", V=83, E=32, F=48, L=2, H=4, K=2, eps=1e-5, theta=10000.0, input_mult=1.2, logit_mult=0.7
)
B, S = 4, 21
LORA = LoraConfig(rank=3, alpha=6.0, targets=["all-linear"])
DPO = PreferenceConfig(beta=0.25, label_smoothing=0.1)
# Measured: 3e-15 (fp64) and 1.5e-6 (fp32); planted faults are at 0.5 and more.
LIMITS = {"fp64": 1e-12, "fp32": 1e-5}
FAULT = 1e-2


@cache
def batch() -> Batch:
    """Rows of unequal lengths, as two pairs, with weights that are not all alike."""
    random = np.random.default_rng(5)
    ids = random.integers(0, 83, (B, S)).astype(np.int32)
    targets = shift_labels(ids)
    for row, (first, last) in enumerate(((4, 20), (4, 15), (9, 18), (9, 20))):
        targets[row, :first] = targets[row, last:] = IGNORE
    positions = np.tile(np.arange(S, dtype=np.int32), (B, 1))
    weights = random.uniform(0.1, 3.0, (B, S)).astype(np.float32)
    reference = -4.5 * (targets != IGNORE).sum(1) + random.normal(0.0, 2.0, B)
    return Batch(ids, targets, positions, weights=weights, reference=reference)


def weighted() -> Batch:
    return replace(batch(), reference=None)


def pairs() -> Batch:
    return replace(batch(), weights=None)


def token_losses(logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-log softmax(logits)[target] [B, S] and each one's derivative by its logits [B, S, V]."""
    counted = targets != IGNORE
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    chosen = np.eye(logits.shape[-1])[np.where(counted, targets, 0)]
    return -np.log((p * chosen).sum(-1)) * counted, (p - chosen) * counted[..., None]


def weighted_mean(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    losses, slopes = token_losses(logits, targets)
    weights = batch().weights
    assert weights is not None
    share = weights.astype(np.float64) / (targets != IGNORE).sum()
    return float((losses * share).sum()), slopes * share[..., None]


def dpo(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Equation 7 of arXiv 2305.18290 with smoothed labels, and its derivative."""
    losses, slopes = token_losses(logits, targets)
    gains = -losses.sum(1) - batch().reference
    margin = DPO.beta * (gains[0::2] - gains[1::2])
    e = DPO.label_smoothing
    sigmoid = 1.0 / (1.0 + np.exp(-margin))
    loss = -((1 - e) * np.log(sigmoid) + e * np.log(1 - sigmoid))
    d_margin = e * sigmoid - (1 - e) * (1 - sigmoid)
    factor = np.empty(B)
    factor[0::2], factor[1::2] = -DPO.beta * d_margin, DPO.beta * d_margin
    return float(loss.mean()), slopes * (factor / (B // 2))[:, None, None]


def released(name: str) -> str:
    """The name of a logical parameter in the decoder of the campaign."""
    ends = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not name.startswith("layers."):
        return ends.get(name, "lm_head.weight")
    _, number, *rest = name.split(".")
    parts = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    inner = parts.get(rest[0]) or {"attn": "self_attn", "ffn": "mlp"}[rest[0]] + f".{rest[1]}_proj"
    return f"model.layers.{number}.{inner}.weight"


@cache
def weights() -> dict[str, np.ndarray]:
    return init_weights(MODEL, 3, "strong")


@cache
def truth(criterion: Criterion, with_adapters: bool = False) -> dict[str, Any]:
    given, held = batch(), merged() if with_adapters else {n: w.astype(np.float64) for n, w in weights().items()}
    held = {released(name): w for name, w in held.items()}
    labels = np.full_like(given.targets, IGNORE)
    labels[:, 1:] = given.targets[:, :-1]
    found = run(SHAPE, held, Inputs(given.input_ids, labels), criterion=criterion)
    return found | {"grads": {name: found["grads"][released(name)] for name in weights()}}


@cache
def adapters() -> dict[str, np.ndarray]:
    """Values of adapters of all linears, B too, as after some training."""
    random = np.random.default_rng(11)
    return {name: random.normal(0.0, 0.3, spec.shape) for name, spec in lora_table(MODEL, LORA).items()}


def merged() -> dict[str, np.ndarray]:
    """W + alpha / r B A of every linear with an adapter."""
    held = {name: w.astype(np.float64) for name, w in weights().items()}
    for name in {name.rpartition(".")[0] for name in adapters()}:
        a, b = (adapters()[f"{name}.lora_{side}"] for side in "ab")
        held[f"{name}.weight"] = held[f"{name}.weight"] + LORA.alpha / LORA.rank * b @ a
    return held


def trainer(backend: str, precision: str, config: PreferenceConfig | None, lora: LoraConfig | None = None) -> Any:
    made = load(backend, "train").Trainer(
        RunConfig(
            model=MODEL,
            data=DataConfig(sources=[], seq_len=S),
            train=TrainConfig(steps=9, global_batch=B, micro_batch=2, precision=precision),
            optim=OptimConfig(lr=1e-3),
            preference=config,
            lora=lora,
        )
    )
    made.load_weights(lambda name, box: weights()[name][box])
    if lora is not None:
        made.optimizer.load_masters(lambda name, box: adapters()[name][box])
    return made


def found(backend: str, given: Batch, precision: str = "fp64", lora: LoraConfig | None = None) -> dict[str, Any]:
    made = trainer(backend, precision, None if given.reference is None else DPO, lora)
    loss = made.gradients(given, given.num_terms, 1.0)
    gradients = {piece.name: np.array(piece.array, np.float64) for piece in made.optimizer.export_gradients()}
    return {"loss": loss, "grads": gradients, "metrics": made.preference_metrics}


def distance(got: dict[str, Any], exact: dict[str, Any]) -> float:
    """The largest relative error of the loss and of each gradient."""
    return max(abs(got["loss"] / exact["loss"] - 1), compare_tensors(got["grads"], exact["grads"]).worst())


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_definitions(backend: str, precision: str) -> None:
    for given, criterion in ((weighted(), weighted_mean), (pairs(), dpo)):
        apart = distance(found(backend, given, precision), truth(criterion))
        print(f"{backend} {precision} {criterion.__name__}: {apart:.1e}")
        assert apart <= LIMITS[precision]


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_learn_preferences(backend: str) -> None:
    """Gradients of A and B from that of the merged weight: dA = s B^T dW, dB = s dW A^T. The live reference is what
    the base without them says, and leaves them on."""
    exact, scale = truth(dpo, with_adapters=True), LORA.alpha / LORA.rank
    expected = {}
    for name in adapters():
        layer, _, side = name.rpartition(".")
        a, b, dw = adapters()[f"{layer}.lora_a"], adapters()[f"{layer}.lora_b"], exact["grads"][f"{layer}.weight"]
        expected[name] = scale * (b.T @ dw if side == "lora_a" else dw @ a.T)
    assert distance(found(backend, pairs(), lora=LORA), exact | {"grads": expected}) <= LIMITS["fp64"]
    made = trainer(backend, "fp64", DPO, LORA)
    for what, base in ((truth(dpo), True), (exact, False)):
        losses, _ = token_losses(what["logits"], batch().targets)
        assert made.log_probs(pairs(), base=base) == pytest.approx(-losses.sum(1), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_and_log_probabilities(backend: str) -> None:
    losses, _ = token_losses(truth(dpo)["logits"], batch().targets)
    gains = -losses.sum(1) - batch().reference
    margins = DPO.beta * (gains[0::2] - gains[1::2])
    metrics = found(backend, pairs())["metrics"]
    assert metrics["reward_margin"] == pytest.approx(margins.mean(), rel=1e-12)
    assert metrics["reward_accuracy"] == (margins > 0).mean()
    assert trainer(backend, "fp64", DPO).log_probs(pairs()) == pytest.approx(-losses.sum(1), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_one_change_nothing(backend: str) -> None:
    """To rounding: the plain loss has an operator of its own."""
    ones = replace(weighted(), weights=np.ones((B, S), np.float32))
    assert distance(found(backend, ones), found(backend, replace(ones, weights=None))) <= LIMITS["fp64"]


def swapped(patch: pytest.MonkeyPatch, backend: str) -> None:
    right = preference.pair_loss
    patch.setattr(preference, "pair_loss", lambda config, chosen, rejected: right(config, rejected, chosen))


def moving_reference(patch: pytest.MonkeyPatch, backend: str) -> None:
    """The reference is what the model itself says now."""
    right = preference.PairObjective.__call__
    patch.setattr(preference.PairObjective, "__call__", lambda self, now, reference: right(self, now, now))


def lost_beta(patch: pytest.MonkeyPatch, backend: str) -> None:
    right = preference.pair_loss
    patch.setattr(preference, "pair_loss", lambda config, *gains: right(replace(config, beta=1.0), *gains))


def lost_weights(patch: pytest.MonkeyPatch, backend: str) -> None:
    """The plain cross-entropy in the place of the weighted one."""
    pipeline = load(backend, "pipeline")
    tensor = {"ms": lambda a: load("ms", "ops").Tensor(a), "pt": lambda a: load("pt", "ops").torch.from_numpy(a)}
    patch.setattr(
        pipeline,
        "weighted_cross_entropy",
        lambda logits, local, size, mesh: pipeline.cross_entropy(logits, tensor[backend](local.targets), size, mesh),
    )


def mask_off_by_one(patch: pytest.MonkeyPatch, backend: str) -> None:
    """Each row's targets start, and end, one place late."""
    from telechat_twins.core.train import trainer as module

    right = module.split_batch

    def faulty(given: Batch, *rest: Any) -> Any:
        labels = shift_labels(given.input_ids)
        late = np.zeros_like(given.targets, bool)
        late[:, 1:] = given.targets[:, :-1] != IGNORE
        return right(replace(given, targets=np.where(late, labels, IGNORE)), *rest)

    patch.setattr(module, "split_batch", faulty)


FAULTS = {
    "chosen and rejected swapped": (swapped, dpo),
    "reference moving": (moving_reference, dpo),
    "beta lost": (lost_beta, dpo),
    "mask off by one": (mask_off_by_one, dpo),
    "weights lost": (lost_weights, weighted_mean),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_planted_fault_is_seen(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, criterion = FAULTS[name]
    plant(monkeypatch, backend)
    apart = distance(found(backend, pairs() if criterion is dpo else weighted()), truth(criterion))
    print(f"{backend} {name}: {apart:.1e}")
    assert apart > FAULT


def test_pair_loss_at_its_ends() -> None:
    """No overflow for any margin, and the slope is the derivative."""
    for margin in (-1e4, -3.0, 0.0, 3.0, 1e4):
        at = preference.pair_loss(DPO, margin / DPO.beta, 0.0)
        step = 1e-6
        up, down = (preference.pair_loss(DPO, (margin + d) / DPO.beta, 0.0).loss for d in (step, -step))
        assert np.isfinite(at.loss) and at.margin == pytest.approx(margin)
        assert at.slope == pytest.approx(DPO.beta * (up - down) / (2 * step), rel=1e-4, abs=1e-6)
    assert preference.pair_loss(PreferenceConfig(), 0.0, 0.0).loss == pytest.approx(np.log(2.0))
