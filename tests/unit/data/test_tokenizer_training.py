"""Training a tokenizer: the fixed ids, repeatability, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from telechat_twins.core.data.tokenizer import load_tokenizer
from telechat_twins.core.data.tokenizer_training import SMALLEST, train_tokenizer
from telechat_twins.core.errors import UserError
from tests.support.data_support import SENTENCES, tiny_tokenizer
from tests.support.shared import shared_file


def test_fixed_pieces_are_where_the_release_has_them():
    released = load_tokenizer(shared_file("data/telechat2/tokenizer.model"), control="none")
    own = load_tokenizer(tiny_tokenizer().path, control="none")
    assert [own.piece(i) for i in range(34)] == [released.piece(i) for i in range(34)]


def test_fixed_pieces():
    own = load_tokenizer(tiny_tokenizer().path, control="none")
    names = ["<_unk>", "<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>", "<_system>", "<_observation>", "<_sep>"]
    assert [own.piece(i) for i in range(9)] == names
    assert [own.piece(i) for i in range(9, 18)] == [f"<_control{n}>" for n in range(1, 10)]
    assert "".join(own.piece(i) for i in range(18, 28)) == "0123456789"
    assert own.encode("42")[-2:] == [22, 20]


def test_whitespace_and_any_character_survive():
    tokenizer = tiny_tokenizer()
    text = "  two\n\n\t\tthree    four \r\n ελ 😀 １\x00 "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_same_text_same_file(tmp_path):
    first = train_tokenizer([*SENTENCES * 5], tmp_path / "a" / "tokenizer.model", 450)
    second = train_tokenizer(iter([*SENTENCES * 5]), tmp_path / "b" / "tokenizer.model", 450)
    assert first.sha256 == second.sha256
    other = train_tokenizer([*SENTENCES * 5, "zebra zebra zebra"], tmp_path / "c" / "tokenizer.model", 450)
    assert other.sha256 != first.sha256


def test_refusals_leave_no_file(tmp_path):
    out = tmp_path / "tokenizer.model"
    with pytest.raises(UserError, match=f"above {SMALLEST}"):
        train_tokenizer(SENTENCES, out, 100)
    with pytest.raises(UserError, match="too high"):
        train_tokenizer(["hi there"], out, 5000)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(["", "  \n"], out, 500)
    with pytest.raises(UserError, match="smaller than required_chars") as caught:
        train_tokenizer(["".join(map(chr, range(0x4E00, 0x4E00 + 300)))], out, SMALLEST + 1)
    assert "--character_coverage" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# Chinese has more characters than a small vocabulary has pieces: as here, where each comes once or twice.
CHINESE = [
    "春江水暖，岸边的柳树刚刚发芽，渔夫推开木窗，看见远山上还留着一层薄雪。",
    "".join(chr(0x4E00 + n) for n in range(2500)),
    "图书馆的灯一直亮到深夜，学生们在长桌旁安静地抄写笔记，窗外下着细雨。\n" * 200,
]


def test_chinese_fits_a_small_vocabulary_by_bytes(tmp_path):
    with pytest.raises(UserError, match="lower the character coverage .the rest is written as bytes"):
        train_tokenizer(CHINESE, tmp_path / "a.model", 2048)
    tokenizer = train_tokenizer(CHINESE, tmp_path / "b.model", 345, character_coverage=0.72)
    text = "".join(CHINESE)
    ids = tokenizer.encode(text)
    assert tokenizer.vocab_size == 345 and tokenizer.decode(ids) == text
    pieces = {tokenizer.piece(i) for i in range(345)}
    assert {"灯", "雨"} <= pieces and "\u5200" not in pieces  # the frequent ones; rare ones are three bytes each
    assert len(tokenizer.encode(CHINESE[2])) < len(CHINESE[2]) / 2
    without = train_tokenizer(CHINESE, tmp_path / "c.model", 90, character_coverage=0.72, byte_fallback=False)
    assert without.encode("\u5200")[-1] == 0 and "<0x41>" not in {without.piece(i) for i in range(90)}
    with pytest.raises(UserError, match="character_coverage: must be above 0 and at most 1"):
        train_tokenizer(CHINESE, tmp_path / "d.model", 2048, character_coverage=98)


@pytest.mark.parametrize("error", [UserError("rows.jsonl:3: not valid JSON"), KeyboardInterrupt()])
def test_an_error_while_reading_is_not_swallowed(tmp_path, error):
    def texts():
        yield "some words " * 50
        raise error

    with pytest.raises(type(error)) as caught:
        train_tokenizer(texts(), tmp_path / "tokenizer.model", 400)
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file/tokenizer.model: cannot be written"):
        train_tokenizer(SENTENCES, tmp_path / "file" / "tokenizer.model", 450)

    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    (tmp_path / "old.model").write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="old.model: cannot be written .No space left"):
        train_tokenizer(SENTENCES, tmp_path / "old.model", 450)
    assert (tmp_path / "old.model").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "old.model"]
