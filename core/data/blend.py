"""Data blend: the global sample order over several packed folders, drawn by weight, reshuffled every epoch.

Sample i is a pure function of (sources, seed, i). So a run resumes by remembering how many samples it consumed, and
every backend, layout and process sees the same order. A sample of preference data is a pair: two neighbouring rows.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from telechat_twins.core.data.packed import PackedDataset
from telechat_twins.core.data.permute import Permutation
from telechat_twins.core.data.vocabulary import most_padding
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.batch import Batch

if TYPE_CHECKING:
    from telechat_twins.core.config import DataConfig

PAIRS = "preference"  # the kind of packed folder whose sequences are pairs (core.data.preference)
# Weights repeat exactly after this many samples at most; finer ones are rounded to it.
MAX_PERIOD = 1 << 16


@dataclass(frozen=True)
class Place:
    """Where a sample comes from: which source, which pass over it, which of its samples."""

    source: int
    epoch: int
    index: int


class SourceSchedule:
    """Which source serves which sample: in any first n samples, source k has served within one of n * weight_k.

    ``weights`` are the exact shares (fractions of 1) in force.
    """

    def __init__(self, weights: Sequence[float]):
        self.weights, shares = _shares(weights)
        self.period = sum(shares)
        self._shares = shares
        self._source, self._rank = _period(shares)

    def __call__(self, sample: int) -> tuple[int, int]:
        """Sample number -> (source, how many samples that source served before)."""
        cycle, place = divmod(sample, self.period)
        source = int(self._source[place])
        return source, cycle * self._shares[source] + int(self._rank[place])


class Blend:
    """Made by ``open_blend``. ``vocab_size`` (the tokenizer's pieces), ``sources``, ``weights`` (fractions) and
    ``num_samples`` (a pass of each) describe it.

    ``pairs``: samples are preference pairs, of ``rows_per_sample`` 2 rows. ``reference``: of pairs, log-probabilities
    by source and stored sequence, which batches then carry.
    """

    def __init__(self, sources: Sequence[PackedDataset], data: DataConfig, seed: int, pad_token_id: int):
        self.sources = list(sources)
        self.vocab_size = self.sources[0].vocab_size
        self.seq_len, self.isolate, self.seed = data.seq_len, data.isolate_documents, seed
        self._pad = pad_token_id
        self._given = [source.weight for source in data.sources]
        self._schedule = SourceSchedule(self._given)
        self.weights = self._schedule.weights
        self._loss_weights = np.asarray([source.loss_weight for source in data.sources], np.float32)
        self.pairs = self.sources[0].kind == PAIRS
        self.rows_per_sample = 2 if self.pairs else 1
        self.reference: list[np.ndarray] | None = None
        self.num_samples = [source.num_samples(data.seq_len) // self.rows_per_sample for source in self.sources]
        self._permutations: dict[int, tuple[int, Permutation]] = {}

    @property
    def num_rows(self) -> int:
        """Rows of a pass of all sources, in which a run's global_batch counts."""
        return sum(self.num_samples) * self.rows_per_sample

    def locate(self, sample: int) -> Place:
        """Where sample number ``sample`` (from 0, without end) of the global order comes from."""
        if sample < 0:
            raise ValueError(f"sample numbers start at 0, found {sample}")
        source, served = self._schedule(sample)
        epoch, place = divmod(served, self.num_samples[source])
        cached = self._permutations.get(source)
        if cached is None or cached[0] != epoch:
            cached = (epoch, Permutation(self.num_samples[source], self.seed, source, epoch))
            self._permutations[source] = cached
        return Place(source, epoch, cached[1](place))

    def batch(self, first_row: int, count: int) -> Batch:
        """Rows first_row .. first_row+count-1 as a Batch of int32 [count, seq_len] arrays.

        A row is a sample, or the chosen or the rejected half of a pair. ``doc_ids`` is None unless documents are
        isolated, ``weights`` unless a source has a loss_weight.
        """
        places = []
        for number in range(first_row, first_row + count):
            sample, side = divmod(number, self.rows_per_sample)
            place = self.locate(sample)
            places.append((place.source, place.index * self.rows_per_sample + side))
        return self.sequences(places)

    def sequences(self, places: Sequence[tuple[int, int]]) -> Batch:
        """A Batch of the rows at ``places``: (source, number among its windows or stored sequences)."""
        rows = [self.sources[k].sample(index, self.seq_len, self._pad, self.isolate) for k, index in places]
        input_ids, targets, positions, doc_ids = (np.stack(column) for column in zip(*rows, strict=True))
        weights = None
        if (self._loss_weights != 1.0).any():
            factors = self._loss_weights[[k for k, _ in places]]
            weights = np.repeat(factors[:, None], self.seq_len, 1)
        reference = None
        if self.reference is not None:
            reference = np.asarray([self.reference[k][index] for k, index in places])
        return Batch(input_ids, targets, positions, doc_ids if self.isolate else None, weights, reference)

    def digest(self) -> str:
        """Identifies what decides the order and the samples, except the seed: contents, weights, cutting."""
        facts = {
            "sources": [source.digest() for source in self.sources],
            "weights": [str(weight) for weight in self.weights],
            "seq_len": self.seq_len,
            "isolate_documents": self.isolate,
            **({"loss_weights": self._loss_weights.tolist()} if (self._loss_weights != 1.0).any() else {}),
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def summary(self) -> str:
        """One line a source: share, samples and tokens a pass."""
        lines = []
        for source, weight, samples in zip(self.sources, self.weights, self.num_samples, strict=True):
            what = "pairs" if self.pairs else "samples"
            share = f"{100 * float(weight):.4g}% of the {what}"
            lines.append(f"{source.path}: {share}, {samples:,} {what} a pass ({source.kind})")
            lines += [f"note: {note}" for note in source.notes]
        return "\n".join(lines)

    def tokenizer(self) -> bytes:
        """The tokenizer's file stored with the first source, as it was verified when the source was opened."""
        return self.sources[0].tokenizer

    @property
    def end_token(self) -> int | None:
        """The id that ends the documents of the first source; None where the source does not record it."""
        found = self.sources[0].meta["tokenizer"].get("eos")
        return found if isinstance(found, int) else None

    @property
    def tokenizer_name(self) -> str:
        """What that file is called: tokenizer.model or tokenizer.json."""
        return self.sources[0].tokenizer_name


def open_blend(data: DataConfig, seed: int, vocab_size: int, pad_token_id: int) -> Blend:
    """Open the sources of a run. UserError, before anything is trained, on whatever would go wrong later:

    no sources, a missing or damaged folder, a tokenizer whose size is not the model's vocabulary, token ids out of
    range, sources made by different tokenizers, a ``seq_len`` shorter than stored sequences.
    """
    if not data.sources:
        raise UserError("data.sources: empty; name at least one folder written by `tele data`")
    if not 0 <= pad_token_id < vocab_size:
        raise UserError(f"model.pad_token_id: {pad_token_id} is outside the vocabulary of {vocab_size}")
    opened: list[PackedDataset] = []
    for n, given in enumerate(data.sources):
        try:
            source = PackedDataset(given.path)
        except UserError as error:
            raise UserError(f"data.sources[{n}].path: {error}") from None
        # Fewer pieces than rows: the vocabulary may be padded (core.data.vocabulary), on which the caller decides.
        if not 0 <= vocab_size - source.vocab_size <= most_padding(vocab_size, source.vocab_size, own=False):
            raise UserError(
                f"data.sources[{n}].path: {given.path} was made by a tokenizer of {source.vocab_size} pieces but "
                f"model.vocab_size is {vocab_size}; pack with the model's tokenizer, or set model.vocab_size "
                "(model.vocab_tokens if the rows beyond only pad)"
            )
        if source.meta["largest_id"] >= source.vocab_size:
            raise UserError(
                f"data.sources[{n}].path: {given.path} holds token id {source.meta['largest_id']}, outside the "
                f"vocabulary of {source.vocab_size}; pack the data again"
            )
        if opened and source.meta["tokenizer"]["sha256"] != opened[0].meta["tokenizer"]["sha256"]:
            raise UserError(
                f"data.sources[{n}].path: {given.path} was made by another tokenizer than {opened[0].path}; "
                "pack all sources with one tokenizer"
            )
        source.check_seq_len(data.seq_len)
        source.check_isolation(data.isolate_documents)
        if opened and PAIRS in (source.kind, opened[0].kind) and source.kind != opened[0].kind:
            raise UserError(
                f"data.sources[{n}].path: {given.path} is of kind '{source.kind}' and {opened[0].path} of kind "
                f"'{opened[0].kind}'; preference pairs are not blended with other data"
            )
        opened.append(source)
    return Blend(opened, data, seed, pad_token_id)


def _shares(weights: Sequence[float]) -> tuple[list[Fraction], list[int]]:
    """Weights -> (exact shares of 1, whole samples of each in one period)."""
    # The decimal the user wrote, not the binary number nearest to it: 0.7 / 0.3 then repeats after 10 samples.
    given = [Fraction(repr(float(weight))) for weight in weights]
    total = sum(given)
    exact = [weight / total for weight in given]
    period = math.lcm(*(share.denominator for share in exact))
    if period > MAX_PERIOD:
        period = MAX_PERIOD
        counts = [max(1, math.floor(share * period)) for share in exact]
        by_rest = sorted(range(len(counts)), key=lambda k: (exact[k] * period - counts[k], -k), reverse=True)
        for step in range(abs(period - sum(counts))):
            if sum(counts) < period:
                counts[by_rest[step % len(counts)]] += 1
            else:
                counts[counts.index(max(counts))] -= 1
    else:
        counts = [int(share * period) for share in exact]
    return [Fraction(count, period) for count in counts], counts


def _period(shares: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """One period of the order -> (source [period], how often that source came before [period]).

    The j-th turn of a source with share w is due in the window [floor(j/w), ceil((j+1)/w)); serving, among the turns
    whose window has opened, the one that closes first meets every window (proportionate-fair scheduling), and a served
    window keeps the count within one of n * w.
    """
    period = sum(shares)
    source = np.zeros(period, np.int32)
    rank = np.zeros(period, np.int64)
    waiting = [(0, k) for k in range(len(shares))]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    turn = [0] * len(shares)
    for n in range(period):
        while waiting and waiting[0][0] <= n:
            k = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (-(-(turn[k] + 1) * period // shares[k]), k))
        k = heapq.heappop(ready)[1]
        source[n], rank[n] = k, turn[k]
        turn[k] += 1
        heapq.heappush(waiting, (turn[k] * period // shares[k], k))
    return source, rank
