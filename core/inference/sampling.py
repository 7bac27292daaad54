"""Sampling in numpy, shared by both backends: the same logits give the same token.

The rules and their order are those of Hugging Face's generation: penalties, temperature, top-k, top-p, min-p, draw.
Everything after the model is computed in float64, so no decision depends on a framework's softmax. For speed no rule
sorts the whole vocabulary, and greedy decoding copies nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from telechat_twins.core.errors import UserError
from telechat_twins.core.schema import from_mapping, option

GROUPS = 1024  # of scores, whose maxima bound the k-th largest score from below
BLOCK = 128  # neighbouring weights that a draw adds up before it looks at single ones
AHEAD = 64  # random numbers generated at once
BINS = 1024  # of scores; top-p sorts the members of one of them
DEPTH = 40.0  # scores further below the largest share the last bin: they are e^-40 times as likely


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling options. ``temperature`` 0 is greedy decoding, on which top-k, top-p and min-p have no effect."""

    temperature: float = option(0.0, help="0 takes the likeliest token; above 0 draws", min=0.0, max=1e6)
    top_k: int = option(0, help="draw only from the k likeliest tokens; 0 switches it off", min=0)
    top_p: float = option(1.0, help="draw only from the likeliest tokens that hold this share", above=0.0, max=1.0)
    min_p: float = option(
        0.0, help="draw only from tokens at least this share as likely as the likeliest", min=0.0, max=1.0
    )
    repetition_penalty: float = option(
        1.0, help="above 1 makes every token already in the prompt or the output less likely", above=0.0, max=1e6
    )
    presence_penalty: float = option(
        0.0, help="taken off the logit of every token in the output", min=-100.0, max=100.0
    )
    frequency_penalty: float = option(
        0.0, help="taken off a token's logit for each time that it is in the output", min=-100.0, max=100.0
    )
    seed: int = option(0, help="start of the random draws", min=0, max=2**64 - 1)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def sampling_config(**values: object) -> SamplingConfig:
    """A checked SamplingConfig; UserError names the option that is unknown, of the wrong type or out of range."""
    return from_mapping(SamplingConfig, values, "sampling")


class TokenChoice(NamedTuple):
    """A chosen token. On request: the difference of the two largest scores (``margin``), its log-probability under the
    model (before penalties and temperature), and the likeliest tokens with theirs (``top``)."""

    token: int
    margin: float | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class TokenMask(Protocol):
    """What may be chosen next, as core.inference.decoding.grammar.Constraint has it."""

    @property
    def complete(self) -> bool: ...

    def mask(self, scores: np.ndarray) -> np.ndarray: ...

    def take(self, token: int) -> None: ...


class Sampler:
    """Sampler of one sequence: its options, its random numbers, and the tokens that its penalties act on."""

    def __init__(
        self,
        config: SamplingConfig,
        prompt: Sequence[int],
        sample: int = 0,
        bias: Mapping[int, float] | None = None,
        margins: bool = False,
        logprobs: int | None = None,
        constraint: TokenMask | None = None,
        ends: Collection[int] = (),
        earliest: int = 0,
    ) -> None:
        """``sample``: index among several answers to one prompt; ``bias`` is added to logits, by token id; ``margins``:
        report them; ``logprobs``: report the chosen token's and those of the N likeliest; ``constraint``: the tokens
        that may be chosen; ``ends``: tokens that may not be chosen for positions before ``earliest``, unless no other
        may."""
        self.config, self.margins, self.logprobs = config, margins, logprobs
        self._constraint = constraint
        self._ends, self._earliest = np.array(sorted(ends), np.int64), earliest
        self._draws = Draws(config.seed, sample)
        self._history = History(prompt) if config.penalises else None
        self._bias = None
        if bias:
            self._bias = np.fromiter(bias.keys(), np.int64), np.fromiter(bias.values(), np.float64)

    def choose(self, logits: np.ndarray, position: int) -> TokenChoice:
        """The token for ``position`` (counted from the start of the prompt) from logits [V].

        UserError when the logits are not finite, or the constraint allows no token.
        """
        check_finite(logits, position - 1)
        config, scores = self.config, logits
        if self._history is not None or self._bias is not None:
            scores = adjust(logits, config, self._history, self._bias)
        if self._constraint is not None:
            scores = self._constraint.mask(scores)
        if position < self._earliest and self._ends.size:
            longer = scores.astype(np.float64)
            longer[self._ends] = -np.inf
            scores = longer if longer.max() > -np.inf else scores
        token = int(np.argmax(scores)) if config.greedy else draw(scores, config, self._draws.at(position))
        if self._history is not None:
            self._history.add(token)
        if self._constraint is not None:
            self._constraint.take(token)
        margin = top2_margin(scores) if self.margins else None
        if self.logprobs is None:
            return TokenChoice(token, margin)
        return TokenChoice(token, margin, *log_probabilities(logits, token, self.logprobs))

    @property
    def complete(self) -> bool:
        """Whether the constraint allows nothing more."""
        return self._constraint is not None and self._constraint.complete


