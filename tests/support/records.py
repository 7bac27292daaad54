"""Synthetic records: every quantity of a small model from random numbers, with faults planted by key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from telechat_twins.core.config import RunConfig, load_run_config
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.parity.record.format import (
    Header,
    Quantity,
    Record,
    digest_of,
    quantity,
    quantity_key,
    write_record,
)
from telechat_twins.core.parity.record.sites import sites
from telechat_twins.core.parity.record.sketch import BUCKETS, Projection

Change = Callable[[np.ndarray], np.ndarray]
PARAMETER_KINDS = ("gradient", "weight_before", "weight_after", "moment1", "moment2")


def tensors(config: RunConfig, rows: int, seq_len: int, step: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float64 tensors by quantity key, in execution order: activations, their gradients, then parameters."""
    rng, found = np.random.default_rng(seed), {}
    places = sites(config.model, config.lora)
    for kind in ("activation", "activation_grad"):
        for site in places if kind == "activation" else reversed(places[:-2]):
            found[quantity_key(kind, site.name, step)] = rng.standard_normal(site.shape(rows, seq_len))
    for kind in PARAMETER_KINDS:
        for name, spec in parameter_table(config.model).items():
            values = rng.standard_normal(spec.shape)
            found[quantity_key(kind, name, step)] = values**2 if kind == "moment2" else values
    return found


def sketched(key: str, values: np.ndarray, buckets: int = BUCKETS, seed: int = 0) -> Quantity:
    """The quantity of a whole tensor."""
    kind, _, rest = key.partition(":")
    name, _, step = rest.rpartition("@")
    projection = Projection(name, values.shape, buckets, seed)
    statistics = projection.box(values, (0,) * values.ndim)
    return quantity(kind, name, int(step), values.shape, values.dtype.name, statistics)


def synthetic_record(
    path: Path,
    config: str = "telechat2-tiny",
    *,
    backend: str = "pt",
    precision: str = "fp32",
    layout: str = "single",
    rows: int = 2,
    seq_len: int = 16,
    seed: int = 0,
    noise: float = 0.0,
    noise_seed: int = 1,
    changes: Mapping[str, Change] | None = None,
    weights: str = "same",
    steps: int = 3,
) -> Record:
    """Write a record of random tensors and return it.

    ``noise``: relative rounding noise, of every element. ``changes``: faults by quantity key, applied to its tensor
    before the noise. ``weights``: what the digest of the weights stands for. ``steps``: rows of the trace; the first
    has quantities.
    """
    run = load_run_config(config, [])
    rng = np.random.default_rng(noise_seed)
    held = tensors(run, rows, seq_len, seed=seed)
    held[quantity_key("activation", "loss", 1)] = np.array(7.5)
    held[quantity_key("activation", "grad_norm", 1)] = np.array(2.5)
    for key, change in (changes or {}).items():
        held[key] = change(held[key].copy())
    held = {key: np.asarray(x * (1 + noise * rng.standard_normal(x.shape))) for key, x in held.items()}
    loss = float(held[quantity_key("activation", "loss", 1)])
    header = Header(
        backend=backend,
        device="cpu",
        layout=layout,
        precision=precision,
        versions={"telechat-twins": "0", "python": "3.11", "numpy": np.__version__},
        config=run.to_dict(),
        digests={"weights": digest_of(weights), "batch": digest_of("batch"), "config": digest_of(run.model.to_dict())},
        steps=[1],
        rows=rows,
        seq_len=seq_len,
        loss=loss,
        grad_norm=2.5,
    )
    trace = [
        {"step": step, "loss": loss * (1 - 0.01 * step) * (1 + noise), "grad_norm": 2.5 / step, "lr": 1e-3}
        for step in range(1, steps + 1)
    ]
    return write_record(path, header, trace, (sketched(key, values) for key, values in held.items()))


def apart(a: Record, b: Record) -> dict[str, float]:
    """Relative distance of every quantity that both records have: the largest of those of sketches, norms and extremes;
    infinite where counts differ."""
    found = {}
    for key in a.quantities.keys() & b.quantities.keys():
        x, y = a.quantities[key], b.quantities[key]
        if (x.shape, x.count, x.nonfinite) != (y.shape, y.count, y.nonfinite):
            found[key] = float("inf")
            continue
        gaps = [float(np.linalg.norm(x.sketch - y.sketch)), x.norm - y.norm, x.min - y.min, x.max - y.max]
        found[key] = max(map(abs, gaps)) / (x.norm or 1.0)
    return found
