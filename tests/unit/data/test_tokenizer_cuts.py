"""Exact cuts of long texts: the ids are those of SentencePiece for the whole text, in one process and in several."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.core.data.encoders import cuts, joined, spm, tasks, words
from telechat_twins.core.data.encoders.cuts import make_cutter, read_specs
from telechat_twins.core.data.encoders.parallel import encode_blocks
from telechat_twins.core.data.encoders.pieces import read_pieces
from telechat_twins.core.data.encoders.tasks import Encoder
from telechat_twins.core.data.tokenizer import load_tokenizer
from telechat_twins.core.errors import UserError
from tests.support.data_support import SENTENCES, tiny_tokenizer, tiny_tokenizer_path
from tests.support.shared import shared_file

PARTS = ["fox ", " fox", "  ", "\n", "\n\n", "\t", " \n", "add(", "中国", "，", "▁", "▁▁ ", "é", "😀", "12", "__"]
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(max_size=8), max_size=40).map("".join)


def trained(folder: Path, name: str, **options: object) -> Path:
    """A SentencePiece model of few pieces; options as its trainer has them."""
    model = io.BytesIO()
    settings = {"vocab_size": 400, "model_type": "bpe", "minloglevel": 2, **options}
    texts = iter([*SENTENCES * 10, "aa bb  cc   dd\n\n x\ty " * 20])
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **settings)
    path = folder / f"{name}.model"
    path.write_bytes(model.getvalue())
    return path


def test_words_are_encoded_in_the_process_itself(monkeypatch):
    """The library starts a thread for every list, and a thread a processor unless told: where every processor has a
    process of its own, it waits for one."""
    asked = []
    encode = sentencepiece.SentencePieceProcessor.encode

    def noted(self: sentencepiece.SentencePieceProcessor, text: object, **options: object) -> object:
        asked.append((type(text), options.get("num_threads")))
        return encode(self, text, **options)

    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "encode", noted)
    tokenizer = load_tokenizer(tiny_tokenizer_path(), "chat")
    tokenizer.encode_batch(["short", "two"])
    assert asked.pop() == (list, 1) and not asked
    tokenizer.encode_batch(["The unusually long words of a text. " * 400, "x" * 9000])
    tokenizer.encode_batch(["a short text by words that are known, and words that are not"])
    assert len(asked) >= 3 and {*asked} == {(str, None)}


@pytest.mark.parametrize("size", [0, 9, 1 << 12])
@pytest.mark.parametrize("symbols", [[], ["\x01", "\x02"], ["\x01a", "b\x02", "\x03\x03"]])
def test_words_that_hold_the_mark_between_words_encode_as_the_whole(tmp_path, monkeypatch, symbols, size):
    monkeypatch.setattr(joined, "_TOGETHER", size)
    path = trained(tmp_path, "x", **IDENTITY, byte_fallback=True, user_defined_symbols=symbols)
    tokenizer, library = load_tokenizer(path, "none"), sentencepiece.SentencePieceProcessor(model_file=str(path))
    mark = joined._mark(tokenizer._inner, tokenizer._cutter)
    assert mark is not None and mark[0] == ("\x04" if len(symbols) == 3 else "\x01")
    rng = random.Random(len(symbols))
    parts = ["\x01", "\x02", "\x03", "\x04", "a", "b", " ", "中国", "\x01a", "fox"]
    texts = ["".join(rng.choices(parts, k=rng.randrange(1, 40))) for _ in range(300)]
    assert [ids.tolist() for ids in tokenizer.encode_batch([*texts, "fox " * 6000])[:-1]] == library.encode(texts)


def test_a_model_without_a_mark_encodes_words_as_a_list(tmp_path):
    path = trained(tmp_path, "x", **CUT["no_bytes"])
    tokenizer, library = load_tokenizer(path, "none"), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert joined._mark(tokenizer._inner, tokenizer._cutter) is None
    text = "The fox, \x01\x02 \x01. " * 3000
    assert tokenizer.encode_batch([text])[0].tolist() == library.encode(text)


def long_texts(seed: int, count: int, size: int) -> list[str]:
    """Real sentences, pieces that are hard to cut, and random characters of many scripts, mixed."""
    rng = random.Random(seed)
    wild = [chr(c) for c in (*range(0x20, 0x250), *range(0x2570, 0x2590), *range(0x4E00, 0x4E40), 0x3000, 0x1F600)]
    made = []
    for _ in range(count):
        text = ""
        while len(text) < size:
            text += rng.choice([*SENTENCES, *PARTS, "".join(rng.choices(wild, k=9)), " " * rng.randrange(9)])
        made.append(text)
    return made


IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
# What the cuts have to respect: pieces across spaces, unknown characters, no space in front, pieces of several symbols.
CUT = {
    "across_spaces": {**IDENTITY, "split_by_whitespace": False, "byte_fallback": True},
    "no_bytes": {**IDENTITY, "character_coverage": 0.985, "vocab_size": 160},
    "no_prefix": {**IDENTITY, "byte_fallback": True, "add_dummy_prefix": False},
    "defined": {**IDENTITY, "byte_fallback": True, "user_defined_symbols": ["\n", "a\n", "x y", "____"]},
    "space_pieces": {**IDENTITY, "byte_fallback": True, "allow_whitespace_only_pieces": True},
}
WHOLE = {
    "unigram": {**IDENTITY, "model_type": "unigram", "byte_fallback": True, "hard_vocab_limit": False},
    "nfkc": {"byte_fallback": True, "remove_extra_whitespaces": False},
    "squeezed": {"normalization_rule_name": "identity", "byte_fallback": True},
    "suffix": {**IDENTITY, "treat_whitespace_as_suffix": True, "byte_fallback": True},
}


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
def test_long_texts_encode_as_the_whole_or_are_not_cut(tmp_path, monkeypatch, name):
    monkeypatch.setattr(spm, "_LONG", 0)
    path = trained(tmp_path, name, **{**CUT, **WHOLE}[name])
    tokenizer = load_tokenizer(path, "none")
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [library.id_to_piece(i) for i in range(library.get_piece_size())]
    cutter = make_cutter(read_specs(path.read_bytes()), pieces)
    assert (cutter is None) == (name in WHOLE)
    texts = ["", " ", "\n", "▁", *long_texts(len(name), 6, 3000)]
    # The second time from the words that are remembered, then with a table in which keys displace each other, whose
    # words are forgotten after each of many parts.
    for places in (19, 19, 3):
        if places == 3:
            for constant, value in (("_PLACES", places), ("_IDS", 50), ("_WORDS", 20), ("_CHARACTERS", 500)):
                monkeypatch.setattr(words, constant, value)
            tokenizer.__dict__.pop("_words", None)
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == library.encode(texts)
    for text in texts:
        cut = tokenizer.last_cut(text)
        assert not (cut and name in WHOLE)
        if cut:
            left, right = tokenizer.encode_batch([text[:cut], text[cut:]], [True, False])
            assert [*left, *right] == library.encode(text)


@pytest.mark.parametrize("wide", [False, True])
def test_pieces_are_read_from_the_bytes_as_the_library_has_them(tmp_path, wide):
    # Names whose bytes look like the beginning of a piece, and such whose sizes take two bytes.
    symbols = ["\n\x0b\n\x04abcd", "\n\x07\nx", *(["中" * 40, "中" * 43, "x" * 200] if wide else [])]
    options = {"control_symbols": ["<c>"], "user_defined_symbols": symbols, "byte_fallback": True}
    path = trained(tmp_path, "x", **options)
    data, library = path.read_bytes(), sentencepiece.SentencePieceProcessor(model_file=str(path))
    found, ids = read_pieces(data), list(range(library.get_piece_size()))
    assert found is not None and found.names == library.id_to_piece(ids) and {*symbols} < {*found.names}
    listed = spm._listed(library)
    assert found.special.tolist() == listed.special.tolist() and 259 < found.special.sum() < len(ids)
    assert read_specs(data, found.end) == read_specs(data) != read_specs(data[: found.end])
    tokenizer = load_tokenizer(path, "none")
    assert tokenizer._read.end == found.end
    assert {*tokenizer.silent} == {"<c>", "<s>", "</s>"}


def test_bytes_that_are_not_pieces_alone_are_left_to_the_library(tmp_path):
    path = trained(tmp_path, "x", byte_fallback=True)
    data, tokenizer = path.read_bytes(), load_tokenizer(path, "none")
    end = tokenizer._read.end
    first = data[: 2 + data[1]]
    other = b"\n\x08\n\x01y\x1d\0\0\0\0"  # a field of another number where the score should be
    for wrong in (b"", b"\n", b"\x12" + data, data[1:], data[: end - 1], data[:end] + other, other + data):
        assert read_pieces(wrong) is None
    assert read_pieces(data[:end]).end == end and read_pieces(first).names == ["<unk>"]
    # A later piece of a message that was put together from two.
    twice = data + b"\n\x0b\n\x02yz\x15\0\0\0\0\x18\x04"
    (tmp_path / "twice.model").write_bytes(twice)
    again = load_tokenizer(tmp_path / "twice.model", "none")
    assert again._names == [*tokenizer._names, "yz"] and again._read.end == 0
    assert again.encode("The fox yz") == sentencepiece.SentencePieceProcessor(model_proto=twice).encode("The fox yz")
    with pytest.raises(UnicodeDecodeError):
        read_pieces(first.replace(b"<", b"\xff"))


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_any_text_encodes_as_the_whole(text):
    tokenizer = tiny_tokenizer()
    want = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer_path())).encode(text)
    assert tokenizer.encode_batch([text, "fox " * 6000])[0].tolist() == want
    cut = tokenizer.last_cut(text)
    left, right = tokenizer.encode_batch([text[:cut], text[cut:]], [True, False])
    assert not cut or [*left, *right] == want


def test_a_wrong_cut_would_be_noticed(tmp_path, monkeypatch):
    """The planted fault: words cut at spaces by a model whose pieces go across them."""
    path = trained(tmp_path, "x", **CUT["across_spaces"])
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [piece for i in range(library.get_piece_size()) if "\u2581" not in (piece := library.id_to_piece(i))[1:]]
    wrong = make_cutter(read_specs(path.read_bytes()), pieces)
    tokenizer = load_tokenizer(path, "none")
    monkeypatch.setitem(tokenizer.__dict__, "_cutter", wrong)
    texts = long_texts(3, 4, 30_000)
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] != library.encode(texts)


def test_keys_that_overlap_would_be_noticed(monkeypatch):
    """The planted fault: keys without the letters' order, so that words of the same letters have one key."""
    tokenizer, texts = load_tokenizer(tiny_tokenizer_path()), ["it ti in ni on no. " * 3000]
    library = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer_path()))
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == library.encode(texts)
    monkeypatch.setattr(cuts, "NUMBER_BITS", 0)
    tokenizer.__dict__.pop("_words")
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] != library.encode(texts)


