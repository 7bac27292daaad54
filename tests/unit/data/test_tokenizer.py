"""The tokenizer against the released ones, and its own promises on a tiny model."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.core.data.control import TELECHAT2_NAMES, ControlToken, Splitter
from telechat_twins.core.data.tokenizer import check_vocabulary, load_tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import load_model_config
from tests.support.data_support import VOCAB_SIZE, tiny_tokenizer, tiny_tokenizer_path
from tests.support.shared import shared_file

# The golden's name of a set-up -> ours.
VARIANTS = {
    "control_tokens": "chat",
    "released_115b": "released_115b",
    "mindformers": "mindformers",
    "sentencepiece": "none",
}
TEXTS = st.text(alphabet=st.sampled_from("ab 中\n\t_1<>😀é▁") | st.characters(exclude_categories=["Cs"]), max_size=60)


def released(control: str = "chat", in_vocabulary: bool = False):
    return load_tokenizer(shared_file("data/telechat2/tokenizer.model"), control, in_vocabulary)


@pytest.mark.parametrize("golden", VARIANTS)
def test_equals_released_tokenizer_on_every_string(golden):
    cases = json.loads(shared_file("goldens/tokenizer/strings.json").read_text(encoding="utf-8"))["strings"]
    tokenizer = released(VARIANTS[golden])
    assert len(cases) == 60
    for case in cases:
        want = case[golden]
        ids = tokenizer.encode(case["text"], allow_control=True)
        assert ids == want["ids"], case["text"]
        assert tokenizer.decode(ids) == want["decoded"], case["text"]
        if "decoded_skip_special" in want:
            assert tokenizer.decode(ids, skip_special=True) == want["decoded_skip_special"], case["text"]


@pytest.mark.parametrize("control", VARIANTS.values())
def test_text_is_ordinary_unless_asked(control):
    cases = json.loads(shared_file("goldens/tokenizer/strings.json").read_text(encoding="utf-8"))["strings"]
    tokenizer = released(control)
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["sentencepiece"]["ids"], case["text"]


def test_ids_beyond_the_vocabulary_stay_away_on_request():
    text = "<unk><tool_call>x</tool_call>"
    assert max(released("chat").encode(text, allow_control=True)) == 131072
    assert max(released("mindformers").encode(text, allow_control=True)) == 131074
    for control in ("chat", "mindformers"):
        ids = released(control, in_vocabulary=True).encode(text, allow_control=True)
        assert max(ids) < 131072
        assert 9 in ids and 10 in ids


def test_no_newline_prefix_needed_inside_a_released_text():
    tokenizer = released()
    whole = tokenizer.encode("first line\n    second 中文\n\n\tthird")
    first, second = tokenizer.encode_batch(["first line\n", "    second 中文\n\n\tthird"], [True, False])
    assert [*first, *second] == whole


def test_control_ids_and_bos():
    tokenizer = tiny_tokenizer()
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert [tokenizer.control[name] for name in TELECHAT2_NAMES] == [1, 2, 3, 4, 5, 6, 9, 10, 11, 12]
    plain = tokenizer.encode("fox")
    assert tokenizer.encode("fox", add_bos=True) == [1, *plain]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*TELECHAT2_NAMES, "<unk>", "<_sep>", "a ", "\n", "中"]), max_size=8).map("".join))
def test_no_control_id_from_user_text(text):
    ids = tiny_tokenizer().encode(text)
    assert not set(ids) & set(range(18))
    assert max(ids, default=0) < VOCAB_SIZE


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_decode_gives_the_text_back(text):
    tokenizer = tiny_tokenizer()
    # SentencePiece writes a space as U+2581, so that character comes back as a space.
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


@settings(max_examples=100, deadline=None)
@given(TEXTS, TEXTS)
def test_continuation_behind_a_newline_is_exact(before, after):
    tokenizer = tiny_tokenizer()
    whole = tokenizer.encode(before + "\n" + after)
    first, second = tokenizer.encode_batch([before + "\n", after], [True, False])
    assert [*first, *second] == whole


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_stream_gives_the_same_text_in_pieces(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    shown = [stream.push(i) for i in ids]
    assert "".join(shown) + stream.flush() == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, tiny_tokenizer().vocab_size - 1), max_size=30), st.integers(0, 30))
def test_many_ids_at_once_write_what_they_write_one_by_one(ids, place):
    tokenizer = tiny_tokenizer()
    one, many = tokenizer.stream(), tokenizer.stream()
    for part in (ids[:place], ids[place:]):
        heard = [i for i in part if not tokenizer.is_silent(i)]
        assert "".join(map(one.push, heard)) + one.flush() == many.push_all(heard)
        assert one.length == many.length


def test_stream_holds_an_unfinished_character_back():
    tokenizer = tiny_tokenizer()
    stream = tokenizer.stream()
    shown = [stream.push(i) for i in tokenizer.encode("😀")]
    assert "".join(shown) == "😀"
    assert shown[:-1] == [""] * (len(shown) - 1)


def test_decode_skips_control_tokens():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("<_user>fox<_bot>dog<_end>", allow_control=True)
    assert tokenizer.decode(ids, skip_special=True) == "fox dog"
    assert tokenizer.decode(ids) == "<_user> fox<_bot> dog<_end>"


def test_only_named_control_tokens():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("<tool_call><_end>", allow_control=["<tool_call>"])
    assert ids[0] == 9 and 2 not in ids


# What Hugging Face's slow tokenizers do, by rule; the expected lists were worked out from that rule by hand.
SINGLE = (ControlToken("<e>", 2, single_word=True), ControlToken("<s>", 1), ControlToken("<e>>", 7))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a<s>b", ["a", 1, "b"]),
        ("a <e> b", ["a ", 2, " b"]),
        ("a<e> b", ["a<e>", " b"]),
        ("a\n<e> b", ["a\n<e>", " b"]),
        ("a <e>\nb", ["a ", "<e>\nb"]),
        ("a <e>b", ["a ", "<e>b"]),
        ("<e>", [2]),
        ("<e><e> x", ["<e><e>", " x"]),
        ("<s><e>", ["<s><e>"]),
        ("<e>>", [7]),
        ("<<s>>", ["<", 1, ">"]),
        ("", []),
    ],
)
def test_splitting_rule(text, want):
    got = [p.id if isinstance(p, ControlToken) else p for p in Splitter(SINGLE).split(text)]
    assert got == want


def test_stripping_rule():
    tokens = (ControlToken("<l>", 1, lstrip=True), ControlToken("<r>", 2, rstrip=True))
    got = [p.id if isinstance(p, ControlToken) else p for p in Splitter(tokens).split("a  <l>  b  <r>  c")]
    assert got == ["a", 1, "  b  ", 2, "c"]


def test_vocabulary_must_fit_the_model():
    config = load_model_config({"preset": "telechat2-tiny", "vocab_size": VOCAB_SIZE})
    check_vocabulary(tiny_tokenizer(), config)
    for size in (VOCAB_SIZE - 1, VOCAB_SIZE + 8):
        other = load_model_config({"preset": "telechat2-tiny", "vocab_size": size})
        with pytest.raises(UserError, match=f"{VOCAB_SIZE} pieces.*{size}"):
            check_vocabulary(tiny_tokenizer(), other)


def test_a_damaged_piece_is_found_when_the_file_is_opened(tmp_path):
    """A piece that is not UTF-8: SentencePiece opens such a file, and fails when the piece is met."""
    data = tiny_tokenizer_path().read_bytes()
    place = data.index("中国".encode()) if "中国".encode() in data else data.index("。".encode())
    (tmp_path / "tokenizer.model").write_bytes(data[:place] + b"\xff" + data[place + 1 :])
    with pytest.raises(UserError, match="tokenizer.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match="tokenizer.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_bad_files_and_ids(tmp_path):
    with pytest.raises(UserError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "nowhere.model")
    with pytest.raises(UserError, match="no such tokenizer"):
        load_tokenizer(tmp_path)
    broken = tmp_path / "tokenizer.model"
    for content in (b"", b"not a model at all", tiny_tokenizer().model_bytes[:2000]):
        broken.write_bytes(content)
        with pytest.raises(UserError, match="not a SentencePiece model"):
            load_tokenizer(broken)
    with pytest.raises(UserError, match="control: 'chatt' is not one of"):
        load_tokenizer(tiny_tokenizer_path(), control="chatt")
    with pytest.raises(UserError, match="token id 999999 is outside"):
        tiny_tokenizer().decode([999999])
    with pytest.raises(UserError, match="outside"):
        tiny_tokenizer().decode([-1])
    with pytest.raises(UserError, match="surrogate"):
        tiny_tokenizer().encode("a\ud800b")


def test_a_folder_is_searched(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer().model_bytes)
    assert load_tokenizer(tmp_path).sha256 == tiny_tokenizer().sha256


def test_a_foreign_tokenizer_has_no_control_tokens(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from " * 30]), model_writer=model, vocab_size=40, model_type="bpe",
        minloglevel=2, user_defined_symbols=["<_user>"],
    )  # fmt: skip
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(UserError, match="control 'none'"):
        load_tokenizer(path)
    bare = load_tokenizer(path, control="none")
    assert bare.decode(bare.encode("some words")) == "some words"
    assert bare.encode("x", add_bos=True)[0] == 1 and bare.eos_token_id == 2  # the file's own <s> and </s>
    with pytest.raises(UserError, match="no control token <_start>"):
        bare.control_id("<_start>")
    assert load_tokenizer(path, "auto").variant == "none"
