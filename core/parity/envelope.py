"""Drift envelope: the band in which an equal device's loss and gradient norm stay, step by step.

Training magnifies rounding, and by how much depends on the recipe and on the step. The envelope measures it: the same
run is made without noise (the centre) and K times with rounding noise in every operator's output
(core.parity.noise). A run of an equal device, framework or layout differs from the centre as these do. The rule:

    d[k, t] = |noisy run k - centre| / |centre| at step t
    limit[t] = MARGIN * max over k and over the steps t - WINDOW .. t + WINDOW of d, at least FLOOR u

The window is there because two runs may meet at one step by chance; MARGIN because K runs are not the largest of all,
and because an operator sums in another order and is then off by several roundings, not by one. FLOOR u is that of the
sums that make the two columns, in another order, before anything has been magnified: u is float32's, in fp64 float64's.
The file is JSON; docs/mutation.md describes its keys.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from telechat_twins.core import backends
from telechat_twins.core.checkpoint.source import OpenInitial
from telechat_twins.core.config import RunConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.files.foreign import load_json
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.parity.bounds import UNIT_ROUNDOFF, Bound
from telechat_twins.core.parity.noise import NoiseSource, noisy_operators
from telechat_twins.core.train import loop
from telechat_twins.core.train.metrics import Row, column, read_metrics
from telechat_twins.core.train.stepper import Stepper
from telechat_twins.core.types import JsonObject

VERSION = 1
COLUMNS = ("loss", "grad_norm")
MARGIN, WINDOW, FLOOR = 4.0, 5, 16.0
RULE = (
    f"limit[t] = {MARGIN:g} x the largest relative deviation of the K noisy runs from the centre, steps t-{WINDOW} to "
    f"t+{WINDOW}, at least {FLOOR:g} u"
)


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """``centre`` and ``limits`` by column (loss, grad_norm), one number a step of ``steps``: an equal device's value
    lies within centre * (1 +- limit). ``runs``: K; ``seed``: of the noise; ``noise``: its size e, relative; ``config``:
    SHA-256 of the run's configuration, without its layout and output."""

    precision: str
    backend: str
    runs: int
    seed: int
    noise: float
    config: str
    steps: list[int]
    centre: dict[str, list[float]]
    limits: dict[str, list[float]]

    def bounds(self, rows: Sequence[Row], against: Sequence[Row] | None = None) -> list[Bound]:
        """Whether a run's rows stay inside: of loss and gradient norm the largest share of its limit, limit 1.

        ``against``: rows to measure from, by default the centre. Steps that the envelope does not have are a bound of
        their own; so are steps that only one of the two has.
        """
        there = {row["step"]: row for row in rows}
        base = None if against is None else {row["step"]: row for row in against}
        missing = set(self.steps) ^ set(there)
        if base is not None:
            missing |= set(self.steps) ^ set(base)
        found = [
            Bound(
                "steps outside the envelope",
                float(len(missing)),
                0.0,
                f"the envelope has steps {self.steps[0]} to {self.steps[-1]}",
                "envelope.steps",
            )
        ]
        for key, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
            shares = {}
            for number, step in enumerate(self.steps):
                if step in missing:
                    continue
                truth = self.centre[key][number] if base is None else _number(base[step], key)
                shares[step] = _relative(_number(there[step], key), truth) / self.limits[key][number]
            worst = max(shares, key=lambda step: math.inf if math.isnan(shares[step]) else shares[step], default=0)
            source = f"at step {worst}; {RULE}; K = {self.runs}, {self.precision}, seed {self.seed}"
            found.append(
                Bound(f"{name}, share of its envelope", shares.get(worst, 0.0), 1.0, source, f"envelope.{key}")
            )
        return found

    def to_dict(self) -> JsonObject:
        """The file's JSON."""
        tree = asdict(self)
        limits = {key: [x if math.isfinite(x) else None for x in values] for key, values in tree.pop("limits").items()}
        tree["centre"] = {key: [None if math.isnan(x) else x for x in values] for key, values in self.centre.items()}
        band = {key: {"low": [None if x is None else -x for x in limits[key]], "high": limits[key]} for key in COLUMNS}
        return {"format": "tele-envelope", "version": VERSION, "rule": RULE, **tree, **band}


def limits_of(deviations: Mapping[str, Sequence[Sequence[float]]], precision: str) -> dict[str, list[float]]:
    """The rule: limits [steps] by column, from relative deviations [K][steps] by column. A deviation that is no number
    makes its window's limit infinite."""
    floor = FLOOR * UNIT_ROUNDOFF["fp64" if precision == "fp64" else "fp32"]
    found = {}
    for key, runs in deviations.items():
        largest = [max(math.inf if math.isnan(x) else x for x in at) for at in zip(*runs, strict=True)]
        spread = [max(largest[max(0, t - WINDOW) : t + WINDOW + 1]) for t in range(len(largest))]
        found[key] = [max(floor, MARGIN * x) for x in spread]
    return found


