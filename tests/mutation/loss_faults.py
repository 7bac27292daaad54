"""Faults of loss, accumulation, optimizer, adapters and preference pairs, in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import telechat_twins.core.model.lora_dropout as lora_dropout
from telechat_twins.core.backends import load
from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.parity import worker
from telechat_twins.core.train import preference, trainer
from tests.mutation.fault import Change, Tensors, fault

Changes = Iterator[Change]


def _targets(wrong: Callable[[Any], np.ndarray]) -> Changes:
    """``wrong(batch)`` in the place of the targets [B, S] that a rank cuts its part from."""
    real = trainer.split_batch

    def split(batch: Any, layout: Any, cp_rank: int) -> Any:
        return real(dataclasses.replace(batch, targets=wrong(batch)), layout, cp_rank)

    yield trainer, "split_batch", split


@fault("position", "layout single", "loss")
def labels_shifted_twice(backend: str) -> Changes:
    """Inside the model, after they were shifted for it."""

    def wrong(batch: Any) -> np.ndarray:
        targets = np.full_like(batch.targets, IGNORE)
        targets[:, :-1] = batch.targets[:, 1:]
        return targets

    return _targets(wrong)


@fault("position", "layout single", "loss")
def labels_not_shifted(backend: str) -> Changes:
    """Each position predicts its own token."""
    return _targets(lambda batch: np.where(batch.targets == IGNORE, IGNORE, batch.input_ids))


@fault("remainder", "layout single", "loss")
def last_target_dropped(backend: str) -> Changes:
    """The last position that predicts something is left out of the sum, not out of the count."""

    def wrong(batch: Any) -> np.ndarray:
        targets = batch.targets.copy()
        targets[:, -2] = IGNORE
        return targets

    return _targets(wrong)


@fault("factor", "layout single", "loss")
def ignored_targets_counted(backend: str) -> Changes:
    """The mean is taken over all positions, the masked ones among them."""
    yield trainer.BaseTrainer, "count_targets", lambda self, num_targets: 4 * 61


@fault("remainder", "layout single", "loss")
def mask_of_targets_missed(backend: str) -> Changes:
    """Positions without a target have token 0 as theirs."""
    pipeline, t = load(backend, "pipeline"), Tensors(backend)
    real = pipeline.cross_entropy
    yield pipeline, "cross_entropy", lambda logits, targets, *rest: real(logits, t.not_negative(targets), *rest)


@fault("factor", "layout single", "loss")
def mean_of_the_means_of_micro_batches(backend: str) -> Changes:
    """Each micro-batch divides by its own targets."""
    pipeline = load(backend, "pipeline")
    real, run, now = pipeline.cross_entropy, pipeline.Pipeline.run, dict[str, float]()

    def remembers(self: Any, batches: Any, num_targets: int, *rest: Any) -> float:
        now.update(targets=num_targets, parts=len(batches))
        return run(self, batches, num_targets, *rest)

    def wrong(logits: Any, targets: Any, *rest: Any) -> Any:
        own = int((targets != IGNORE).sum())
        return real(logits, targets, *rest) * (now["targets"] / (own * now["parts"]))

    yield pipeline.Pipeline, "run", remembers
    yield pipeline, "cross_entropy", wrong


@fault("dtype", "layout single", "loss")
def logits_in_bfloat16(backend: str) -> Changes:
    """The softmax of a float32 run reads rounded logits."""
    pipeline, t = load(backend, "pipeline"), Tensors(backend)
    real = pipeline.cross_entropy
    yield pipeline, "cross_entropy", lambda logits, *rest: real(t.rounded(logits), *rest)


@fault("factor", "layout single:weights", "loss")
def loss_weights_ignored(backend: str) -> Changes:
    """Every token counts the same."""
    module = load(backend, "losses")
    yield module, "_row_vector", lambda values, beside, real=module._row_vector: real(np.ones_like(values), beside)


@fault("remainder", "layout single", "loss")
def last_micro_batch_dropped(backend: str) -> Changes:
    """What does not make a pair of micro-batches is left out."""
    real = trainer.BaseTrainer._pieces
    yield trainer.BaseTrainer, "_pieces", lambda self, batch: real(self, batch)[:-1]


@fault("twice", "layout single", "loss")
def first_micro_batch_counted_twice(backend: str) -> Changes:
    """It comes again at the end of the step."""
    real = trainer.BaseTrainer._pieces
    yield trainer.BaseTrainer, "_pieces", lambda self, batch: [*real(self, batch), *real(self, batch)[:1]]


@fault("factor", "layout single:fp16", "gradient norm")
def loss_scale_left_in_the_norm(backend: str) -> Changes:
    """The gradient norm of float16 is that of scaled gradients."""
    yield trainer.BaseTrainer, "grad_norm", lambda self, loss_scale: self.optimizer.grad_norm()


@fault("stale", "layout single", "weight's change")
def gradients_of_the_step_before_kept(backend: str) -> Changes:
    """Accumulators are not cleared after an update."""
    adamw, held = load(backend, "optim").AdamW, dict[int, list[Any]]()
    real = adamw.reduce

    def wrong(self: Any) -> None:
        real(self)
        before = held.get(id(self))
        held[id(self)] = [part + 0.0 for part in self.parts]
        if before is not None:
            self.parts = [part + old for part, old in zip(self.parts, before, strict=True)]

    yield adamw, "reduce", wrong


def _scalars(backend: str, wrong: Callable[[Any], dict[str, Any]]) -> Changes:
    """The scalars of an update with what ``wrong(scalars)`` gives in their place."""
    optim = load(backend, "optim")
    real = optim.AdamWStep

    def made(*args: Any) -> Any:
        scalars = real(*args)
        return dataclasses.replace(scalars, **wrong(scalars))

    yield optim, "AdamWStep", made


@fault("factor", "layout single", "weight's change")
def bias_correction_missed(backend: str) -> Changes:
    """Moments are used as if they were old."""
    return _scalars(backend, lambda s: {"step": 10**6})


@fault("position", "layout single", "weight's change")
def updates_counted_from_two(backend: str) -> Changes:
    """The first update has the bias correction of the second."""
    return _scalars(backend, lambda s: {"step": s.step + 1})


@fault("halves", "layout single", "weight's change")
def betas_swapped(backend: str) -> Changes:
    """Each moment decays with the other's rate."""
    return _scalars(backend, lambda s: {"beta1": s.beta2, "beta2": s.beta1})


