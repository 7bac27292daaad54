"""Campaign of records: are the sketches' error bars true, and is a single wrong element seen?

    python -m tests.campaigns.record_trials [--trials 1000] [--seq-len 256] [--backend ms|pt]

One training step of telechat2-mini, as initialised, recorded by both backends in fp32 and in float64.

projections   each trial draws a gradient and new signs, and estimates the distance of the two backends' from sketches
              of every size K: the stated interval holds the true one in at least 99 %
elements      each trial makes one element of one gradient wrong by 1e-3 of itself: by tensor (each gradient as often,
              then an element of it), by element (each element as often), and by small tensor (biases and gains), with
              the float64 reference and without: its bound is broken in at least 95 %. Elements that are 0 (rows of an
              embedding that no token reads) have no such error and are not drawn
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.model.batch import Batch, shift_labels
from telechat_twins.core.parity.compare.records import compare_records
from telechat_twins.core.parity.record.blocks import LARGE, grid_with
from telechat_twins.core.parity.record.format import Quantity, Record
from telechat_twins.core.parity.record.read import read_full
from telechat_twins.core.parity.record.sketch import SPREAD, Projection, distance, matrix_shape
from tests.support.recording import record_step

WRONG = 1e-3  # of the element itself
INSIDE, SEEN = 0.99, 0.95
WAYS = ("by tensor", "by element", "by small tensor")
Full = dict[str, np.ndarray]  # by key


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--backend", choices=("ms", "pt"), default="ms", help="whose gradients are made wrong")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        sides = record_sides(Path(folder), args.seq_len, args.backend)
        full = {name: gradients(sides[name]) for name in ("a", "b")}
    rates = error_bars(full, args.trials) | wrong_elements(sides, full["a"], args.trials)
    good = True
    for what, (share, least) in rates.items():
        good &= share >= least
        print(f"{'ok    ' if share >= least else 'MISSED'} {what}: {share:.1%} of {args.trials}, at least {least:.0%}")
    return 0 if good else 1


def record_sides(folder: Path, seq_len: int, backend: str) -> dict[str, Record]:
    """One step of the mini model: of ``backend`` ("a"), of the other ("b"), and in float64 ("reference")."""
    other = "pt" if backend == "ms" else "ms"
    made = {}
    for name, (which, precision) in {"a": (backend, "fp32"), "b": (other, "fp32"), "reference": ("pt", "fp64")}.items():
        config = mini(seq_len, precision)
        ids = np.random.default_rng(1).integers(0, config.model.num_tokens, (1, seq_len)).astype(np.int32)
        batch = Batch(ids, shift_labels(ids), np.arange(seq_len, dtype=np.int32)[None])
        kept = ("gradient:*",) if name != "reference" else ()
        made[name] = record_step(which, config, folder / name, kept, batch, weights="normal")
    return made


def mini(seq_len: int, precision: str) -> RunConfig:
    return run_config_from_dict(
        {
            "model": "telechat2-mini",
            "data": {"sources": [], "seq_len": seq_len},
            "train": {"steps": 1, "global_batch": 1, "micro_batch": 1, "precision": precision},
            "optim": {"lr": 1e-3},
        }
    )


def gradients(record: Record) -> Full:
    return {key: read_full(record, key) for key in record.full}


def error_bars(full: dict[str, Full], trials: int) -> dict[str, tuple[float, float]]:
    """By K, the share of trials whose interval holds the true distance of the two backends' gradients."""
    random, inside = np.random.default_rng(2), Counter[int]()
    keys = [key for key, values in full["a"].items() if values.size <= 1 << 20]  # larger ones take longer and no more
    for trial in range(trials):
        key = keys[random.integers(len(keys))]
        apart = full["a"][key].astype(np.float64) - full["b"][key]
        true = float(np.linalg.norm(apart))
        whole = Projection(f"{key}/{trial}", apart.shape, max(SPREAD))
        sketch = whole.box(apart, (0,) * apart.ndim).sketch
        for buckets in SPREAD:
            if apart.size > max(SPREAD):
                mine = sketch.reshape(-1, buckets).sum(axis=0)  # buckets that a shorter hash makes one
            else:
                mine = Projection(whole.name, apart.shape, buckets).box(apart, (0,) * apart.ndim).sketch
            found = distance(mine, np.zeros(buckets), apart.shape)
            inside[buckets] += found.low <= true * (1 + 1e-9) and true <= found.high * (1 + 1e-9)
    return {f"distances inside their error bars, K = {k}": (inside[k] / trials, INSIDE) for k in SPREAD}


