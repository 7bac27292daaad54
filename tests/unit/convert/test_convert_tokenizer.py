"""The exported tokenizer.json gives the ids of tokenizer.model, by the library's own rules written out here."""

from __future__ import annotations

import functools
import json
import random
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import SentencePieceProcessor

from telechat_twins.convert.hf.tokenizer import describe_tokenizer, tokenizer_json
from telechat_twins.core.data.tokenizer import load_tokenizer
from telechat_twins.core.data.tokenizer_training import train_tokenizer
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.types import JsonObject
from tests.support.data_support import SENTENCES
from tests.support.shared import shared_file

# Numerals that are no ASCII digits, with something to merge with on either side.
NUMERALS = ("① 总则 ②分则 ①总则 第〇条\n", "half ½ cup, ¼ cup ½cup x² Ⅷ. Ⅷ章 ٣ days ३ days ٣days\n")
TEXTS = (
    "",
    " ",
    "a",
    "① 总则",
    "Hello, world 12345!",
    "def f(self):\n\treturn _x__y___z____w_____v______u_______",
    "  two  spaces ",
    "\ufeffmark and \u00a0 no-break \u3000 wide",
    "生抽与老抽的区别？",
    "naïve cafe\u0301, ½ and ² and ﬁ",
    "emoji 😈 and \u0000 zero\r\n\x85\u2028 ▁ mark",
)
ODD = (
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\ufeff",
    "\u00a0",
    "\u3000",
    "\x00",
    "e\u0301",
    "ﬁ",
    "①",
    "½",
    "〇",
    "😈",
    "ß",
    "▁",
    "٣",
)


class Library:
    """What the tokenizers library does with a tokenizer.json of ours; memory of what was merged before."""

    def __init__(self, made: JsonObject):
        self.vocab: dict[str, int] = made["model"]["vocab"]
        self.ranks = {tuple(pair): n for n, pair in enumerate(made["model"]["merges"])}
        self.normalizers = made["normalizer"]["normalizers"]
        self.digits = made["pre_tokenizer"] is not None
        added = {token["content"]: token for token in made["added_tokens"]}
        self.ids = {name: token["id"] for name, token in added.items()}
        raw = [name for name, token in added.items() if not token["normalized"]]
        late = {self.normalized(name): name for name, token in added.items() if token["normalized"]}
        self.raw, self.late, self.late_names = _finder(raw), _finder(late), late
        self.merged = functools.lru_cache(None)(self._merged)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for segment in self.raw.split(text):
            if segment in self.ids:
                ids.append(self.ids[segment])
                continue
            for word in self.late.split(self.normalized(segment)):
                if word in self.late_names:
                    ids.append(self.ids[self.late_names[word]])
                else:
                    for part in _digits_apart(word) if self.digits else [word]:
                        ids += self.merged(part)
        return ids

    def normalized(self, text: str) -> str:
        for one in self.normalizers:
            if one["type"] == "Prepend":
                text = one["prepend"] + text if text else text
            elif "Regex" in one["pattern"]:
                text = re.sub(one["pattern"]["Regex"].replace("\\z", "\\Z"), one["content"], text)
            else:
                text = text.replace(one["pattern"]["String"], one["content"])
        return text

    def _merged(self, word: str) -> tuple[int, ...]:
        parts = list(word)
        while True:
            pairs = [
                (self.ranks.get(pair, len(self.ranks)), i) for i, pair in enumerate(zip(parts, parts[1:], strict=False))
            ]
            best, i = min(pairs, default=(len(self.ranks), 0))
            if best == len(self.ranks):
                break
            parts[i : i + 2] = ["".join(parts[i : i + 2])]
        ids: list[int] = []
        for part in parts:
            ids += (
                [self.vocab[part]] if part in self.vocab else [self.vocab[f"<0x{byte:02X}>"] for byte in part.encode()]
            )
        return tuple(ids)


def _finder(names: Iterable[str]) -> re.Pattern[str]:
    """Splits a text at the names, which stay in the result."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)") + ")")


def _digits_apart(text: str) -> list[str]:
    """The library's pre-tokenizer Digits, each alone: numerals in Unicode's sense."""
    words = [""]
    for character in text:
        if unicodedata.category(character).startswith("N"):
            words += [character, ""]
        else:
            words[-1] += character
    return [word for word in words if word]


@functools.cache
def pieces_of(which: str) -> SentencePieceProcessor:
    if which == "released":
        return sentencepiece.SentencePieceProcessor(model_file=str(shared_file("data/telechat2/tokenizer.model")))
    return sentencepiece.SentencePieceProcessor(model_proto=_trained())


@functools.cache
def made_of(which: str) -> JsonObject:
    made = tokenizer_json(pieces_of(which))
    assert made is not None
    return made


@functools.cache
def library_of(which: str) -> Library:
    return Library(made_of(which))


@functools.cache
def _trained() -> bytes:
    with tempfile.TemporaryDirectory(prefix="tele-tokenizer-tests-") as folder:
        words = " ".join(f"word{n % 97} sound{n % 31} letter{n % 13}ing" for n in range(400))
        return train_tokenizer([*SENTENCES * 20, *NUMERALS * 20, words], Path(folder) / "t.model", 640).model_bytes


def drawn(pieces: SentencePieceProcessor, count: int, seed: int, whole: bool = False) -> Iterator[str]:
    """Seeded strings of up to 12 of the pieces' characters; ``whole``: of pieces, characters and oddities."""
    draw = random.Random(seed)
    kept = [i for i in range(pieces.get_piece_size()) if not (pieces.is_control(i) or pieces.is_unknown(i))]
    names = [pieces.id_to_piece(i).replace("▁", " ") for i in kept if not pieces.is_byte(i)]
    characters = sorted(set("".join(names)))
    for _ in range(count):
        kinds = draw.choices((characters, names, ODD) if whole else (characters,), k=draw.randint(0, 12))
        yield "".join(map(draw.choice, kinds))