@fault("factor", "layout single", "weight's change")
def eps_before_the_bias_correction(backend: str) -> Changes:
    """eps is added to the root of the uncorrected moment, as Kingma and Ba's efficient form has it."""
    return _scalars(backend, lambda s: {"eps": s.eps / s.bias_correction2**0.5})


@fault("remainder", "layout single", "weight's change")
def weight_decay_missed(backend: str) -> Changes:
    """No parameter decays."""
    return _scalars(backend, lambda s: {"weight_decay": 0.0})


@fault("factor", "layout single", "weight's change")
def weight_decay_without_the_rate(backend: str) -> Changes:
    """The weight is multiplied by 1 - decay, not by 1 - lr * decay."""
    return _scalars(backend, lambda s: {"weight_decay": s.weight_decay / s.lr})


@fault("schedule", "layout single", "weight's change")
def gains_and_biases_decay(backend: str) -> Changes:
    """Vectors decay as matrices do."""
    optim = load(backend, "optim")
    real = optim.class_decay
    yield optim, "class_decay", lambda config, decays, mup_class: real(config, True, mup_class)


@fault("factor", "layout single", "weight's change")
def weight_decay_in_the_gradient(backend: str) -> Changes:
    """Adam with L2 in the place of AdamW."""
    optim = load(backend, "optim")
    step = optim.AdamW.step

    def wrong(self: Any, lr: float, grad_scale: float) -> None:
        self.parts = [g + w * (0.1 / grad_scale) for g, w in zip(self.parts, self.masters, strict=True)]
        step(self, lr, grad_scale)

    yield optim.AdamW, "step", wrong
    yield from _scalars(backend, lambda s: {"weight_decay": 0.0})


