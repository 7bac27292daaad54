"""Training of a SentencePiece BPE with TeleChat2's control tokens at TeleChat2's ids, for small models."""

from __future__ import annotations

import collections
import functools
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from telechat_twins.core.data.control import BOT, END, PAD, START, SYSTEM, USER
from telechat_twins.core.data.tokenizer import Tokenizer, load_tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import new_file

# Ids 4-17 behind <_unk> <_start> <_end> <_pad>, then from 18 the released order: digits, "_" 28, newline 29, tab 30.
CONTROL_PIECES = (USER, BOT, SYSTEM, "<_observation>", "<_sep>", *(f"<_control{n}>" for n in range(1, 10)))
LITERAL_PIECES = (*"0123456789", "_", "\n", "\t", "__", "___", "____")
FIXED = 4 + len(CONTROL_PIECES) + len(LITERAL_PIECES)
SMALLEST = FIXED + 256
LIBRARY_COVERAGE = 0.98  # below this SentencePiece refuses; the rare characters are taken out here

_BLOCK = 4096

# TeleChat2's settings: control tokens at its ids, bytes for characters without a piece, text taken as it is.
_train_bpe = functools.partial(
    sentencepiece.SentencePieceTrainer.train,
    model_type="bpe",
    unk_id=0,
    unk_piece="<_unk>",
    bos_id=1,
    bos_piece=START,
    eos_id=2,
    eos_piece=END,
    pad_id=3,
    pad_piece=PAD,
    control_symbols=list(CONTROL_PIECES),
    user_defined_symbols=list(LITERAL_PIECES),
    split_digits=True,
    allow_whitespace_only_pieces=True,
    normalization_rule_name="identity",
    add_dummy_prefix=True,
    remove_extra_whitespaces=False,
    max_sentence_length=16 * _BLOCK,
    input_sentence_size=0,
    shuffle_input_sentence=False,
    minloglevel=2,
)


def train_tokenizer(
    texts: Iterable[str],
    path: str | Path,
    vocab_size: int,
    *,
    threads: int = 1,
    character_coverage: float = 0.9995,
    byte_fallback: bool = True,
) -> Tokenizer:
    """Train on ``texts`` and write the model file ``path``; returns it loaded. The same texts give the same bytes.

    ``character_coverage``: share of the text's characters that get pieces, the frequent ones first; the others are
    written as bytes (``byte_fallback``), or unknown. Chinese has thousands of characters: 0.98 leaves about half of
    them to the bytes. SentencePiece keeps its training text in memory, below 0.98 it is there twice: give a sample of a
    large corpus, not all of it. UserError when ``vocab_size`` is too small for the fixed pieces and the characters
    found, or larger than the text can fill, or when there is no text.
    """
    _check(vocab_size, character_coverage, byte_fallback)
    blocks = _blocks(texts)
    if character_coverage < LIBRARY_COVERAGE:
        blocks, character_coverage = _covered(list(blocks), character_coverage), 1.0
    first = next(blocks, None)
    if first is None:
        raise UserError("tokenizer training: found no text; give at least one text that is not blank")

    stopped: list[BaseException] = []

    def sentences() -> Iterator[str]:
        yield first
        try:
            yield from blocks
        except BaseException as error:
            # SentencePiece would turn it into an error of its own: a malformed row, and Ctrl-C as well.
            stopped.append(error)
            raise

    model = io.BytesIO()
    try:
        _train_bpe(
            sentence_iterator=sentences(),
            model_writer=model,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=byte_fallback,
            num_threads=threads,
        )
    except (RuntimeError, OSError, UnicodeEncodeError) as error:
        if stopped:
            raise stopped[0] from None
        # SentencePiece goes on to name an option of its own command, which is none of ours.
        reason = str(error).splitlines()[0].rpartition("] ")[2].partition(" or decrease character_coverage")[0]
        if "required_chars" in reason:
            rest = "the rest is written as bytes" if byte_fallback else "the rest becomes unknown"
            reason += f". Or lower the character coverage ({rest})"
        raise UserError(f"vocab_size: {vocab_size} does not suit this text; SentencePiece reports: {reason}") from None
    _write(Path(path), model.getvalue())
    return load_tokenizer(path)


def _check(vocab_size: int, coverage: float, byte_fallback: bool) -> None:
    smallest = SMALLEST if byte_fallback else FIXED
    if vocab_size <= smallest:
        raise UserError(f"vocab_size: must be above {smallest} (control tokens, digits and bytes), found {vocab_size}")
    if not 0 < coverage <= 1:
        raise UserError(f"character_coverage: must be above 0 and at most 1, found {coverage:g}")


def _covered(blocks: list[str], coverage: float) -> Iterator[str]:
    """``blocks`` without their rare characters: of the others each, from the most frequent on, until they make up
    ``coverage`` of the text. A newline takes the place of a rare one: a piece of its own, with which nothing merges."""
    counts: collections.Counter[str] = collections.Counter()
    for block in blocks:
        counts.update(block)
    total, kept, seen = counts.total(), set(LITERAL_PIECES), 0
    for character, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
        if seen >= coverage * total:
            break
        kept.add(character)
        seen += count
    rare = {ord(character): "\n" for character in counts.keys() - kept}
    return (block.translate(rare) for block in blocks)


def _write(path: Path, data: bytes) -> None:
    """The whole file or, with a UserError, no change."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from None


def _blocks(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of at most _BLOCK characters, cut behind a newline where there is one.

    Blocks and not lines: each training sentence gets a dummy space in front, which a line inside a text does not have.
    """
    for text in texts:
        start = 0
        while start < len(text):
            stop = min(start + _BLOCK, len(text))
            if stop < len(text):
                newline = text.rfind("\n", start, stop)
                stop = newline + 1 if newline > start else stop
            block = text[start:stop]
            start = stop
            if block.strip():
                yield block