def differing(pieces: SentencePieceProcessor, library: Library, texts: list[str]) -> list[str]:
    wanted = pieces.encode(texts)
    return [text for text, ids in zip(texts, wanted, strict=True) if library.encode(text) != ids]


@pytest.mark.parametrize("which", ["trained here", "released"])
def test_tokenizer_json_gives_the_same_ids(which: str) -> None:
    pieces, made, library = pieces_of(which), made_of(which), library_of(which)
    assert differing(pieces, library, [*TEXTS, Path(__file__).read_text()[:1500]]) == []
    texts = list(drawn(pieces, 20_000, seed=1))
    assert differing(pieces, library, texts) == []
    alone = {token["content"] for token in made["added_tokens"]}
    odd = [text for text in drawn(pieces, 3_000, seed=2, whole=True) if text not in alone]
    assert differing(pieces, library, odd) == []
    # The strings are able to show a pre-tokenizer that splits at numerals.
    digits = {**made, "pre_tokenizer": {"type": "Digits", "individual_digits": True}}
    assert len(differing(pieces, Library(digits), texts + odd)) > 20


def test_the_released_tokenizer_keeps_numerals_inside_pieces() -> None:
    pieces = pieces_of("released")
    ids = library_of("released").encode("\u2460 总则")
    assert ids[0] == 14587 and [pieces.id_to_piece(i) for i in ids] == ["▁①", "▁总", "则"]


@pytest.mark.parametrize("which", ["trained here", "released"])
def test_control_tokens_in_text_are_those_of_this_project(which: str, tmp_path: Path) -> None:
    pieces = pieces_of(which)
    (tmp_path / "tokenizer.model").write_bytes(pieces.serialized_model_proto())
    ours, library = load_tokenizer(tmp_path, in_vocabulary=True), library_of(which)
    names = [name for name in ours.matched if name.startswith("<") and name in library.ids]
    assert {"<_start>", "<_end>", "<_user>", "<_bot>", "<_system>", "<tool_call>"} <= set(names)
    draw = random.Random(3)
    for text in drawn(pieces, 300, seed=4):
        mixed = f"{text}{draw.choice(names)}{text[::-1]}{draw.choice(names)}{draw.choice(names)} x"
        assert library.encode(mixed) == ours.encode(mixed, allow_control=True), mixed


def test_a_placeholder_alone_is_the_one_text_that_differs() -> None:
    pieces, library = pieces_of("released"), library_of("released")
    for text in ("a<reserve1>b", " <reserve1>", "<reserve1>\n", "<reserve1><reserve2> x", "x<reserve100>"):
        assert library.encode(text) == pieces.encode(text), text
    assert ["▁", *map(pieces.id_to_piece, library.encode("<reserve1>"))] == pieces.encode("<reserve1>", out_type=str)


@pytest.mark.parametrize("which", ["trained here", "released"])
def test_these_rules_are_those_of_the_library(which: str) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="compares the rules above with the library itself")
    pieces, made = pieces_of(which), made_of(which)
    digits = {**made, "pre_tokenizer": {"type": "Digits", "individual_digits": True}}
    texts = [*TEXTS, *drawn(pieces, 5_000, seed=5, whole=True), "<reserve1>", "<_user>a<_bot>\u2460<_end>"]
    for one in (made, digits):
        library = tokenizers.Tokenizer.from_str(json.dumps(one))
        found = [encoding.ids for encoding in library.encode_batch(texts, add_special_tokens=False)]
        assert found == list(map(Library(one).encode, texts))


def test_a_tokenizer_that_cannot_be_said_so_goes_without(tmp_path: Path) -> None:
    """SentencePiece's default changes the text (NFKC), which no table here says: only tokenizer.model is written."""
    from tests.unit.convert.test_convert_hf import train_tokenizer as train_with_defaults

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(train_with_defaults(tmp_path / "t.model", 60)))
    assert tokenizer_json(pieces) is None
    described = describe_tokenizer(pieces, load_model_config("telechat2-tiny"), exact=False)
    assert described["tokenizer_class"] == "LlamaTokenizer" and described["use_fast"] is False


def test_equal_scores_and_unused_pieces_have_no_table_of_merges() -> None:
    pieces = pieces_of("trained here")

    class Changed:
        """The tokenizer with one answer changed."""

        def __init__(self, **answers: object):
            self.answers = answers

        def __getattr__(self, name: str) -> object:
            return self.answers.get(name, getattr(pieces, name))

    assert tokenizer_json(Changed()) is not None
    assert tokenizer_json(Changed(get_score=lambda i: max(pieces.get_score(i), -40.0))) is None
    assert tokenizer_json(Changed(is_unused=lambda i: i == 630)) is None
