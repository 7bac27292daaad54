"""The packed folder: what is written, what is read back, how samples are cut, and what damage is noticed."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.batch import IGNORE
from core.data.packed import PackedDataset, PackedWriter, token_dtype
from core.errors import UserError
from tests.data_support import tiny_tokenizer

PAD = 3


def write_text(path, documents, **options):
    with PackedWriter(path, tiny_tokenizer(), "text", **options) as writer:
        for document in documents:
            writer.start_document()
            writer.add_tokens(document)
        writer.finish()
    return PackedDataset(path)


def write_sft(path, sequences, max_length):
    with PackedWriter(path, tiny_tokenizer(), "sft") as writer:
        for ids, mask, starts in sequences:
            writer.add_sequence(np.asarray(ids, np.int32), np.asarray(mask, np.uint8), starts)
        writer.finish({"max_length": max_length})
    return PackedDataset(path)


def rows(dataset, seq_len, isolate=False):
    return [[a.tolist() for a in dataset.sample(i, seq_len, PAD, isolate)] for i in range(dataset.num_samples(seq_len))]


def test_text_windows_by_hand(tmp_path):
    data = write_text(tmp_path / "d", [[20, 21, 22, 2], [30, 31, 2]])
    assert data.tokens.tolist() == [20, 21, 22, 2, 30, 31, 2] and data.documents.tolist() == [0, 4, 7]
    joined = rows(data, 4)
    assert joined[0] == [[20, 21, 22, 2], [21, 22, 2, 30], [0, 1, 2, 3], [0] * 4]
    assert joined[1] == [[30, 31, 2, PAD], [31, 2, IGNORE, IGNORE], [0, 1, 2, 3], [0] * 4]
    apart = rows(data, 4, isolate=True)
    # The first token of the second document is no target, and the padding is a document of its own.
    assert apart[0] == [[20, 21, 22, 2], [21, 22, 2, IGNORE], [0, 1, 2, 3], [0] * 4]
    assert apart[1] == [[30, 31, 2, PAD], [31, 2, IGNORE, IGNORE], [0, 1, 2, 0], [0, 0, 0, 1]]
    assert rows(data, 6, isolate=True)[0] == [
        [20, 21, 22, 2, 30, 31], [21, 22, 2, IGNORE, 31, 2], [0, 1, 2, 3, 0, 1], [0, 0, 0, 0, 1, 1]
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(2, 40))
def test_every_token_is_a_target_exactly_once(tmp_path_factory, sizes, seq_len):
    total = sum(sizes)
    if total < 2:
        return
    stream = 20 + np.arange(total) % 500
    edges = np.cumsum([0, *sizes])
    documents = [stream[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    data = write_text(tmp_path_factory.mktemp("packed") / "d", documents)
    targets = np.concatenate([np.asarray(r[1]) for r in rows(data, seq_len)])
    np.testing.assert_array_equal(targets[targets != IGNORE], stream[1:])
    apart = [[np.asarray(a) for a in r] for r in rows(data, seq_len, isolate=True)]
    got = np.concatenate([r[1] for r in apart])
    np.testing.assert_array_equal(got[got != IGNORE], np.delete(stream, edges[:-1]))
    for inputs, target, positions, docs in apart:
        for n in range(seq_len):
            new = n == 0 or docs[n] != docs[n - 1]
            assert positions[n] == (0 if new else positions[n - 1] + 1)
            # A target is the next input of the same document, or lies just behind the window.
            if target[n] != IGNORE and n + 1 < seq_len:
                assert docs[n] == docs[n + 1] and target[n] == inputs[n + 1]


def test_sft_samples_by_hand(tmp_path):
    sequences = [
        ([4, 20, 5, 21, 2, 4, 22, 5, 23, 2], [0, 0, 0, 1, 1, 0, 0, 0, 1, 1], (0, 5)),
        ([4, 24, 5, 25, 2], [0, 0, 0, 1, 1], (0,)),
    ]
    data = write_sft(tmp_path / "d", sequences, 10)
    skip = IGNORE
    joined, apart = rows(data, 10), rows(data, 10, isolate=True)
    assert joined[0] == [
        sequences[0][0], [skip, skip, 21, 2, skip, skip, skip, 23, 2, skip], list(range(10)), [0] * 10
    ]  # fmt: skip
    assert joined[1][0] == [4, 24, 5, 25, 2] + [PAD] * 5
    assert joined[1][1] == [skip, skip, 25, 2] + [skip] * 6
    assert apart[0][2:] == [[0, 1, 2, 3, 4] * 2, [0] * 5 + [1] * 5]
    assert apart[1][2:] == [[0, 1, 2, 3, 4] * 2, [0] * 5 + [1] * 5]
    assert data.meta["targets"] == 6
    with pytest.raises(UserError, match="seq_len: 9 would cut"):
        data.check_seq_len(9)


def test_a_pack_one_longer_than_the_samples_gives_its_last_target(tmp_path):
    # MindFormers packs hold one token more than the model sees: inputs are [:-1], targets [1:].
    data = write_sft(tmp_path / "d", [([3, 4, 20, 5, 21, 2], [0, 0, 0, 0, 1, 1], (0,))], 5)
    assert rows(data, 5) == [[[3, 4, 20, 5, 21], [IGNORE, IGNORE, IGNORE, 21, 2], [0, 1, 2, 3, 4], [0] * 5]]


def test_token_type_follows_the_vocabulary():
    assert token_dtype(65536) == np.uint16 and token_dtype(65537) == np.int32 and token_dtype(131072) == np.int32


def test_meta_and_digest(tmp_path):
    data = write_text(tmp_path / "d", [[20, 21, 2], [22, 2]])
    again = write_text(tmp_path / "e", [[20, 21, 2], [22, 2]])
    other = write_text(tmp_path / "f", [[20, 21, 2], [23, 2]])
    assert (tmp_path / "d" / "meta.json").read_bytes() == (tmp_path / "e" / "meta.json").read_bytes()
    assert data.digest() == again.digest() != other.digest()
    assert data.meta["tokens"] == 5 and data.meta["documents"] == 2 and data.meta["largest_id"] == 22
    assert data.meta["tokenizer"]["sha256"] == tiny_tokenizer().sha256
    assert (tmp_path / "d" / "tokenizer.model").read_bytes() == tiny_tokenizer().model_bytes
    data.verify()


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "tokenizer.model"])
def test_damage_is_named(tmp_path, name):
    data = write_text(tmp_path / "d", [[20, 21, 2]])
    file = tmp_path / "d" / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{name}: altered"):
        data.verify()
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{name}: expected {len(content)} bytes, found {len(content) - 1}"):
        PackedDataset(tmp_path / "d")
    file.unlink()
    with pytest.raises(UserError, match=f"{name}: expected .* found missing"):
        PackedDataset(tmp_path / "d")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 99}, "format version 99"),
        ({"format": "other"}, "is not the meta.json of a packed folder"),
        ({"vocab_size": "many"}, "'vocab_size' is missing or damaged"),
        ({"dtype": "object"}, "inconsistent"),
        ({"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}, "inconsistent"),
    ],
)
def test_a_foreign_meta_is_refused(tmp_path, change, says):
    write_text(tmp_path / "d", [[20, 21, 2]])
    file = tmp_path / "d" / "meta.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=says):
        PackedDataset(tmp_path / "d")


def test_not_a_folder(tmp_path):
    with pytest.raises(UserError, match="no such packed folder"):
        PackedDataset(tmp_path / "d")
    with pytest.raises(UserError, match="no meta.json"):
        PackedDataset(tmp_path)


def test_an_interrupted_run_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), PackedWriter(tmp_path / "d", tiny_tokenizer(), "text") as writer:
        writer.start_document()
        writer.add_tokens([20, 21])
        assert not (tmp_path / "d").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_cleared_but_not_those_of_a_living_one(tmp_path):
    dead, alive = tmp_path / ".d.999999999.partial", tmp_path / f".d.{os.getppid()}.partial"
    dead.mkdir()
    alive.mkdir()
    write_text(tmp_path / "d", [[20, 21, 2]])
    assert not dead.exists() and alive.exists()


def test_existing_folders_are_not_overwritten(tmp_path):
    write_text(tmp_path / "d", [[20, 21, 2]])
    with pytest.raises(UserError, match="exists already.*--force"):
        PackedWriter(tmp_path / "d", tiny_tokenizer(), "text")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not a packed folder"):
        PackedWriter(precious, tiny_tokenizer(), "text", force=True)
    assert write_text(tmp_path / "d", [[30, 31, 2]], force=True).tokens.tolist() == [30, 31, 2]
    # A replacement that fails leaves the old folder as it was.
    with (
        pytest.raises(UserError, match="empty"),
        PackedWriter(tmp_path / "d", tiny_tokenizer(), "text", True) as writer,
    ):
        writer.finish()
    assert PackedDataset(tmp_path / "d").tokens.tolist() == [30, 31, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "precious"]


def test_files_altered_in_place_are_named_where_they_are_read(tmp_path):
    # Same sizes as recorded, so that only the contents can tell.
    folder = tmp_path / "d"
    write_sft(folder, [([3, 4, 20, 5, 21, 2], [0, 0, 0, 0, 1, 1], (0,))] * 2, 5)

    def alter(name, dtype, place, value):
        array = np.memmap(folder / name, dtype, mode="r+")
        before, array[place] = int(array[place]), value
        array.flush()
        return before

    vocab_size = tiny_tokenizer().vocab_size
    assert PackedDataset(folder).sample(1, 5, 3)[0].max() < vocab_size
    before = alter("tokens.bin", "<u2", 8, vocab_size)
    with pytest.raises(UserError, match=f"tokens.bin: altered, token id {vocab_size} at place 8 is outside"):
        PackedDataset(folder).sample(1, 5, 3)
    alter("tokens.bin", "<u2", 8, before)
    for place, value in ((1, -3), (1, 1000), (2, 2)):
        before = alter("sequences.bin", "<i8", place, value)
        with pytest.raises(UserError, match="sequences.bin: altered"):
            PackedDataset(folder).sample(1, 5, 3)
        alter("sequences.bin", "<i8", place, before)
    PackedDataset(folder).sample(1, 5, 3)


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    says = "rows:3: token id 600 is outside the vocabulary of 600"
    with pytest.raises(UserError, match=says), PackedWriter(tmp_path / "d", tiny_tokenizer(), "text") as writer:
        writer.start_document()
        writer.add_tokens([20, 600], "rows:3")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_the_users_to_mend(tmp_path, monkeypatch):
    from core.data import packed

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed._HashedFile, "write", full)
    says = "cannot be written .No space left on device"
    with pytest.raises(UserError, match=says), PackedWriter(tmp_path / "d", tiny_tokenizer(), "text") as writer:
        writer.start_document()
    assert list(tmp_path.iterdir()) == []