def wrong_elements(sides: dict[str, Record], full: Full, trials: int) -> dict[str, tuple[float, float]]:
    """By how elements are drawn, with and without the reference, the share of trials whose bound is broken."""
    a, b, reference = sides["a"], sides["b"], sides["reference"]
    for judge in (reference, None):
        broken = [row.key for row in compare_records(a, b, judge).quantities if not row.holds]
        if broken:
            raise SystemExit(f"equal runs break {broken[:3]} already")
    places = {key: np.flatnonzero(values) for key, values in full.items()}
    found = {}
    for way in WAYS:
        random, seen, missed = np.random.default_rng(3), Counter[str](), Counter[str]()
        for _ in range(trials):
            key, place = draw(way, places, full, random)
            wrong = with_wrong_element(a.quantities[key], full[key], place, a.header.seed)
            for label, judge in (("with", reference), ("without", None)):
                one, two, three = (None if r is None else only(r, key) for r in (a, b, judge))
                assert one is not None and two is not None
                one.quantities[key] = wrong
                (row,) = (r for r in compare_records(one, two, three).quantities if r.key == key)
                seen[label] += not row.holds
                missed[key] += row.holds
        print(f"{way}: missed most in {', '.join(f'{key} ({n})' for key, n in missed.most_common(4) if n)}", flush=True)
        for label in ("with", "without"):
            found[f"wrong elements seen, {way}, {label} a reference"] = (seen[label] / trials, SEEN)
    return found


def draw(way: str, places: dict[str, np.ndarray], full: Full, random: np.random.Generator) -> tuple[str, int]:
    """Key and number of an element that is not 0."""
    keys = [key for key, held in places.items() if len(held) and (way != "by small tensor" or full[key].size <= LARGE)]
    sizes = np.array([len(places[key]) if way == "by element" else 1 for key in keys], np.float64)
    key = keys[int(random.choice(len(keys), p=sizes / sizes.sum()))]
    return key, int(places[key][random.integers(len(places[key]))])


def with_wrong_element(quantity: Quantity, values: np.ndarray, place: int, seed: int) -> Quantity:
    """The quantity as if element ``place`` were wrong: sketches, sums and blocks are linear."""
    shape = matrix_shape(quantity.shape)
    row, column = divmod(place, shape[1])
    old = float(values.reshape(-1)[place])
    new = float(np.float32(old * (1 + WRONG)))
    projection = Projection(quantity.name, quantity.shape, len(quantity.sketch), seed)
    apart = projection.slice(np.array([[new - old]]), np.array([row]), column)
    blocks = quantity.blocks
    if blocks is not None:
        grid = grid_with(shape, blocks.shape)
        assert grid is not None
        sums = np.zeros(grid.blocks)
        grid.add(sums, np.array([[new - old]]), np.array([row]), column)
        blocks = (blocks.astype(np.float64) + sums).astype(np.float32)
    return dataclasses.replace(
        quantity,
        norm2=quantity.norm2 + new * new - old * old,
        sum=quantity.sum + new - old,
        min=min(quantity.min, new),  # the element has grown, so that an extreme is the old one or itself
        max=max(quantity.max, new),
        sketch=quantity.sketch + apart.sketch,
        blocks=blocks,
    )


def only(record: Record, key: str) -> Record:
    """The gradients of a record, of which others than ``key`` stand for their kind's median and have no blocks."""
    held = {
        k: q if k == key else dataclasses.replace(q, blocks=None)
        for k, q in record.quantities.items()
        if q.kind == "gradient"
    }
    return dataclasses.replace(record, quantities=held)


if __name__ == "__main__":
    raise SystemExit(main())