@fault("schedule", "layout single:fp64", "weight's change")
def weight_decay_after_the_update(backend: str) -> Changes:
    """The new weight decays, not the old one: different by lr^2 * decay."""
    optim = load(backend, "optim")
    step = optim.AdamW.step

    def wrong(self: Any, lr: float, grad_scale: float) -> None:
        step(self, lr, grad_scale)
        kept = {p.name: p.array * (1.0 - lr * 0.1 * (p.array.ndim == 2)) for p in self.export_masters()}
        self.load_masters(lambda name, box: kept[name][box])

    yield optim.AdamW, "step", wrong
    yield from _scalars(backend, lambda s: {"weight_decay": 0.0})


@fault("schedule", "layout single", "weight's change")
def gradients_not_clipped(backend: str) -> Changes:
    """The update takes them whatever their norm is."""
    yield worker, "clip_factor", lambda norm, limit: 1.0


@fault("dtype", "layout single", "weight's change")
def masters_in_bfloat16(backend: str) -> Changes:
    """Masters are rounded after every update."""
    from ml_dtypes import bfloat16

    adamw = load(backend, "optim").AdamW
    step = adamw.step

    def wrong(self: Any, lr: float, grad_scale: float) -> None:
        step(self, lr, grad_scale)
        kept = {p.name: p.array.astype(bfloat16).astype(np.float32) for p in self.export_masters()}
        self.load_masters(lambda name, box: kept[name][box])

    yield adamw, "step", wrong


@fault("dtype", "layout single", r"gradient")
def gradients_in_bfloat16(backend: str) -> Changes:
    """Accumulated gradients of a float32 run are rounded once."""
    adamw, t = load(backend, "optim").AdamW, Tensors(backend)
    real = adamw.reduce

    def wrong(self: Any) -> None:
        real(self)
        self.parts = [t.rounded(part) for part in self.parts]

    yield adamw, "reduce", wrong


@fault("remainder", "layout single:mup", "weight's change")
def decay_of_matrices_lost(backend: str) -> Changes:
    """Matrix-like parameters decay as the vector-like ones do."""
    yield load(backend, "optim"), "class_decay", lambda config, decays, mup_class: config.weight_decay * decays


@fault("remainder", "layout single", "gradient norm")
def norm_of_the_first_bucket(backend: str) -> Changes:
    """The gradient norm is that of one group of parameters."""
    adamw = load(backend, "optim").AdamW
    real = adamw.grad_norm

    def wrong(self: Any) -> float:
        parts, buckets = self.parts, self.gradients.buckets
        self.parts, self.gradients.buckets = parts[:1], buckets[:1]
        try:
            return real(self)
        finally:
            self.parts, self.gradients.buckets = parts, buckets

    yield adamw, "grad_norm", wrong


def _adapters(backend: str, wrong: Callable[[Any], dict[str, Any]]) -> Changes:
    """Adapted layers with what ``wrong(layer)`` gives in their place."""
    ops = load(backend, "ops")
    real = ops.Adapted

    def made(*args: Any) -> Any:
        layer = real(*args)
        return layer._replace(**wrong(layer))

    yield ops, "Adapted", made


@fault("adapter", "layout single:lora", "loss")
def adapter_scale_missed(backend: str) -> Changes:
    """B A x is added without alpha / rank."""
    return _adapters(backend, lambda layer: {"scale": 1.0})


@fault("adapter", "layout single:lora", "loss")
def adapter_divided_by_the_rank_twice(backend: str) -> Changes:
    """The scale is alpha / rank^2."""
    return _adapters(backend, lambda layer: {"scale": layer.scale / 3})


