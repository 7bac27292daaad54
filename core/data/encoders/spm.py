"""The SentencePiece implementation of the tokenizer interface, with a table of control tokens."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from pathlib import Path
from typing import TypeVar

import numpy as np
import sentencepiece

from telechat_twins.core.data.control import (
    ALIASES,
    END,
    PAD,
    START,
    TABLES,
    TELECHAT2_NAMES,
    TOOL_TOKENS,
    Allow,
    ControlTable,
    ControlToken,
    Splitter,
)
from telechat_twins.core.data.detokenizer import StreamDecoder
from telechat_twins.core.data.encoders.cuts import SPACE, WITHOUT_PREFIX, Cutter, Specs, make_cutter, read_specs
from telechat_twins.core.data.encoders.joined import words_encoder
from telechat_twins.core.data.encoders.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, PieceTable, read_pieces
from telechat_twins.core.data.encoders.special import SpecialTokens, encodable, missing_control, missing_special
from telechat_twins.core.data.encoders.words import Words
from telechat_twins.core.errors import UserError

_LONG = 20_000  # characters from which finding the cuts pays


_Made = TypeVar("_Made")


def _begun(make: Callable[[], _Made]) -> Callable[[], _Made]:
    """Let ``make`` run in a thread, while Python goes on where the library does not need it. What is returned waits for
    its result, or raises its error."""
    results: list[_Made] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(make())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result() -> _Made:
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    return result


def _listed(pieces: sentencepiece.SentencePieceProcessor) -> PieceTable:
    """The table of pieces as the library has it, for a file whose bytes do not show it."""
    ids = list(range(pieces.get_piece_size()))
    types = np.full(len(ids), NORMAL, np.uint8)
    types[np.frombuffer(bytes(pieces.is_control(ids)), bool)] = CONTROL
    types[np.frombuffer(bytes(pieces.is_byte(ids)), bool)] = BYTE
    types[pieces.unk_id()] = UNKNOWN
    return PieceTable(pieces.id_to_piece(ids), types, 0)


class SentencePieceTokenizer:
    """The tokenizer of a ``tokenizer.model``; made by ``core.data.tokenizer.load_tokenizer``.

    ``vocab_size``: pieces in the file. ``control``: name -> id of TeleChat2's control tokens, all inside the vocabulary
    (empty with control "none"). ``matched``: name -> id of what ``allow_control=True`` recognises in text. ``path``,
    ``sha256`` and ``model_bytes`` identify the file. ``special``: beginning, end and padding where they are not
    TeleChat2's. ``many``: long texts are to be encoded, so that what they need is loaded at once.
    """

    file_name = "tokenizer.model"

    def __init__(
        self,
        model_bytes: bytes,
        path: Path,
        variant: str,
        in_vocabulary: bool = False,
        special: SpecialTokens | None = None,
        many: bool = False,
    ):
        self.path = path
        self.model_bytes = model_bytes
        self.sha256 = hashlib.sha256(model_bytes).hexdigest()
        self.variant = variant
        try:
            if not model_bytes:  # of which the library would make a processor without a model
                raise RuntimeError("empty")
            loading = sentencepiece.SentencePieceProcessor
            loaded = _begun(functools.partial(loading, model_proto=model_bytes))
            without_prefix = functools.partial(loading, model_proto=model_bytes + WITHOUT_PREFIX)
            self._loading_inner = _begun(without_prefix) if many else without_prefix
            read = read_pieces(model_bytes)  # a damaged name is found out here
            self._pieces = loaded()
            self.vocab_size: int = self._pieces.get_piece_size()
            known = read is not None and len(read.names) == self.vocab_size
            self._read = read if read is not None and known else _listed(self._pieces)
            self._names: list[str] = self._read.names
        except (RuntimeError, UnicodeDecodeError):
            self.vocab_size = 0
        if not self.vocab_size:
            raise UserError(f"{path}: not a SentencePiece model; give the release's tokenizer.model")
        if variant == "auto":
            telechat2 = all(self._control_id(name) is not None for name in TELECHAT2_NAMES)
            self.variant = variant = "chat" if telechat2 else "none"
        self.control: dict[str, int] = {} if variant == "none" else self._control_ids()
        table = ControlTable()
        if variant != "none":
            table = TABLES[variant](self.control, self._piece_id, self.vocab_size)
        if in_vocabulary:
            table = table.inside(self.vocab_size, {name: self.control[name] for name in TOOL_TOKENS if self.control})
        self._table = table
        self._splitter = Splitter(table.tokens)
        self._special = {t.id: t.text for t in table.tokens}
        self.special = special or SpecialTokens()

    @property
    def matched(self) -> dict[str, int]:
        return {t.text: t.id for t in self._table.tokens}

    @functools.cached_property
    def silent(self) -> dict[str, int]:
        """Name -> id of every token that writes no text."""
        return {**{self._names[i]: i for i in np.flatnonzero(self._read.types == CONTROL).tolist()}, **self.control}

    @property
    def bos_token_id(self) -> int:
        return self.control_id(START) if self.control else self._own_id("bos", self._pieces.bos_id())

    @property
    def eos_token_id(self) -> int:
        return self.control_id(END) if self.control else self._own_id("eos", self._pieces.eos_id())

    @property
    def pad_token_id(self) -> int:
        return self.control_id(PAD) if self.control else self._own_id("pad", self._pieces.pad_id())

    def control_id(self, name: str) -> int:
        """The id of a control token; UserError when this tokenizer has none of that name."""
        if name not in self.control:
            raise missing_control(self.path, name, self.variant)
        return self.control[name]

    def token_id(self, name: str) -> int | None:
        """The id of the piece of this name."""
        return self.control.get(name, self._piece_id(name))

    def encode(self, text: str, add_bos: bool = False, allow_control: Allow = False) -> list[int]:
        """Text -> ids. ``allow_control`` True matches the table's control tokens, a collection only those names.

        Equal to the released tokenizers with ``allow_control=True``, ids one past the vocabulary included (``<unk>``
        with "chat", tool tokens with "mindformers"); load with ``in_vocabulary=True`` where such ids may not occur.
        """
        ids = [self.bos_token_id] if add_bos else []
        if not allow_control:
            return ids + self._plain(text)
        names = None if allow_control is True else allow_control
        for segment in self._splitter.split(text, names):
            if isinstance(segment, ControlToken):
                ids.append(segment.id)
            else:
                ids += self._plain(segment)
        return ids

    def encode_batch(self, texts: Sequence[str], begins: Sequence[bool] | None = None) -> list[np.ndarray]:
        """Ordinary text only, many at once: int32 ids of each. Where ``begins`` is False, the text goes on behind one
        of ``last_cut``'s places, without a space in front."""
        for text in texts:
            encodable(text)
        starts = [True] * len(texts) if begins is None else begins
        # Of little text the ids are there before the cuts are known, unless they are known already.
        little = "_words" not in self.__dict__ and all(starts) and sum(map(len, texts)) < _LONG
        words = None if little else self._words
        if words is None:
            found = self._pieces.encode([*texts], num_threads=1) if texts else []
            return [np.asarray(ids, np.int32) for ids in found]
        prefix = " " if self._specs.adds_prefix else ""
        pairs = zip(texts, starts, strict=True)
        return words.encode([(prefix if start and text else "") + text for text, start in pairs])

    def last_cut(self, text: str) -> int:
        """The last place at which ``text`` may be cut into two that encode as the whole does; 0 if none is certain."""
        return 0 if self._cutter is None else self._cutter.last(text)

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
        return self._names[index] if 0 <= index < self.vocab_size else "?"

    def token_bytes(self, index: int) -> bytes:
        """What one token adds to a text; the name of a control token. Bytes, because a token may be part of a
        character."""
        byte = self.byte_of(index)
        if byte is not None:
            return bytes([byte])
        return self.piece(index).replace(SPACE, " ").encode()

    def stream(self) -> StreamDecoder:
        """A decoder for ids that arrive one by one, without the control tokens."""
        return StreamDecoder(self)

    def is_silent(self, index: int) -> bool:
        """Whether a token writes no text: a control token."""
        return index in self._special or (0 <= index < self.vocab_size and self._pieces.is_control(index))

    def byte_of(self, index: int) -> int | None:
        """The byte that a byte piece stands for; None for any other token."""
        if 0 <= index < self.vocab_size and self._pieces.is_byte(index):
            return int(self._names[index][1:-1], 16)
        return None

    @functools.cached_property
    def anchor(self) -> int | None:
        """The first token that is a plain word or letter; None in a vocabulary without one."""
        for index in range(self.vocab_size):
            plain = not (self.is_silent(index) or self._pieces.is_byte(index) or self._pieces.is_unknown(index))
            if plain and self._names[index].isalnum():
                return index
        return None

    @functools.cached_property
    def longest_piece(self) -> int:
        """Characters of text that one token can stand for at most."""
        return max(map(len, self._names))

    @functools.cached_property
    def _specs(self) -> Specs:
        try:
            return read_specs(self.model_bytes, self._read.end)
        except ValueError:  # a file that only the library can read is not cut
            return Specs({}, {})

    @functools.cached_property
    def _cutter(self) -> Cutter | None:
        return make_cutter(self._specs, list(compress(self._names, (~self._read.special).tobytes())))

    @functools.cached_property
    def _inner(self) -> sentencepiece.SentencePieceProcessor:
        """The same model without the space in front of a text."""
        if not self._specs.adds_prefix:
            return self._pieces
        return self._loading_inner()

    @functools.cached_property
    def _words(self) -> Words | None:
        """Encodes word by word; None for a model without exact cuts."""
        if not self._specs.is_bpe:
            return None
        inner = _begun(lambda: self._inner)
        cutter = self._cutter
        inner()
        if cutter is None:
            return None
        return Words(cutter, words_encoder(self._inner, cutter))

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
        if len(text) >= _LONG and self._cutter is not None:
            return self.encode_batch([text])[0].tolist()
        encodable(text)
        return self._pieces.encode(text)

    def _piece_id(self, name: str) -> int | None:
        index = self._pieces.piece_to_id(name)
        return index if self._names[index] == name else None

    def _control_id(self, name: str) -> int | None:
        """The id of a control token; a piece that SentencePiece itself matches in text does not count, which would let
        a user's text become a control token."""
        index = self._piece_id(name)
        if index is None and name in ALIASES:
            index = self._piece_id(ALIASES[name])
        return None if index is None or not self._pieces.is_control(index) else index

    def _control_ids(self) -> dict[str, int]:
        found = {}
        for name in TELECHAT2_NAMES:
            index = self._control_id(name)
            if index is None:
                raise UserError(
                    f"{self.path}: has no control piece {name}, so it is not a TeleChat2 tokenizer; "
                    "use control 'none' to read it as bare SentencePiece"
                )
            found[name] = index
        return found

    def _own_id(self, kind: str, default: int) -> int:
        given = self.special.id_of(kind, self.token_id, self.vocab_size, self.path)
        if given is None and default < 0:
            raise missing_special(self.path, kind)
        return default if given is None else given