def measure(
    backend: str,
    config: RunConfig,
    runs: int,
    seed: int,
    open_initial: OpenInitial | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Envelope:
    """The envelope of a run: trains it 1 + ``runs`` times on one device, in this process. ``say``: progress, a line a
    run. UserError when two runs do not have the same steps (one was stopped)."""
    centre = noisy_rows(backend, config, None, open_initial)
    say(f"centre: {len(centre)} steps, loss {centre[-1]['loss']:.4f}")
    deviations: dict[str, list[list[float]]] = {key: [] for key in COLUMNS}
    for number in range(runs):
        rows = noisy_rows(backend, config, seed + number, open_initial)
        if [row["step"] for row in rows] != [row["step"] for row in centre]:
            raise UserError(f"noisy run {number + 1} made {len(rows)} of {len(centre)} steps; see health.spike_policy")
        for key in COLUMNS:
            pairs = zip(column(rows, key), column(centre, key), strict=True)
            deviations[key].append([_relative(a, b) for a, b in pairs])
        largest = max(deviations["loss"][-1])
        say(f"noisy run {number + 1} of {runs}: loss at most {largest:.1e} from the centre")
    precision = config.train.precision
    return Envelope(
        precision=precision,
        backend=backend,
        runs=runs,
        seed=seed,
        noise=2 * UNIT_ROUNDOFF[precision],
        config=config_digest(config),
        steps=[row["step"] for row in centre],
        centre={key: column(centre, key) for key in COLUMNS},
        limits=limits_of(deviations, precision),
    )


def noisy_rows(backend: str, config: RunConfig, seed: int | None, open_initial: OpenInitial | None = None) -> list[Row]:
    """Rows of metrics of one run on one device in a folder of its own, with noise of ``seed`` or, for None, without."""
    config = replace(config, parallel=Layout(), checkpoint=replace(config.checkpoint, every=0))
    make: Callable[[RunConfig], Stepper] = backends.load(backend, "train").Trainer
    with tempfile.TemporaryDirectory(prefix="tele-envelope-") as folder, contextlib.ExitStack() as active:
        if seed is not None:
            source = NoiseSource(config.train.precision, seed)
            active.enter_context(noisy_operators(backend, source))
            make = _counted(make, source)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            loop.train(make, config, folder, open_initial=open_initial)
        return read_metrics(folder)


def _counted(make: Callable[[RunConfig], Stepper], source: NoiseSource) -> Callable[[RunConfig], Stepper]:
    """Steppers that tell ``source`` which update the operators are called for."""

    def made(config: RunConfig) -> Stepper:
        stepper = make(config)
        real = stepper.gradients

        def gradients(*args: object, **options: object) -> float:
            source.begin(stepper.step)
            return real(*args, **options)  # type: ignore[arg-type]

        setattr(stepper, "gradients", gradients)  # noqa: B010  # an instance's own, in front of its class's
        return stepper

    return made


def config_digest(config: RunConfig) -> str:
    """SHA-256 of what decides a run's numbers: all but layout, checkpoints and choice of operators."""
    tree = config.to_dict()
    for key in ("parallel", "checkpoint", "kernels"):
        tree.pop(key, None)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def write_envelope(envelope: Envelope, path: Path) -> None:
    """Write the JSON file at once, or not at all."""
    text = json.dumps(envelope.to_dict(), allow_nan=False, separators=(",", ":"))
    write_text(path, text + "\n")


def read_envelope(path: str | Path) -> Envelope:
    """The file that ``write_envelope`` wrote. UserError for a file that is none, or of another version."""
    path = Path(path)
    tree = load_json(path, "an envelope, written by `tele parity envelope`")
    try:
        if tree["format"] != "tele-envelope" or tree["version"] != VERSION:
            raise UserError(
                f"{path}: format '{tree['format']}' version {tree['version']}, needs tele-envelope version {VERSION}; "
                "measure it again with `tele parity envelope`"
            )
        steps = [int(step) for step in tree["steps"]]
        centre = {key: [_or(x, math.nan) for x in tree["centre"][key]] for key in COLUMNS}
        limits = {key: [_or(x, math.inf) for x in tree[key]["high"]] for key in COLUMNS}
        found = Envelope(
            precision=str(tree["precision"]),
            backend=str(tree["backend"]),
            config=str(tree["config"]),
            runs=int(tree["runs"]),
            seed=int(tree["seed"]),
            noise=float(tree["noise"]),
            steps=steps,
            centre=centre,
            limits=limits,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not an envelope ({error!r}); write it with `tele parity envelope`") from None
    columns = [*found.centre.values(), *found.limits.values()]
    if not steps or any(len(values) != len(steps) for values in columns):
        raise UserError(f"{path}: columns of different lengths; write it again with `tele parity envelope`")
    if any(not limit > 0.0 for values in found.limits.values() for limit in values):
        raise UserError(f"{path}: limits must be above 0; write it again with `tele parity envelope`")
    return found


def _or(value: object, missing: float) -> float:
    """A number of the file; null is ``missing``."""
    return missing if value is None else float(value)  # type: ignore[arg-type]


def _number(row: Row, key: str) -> float:
    value = row.get(key)
    return math.nan if value is None else float(value)


def _relative(a: float, b: float) -> float:
    """|a - b| / |b|; 0 where neither is a number (a skipped step)."""
    if math.isnan(a) and math.isnan(b):
        return 0.0
    return abs(a - b) / abs(b) if b else abs(a - b)
