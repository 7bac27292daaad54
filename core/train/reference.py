"""Reference log-probabilities of preference training: of the initial weights, computed once and kept with the run.

    reference.bin    float64 little-endian, one number a stored sequence: sources in order, sequences in order
    reference.json   what they belong to (data, initial weights, length), and the SHA-256 once all are there

Both lie in the run's folder. An interrupted pass goes on where it stopped; a run that is resumed reads them, since its
weights have moved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from telechat_twins.core.config import RunConfig
from telechat_twins.core.data.blend import Blend
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.files.foreign import load_json
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.train.agreement import meet, run_on_all
from telechat_twins.core.train.stepper import Stepper
from telechat_twins.core.types import JsonObject

VALUES, FACTS = "reference.bin", "reference.json"


def check_preference(config: RunConfig, blend: Blend) -> None:
    """UserError unless the data are pairs exactly where the run has a ``preference`` section."""
    if config.preference is not None and not blend.pairs:
        source = blend.sources[0]
        raise UserError(
            f"preference: needs pairs, and data.sources[0] {source.path} is of kind '{source.kind}'; "
            "pack chosen and rejected answers with `tele data --preference`, or leave the section out"
        )
    if config.preference is None and blend.pairs:
        raise UserError(
            f"data.sources[0]: {blend.sources[0].path} holds preference pairs; add a `preference:` section "
            "(preference.beta=0.1), or name data of another kind"
        )


def origin_of(config: RunConfig, init: JsonObject | None) -> JsonObject:
    """The identity of a run's initial weights: fingerprint of ``train.init``'s model, else model and seed."""
    if init is not None:
        return {"init": init["fingerprint"]}
    return {"seed": config.train.seed, "model": config.model.to_dict()}


def with_live_reference(stepper: Stepper, batch: Batch, first: int) -> Batch:
    """``batch``, which is rows ``first`` and on of a global batch, with the log-probabilities of the adapters' base."""
    found = stepper.log_probs(batch, base=True)
    return dataclasses.replace(batch, reference=np.asarray(found[first : first + len(batch.input_ids)]))