@fault("adapter", "layout single:lora", "loss")
def kept_inputs_not_scaled_up(backend: str) -> Changes:
    """Dropout does not divide by what it keeps."""
    yield lora_dropout.LoraDropout, "factor", 1.0


@fault("adapter", "layout single:lora", "loss")
def dropout_left_out(backend: str) -> Changes:
    """Adapters read whole inputs in training."""
    yield load(backend, "model"), "dropped", lambda *args: None


@fault("adapter", "layout single:lora", r"gradient \(.*lora_a\)")
def adapter_trains_b_alone(backend: str) -> Changes:
    """A is a constant."""
    t = Tensors(backend)
    return _adapters(backend, lambda layer: {"lora_a": t.constant(layer.lora_a) + layer.lora_a * 0.0})


@fault("adapter", "layout single:lora", "loss")
def one_mask_for_all_rows(backend: str) -> Changes:
    """Each row of the batch draws the first one's dropout."""
    real = lora_dropout.LoraDropout
    yield trainer, "LoraDropout", lambda rate, seed, step, samples, places: real(rate, seed, step, samples * 0, places)


@fault("adapter", "layout single:lora", "weight's change")
def dropout_of_the_first_step(backend: str) -> Changes:
    """Masks do not change with the step."""
    real = lora_dropout.LoraDropout
    yield trainer, "LoraDropout", lambda rate, seed, step, *rest: real(rate, seed, 0, *rest)


@fault("remainder", "layout single:frozen", "refused")
def frozen_blocks_train(backend: str) -> Changes:
    """train.freeze is not honoured."""
    module = load(backend, "train")
    yield module, "trainable", lambda table, config: dict(table)


def _pairs(wrong: Callable[..., Any]) -> Changes:
    """``wrong(real, config, chosen, rejected)`` in the place of a pair's loss."""
    real = preference.pair_loss
    yield preference, "pair_loss", lambda *args: wrong(real, *args)


@fault("preference", "layout single:pairs", "loss")
def chosen_and_rejected_swapped(backend: str) -> Changes:
    """The rejected answer is preferred."""
    return _pairs(lambda real, config, a, b: real(config, b, a))


@fault("preference", "layout single:pairs", "loss")
def beta_missed(backend: str) -> Changes:
    """The margin is not scaled."""
    return _pairs(lambda real, config, *sides: real(dataclasses.replace(config, beta=1.0), *sides))


@fault("preference", "layout single:pairs", r"gradient")
def slope_without_beta(backend: str) -> Changes:
    """The loss is right, its derivative lacks the factor of the chain rule."""

    def wrong(real: Any, config: Any, *sides: float) -> Any:
        found = real(config, *sides)
        return found._replace(slope=found.slope / config.beta)

    return _pairs(wrong)


@fault("preference", "layout single:pairs", "loss")
def label_smoothing_missed(backend: str) -> Changes:
    """Every preference is certain."""
    return _pairs(lambda real, config, *sides: real(dataclasses.replace(config, label_smoothing=0.0), *sides))


@fault("preference", "layout single:pairs", "loss")
def reference_left_out(backend: str) -> Changes:
    """The margin is that of the model alone."""
    real = preference.PairObjective.__call__
    yield preference.PairObjective, "__call__", lambda self, now, reference: real(self, now, reference * 0.0)


@fault("preference", "layout single:pairs", "loss")
def mean_over_rows_of_pairs(backend: str) -> Changes:
    """Two rows a pair are counted, not one pair."""
    yield trainer.BaseTrainer, "count_targets", lambda self, num_terms: 2 * num_terms


@fault("preference", "layout single:pairs", "loss|gradient")
def log_probability_of_the_mean_token(backend: str) -> Changes:
    """Rows count by their mean token, not by their sum."""
    module = load(backend, "losses")
    real = module.agree

    def wrong(values: list[float], group: Any, op: str) -> list[float]:
        return [value / 60 for value in real(values, group, op)]

    yield module, "agree", wrong
