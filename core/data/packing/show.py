"""Decoded samples of a packed folder, with what is trained marked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from telechat_twins.core.data.packed import PackedDataset
from telechat_twins.core.data.tokenizer import Tokenizer, load_tokenizer
from telechat_twins.core.shown import controls_shown

OPEN, CLOSE = "\u27e6", "\u27e7"  # around runs of targets
LEGEND = f"{OPEN}trained{CLOSE}"
BRIEF = 400  # characters of the sample that a summary shows
_MOST = 1 << 16  # tokens of a sample that are decoded


def own_tokenizer(data: PackedDataset) -> Tokenizer:
    """The tokenizer that a packed folder carries, loaded as it was when it made the ids."""
    return load_tokenizer(Path(data.path), str(data.meta["tokenizer"]["control"]), in_vocabulary=True)


def samples(data: PackedDataset, tokenizer: Tokenizer, count: int, longest: int | None = None) -> Iterator[str]:
    """The first ``count`` texts, rows or pairs of a folder as text, each below a line with its number and size.

    Runs of targets stand between OPEN and CLOSE: in a dialogue those of the loss mask, in a text all but the first
    token. ``longest`` characters at most, cut in the middle.
    """
    pairs = data.kind == "preference"
    documents = np.asarray(data.documents[: count * (1 + pairs) + 1])
    for number, (begin, end) in enumerate(zip(documents[:-1].tolist(), documents[1:].tolist(), strict=True), 1):
        ids, mask = _taken(data, begin, end)
        text = controls_shown(marked(ids, mask, tokenizer))
        if longest is not None and len(text) > longest:
            text = (
                f"{text[: longest // 2]} ... ({len(text) - longest} characters) ... {text[-(longest - longest // 2) :]}"
            )
        cut = f", of which the first {_MOST} are shown" * (end - begin > _MOST)
        name = f"pair {(number + 1) // 2}, {'chosen' if number % 2 else 'rejected'}" if pairs else f"sample {number}"
        yield f"{name}: {end - begin} tokens, {int(mask.sum())} trained {LEGEND}{cut}\n{text}"


def _taken(data: PackedDataset, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64 [n], targets bool [n]) of a document; the first token of a sequence is predicted by nothing."""
    end = min(end, begin + _MOST)
    ids = np.asarray(data.tokens[begin:end], np.int64)
    if data.mask is None or data.sequences is None:
        targets = np.ones(len(ids), bool)
        targets[:1] = begin > 0
        return ids, targets
    targets = np.asarray(data.mask[begin:end]) != 0
    if begin == int(data.sequences[np.searchsorted(data.sequences, begin)]):
        targets[:1] = False
    return ids, targets


def marked(ids: np.ndarray, targets: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of ids int [n], control tokens by their names, with each run of ``targets`` bool [n] between OPEN and
    CLOSE."""
    parts: list[str] = []
    decoder, inside = tokenizer.stream(), False
    silent = np.isin(ids, [index for index in np.unique(ids).tolist() if tokenizer.is_silent(index)])
    # Runs of ids that write text and have one target, and each other id alone.
    begins = np.flatnonzero(np.diff(targets, prepend=~targets[:1]) | np.diff(silent, prepend=~silent[:1]) | silent)
    for begin, end in pairwise([*begins.tolist(), len(ids)]):
        if targets[begin] != inside:
            parts.append(CLOSE if inside else OPEN)
            inside = not inside
        if silent[begin]:
            # The layout encodes what stands between two control tokens on its own.
            parts.append(tokenizer.piece(int(ids[begin])))
            decoder = tokenizer.stream()
        else:
            parts.append(decoder.push_all(ids[begin:end].tolist()))
    return "".join([*parts, CLOSE * inside])