class Reference:
    """The reference of one run on one rank. ``values`` float64, nan where not computed yet."""

    def __init__(self, folder: Path, blend: Blend, origin: JsonObject) -> None:
        self.folder, self.blend = folder, blend
        sizes = [blend.rows_per_sample * samples for samples in blend.num_samples]
        self.starts = np.cumsum([0, *sizes])
        self.values = np.full(int(self.starts[-1]), np.nan)
        data = [source.digest() for source in blend.sources]
        facts = {"data": data, "seq_len": blend.seq_len, "isolate": blend.isolate, "origin": origin}
        self.key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def load(self, folder: Path) -> int:
        """Read what ``folder`` holds of this reference; returns how many sequences that are, 0 when it is another's.

        UserError when a finished one was altered.
        """
        if not (folder / FACTS).is_file() or not (folder / VALUES).is_file():
            return 0
        facts = load_json(folder / FACTS, "the facts of a reference")
        if facts.get("key") != self.key:
            return 0
        data = (folder / VALUES).read_bytes()
        found = np.frombuffer(data[: len(data) // 8 * 8], "<f8")[: len(self.values)]
        whole = facts.get("sha256") is None or facts["sha256"] == hashlib.sha256(data).hexdigest()
        if not whole or not np.isfinite(found).all():
            raise UserError(f"{folder / VALUES}: altered; remove it and {FACTS}, and start the run anew")
        self.values[: len(found)] = found
        return len(found)

    def compute(self, stepper: Stepper, rows: int, stopped: Callable[[], bool]) -> bool:
        """Evaluate what is missing, ``rows`` sequences at a time over all ranks; False when ``stopped`` ended it.

        Every rank calls this, with the initial weights in its stepper. Rank 0 writes after each batch, so that an
        interrupted pass keeps its work.
        """
        done = self.load(self.folder)
        meet(stepper)  # all have read before rank 0 writes
        run_on_all(stepper, lambda: self._begin(done) if stepper.rank == 0 else None)
        first, count = stepper.share(rows)
        while done < len(self.values):
            if stopped():
                return False
            # The last batch is filled up with the last sequence.
            numbers = np.minimum(np.arange(done + first, done + first + count), len(self.values) - 1)
            batch = self.blend.sequences(self._places(numbers))
            found = np.asarray(stepper.log_probs(batch))[: len(self.values) - done]
            self._require_finite(found, done)
            self.values[done : done + len(found)] = found
            run_on_all(stepper, lambda part=found: self._append(part) if stepper.rank == 0 else None)  # type: ignore[misc]
            done += len(found)
        run_on_all(stepper, lambda: self._finish() if stepper.rank == 0 else None)
        return True

    def adopt(self, folder: Path, first: bool) -> bool:
        """Take a finished reference from another run's folder, where there is one; the ``first`` rank copies it."""
        if self.load(folder) < len(self.values):
            return False
        if first and folder.resolve() != self.folder.resolve():
            self._begin(0)
            self._append(self.values)
            self._finish()
        return True

    def by_source(self) -> list[np.ndarray]:
        """One array a source, by stored sequence."""
        return [self.values[a:b] for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)]

    def _places(self, numbers: Sequence[int] | np.ndarray) -> list[tuple[int, int]]:
        sources = np.searchsorted(self.starts, numbers, side="right") - 1
        return [(int(s), int(n - self.starts[s])) for s, n in zip(sources, numbers, strict=True)]

    def _require_finite(self, found: np.ndarray, done: int) -> None:
        if not np.isfinite(found).all():
            source, index = self._places([done + int(np.argmin(np.isfinite(found)))])[0]
            raise UserError(
                f"{self.blend.sources[source].path}: sequence {index} has no finite log-probability under the initial "
                "weights; check the model of train.init, or use another train.precision"
            )

    def _begin(self, done: int) -> None:
        """Keep the first ``done`` numbers of the files, if they are of this reference; a torn one goes."""
        with self._disk(), open(self.folder / VALUES, "ab") as file:
            file.truncate(done * 8)
        self._write_facts(None)

    def _append(self, values: np.ndarray) -> None:
        with self._disk(), open(self.folder / VALUES, "ab") as file:
            file.write(values.astype("<f8").tobytes())

    def _finish(self) -> None:
        self._write_facts(hashlib.sha256(self.values.astype("<f8").tobytes()).hexdigest())

    def _write_facts(self, digest: str | None) -> None:
        facts = {"key": self.key, "sequences": len(self.values), "sha256": digest}
        write_text(self.folder / FACTS, json.dumps(facts, indent=1) + "\n")

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.folder / VALUES}: cannot be written ({error.strerror}); free some space") from None


def prepare(
    reference: Reference,
    stepper: Stepper,
    rows: int,
    moved_in: Path | None,
    stopped: Callable[[], bool],
    note: Callable[[str], None],
) -> None:
    """Complete ``reference`` and hand it to its blend.

    moved_in: None while the weights are the initial ones; else the folder of the run whose checkpoint they come from,
    which must hold the reference (UserError). Returns without it when ``stopped``.
    """
    total = len(reference.values)
    folders = [reference.folder, *([] if moved_in is None else [moved_in])]
    if not any(run_on_all(stepper, lambda f=f: reference.adopt(f, stepper.rank == 0)) for f in folders):  # type: ignore[misc]
        if moved_in is not None:
            raise UserError(
                f"{moved_in}: has no complete {VALUES} for this data and these initial weights, and the weights have "
                "moved since; put the files of the run that began the training there, or begin a new run"
            )
        note(f"reference: evaluating {total:,} sequences with the initial weights")
        if not reference.compute(stepper, rows, stopped):
            return
    note(f"reference: log-probabilities of {total:,} sequences in {reference.folder / VALUES}")
    reference.blend.reference = reference.by_source()
