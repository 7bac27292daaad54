"""Padded vocabularies: embedding and head with more rows than the tokenizer has pieces.

Releases pad the vocabulary so that many processes can share it. The padding rows have weights like any other; they must
never be drawn, and training takes them out of the softmax (``ModelConfig.vocab_tokens``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from telechat_twins.core.config import RunConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.shown import shown

_ROWS = 64  # of padding, which even a small vocabulary may have
_SHARE = 8  # a vocabulary may be padded by one part in so many before the tokenizer looks like another model's


def most_padding(rows: int, pieces: int, own: bool) -> int:
    """Rows that may be padding. A tokenizer that is the model's ``own`` is trusted as long as most rows are tokens; of
    another the vocabulary must look like padding to it, or a wrong tokenizer would be taken for the right one."""
    return pieces if own else max(_ROWS, rows // _SHARE)


def fit_vocabulary(
    config: ModelConfig,
    pieces: int,
    own: bool,
    added: Mapping[str, int | None] | None = None,
    path: str | Path = "tokenizer",
) -> tuple[ModelConfig, str | None]:
    """``config`` with ``vocab_tokens`` set where a tokenizer of so many pieces leaves padding rows, and a note on it.

    Unchanged, without a note, where the config itself sets ``vocab_tokens`` and where the tokenizer does not fit:
    then ``num_tokens`` differs from ``pieces``, which the caller refuses. ``added``: name -> id of tokens that files
    beside the tokenizer at ``path`` add (core.data.encoders.special); UserError for one whose row would be taken for
    padding.
    """
    padding = config.vocab_size - pieces
    ids = (config.bos_token_id, config.filler_id, *config.stop_ids)
    if config.vocab_tokens is not None or not 0 < padding <= most_padding(config.vocab_size, pieces, own):
        return config, None
    if max(ids) >= pieces:
        return config, None
    for name, index in (added or {}).items():
        if index is not None and pieces <= index < config.vocab_size:
            raise UserError(
                f"{path}: {shown(name)} was added with id {index} by a file beside it, behind the {pieces} pieces that "
                "are read, so its row is no padding; give the tokenizer.json that holds it, which transformers writes"
            )
    return dataclasses.replace(config, vocab_tokens=pieces), (
        f"the vocabulary has {config.vocab_size} rows and the tokenizer {pieces} pieces: the last {padding} rows are "
        "padding and are never predicted (model.vocab_tokens)"
    )


def fit_run(config: RunConfig, pieces: int, end: int | None = None) -> tuple[RunConfig, list[str]]:
    """``config`` whose model knows which rows of its vocabulary are padding, by the data's tokenizer, and notes on it.

    ``end``: the token that ends the data's documents, if known; noted where it does not end generation as well.
    UserError when the tokenizer is not the model's.
    """
    model, note = fit_vocabulary(config.model, pieces, own=False)
    if model.num_tokens != pieces:
        raise UserError(
            f"data.sources: made by a tokenizer of {pieces} pieces, but {model.num_tokens} of the model's "
            f"{model.vocab_size} rows stand for tokens; pack with the model's tokenizer, or set "
            f"model.vocab_tokens={pieces}"
        )
    notes = [] if note is None else [f"note: {note}"]
    if end is not None and end not in model.stop_ids:
        notes.append(
            f"note: the data's documents end with token {end}, which does not end generation by this model; set "
            f"model.eos_token_id={end} (now {model.eos_token_id})"
        )
    return dataclasses.replace(config, model=model), notes
