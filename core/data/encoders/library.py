"""Tokenizers of the tokenizers library: a ``tokenizer.json``, or byte-level BPE from ``vocab.json`` and ``merges.txt``.

Two kinds are read: byte-level ones, whose pieces are bytes (FLM-101B's, GPT-2's), and those that mark spaces as
SentencePiece does and fall back to byte pieces. Text never becomes a special token unless the caller asks.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from telechat_twins.core.backends import install_command
from telechat_twins.core.data.control import (
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
from telechat_twins.core.data.detokenizer import ByteDecoder, Decoder, StreamDecoder
from telechat_twins.core.data.encoders.cuts import SPACE
from telechat_twins.core.data.encoders.special import (
    ADDED,
    TOKENIZER_CONFIG,
    SpecialTokens,
    encodable,
    missing_control,
    missing_special,
)
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MIB, load_json, read_file
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

MAX_FILE = 64 * MIB  # bytes of a tokenizer.json, vocab.json or merges.txt
GPT2_END = "<|endoftext|>"  # what GPT-2's tokenizer takes for beginning and end where no file names them
MOST_ADDED = 1024  # ids that may lie between the last piece and a special token
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", None)


class LibraryTokenizer:
    """A tokenizer of the library behind the interface ``core.data.tokenizer.Tokenizer``."""

    file_name = "tokenizer.json"

    def __init__(
        self,
        library: Library,
        model_bytes: bytes,
        path: Path,
        variant: str,
        in_vocabulary: bool = False,
        special: SpecialTokens | None = None,
    ):
        self.path, self.model_bytes = path, model_bytes
        self.sha256 = hashlib.sha256(model_bytes).hexdigest()
        self._library = library
        self._library.no_padding()
        self._library.no_truncation()
        if getattr(self._library.model, "dropout", None):
            self._library.model.dropout = None  # of BPE's training: it leaves merges out at random
        self._library.encode_special_tokens = True  # names of special tokens in text are text
        vocabulary: dict[str, int] = library.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"{path}: has no tokens")
        self.vocab_size = max(vocabulary.values()) + 1
        self._pieces: list[str | None] = [None] * self.vocab_size
        for piece, index in vocabulary.items():
            self._pieces[index] = piece
        self._byte_level = _is_byte_level(library, path)
        added = library.get_added_tokens_decoder()
        self._special = {index: token.content for index, token in added.items() if token.special}
        self._written = {index: token.content for index, token in added.items() if not token.special}
        names = {text: index for index, text in self._special.items()}
        if variant == "auto":
            variant = "chat" if all(name in names for name in TELECHAT2_NAMES) else "none"
        self.variant = variant
        table = ControlTable(
            tuple(ControlToken(t.content, i, t.single_word, t.lstrip, t.rstrip) for i, t in added.items() if t.special),
            space_before=False,
        )
        self.control: dict[str, int] = {}
        if variant != "none":
            self.control = _control_ids(names, path)
            table = TABLES[variant](self.control, vocabulary.get, self.vocab_size)
        if in_vocabulary:
            table = table.inside(self.vocab_size, {name: self.control[name] for name in TOOL_TOKENS if self.control})
        self._table, self._splitter = table, Splitter(table.tokens)
        self.special = special or SpecialTokens()

    @property
    def matched(self) -> dict[str, int]:
        return {t.text: t.id for t in self._table.tokens}

    @functools.cached_property
    def silent(self) -> dict[str, int]:
        """Name -> id of every token that writes no text."""
        return {text: index for index, text in self._special.items()}

    @property
    def bos_token_id(self) -> int:
        return self.control_id(START) if self.control else self._own_id("bos")

    @property
    def eos_token_id(self) -> int:
        return self.control_id(END) if self.control else self._own_id("eos")

    @property
    def pad_token_id(self) -> int:
        return self.control_id(PAD) if self.control else self._own_id("pad")

    def control_id(self, name: str) -> int:
        """The id of a control token; UserError when this tokenizer has none of that name."""
        if name not in self.control:
            raise missing_control(self.path, name, self.variant)
        return self.control[name]

    def token_id(self, name: str) -> int | None:
        """The id of the token of this name."""
        index: int | None = self._library.token_to_id(name)
        return index

    def encode(self, text: str, add_bos: bool = False, allow_control: Allow = False) -> list[int]:
        """Text -> ids; ``allow_control`` True matches the table's tokens, a collection only those names."""
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
        """Ordinary text only: int32 ids of each. A text that goes on (``begins`` False) starts with a space, by
        ``last_cut``, so that no space is put in front of it."""
        return [np.asarray(self._plain(text), np.int32) for text in texts]

    def last_cut(self, text: str) -> int:
        """The last place at which ``text`` may be cut into two that encode as the whole does; 0 if none is certain.

        GPT-2's splitting never joins a visible character to a space behind it. Other splittings are not judged.
        """
        if not self._cuts_at_spaces:
            return 0
        place = text.rfind(" ")
        while place > 0 and text[place - 1].isspace():
            place = text.rfind(" ", 0, place)
        return max(place, 0)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Ids -> text. UserError on an id that no token has."""
        kept = [int(i) for i in ids]
        for i in kept:
            if not 0 <= i < self.vocab_size or self._pieces[i] is None:
                raise UserError(f"token id {i} is not one of the {self.vocab_size} tokens of {self.path}")
        if skip_special:
            kept = [i for i in kept if i not in self._special]
        if not self._byte_level:
            text: str = self._library.decode(kept, skip_special_tokens=False)
            return text
        chunks: list[str] = []
        run: list[bytes] = []
        for i in kept:
            if i in self._special:
                chunks += [b"".join(run).decode("utf-8", "replace"), self._special[i]]
                run = []
            else:
                run.append(self._bytes_of(i))
        return "".join([*chunks, b"".join(run).decode("utf-8", "replace")])

    def piece(self, index: int) -> str:
        """How the vocabulary writes one id; "?" outside it."""
        piece = self._pieces[index] if 0 <= index < self.vocab_size else None
        return "?" if piece is None else piece

    def token_bytes(self, index: int) -> bytes:
        """What one token adds to a text; the name of a special token."""
        if index in self._special or not 0 <= index < self.vocab_size:
            return self.piece(index).encode()
        if self._byte_level:
            return self._bytes_of(index)
        byte = self.byte_of(index)
        return self.piece(index).replace(SPACE, " ").encode() if byte is None else bytes([byte])

    def stream(self) -> Decoder:
        """A decoder for ids that arrive one by one, without the special tokens."""
        return ByteDecoder(self) if self._byte_level else StreamDecoder(self)

    def is_silent(self, index: int) -> bool:
        """Whether a token writes no text."""
        return index in self._special

    def byte_of(self, index: int) -> int | None:
        """The byte that a byte piece such as <0x0A> stands for; None for any other token."""
        found = _BYTE_PIECE.fullmatch(self.piece(index))
        return int(found[1], 16) if found and not self._byte_level else None

    @functools.cached_property
    def anchor(self) -> int | None:
        """The first token that is a plain word or letter; None in a vocabulary without one."""
        plain = (i for i, piece in enumerate(self._pieces) if piece and piece.isalnum() and not self.is_silent(i))
        return next(plain, None)

    @functools.cached_property
    def longest_piece(self) -> int:
        """Characters of text that one token can stand for at most."""
        return max(len(piece) for piece in self._pieces if piece is not None)

    @functools.cached_property
    def _cuts_at_spaces(self) -> bool:
        splitting = _state(self._library.pre_tokenizer)
        gpt2 = splitting.get("type") == "ByteLevel" and splitting.get("use_regex", True)
        # A token of the user's own may hold a space, or take those beside it.
        return bool(gpt2) and self._library.normalizer is None and not self._written

    def _plain(self, text: str) -> list[int]:
        encodable(text)
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def _bytes_of(self, index: int) -> bytes:
        piece = self.piece(index)
        if index in self._written:
            return piece.encode()
        return bytes(_BYTES[c] for c in piece) if all(c in _BYTES for c in piece) else piece.encode()

    def _own_id(self, kind: str) -> int:
        index = self.special.id_of(kind, self.token_id, self.vocab_size, self.path)
        if index is None:
            raise missing_special(self.path, kind)
        return index


def open_json(path: Path, variant: str, in_vocabulary: bool, special: SpecialTokens) -> LibraryTokenizer:
    """The tokenizer of a ``tokenizer.json``; UserError for a file that is not one, or of a kind that is not read."""
    data = read_file(path, MAX_FILE, "no such tokenizer")
    library_class = _library_class(path)
    try:
        library = library_class.from_buffer(data)
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{path}: not a tokenizer of the tokenizers library ({error})") from None
    return LibraryTokenizer(library, data, path, variant, in_vocabulary, special)


def open_vocabulary(
    vocabulary: Path, variant: str, in_vocabulary: bool, special: SpecialTokens
) -> tuple[LibraryTokenizer, list[str]]:
    """GPT-2's byte-level BPE of a ``vocab.json`` and the ``merges.txt`` beside it, and notes on what was assumed.

    Special tokens without a piece get the ids behind the last one, as in transformers. UserError for files that do not
    fit each other or are not byte-level.
    """
    library_class = _library_class(vocabulary)
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    merges = vocabulary.with_name("merges.txt")
    for file in (vocabulary, merges):
        read_file(file, MAX_FILE, "no such file; byte-level BPE has vocab.json and merges.txt")
    try:
        library = library_class(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:
        raise UserError(f"{vocabulary}: not the vocabulary of {merges.name} beside it ({error})") from None
    if lacking := [c for c in _BYTES if library.token_to_id(c) is None]:
        raise UserError(
            f"{vocabulary}: lacks {len(lacking)} of the 256 bytes, so it is not byte-level; give its tokenizer.json"
        )
    described = vocabulary.with_name(TOKENIZER_CONFIG)
    about = load_json(described, "a description of tokens") if described.is_file() else {}
    prefix = about.get("add_prefix_space") is True
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    library.decoder = decoders.ByteLevel()
    notes = []
    if (name := about.get("tokenizer_class")) not in _GPT2_CLASSES:
        notes.append(f"{described}: tokenizer_class {name!r} is read as GPT-2's byte-level BPE")
    added = dict(special.added)
    if not added:
        added, given = {GPT2_END: None}, dict(special.given)
        for kind in ("bos", "eos"):
            given.setdefault(kind, (GPT2_END, str(vocabulary)))
        special = dataclasses.replace(special, given=given, added=added)
        notes.append(f"no file names special tokens; {GPT2_END} begins and ends texts, as in GPT-2's tokenizer")
    _add(library, AddedToken, added, vocabulary)
    data = library.to_str().encode()
    return LibraryTokenizer(library, data, vocabulary, variant, in_vocabulary, special), notes


def _add(library: Library, token: type, added: Mapping[str, int | None], path: Path) -> None:
    """Make the named tokens special: those that are pieces keep their ids, others get theirs or the next ones."""
    size = library.get_vocab_size()
    placed = sorted(
        ((name, index) for name, index in added.items() if library.token_to_id(name) is None),
        key=lambda entry: (entry[1] is None, entry[1] or 0),
    )
    for name, index in placed:
        after = library.get_vocab_size()
        if index is not None and not size <= index < size + MOST_ADDED:
            raise UserError(f"{path.with_name(ADDED)}: {name!r} has id {index}, and the pieces end at {size - 1}")
        gap = max(0, (index or 0) - after)
        library.add_special_tokens([token(f"<unused {after + n}>", normalized=False) for n in range(gap)])
        library.add_special_tokens([token(name, normalized=False)])
    library.add_special_tokens([token(name, normalized=False) for name in added])
    for name, index in added.items():
        if index is not None and (found := library.token_to_id(name)) != index:
            raise UserError(f"{path}: {name!r} should have id {index} and has {found}; the files contradict each other")


def _library_class(path: Path) -> type[Library]:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise UserError(
            f"{path}: is read with the tokenizers library, which is not installed; run: {install_command('tokenizers')}"
        ) from None
    found: type[Library] = Tokenizer
    return found


def _control_ids(names: Mapping[str, int], path: Path) -> dict[str, int]:
    for name in TELECHAT2_NAMES:
        if name not in names:
            raise UserError(
                f"{path}: has no special token {name}, so it is not a TeleChat2 tokenizer; use control 'none'"
            )
    return {name: names[name] for name in TELECHAT2_NAMES}


def _is_byte_level(library: Library, path: Path) -> bool:
    """Whether pieces are bytes, by the decoder; UserError for a kind of tokenizer that is not read."""
    decoder = _state(library.decoder)
    kinds = [step.get("type") for step in (decoder, *decoder.get("decoders", ()))]
    if "ByteLevel" in kinds:
        return True
    if "ByteFallback" in kinds:
        return False
    raise UserError(
        f"{path}: its decoder is {decoder.get('type', 'missing')}; read are byte-level tokenizers and those with byte "
        "fallback"
    )


def _state(part: object) -> JsonObject:
    """The JSON of a part of the library's tokenizer; empty for one that is not set."""
    if part is None:
        return {}
    found = json.loads(getattr(part, "__getstate__")())  # noqa: B009  (the library's types do not declare it)
    return found if isinstance(found, dict) else {}


def _byte_letters() -> dict[str, int]:
    """GPT-2's letter for each byte -> the byte: printable ones stand for themselves, the rest lie from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTES = _byte_letters()
