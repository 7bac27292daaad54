"""The tokenizer interface and its SentencePiece implementation with a table of control tokens.

Text of a user never becomes a control token unless the caller asks (``allow_control``): SentencePiece does not match
its control pieces in text, and the table is consulted only on request.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import sentencepiece

from telechat_twins.core.data.control import (
    ALIASES,
    CONTROL_CHOICES,
    END,
    PAD,
    START,
    TABLES,
    TELECHAT2_NAMES,
    TOOL_TOKENS,
    ControlTable,
    ControlToken,
    Splitter,
)
from telechat_twins.core.data.detokenizer import Pieces, StreamDecoder
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MIB, read_file

if TYPE_CHECKING:
    from telechat_twins.core.model.config import ModelConfig

MAX_MODEL = 64 * MIB  # bytes of a tokenizer.model; the released ones have 2 MB

Allow = bool | Collection[str]


class Tokenizer(Pieces, Protocol):
    """The interface of a tokenizer: what data preparation, inference and serving call.

    ``vocab_size``: pieces in the file. ``control``: name -> id of TeleChat2's control tokens, empty with variant
    "none". ``path``, ``sha256``, ``model_bytes`` and ``variant`` identify the file and how it was loaded.
    """

    @property
    def path(self) -> Path: ...
    @property
    def sha256(self) -> str: ...
    @property
    def model_bytes(self) -> bytes: ...
    @property
    def variant(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def control(self) -> dict[str, int]: ...
    @property
    def matched(self) -> dict[str, int]: ...
    @property
    def bos_token_id(self) -> int: ...
    @property
    def eos_token_id(self) -> int: ...
    @property
    def pad_token_id(self) -> int: ...
    @property
    def longest_piece(self) -> int: ...
    def control_id(self, name: str) -> int: ...
    def encode(self, text: str, add_bos: bool = False, allow_control: Allow = False) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]: ...
    def encode_continuation(self, text: str) -> list[int]: ...
    def continuation_text(self, text: str) -> str: ...
    def continuation_of(self, ids: list[int]) -> list[int]: ...
    def piece(self, index: int) -> str: ...
    def token_bytes(self, index: int) -> bytes: ...
    def stream(self) -> StreamDecoder: ...


class SentencePieceTokenizer:
    """The tokenizer of a ``tokenizer.model``; made by ``load_tokenizer``.

    ``vocab_size``: pieces in the file. ``control``: name -> id of TeleChat2's control tokens, all inside the vocabulary
    (empty with control "none"). ``matched``: name -> id of what ``allow_control=True`` recognises in text. ``path``,
    ``sha256`` and ``model_bytes`` identify the file.
    """

    def __init__(self, model_bytes: bytes, path: Path, variant: str, in_vocabulary: bool = False):
        self.path = path
        self.model_bytes = model_bytes
        self.sha256 = hashlib.sha256(model_bytes).hexdigest()
        self.variant = variant
        try:
            if not model_bytes:  # of which the library would make a processor without a model
                raise RuntimeError("empty")
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
            self.vocab_size: int = self._pieces.get_piece_size()
            self._pieces.id_to_piece(list(range(self.vocab_size)))  # a damaged piece is found out here
        except (RuntimeError, UnicodeDecodeError):
            self.vocab_size = 0
        if not self.vocab_size:
            raise UserError(f"{path}: not a SentencePiece model; give the release's tokenizer.model")
        self.control: dict[str, int] = {} if variant == "none" else self._control_ids()
        table = ControlTable()
        if variant != "none":
            table = TABLES[variant](self.control, self._piece_id, self.vocab_size)
        if in_vocabulary:
            table = table.inside(self.vocab_size, {name: self.control[name] for name in TOOL_TOKENS if self.control})
        self._table = table
        self._splitter = Splitter(table.tokens)
        self._special = {t.id: t.text for t in table.tokens}
        self._continues: bool | None = None

    @property
    def matched(self) -> dict[str, int]:
        return {t.text: t.id for t in self._table.tokens}

    @property
    def bos_token_id(self) -> int:
        return self.control_id(START)

    @property
    def eos_token_id(self) -> int:
        return self.control_id(END)

    @property
    def pad_token_id(self) -> int:
        return self.control_id(PAD)

    def control_id(self, name: str) -> int:
        """The id of a control token; UserError when this tokenizer has none of that name."""
        if name not in self.control:
            raise UserError(f"{self.path}: no control token {name} with control '{self.variant}'; load with 'chat'")
        return self.control[name]

    def encode(self, text: str, add_bos: bool = False, allow_control: Allow = False) -> list[int]:
        """Text -> ids. ``allow_control`` True matches the table's control tokens, a collection only those names.

        Equal to the released tokenizers with ``allow_control=True``, ids one past the vocabulary included (``<unk>``
        with "chat", tool tokens with "mindformers"); load with ``in_vocabulary=True`` where such ids may not occur.
        """
        ids = [self.control_id(START)] if add_bos else []
        if not allow_control:
            return ids + self._plain(text)
        names = None if allow_control is True else allow_control
        for segment in self._splitter.split(text, names):
            if isinstance(segment, ControlToken):
                ids.append(segment.id)
            else:
                ids += self._plain(segment)
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Ordinary text only, many at once, in SentencePiece's own threads."""
        for text in texts:
            _encodable(text)
        return self._pieces.encode(list(texts), num_threads=threads) if texts else []

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of ``text`` as they are inside a longer text, right behind a newline: no dummy space in front.

        Exact when the newline is a piece of its own that merges with nothing, as in every TeleChat2 tokenizer;
        otherwise ``text`` is encoded as if it stood alone.
        """
        return self.continuation_of(self.encode_batch([self.continuation_text(text)])[0])

    def continuation_text(self, text: str) -> str:
        """What to hand to ``encode_batch`` for a continuation."""
        return "\n" + text if self._newline_is_atomic() else text

    def continuation_of(self, ids: list[int]) -> list[int]:
        """Strip what ``continuation_text`` added."""
        return ids[len(self._plain("\n")) :] if self._newline_is_atomic() else ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Ids -> text, spaces around control tokens as the released class writes them.

        UserError on an id that is neither a piece nor in the table.
        """
        kept = [int(i) for i in ids]
        for i in kept:
            if not 0 <= i < self.vocab_size and i not in self._special:
                raise UserError(f"token id {i} is outside the tokenizer's {self.vocab_size} pieces ({self.path})")
        if skip_special:
            kept = [i for i in kept if not self.is_silent(i)]
        chunks: list[str] = []
        run: list[int] = []
        for i in kept:
            if i in self._table.spaced_ids:
                chunks += [text for text in (self._joined(run),) if text]
                chunks.append(self._special[i])
                run = []
            else:
                run.append(i)
        if run or not chunks:
            chunks.append(self._joined(run))
        return " ".join(chunks)

    def piece(self, index: int) -> str:
        """How the vocabulary writes one id; "?" outside it."""
        if index in self._special:
            return self._special[index]
        return self._pieces.id_to_piece(index) if 0 <= index < self.vocab_size else "?"

    def token_bytes(self, index: int) -> bytes:
        """What one token adds to a text; the name of a control token. Bytes, because a token may be part of a
        character."""
        byte = self.byte_of(index)
        if byte is not None:
            return bytes([byte])
        return self.piece(index).replace("\u2581", " ").encode()

    def stream(self) -> StreamDecoder:
        """A decoder for ids that arrive one by one, without the control tokens."""
        return StreamDecoder(self)

    def is_silent(self, index: int) -> bool:
        """Whether a token writes no text: a control token."""
        return index in self._special or (0 <= index < self.vocab_size and self._pieces.is_control(index))

    def byte_of(self, index: int) -> int | None:
        """The byte that a byte piece stands for; None for any other token."""
        if 0 <= index < self.vocab_size and self._pieces.is_byte(index):
            return int(self._pieces.id_to_piece(index)[1:-1], 16)
        return None

    @functools.cached_property
    def anchor(self) -> int | None:
        """The first token that is a plain word or letter; None in a vocabulary without one."""
        for index in range(self.vocab_size):
            plain = not (self.is_silent(index) or self._pieces.is_byte(index) or self._pieces.is_unknown(index))
            if plain and self._pieces.id_to_piece(index).isalnum():
                return index
        return None

    @functools.cached_property
    def longest_piece(self) -> int:
        """Characters of text that one token can stand for at most."""
        return max(len(self._pieces.id_to_piece(index)) for index in range(self.vocab_size))

    def _joined(self, ids: list[int]) -> str:
        out, segment, after_special = "", [], False
        for n, i in enumerate(ids):
            if i not in self._special:
                segment.append(i)
                after_special = False
                continue
            if self._table.space_before and n and not after_special:
                out += " "
            out += self._pieces.decode(segment) + self._special[i]
            segment, after_special = [], True
        return out + self._pieces.decode(segment)

    def _plain(self, text: str) -> list[int]:
        _encodable(text)
        return self._pieces.encode(text)

    def _piece_id(self, name: str) -> int | None:
        index = self._pieces.piece_to_id(name)
        return index if self._pieces.id_to_piece(index) == name else None

    def _control_ids(self) -> dict[str, int]:
        found = {}
        for name in TELECHAT2_NAMES:
            index = self._piece_id(name)
            if index is None and name in ALIASES:
                index = self._piece_id(ALIASES[name])
            # A piece that SentencePiece itself matches in text would let a user's text become a control token.
            if index is None or not self._pieces.is_control(index):
                raise UserError(
                    f"{self.path}: has no control piece {name}, so it is not a TeleChat2 tokenizer; "
                    "use control 'none' to read it as bare SentencePiece"
                )
            found[name] = index
        return found

    def _newline_is_atomic(self) -> bool:
        if self._continues is None:
            holders = [i for i in range(self.vocab_size) if "\n" in self._pieces.id_to_piece(i)]
            self._continues = [self._pieces.id_to_piece(i) for i in holders] == ["\n"]
        return self._continues


