"""The tokenizer interface, and how a tokenizer is opened: SentencePiece, byte-level BPE, or a ``tokenizer.json``.

Text of a user never becomes a control token unless the caller asks (``allow_control``): the libraries do not match
control pieces in text, and the table of control tokens is consulted only on request.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from telechat_twins.core.data.control import CONTROL_CHOICES, Allow
from telechat_twins.core.data.detokenizer import Decoder, Pieces
from telechat_twins.core.data.encoders.library import open_json, open_vocabulary
from telechat_twins.core.data.encoders.special import FILES, SpecialTokens, find_tokenizer, read_special
from telechat_twins.core.data.encoders.spm import SentencePieceTokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MIB, read_file
from telechat_twins.core.near import near_path
from telechat_twins.core.shown import message_line
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from telechat_twins.core.model.config import ModelConfig

MAX_MODEL = 64 * MIB  # bytes of a tokenizer.model; the released ones have 2 MB


class Tokenizer(Pieces, Protocol):
    """The interface of a tokenizer: what data preparation, inference and serving call.

    ``vocab_size``: tokens in the file. ``control``: name -> id of TeleChat2's control tokens, empty with variant
    "none". ``silent``: name -> id of all tokens that write no text. ``path``, ``sha256`` and ``variant`` identify the
    file and how it was loaded; ``model_bytes`` are the tokenizer as one file, called ``file_name`` where it is kept.
    ``encode_batch`` and ``last_cut``: as SentencePieceTokenizer has them.
    """

    @property
    def path(self) -> Path: ...
    @property
    def sha256(self) -> str: ...
    @property
    def model_bytes(self) -> bytes: ...
    @property
    def file_name(self) -> str: ...
    @property
    def variant(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def control(self) -> dict[str, int]: ...
    @property
    def matched(self) -> dict[str, int]: ...
    @property
    def silent(self) -> dict[str, int]: ...
    @property
    def bos_token_id(self) -> int: ...
    @property
    def eos_token_id(self) -> int: ...
    @property
    def pad_token_id(self) -> int: ...
    @property
    def longest_piece(self) -> int: ...
    @property
    def special(self) -> SpecialTokens: ...
    def control_id(self, name: str) -> int: ...
    def token_id(self, name: str) -> int | None: ...
    def encode(self, text: str, add_bos: bool = False, allow_control: Allow = False) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str], begins: Sequence[bool] | None = None) -> list[np.ndarray]: ...
    def last_cut(self, text: str) -> int: ...
    def piece(self, index: int) -> str: ...
    def token_bytes(self, index: int) -> bytes: ...
    def stream(self) -> Decoder: ...


def load_tokenizer(
    path: str | Path,
    control: str = "chat",
    in_vocabulary: bool = False,
    special: Mapping[str, str | None] | None = None,
    many: bool = False,
) -> Tokenizer:
    """Open a ``tokenizer.model``, ``tokenizer.json``, ``vocab.json`` (with ``merges.txt``), or the folder with one.

    ``control`` chooses what is matched in text on request: "chat" (table of the 3B and 7B releases), "released_115b",
    "mindformers", "none" (no dialogue pieces), or "auto" ("chat" for a tokenizer that has TeleChat2's pieces, else
    "none"). ``in_vocabulary`` drops ids beyond the file's pieces from the table: such a token is matched as its
    in-vocabulary namesake where there is one, and is ordinary text otherwise. ``special``: kind ("bos", "eos", "pad")
    -> the token's name, for a tokenizer without TeleChat2's pieces; the files beside it say what is not given.
    ``many``: long texts are to be encoded, so that what they need is loaded at once.
    UserError when the file is missing, is not a tokenizer, or lacks TeleChat2's control pieces.
    """
    if control not in CONTROL_CHOICES:
        raise UserError(f"control: '{control}' is not one of {', '.join(CONTROL_CHOICES)}")
    given = Path(path)
    file = find_tokenizer(given) or given / FILES[0] if given.is_dir() else given
    known = read_special(file.parent, special)
    if file.name in ("vocab.json", "merges.txt"):
        opened, notes = open_vocabulary(file.with_name("vocab.json"), control, in_vocabulary, known)
        for note in notes:
            print(f"note: {message_line(note)}", file=sys.stderr)
        return opened
    if file.suffix == ".json":
        return open_json(file, control, in_vocabulary, known)
    hint = "" if file.exists() else near_path(file)
    missing = f"no such tokenizer; give a {', '.join(FILES)} or the folder that holds it{hint}"
    return SentencePieceTokenizer(read_file(file, MAX_MODEL, missing), file, control, in_vocabulary, known, many)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """UserError unless the tokenizer has exactly one piece per row of the model's embedding."""
    pieces = tokenizer.vocab_size
    named = {"bos_token_id": (config.bos_token_id,), "eos_token_id": sorted(config.stop_ids)}
    named["pad_token_id"] = (config.filler_id,)
    for name, ids in named.items():
        if pieces < config.num_tokens and (behind := next((one for one in ids if one >= pieces), None)) is not None:
            raise UserError(
                f"{tokenizer.path}: has {pieces} pieces, and the model's {name} {behind} lies behind them, so the rows "
                f"up to {config.num_tokens} are no padding; give the tokenizer that has it, or correct {name} in the "
                "model's files"
            )
    if tokenizer.vocab_size != config.num_tokens:
        raise UserError(
            f"{tokenizer.path}: the tokenizer has {tokenizer.vocab_size} pieces but model.vocab_size is "
            f"{config.num_tokens}; use the model's own tokenizer, or set model.vocab_size={tokenizer.vocab_size}"
        )


def special_ids(tokenizer: Tokenizer) -> JsonObject:
    """bos_token_id, eos_token_id and pad_token_id as a model's config holds them: the end token begins texts where
    nothing else does, and there may be no padding. UserError without an end token."""
    ids: JsonObject = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = None
    for kind in ("bos", "pad"):
        with contextlib.suppress(UserError):
            ids[f"{kind}_token_id"] = getattr(tokenizer, f"{kind}_token_id")
    return ids


def assumed(tokenizer: Tokenizer) -> list[str]:
    """What begins and ends documents by a tokenizer without TeleChat2's pieces, and which file says so; UserError where
    nothing names an end token."""
    if tokenizer.control:
        return []
    end = tokenizer.eos_token_id
    where = tokenizer.special.source("eos", tokenizer.path)
    return [f"{tokenizer.path}: no dialogue pieces; documents end with {tokenizer.piece(end)!r} (id {end}), by {where}"]