class History:
    """Distinct tokens of a sequence: ``ids`` [n], and how often each occurs in the output, ``made`` [n]."""

    def __init__(self, prompt: Sequence[int]) -> None:
        ids = list(dict.fromkeys(prompt))
        self._place = {token: place for place, token in enumerate(ids)}
        self._ids = np.array(ids, np.int64)
        self._made = np.zeros(len(ids))

    def add(self, token: int) -> None:
        """Append ``token`` to the output."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            more = max(64, place)
            self._ids = np.concatenate((self._ids, np.zeros(more, np.int64)))
            self._made = np.concatenate((self._made, np.zeros(more)))
        self._ids[place] = token
        self._made[place] += 1.0

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: len(self._place)]

    @property
    def made(self) -> np.ndarray:
        return self._made[: len(self._place)]


def adjust(
    logits: np.ndarray,
    config: SamplingConfig,
    history: History | None = None,
    bias: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Scores float64 [V] from logits [V]: penalties for the tokens in ``history``, then ``bias`` (ids, values).

    Repetition penalty, for tokens of prompt and output: a positive logit is divided by it, a negative one multiplied,
    once, however often the token occurred. Frequency and presence penalty, for tokens of the output: the frequency
    penalty is subtracted for each occurrence, the presence penalty once.
    """
    scores = np.asarray(logits).astype(np.float64)
    if history is not None:
        ids = history.ids
        values = scores[ids]
        if config.repetition_penalty != 1.0:
            penalty = config.repetition_penalty
            values = np.where(values < 0.0, values * penalty, values / penalty)
        made = history.made
        scores[ids] = values - config.frequency_penalty * made - config.presence_penalty * (made > 0.0)
    if bias is not None:
        scores[bias[0]] += bias[1]
    return scores


def largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Ids, ascending, of the k largest scores [V], and of all tied with the k-th largest."""
    size = scores.size
    if k >= size:
        return np.arange(size)
    rows = size // GROUPS
    if rows > 1 and k <= GROUPS:
        # Deal the scores into GROUPS groups (columns). Let t be the k-th largest of the groups' maxima: k groups have a
        # score of t or more, so the k-th largest score of all is at least t. Only scores from t on need a partition,
        # usually little more than k. The scores after rows * GROUPS are in no group, which leaves t a lower bound.
        tops = scores[: rows * GROUPS].reshape(rows, GROUPS).max(0)
        ids = np.flatnonzero(scores >= np.partition(tops, GROUPS - k)[GROUPS - k])
        if ids.size == k:
            return ids
        values = scores[ids]
        return ids[values >= np.partition(values, ids.size - k)[ids.size - k]]
    return np.flatnonzero(scores >= np.partition(scores, size - k)[size - k])


def kept(scores: np.ndarray, config: SamplingConfig) -> tuple[np.ndarray | None, np.ndarray]:
    """The tokens to draw from, by scores [V]: ids, ascending (None: all), and their weights, not normalised.

    Top-k also keeps tokens tied with the k-th. Top-p drops the least likely tokens as long as they hold at most 1 - p
    together; the likeliest always stays, and among equal scores the higher id counts as likelier. Min-p, after it,
    drops tokens less likely than min_p times the likeliest.
    """
    ids = None
    scores = np.asarray(scores)
    if 0 < config.top_k < scores.size:
        ids = largest(scores, config.top_k)
        scores = scores[ids]
    # Subtract the largest score before dividing: the distribution is the same, and with a tiny temperature the largest
    # stays 0 instead of overflowing.
    scores = scores.astype(np.float64)
    with np.errstate(over="ignore"):
        scores = (scores - scores.max()) / config.temperature
    weights = np.exp(scores)
    if config.top_p < 1.0:
        within = _nucleus(scores, weights, config.top_p)
        ids, weights = within if ids is None else ids[within], weights[within]
    if config.min_p > 0.0:
        within = np.flatnonzero(weights >= config.min_p)  # weights are relative to the likeliest, which has 1
        ids, weights = within if ids is None else ids[within], weights[within]
    return ids, weights


def _nucleus(scores: np.ndarray, weights: np.ndarray, p: float) -> np.ndarray:
    """Ids, ascending, that top-p keeps. ``scores``: at most 0; ``weights``: their exponentials.

    A histogram instead of a sort: scores are put into bins of equal width, from the likeliest (bin 0) to the least
    likely. Bins before the one in which the cumulative share reaches p are kept whole, bins after it are dropped, and
    only the members of that bin are sorted. Equal scores are in one bin.
    """
    total = weights.sum()
    depth = min(-float(scores.min()), DEPTH)
    bins = np.zeros(scores.size, np.int64)
    if scores.size > BINS and depth > 0.0:
        np.minimum(scores * (-(BINS - 1) / depth), BINS - 1, casting="unsafe", out=bins)
    shares = np.bincount(bins, weights, BINS) / total
    reached = np.cumsum(shares)
    edge = min(int(np.searchsorted(reached, p)), BINS - 1)
    ids = np.flatnonzero(bins == edge)
    order = np.argsort(scores[ids], kind="stable")  # least likely first
    below = shares[edge + 1 :].sum()  # the share of the dropped bins
    # Hugging Face's rule: a token is dropped while it and all less likely ones hold at most 1 - p.
    stays = below + np.cumsum(weights[ids[order]] / total) > 1.0 - p
    if edge == 0:
        stays[-1] = True  # the likeliest
    keep = bins < edge
    keep[ids[order[stays]]] = True
    return np.flatnonzero(keep)


def draw(scores: np.ndarray, config: SamplingConfig, u: float) -> int:
    """A token drawn from scores [V] by inversion: the cumulative distribution's inverse at ``u`` in [0, 1).

    ``config.temperature`` must be above 0.
    """
    ids, weights = kept(scores, config)
    place = _inverse(weights, u)
    return place if ids is None else int(ids[place])


def _inverse(weights: np.ndarray, u: float) -> int:
    """The first index whose cumulative weight exceeds ``u`` times the sum of weights [n]; never one of weight 0."""
    # Two levels: find the block by the cumulative sums of blocks, then the index by those inside the block.
    whole = weights.size // BLOCK * BLOCK
    sums = np.concatenate((weights[:whole].reshape(-1, BLOCK).sum(1), weights[whole:].sum(keepdims=True)))
    ends = np.cumsum(sums)
    target = u * ends[-1]
    # By rounding, target may reach the last sum: then take the first block that reaches it, since blocks after it weigh
    # nothing. The same inside the block.
    block = min(int(np.searchsorted(ends, target, side="right")), int(np.searchsorted(ends, ends[-1])))
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK])
    target -= ends[block - 1] if block else 0.0
    place = min(int(np.searchsorted(inside, target, side="right")), int(np.searchsorted(inside, inside[-1])))
    return block * BLOCK + place


def uniform(seed: int, position: int, sample: int = 0) -> float:
    """Counter-based random number in [0, 1): a function of seed, position and sample, equal on every platform.

    Philox4x64-10 with the seed as key and (position, sample) as counter; the top 53 bits of the first word. So a draw
    does not depend on which sequences share a step, or on whether a sequence was preempted.
    """
    return _fraction(np.random.Philox(key=seed, counter=[position, sample, 0, 0]).random_raw())


def _fraction(word: int) -> float:
    return (int(word) >> 11) * 2.0**-53


class Draws:
    """``uniform`` for one seed and sample, generated in batches of AHEAD consecutive positions."""

    def __init__(self, seed: int, sample: int) -> None:
        self._seed, self._sample = seed, sample
        self._first = 0
        self._words = np.empty(0, np.uint64)

    def at(self, position: int) -> float:
        place = position - self._first
        if not 0 <= place < self._words.size:
            made = np.random.Philox(key=self._seed, counter=[position, self._sample, 0, 0])
            # Philox yields four words for each counter value, that is for each position: take the first of each four.
            self._first, place = position, 0
            self._words = made.random_raw(4 * AHEAD)[::4]
        return _fraction(self._words[place])


def log_probabilities(logits: np.ndarray, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """log softmax(logits)[token], and (id, log-probability) of the ``top`` likeliest tokens; float64.

    The likeliest comes first; among equals, the lower id.
    """
    wide = np.asarray(logits).astype(np.float64)
    most = wide.max()
    log_sum = float(most + np.log(np.exp(wide - most).sum()))
    ids = largest(wide, top) if top else np.empty(0, np.int64)
    order = np.lexsort((ids, -wide[ids]))[:top]
    return float(wide[token]) - log_sum, tuple((int(i), float(wide[i]) - log_sum) for i in ids[order])


def top2_margin(scores: np.ndarray) -> float:
    """Largest minus second largest score: by how much a greedy choice was ahead of the next token."""
    if scores.size < 2:
        return float("inf")
    first = int(np.argmax(scores))
    others = (part.max() for part in (scores[:first], scores[first + 1 :]) if part.size)
    return float(scores[first]) - float(max(others))


def check_finite(logits: np.ndarray, position: int) -> None:
    """UserError when logits have a NaN or an infinity: a token chosen from them would look like a valid answer."""
    # numpy's min and max of an array with a NaN are NaN, so two reductions are enough.
    if np.isfinite(logits.min()) and np.isfinite(logits.max()):
        return
    bad = int(np.count_nonzero(~np.isfinite(logits)))
    raise UserError(
        f"logits: {bad} of {logits.size} are not finite at position {position}; the weights are damaged or the "
        "precision overflows: verify the checkpoint, or try --precision fp32"
    )