def load_tokenizer(path: str | Path, control: str = "chat", in_vocabulary: bool = False) -> SentencePieceTokenizer:
    """Open a ``tokenizer.model`` (or the folder that holds one).

    ``control`` chooses what is matched in text on request: "chat" (table of the 3B and 7B releases), "released_115b",
    "mindformers", or "none" (bare SentencePiece). ``in_vocabulary`` drops ids beyond the file's pieces from the table:
    such a token is matched as its in-vocabulary namesake where there is one, and is ordinary text otherwise.
    UserError when the file is missing, is not a SentencePiece model, or lacks TeleChat2's control pieces.
    """
    if control not in CONTROL_CHOICES:
        raise UserError(f"control: '{control}' is not one of {', '.join(CONTROL_CHOICES)}")
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.model"
    missing = "no such tokenizer; give a tokenizer.model or the folder that holds it"
    model_bytes = read_file(file, MAX_MODEL, missing)
    return SentencePieceTokenizer(model_bytes, file, control, in_vocabulary)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """UserError unless the tokenizer has exactly one piece per row of the model's embedding."""
    if tokenizer.vocab_size != config.num_tokens:
        raise UserError(
            f"{tokenizer.path}: the tokenizer has {tokenizer.vocab_size} pieces but model.vocab_size is "
            f"{config.num_tokens}; use the model's own tokenizer, or set model.vocab_size={tokenizer.vocab_size}"
        )


def _encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        bad = text[error.start]
        raise UserError(f"text has an unpaired surrogate U+{ord(bad):04X} at character {error.start}") from None
