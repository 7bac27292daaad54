"""Catalogue of the faults that `tele parity locate` must name, continued: of the optimizer, batches and targets, masks,
adapters and preference pairs, which lie around the operators of tests/campaigns/locate_catalogue.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from telechat_twins.core.backends import load
from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.train import trainer
from tests.campaigns.located_faults import FORWARD, Framework, fault

Changes = Iterator[tuple[Any, str, Any]]


# The optimizer, the schedule and the loss's divisor: methods of core and of the twins.
def _adamw(wrong: Any) -> Any:
    """A plant that replaces the scalars of an update: ``wrong(step)`` returns others."""

    def plant(backend: str) -> Changes:
        optim = load(backend, "optim")
        real = optim.AdamWStep
        yield optim, "AdamWStep", lambda *args: wrong(real(*args))

    return plant


def _update(name: str, **changes: Any) -> None:
    def wrong(step: Any) -> Any:
        return dataclasses.replace(step, **{key: value(step) for key, value in changes.items()})

    fault(name, "adamw", "embed.weight", "update", _adamw(wrong))


_update("betas swapped", beta1=lambda s: s.beta2, beta2=lambda s: s.beta1)
_update("bias correction missed", step=lambda s: 10_000)
_update("weight decay missed", weight_decay=lambda s: 0.0)
_update("eps of another recipe", eps=lambda s: 1e-4)
_update("clipping ignored", grad_scale=lambda s: 1.0)
_update("learning rate doubled", lr=lambda s: 2 * s.lr)


def _gradients_in_bfloat16(backend: str) -> Changes:
    adamw, framework = load(backend, "optim").AdamW, Framework(backend)
    real = adamw.reduce

    def wrong(self: Any) -> None:
        real(self)
        self.parts = [framework.rounded(part) for part in self.parts]

    yield adamw, "reduce", wrong


fault("gradients summed in bfloat16", "gradient_sum", "head.weight", "backward", _gradients_in_bfloat16)


def _norm_of_one_bucket(backend: str) -> Changes:
    adamw = load(backend, "optim").AdamW
    real = adamw.grad_norm

    def wrong(self: Any) -> float:
        kept, self.parts = self.parts, self.parts[:1]
        buckets, self.gradients.buckets = self.gradients.buckets, self.gradients.buckets[:1]
        try:
            return float(real(self))
        finally:
            self.parts, self.gradients.buckets = kept, buckets

    yield adamw, "grad_norm", wrong


fault("norm of one bucket", "norm", "grad_norm", "backward", _norm_of_one_bucket)


def _targets(wrong: Any) -> Any:
    def plant(backend: str) -> Changes:
        real = trainer.split_batch

        def split(batch: Any, layout: Any, rank: int) -> Any:
            return real(dataclasses.replace(batch, targets=wrong(batch.targets.copy())), layout, rank)

        yield trainer, "split_batch", split

    return plant


def _last_row_ignored(targets: np.ndarray) -> np.ndarray:
    targets[-1] = IGNORE
    return targets


fault("targets of the last row ignored", "cross_entropy", "loss", "forward", _targets(_last_row_ignored))
fault(
    "targets of row zero in every row",
    "cross_entropy",
    "loss",
    "forward",
    _targets(lambda t: np.repeat(t[:1], len(t), 0)),
)


def _count(backend: str) -> Changes:
    real = trainer.BaseTrainer.count_targets
    yield trainer.BaseTrainer, "count_targets", lambda self, count: real(self, count) + 1


fault("one target too many counted", "cross_entropy", "loss", "forward", _count)


def _documents(backend: str) -> Changes:
    ops = load(backend, "ops")
    real = ops.attention_blocks
    yield ops, "attention_blocks", lambda queries, keys, ids: real(queries, keys, None)


fault("documents see each other", "attention", "layers.0.attn.core", "forward", _documents, case="documents")


# Growth masks, adapters, and padding of the vocabulary.
def _mask(which: int) -> Any:
    def plant(backend: str) -> Changes:
        model = load(backend, "model")
        real = model.masks
        yield model, "masks", lambda *args: tuple(None if n == which else x for n, x in enumerate(real(*args)))

    return plant


fault("channels without mask", "rms_norm", "layers.0.attn_norm", "forward", _mask(0), case="growth")
fault("heads without mask", "attention", "layers.0.attn.core", "forward", _mask(1), case="growth")
fault("neurons without mask", "swiglu", "layers.0.ffn.act", "forward", _mask(2), case="growth")


def _new_block(backend: str) -> Changes:
    block = load(backend, "model").DecoderBlock
    real = getattr(block, FORWARD[backend])

    def wrong(self: Any, *args: Any) -> Any:
        kept, self.mask = self.mask, None
        try:
            return real(self, *args)
        finally:
            self.mask = kept

    yield block, FORWARD[backend], wrong


fault("new block without identity", "add", "layers.1", "forward", _new_block, case="growth")


def _adapter_scale(backend: str) -> Changes:
    yield load(backend, "model"), "lora_scale", lambda *_: 1.0


fault("adapter's scale missed", "linear", "layers.0.attn.q", "forward", _adapter_scale, case="lora")


def _adapters(wrong: Any) -> Any:
    def plant(backend: str) -> Changes:
        ops = load(backend, "ops")
        framework, real = Framework(backend), ops.adapted_linears
        yield (
            ops,
            "adapted_linears",
            lambda x, dropped, layers, compute, again=None: wrong(framework, real, x, dropped, layers, compute),
        )

    return plant


fault(
    "adapter's A without gradient",
    "linear",
    "layers.1.ffn.down",
    "backward",
    _adapters(
        lambda f, real, x, d, layers, c: real(x, d, [one._replace(lora_a=f.frozen(one.lora_a)) for one in layers], c)
    ),
    case="lora",
)


def _beta(backend: str) -> Changes:
    from telechat_twins.core.train import preference

    real = preference.pair_loss
    yield preference, "pair_loss", lambda log_probs, reference, beta, *r: real(log_probs, reference, 2 * beta, *r)


fault("beta of preference doubled", "cross_entropy", "loss", "forward", _beta, case="pairs")
