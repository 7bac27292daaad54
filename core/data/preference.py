"""Preference pairs in the packed form: a chosen and a rejected answer to one prompt, as two neighbouring sequences.

A folder of kind "preference" holds the same files as kind "sft" (core.data.packed); sequence 2i is the chosen and
sequence 2i+1 the rejected one of pair i. Both hold the whole row, prompt included, and their mask is 1 on the tokens
of the answer. meta.json also has ``pairs`` and ``max_length``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from telechat_twins.core.data.blend import PAIRS
from telechat_twins.core.data.packed import PackedWriter
from telechat_twins.core.data.tokenizer import Tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject


class PreferenceWriter:
    """Writer of one packed folder of pairs; a context manager like PackedWriter, ended by ``finish``.

    ``seq_len``: most tokens of a sequence; the data can be trained at this ``data.seq_len`` or above. UserError as of
    PackedWriter.
    """

    def __init__(self, out: str | Path, tokenizer: Tokenizer, seq_len: int, force: bool = False) -> None:
        self.seq_len, self.pairs = seq_len, 0
        self._packed = PackedWriter(out, tokenizer, PAIRS, force)

    def __enter__(self) -> PreferenceWriter:
        self._packed.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._packed.__exit__(kind, error, trace)

    def add_pair(
        self,
        chosen: Sequence[int] | np.ndarray,
        chosen_mask: Sequence[int] | np.ndarray,
        rejected: Sequence[int] | np.ndarray,
        rejected_mask: Sequence[int] | np.ndarray,
        where: str,
    ) -> None:
        """Append one pair of token ids, each with its loss mask (1 where the token belongs to the answer).

        UserError, naming ``where`` (file and line), when a side is longer than ``seq_len``, when no token of a side
        counts (the first one of a row is never predicted), or when both sides are the same.
        """
        sides = (("chosen", chosen, chosen_mask), ("rejected", rejected, rejected_mask))
        held = []
        for name, given, mask in sides:
            ids, counts = np.asarray(given, np.int32), np.asarray(mask, np.uint8)
            if ids.ndim != 1 or ids.shape != counts.shape:
                raise ValueError(f"{where}: {name} has ids {ids.shape} and a mask {counts.shape}; needs equal lengths")
            if len(ids) > self.seq_len:
                raise UserError(
                    f"{where}: '{name}' has {len(ids)} tokens with its prompt, at most {self.seq_len} fit; "
                    "shorten it or give a larger --seq-len"
                )
            if not counts[1:].any():
                raise UserError(f"{where}: no token of '{name}' is an answer to learn from; give it some text")
            held.append((ids, counts))
        if all(np.array_equal(a, b) for a, b in zip(*held, strict=True)):
            raise UserError(f"{where}: 'chosen' and 'rejected' are the same tokens; remove the row")
        for ids, counts in held:
            self._packed.add_sequence(ids, counts, [0], where)
        self.pairs += 1

    def finish(self, extra: JsonObject | None = None) -> JsonObject:
        """Write meta.json with ``pairs``, ``max_length`` and ``extra``; return the meta. UserError without a pair."""
        return self._packed.finish({"pairs": self.pairs, "max_length": self.seq_len, **(extra or {})})