def test_released_tokenizer_on_its_own_examples():
    path = shared_file("data/telechat2/tokenizer.model")
    tokenizer, library = load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [shared_file(f"data/telechat2/{name}.jsonl").read_text("utf-8") for name in ("demo_code", "demo_single")]
    texts += long_texts(5, 2, 20_000)
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == library.encode(texts)


@dataclass(frozen=True)
class Block:
    where: str
    text: str
    first: bool = True
    last: bool = True


def test_blocks_leave_no_trace(monkeypatch):
    monkeypatch.setattr(tasks, "TASK", 500)
    tokenizer, documents = tiny_tokenizer(), [*long_texts(9, 5, 2000), "中" * 700]
    rng, blocks = random.Random(2), []
    for number, text in enumerate(documents):
        places = sorted({0, *(rng.randrange(len(text) + 1) for _ in range(9)), len(text)})
        parts = [text[a:b] for a, b in zip(places, places[1:], strict=False)]
        blocks += [Block(f"d{number}", p, n == 0, n == len(parts) - 1) for n, p in enumerate(parts)]
    for workers in (1, 2, 3):
        found: list[list[int]] = []
        for encoded in encode_blocks(blocks, Encoder(tokenizer), workers):
            first, *others = np.split(encoded.ids, encoded.starts)
            if len(first):
                found[-1] += first.tolist()
            found += [ids.tolist() for ids in others]
        assert found == [tokenizer.encode(text) for text in documents]


def test_too_many_letters_are_not_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(cuts, "_LETTERS", 20)
    tokenizer = load_tokenizer(trained(tmp_path, "many", **CUT["across_spaces"]), "none")
    assert tokenizer.last_cut("some words of text") == 0
    assert tokenizer.encode_batch(["a fox " * 9])[0].tolist() == tokenizer.encode("a fox " * 9)


def test_what_cannot_be_cut_is_refused(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(trained(tmp_path, "u", **WHOLE["unigram"]), "none")
    monkeypatch.setattr(tasks, "_UNCUT", 100)
    with pytest.raises(UserError, match="a.txt:1: more than 100 characters of one document"):
        list(encode_blocks([Block("a.txt:1", "word " * 30, last=False)], Encoder(tokenizer)))
