"""Tokenizers of the tokenizers library: byte-level BPE of FLM-101B's form, and a tokenizer.json."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.convert.hf.tokenizer import tokenizer_json, write_library_config
from telechat_twins.core import cli
from telechat_twins.core.data.encoders.parallel import encode_blocks
from telechat_twins.core.data.encoders.tasks import Encoder
from telechat_twins.core.data.packed import PackedDataset
from telechat_twins.core.data.tokenizer import Tokenizer, assumed, load_tokenizer, special_ids
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import load_model_config
from tests.support.data_support import SENTENCES, tiny_tokenizer, tiny_tokenizer_path
from tests.unit.data.test_tokenizer_cuts import TEXTS, Block, long_texts

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vocab.json and merges.txt of 400 pieces, by the library's own trainer."""
    folder = tmp_path_factory.mktemp("flm")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([*SENTENCES * 20], vocab_size=400, min_frequency=2)
    made.save_model(str(folder))
    return folder


def described(folder: Path, target: Path, **files: object) -> Path:
    """The two files of ``folder`` with further JSON files beside them."""
    target.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (target / name).write_bytes((folder / name).read_bytes())
    for name, value in files.items():
        (target / f"{name}.json").write_text(json.dumps(value))
    return target


def test_ids_are_the_librarys_and_names_of_special_tokens_are_text(gpt2, capsys):
    tokenizer = load_tokenizer(gpt2, "auto")
    size = len(json.loads((gpt2 / "vocab.json").read_text()))
    assert "<|endoftext|> begins and ends texts, as in GPT-2's tokenizer" in capsys.readouterr().err
    library = tokenizers.ByteLevelBPETokenizer(str(gpt2 / "vocab.json"), str(gpt2 / "merges.txt"))
    for text in long_texts(1, 5, 500):
        assert tokenizer.encode(text) == library.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.bos_token_id) == (size + 1, size, size)
    assert tokenizer.control == {} and tokenizer.variant == "none" and tokenizer.silent == {"<|endoftext|>": size}
    written = "a<|endoftext|>b"
    assert size not in tokenizer.encode(written) and tokenizer.decode(tokenizer.encode(written)) == written
    assert tokenizer.encode(written, allow_control=True).count(size) == 1
    assert tokenizer.decode([*tokenizer.encode("fox"), size], skip_special=True) == "fox"
    with pytest.raises(UserError, match="no pad token is named in it"):
        _ = tokenizer.pad_token_id
    assert special_ids(tokenizer) == {"eos_token_id": size, "bos_token_id": size, "pad_token_id": None}
    with pytest.raises(UserError, match="this tokenizer has no dialogue pieces"):
        tokenizer.control_id("<_user>")


def test_special_tokens_come_from_the_files_beside(gpt2, tmp_path):
    size = len(json.loads((gpt2 / "vocab.json").read_text()))
    entries = {str(size + 2): {"content": "<cls>", "special": True}, str(size): {"content": "<end>", "special": True}}
    files = {
        "tokenizer_config": {"eos_token": {"content": "<end>"}, "pad_token": None, "added_tokens_decoder": entries}
    }
    tokenizer = load_tokenizer(
        described(gpt2, tmp_path / "a", **files, special_tokens_map={"pad_token": "<cls>"}), "auto"
    )
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.vocab_size) == (size, size + 2, size + 3)
    assert "<end>' (id" in assumed(tokenizer)[0] and "tokenizer_config.json" in assumed(tokenizer)[0]
    chosen = load_tokenizer(tmp_path / "a", "auto", special={"eos": "<cls>"})
    assert chosen.eos_token_id == size + 2 and "--eos-token" in assumed(chosen)[0]
    by_model = described(gpt2, tmp_path / "b", config={"eos_token_id": size, "bos_token_id": [size]})
    assert load_tokenizer(by_model, "auto").bos_token_id == size
    wrong = described(gpt2, tmp_path / "c", added_tokens={"<end>": 5}, special_tokens_map={"eos_token": "<end>"})
    with pytest.raises(UserError, match="'<end>' has id 5, and the pieces end at"):
        load_tokenizer(wrong, "auto")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_streaming_adds_up_and_knows_where_each_token_begins(gpt2, data):
    """Ids drawn at will: characters split over tokens, bytes that are no character, special tokens between."""
    tokenizer = load_tokenizer(gpt2, "auto")
    some = [i for i in range(tokenizer.vocab_size) if not tokenizer.token_bytes(i).isascii()]
    ids = data.draw(st.lists(st.sampled_from([*some, 40, 41, tokenizer.eos_token_id]), max_size=30))
    stream, text = tokenizer.stream(), ""
    for n, index in enumerate(ids):
        text += stream.push(index)
        before = [i for i in ids[:n] if not tokenizer.is_silent(i)]
        if not tokenizer.is_silent(index):
            begun = b"".join(map(tokenizer.token_bytes, before))
            # The character of the token's first byte: the last one of all bytes up to that byte.
            whole = (begun + tokenizer.token_bytes(index)[:1]).decode("utf-8", "replace")
            assert stream.start == len(whole) - 1
        assert stream.length == len(text)
    heard = tokenizer.stream().push_all([i for i in ids if not tokenizer.is_silent(i)])
    assert text + stream.flush() == tokenizer.decode(ids, skip_special=True) == heard


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_cut_texts_encode_as_the_whole(gpt2, text):
    tokenizer = load_tokenizer(gpt2, "auto")
    cut = tokenizer.last_cut(text)
    left, right = tokenizer.encode_batch([text[:cut], text[cut:]], [True, False])
    assert [*left, *right] == tokenizer.encode(text)
    parts = [Block("t", text[:7], True, False), Block("t", text[7:9], False, False), Block("t", text[9:], False, True)]
    assert [i for part in encode_blocks(parts, Encoder(tokenizer)) for i in part.ids] == tokenizer.encode(text)


