"""Encoding of texts word by word, where a word is what lies between two exact cuts (core.data.encoders.cuts).

Words of up to four characters, in Chinese nine of ten, are found by arithmetic on whole batches: the numbers that a
cutter gives to the letters of pieces are below 2^15, so that four of them are a key of 60 bits, and a table by key
holds where a word's ids lie. Two keys for one place of the table displace each other; a key is compared whole, so a
word is never taken for another. Longer words are remembered by their text.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from telechat_twins.core.data.encoders.cuts import NO_KEY, Cutter
from telechat_twins.core.data.encoders.joined import Encode

_PLACES = 19  # bits of the table's size; 8 MB of keys and places
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio: neighbouring keys lie far apart
_IDS = 1 << 20  # ids of short words that are kept at most
_LONG = 32  # characters of a longer word that is remembered
_WORDS = 1 << 17  # longer words remembered at most; about 25 MB
_KEPT = 24 << 20  # bytes of freed arrays that the process keeps for the next
_CHARACTERS = 1 << 18  # of texts that are worked on at once; some 60 bytes of arrays for each


class Words:
    """Ids of the words of one model, of which ``encode`` makes those that are met first.

    Threads may share it: one at a time encodes.
    """

    def __init__(self, cutter: Cutter, encode: Encode) -> None:
        self._cutter, self._encode, self._lock = cutter, encode, threading.Lock()
        self._long: dict[str, bytes] = {}
        self._ids: np.ndarray  # of the short words, one word's after the other's
        self._forget()
        # The GNU C library maps, and gives back, arrays anew each time that are larger than any that was freed before,
        # up to 32 MB: a page fault for each 4 KB of arrays that live for a moment. This one is never touched.
        np.empty(_KEPT, np.uint8)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text."""
        found: list[np.ndarray] = []
        first = size = 0
        with self._lock:
            for number, text in enumerate(texts, 1):
                size += len(text)
                if size >= _CHARACTERS or number == len(texts):
                    found += self._together(texts[first:number])
                    first, size = number, 0
        return found

    def _together(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` of texts whose characters fit into memory together."""
        text, ends = "".join(texts), np.cumsum([len(text) for text in texts])
        if not text:
            return [np.zeros(0, np.int32) for _ in texts]
        begins, keys = self._cutter.keyed_words(text, ends)
        lengths = np.diff(begins, append=len(text))
        short = keys != NO_KEY
        starts, sizes = np.zeros(len(begins), np.int64), np.zeros(len(begins), np.int64)
        starts[short], sizes[short] = self._short_words(text, begins[short], lengths[short], keys[short])
        longer = np.flatnonzero(~short)
        bounds = zip(begins[longer].tolist(), (begins[longer] + lengths[longer]).tolist(), strict=True)
        more, sizes[longer] = self._long_words([text[begin:end] for begin, end in bounds])
        starts[longer] = len(self._ids) + np.cumsum(sizes[longer]) - sizes[longer]
        # Ids of word w: sizes[w] of them from starts[w] on, at places behind those of the words before.
        after = np.cumsum(sizes)
        ids = np.concatenate((self._ids, more))
        ids = ids[np.arange(after[-1]) + np.repeat(starts - after + sizes, sizes)]
        if len(self._ids) > _IDS:
            self._forget()
        words = np.searchsorted(begins, ends)  # before each text's end
        return np.split(ids, np.where(words > 0, after[words - 1], 0)[:-1])

    def _short_words(
        self, text: str, begins: np.ndarray, lengths: np.ndarray, keys: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the ids of each word begin in ``_ids``, and how many there are; unknown words are added."""
        places = (keys.astype(np.uint64) * _MULTIPLIER >> np.uint64(64 - _PLACES)).astype(np.int64)
        starts, sizes = self._starts[places], self._sizes[places]
        missing = np.flatnonzero(self._keys[places] != keys)
        if not len(missing):
            return starts, sizes
        fresh, one, which = np.unique(keys[missing], return_index=True, return_inverse=True)
        one = missing[one]
        bounds = zip(begins[one].tolist(), (begins[one] + lengths[one]).tolist(), strict=True)
        more, fresh_sizes = self._encode([text[begin:end] for begin, end in bounds])
        fresh_starts = len(self._ids) + np.cumsum(fresh_sizes) - fresh_sizes
        starts[missing], sizes[missing] = fresh_starts[which], fresh_sizes[which]
        at = places[one]
        self._ids = np.concatenate((self._ids, more))
        # Of fresh words with one place each array keeps the last, so the three agree.
        self._keys[at], self._starts[at], self._sizes[at] = fresh, fresh_starts, fresh_sizes
        return starts, sizes

    def _long_words(self, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """All ids, and how many each word has."""
        known = self._long
        parts = list(map(known.get, words))
        if None in parts:
            missing = list(dict.fromkeys(word for word, ids in zip(words, parts, strict=True) if ids is None))
            made, sizes = self._encode(missing)
            data, ends = made.tobytes(), (4 * np.cumsum(sizes)).tolist()
            pieces = (data[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True))
            fresh = dict(zip(missing, pieces, strict=True))
            parts = [fresh[word] if ids is None else ids for word, ids in zip(words, parts, strict=True)]
            if len(known) > _WORDS:
                known.clear()
            known.update((word, ids) for word, ids in fresh.items() if len(word) <= _LONG)
        held = [part for part in parts if part is not None]
        return np.frombuffer(b"".join(held), np.intc), np.fromiter(map(len, held), np.int64, len(held)) // 4

    def _forget(self) -> None:
        self._keys = np.full(1 << _PLACES, NO_KEY, np.int64)
        self._starts, self._sizes = (np.zeros(1 << _PLACES, np.int32) for _ in range(2))
        self._ids = np.zeros(0, np.int32)