def exported(folder: Path) -> Tokenizer:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer_path()))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(pieces)))
    return load_tokenizer(folder, "auto")


def test_a_tokenizer_json_is_the_tokenizer_it_describes(tmp_path):
    tokenizer, own = exported(tmp_path), tiny_tokenizer()
    assert (tokenizer.variant, tokenizer.control, tokenizer.vocab_size) == ("chat", own.control, own.vocab_size)
    for text in long_texts(2, 4, 300):
        ids = tokenizer.encode(text)
        assert ids == own.encode(text) and tokenizer.decode(ids) == own.decode(ids)
        assert list(map(tokenizer.token_bytes, ids)) == list(map(own.token_bytes, ids))
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == own.decode(ids)
    assert tokenizer.encode("<_user>x") == own.encode("<_user>x")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="not a tokenizer of the tokenizers library"):
        load_tokenizer(tmp_path)


def test_text_is_packed_and_found_again(gpt2, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("".join(SENTENCES))
    words = ["data", str(tmp_path / "a.txt"), "--tokenizer", str(gpt2), "--out", str(tmp_path / "out"), "--quiet"]
    assert cli.main([*words, "--bos"]) == 0
    tokenizer, data = load_tokenizer(gpt2, "auto"), PackedDataset(tmp_path / "out")
    end = tokenizer.eos_token_id
    assert data.tokens.tolist() == [end, *tokenizer.encode("".join(SENTENCES)), end]
    assert data.tokenizer_name == "tokenizer.json" and "documents end with '<|endoftext|>'" in capsys.readouterr().err
    assert load_tokenizer(tmp_path / "out", "auto").encode("fox") == tokenizer.encode("fox")
    assert cli.main([*words[:-1], "--force", "--quiet", "--sft", "plain", "--seq-len", "64"]) != 0
    assert "this is a base model, which continues text" in capsys.readouterr().err


def test_an_exported_folder_names_the_class_and_the_models_tokens(gpt2, tmp_path):
    config = load_model_config({"preset": "flm-tiny", "vocab_size": 512, "vocab_tokens": 401})
    config = dataclasses.replace(config, bos_token_id=400, eos_token_id=400, pad_token_id=None)
    (tmp_path / "tokenizer.json").write_bytes(load_tokenizer(gpt2, "auto").model_bytes)
    write_library_config(tmp_path, config)
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert about["eos_token"] == "<|endoftext|>" and "pad_token" not in about and "chat_template" not in about
    assert load_tokenizer(tmp_path, "auto").eos_token_id == 400
    with pytest.raises(UserError, match="has 401 tokens, the model's vocab_size is 400"):
        write_library_config(tmp_path, dataclasses.replace(config, vocab_tokens=400, bos_token_id=1, eos_token_id=1))


def test_dropout_of_a_tokenizers_training_changes_no_ids(gpt2, tmp_path):
    library = tokenizers.ByteLevelBPETokenizer(str(gpt2 / "vocab.json"), str(gpt2 / "merges.txt"), dropout=0.9)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", "none")
    wanted = tokenizers.ByteLevelBPETokenizer(str(gpt2 / "vocab.json"), str(gpt2 / "merges.txt"))
    for text in SENTENCES * 3:
        assert tokenizer.encode(text) == wanted.encode(text).ids
