"""The packed folder: what is written, what is read back, how samples are cut, and what damage is noticed."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.core.data import packed, packed_files
from telechat_twins.core.data.packed import PackedDataset, PackedWriter, token_dtype, verify
from telechat_twins.core.data.packed_files import BLOCK
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.batch import IGNORE
from tests.support.data_support import reseal, tiny_tokenizer

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
    verify(data.path)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "tokenizer.model", "tokens.sums"])
def test_damage_is_named(tmp_path, name):
    write_text(tmp_path / "d", [[20, 21, 2]])
    file = tmp_path / "d" / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for check in (verify, PackedDataset):
        with pytest.raises(UserError, match=f"{name}: altered"):
            check(tmp_path / "d")
    file.write_bytes(content[:-1])
    for check in (verify, PackedDataset):
        with pytest.raises(UserError, match=f"{name}: expected {len(content)} bytes, found {len(content) - 1}"):
            check(tmp_path / "d")
    file.unlink()
    with pytest.raises(UserError, match=f"{name}: expected .* found missing"):
        PackedDataset(tmp_path / "d")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 99}, "format version 99"),
        ({"version": True}, "format version True"),
        ({"version": 1}, "altered, version 1 has no hash"),
        ({"meta_sha256": None}, "altered, its hash"),
        ({"format": "other"}, "is not the meta.json of a packed folder"),
        ({"vocab_size": "many"}, "'vocab_size' is missing or damaged"),
        ({"vocab_size": 70000}, "dtype of the vocabulary"),
        ({"dtype": "object"}, "inconsistent"),
        ({"documents": 2}, "size of documents.bin: 16 for 24"),
        ({"largest_id": -1}, "'largest_id' is missing or damaged"),
        ({"tokenizer": {"sha256": "0" * 64}}, "hash of the tokenizer"),
        ({"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}, "inconsistent"),
        ({"files": {"tokens.bin": {"bytes": 6}}}, "hash of 'tokens.bin'"),
        ({"files": {"tokens.bin": 6}}, "entry 'tokens.bin'"),
        ({"files": []}, "'files' is missing or damaged"),
    ],
)
def test_a_foreign_meta_is_refused(tmp_path, change, says):
    write_text(tmp_path / "d", [[20, 21, 2]])
    reseal(tmp_path / "d", **change)
    for check in (verify, PackedDataset):
        with pytest.raises(UserError, match=says):
            check(tmp_path / "d")


def test_a_meta_altered_in_place_is_named(tmp_path):
    write_text(tmp_path / "d", [[20, 21, 2]])
    file = tmp_path / "d" / "meta.json"
    text = file.read_text()
    for old, new in (('"documents": 1', '"documents": 2'), ("\n", "\n "), ('"control"', '"kontrol"')):
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match="meta.json: altered, its hash is not the recorded one"):
            PackedDataset(tmp_path / "d")


@pytest.mark.parametrize(
    ("starts", "says"),
    [
        ([0, 5, 3, 6, 9], "document 1 goes from token 5 to 3"),
        ([0, 3, 3, 6, 9], "document 1 goes from token 3 to 3"),
        ([1, 3, 5, 6, 9], "from 1 to 9 instead of from 0 to 9"),
        ([0, 3, 5, 6, 10], "from 0 to 10 instead of from 0 to 9"),
        ([0, 3, 5, -1, 9], "document 2 goes from token 5 to -1"),
        ([0, 3, 5, 2**62, 9], "document 3 goes from token 4611686018427387904 to 9"),
    ],
)
def test_documents_out_of_order_or_range_are_named(tmp_path, starts, says):
    """Where nothing has a hash: a folder of an early version."""
    write_text(tmp_path / "d", [[20, 21, 2], [30, 2], [2], [31, 32, 2]])
    as_version_1(tmp_path / "d", hashes=False)
    np.array(starts, "<i8").tofile(tmp_path / "d" / "documents.bin")
    for check in (verify, PackedDataset):
        with pytest.raises(UserError, match=f"documents.bin: altered, {says}"):
            check(tmp_path / "d")


def as_version_1(folder, hashes):
    """Rewrite a packed folder as the first version wrote it; ``hashes``: with those of its files."""
    meta = json.loads((folder / "meta.json").read_text())
    files = {n: dict(f) for n, f in meta["files"].items() if not n.endswith(".sums")}
    for facts in files.values() if not hashes else ():
        del facts["sha256"]
    tokenizer = dict(meta["tokenizer"])
    if not hashes:
        del tokenizer["sha256"]
    for file in folder.glob("*.sums"):
        file.unlink()
    reseal(folder, version=1, meta_sha256=None, files=files, tokenizer=tokenizer)


@pytest.mark.parametrize("hashes", [True, False])
def test_data_of_the_first_version_opens_with_a_note(tmp_path, hashes):
    new = write_text(tmp_path / "d", [[20, 21, 2], [30, 2]])
    as_version_1(tmp_path / "d", hashes)
    old = PackedDataset(tmp_path / "d")
    [note] = old.notes
    assert "packed by an earlier version: its meta.json has no hash" in note and "pack again" in note
    assert ("nor have tokens.bin" in note) == (not hashes) and new.notes == []
    assert rows(old, 3) == rows(new, 3)
    verify(tmp_path / "d")
    if hashes:
        assert old.digest() == new.digest()  # a run resumes on the same data packed again
        content = (tmp_path / "d" / "tokens.bin").read_bytes()
        (tmp_path / "d" / "tokens.bin").write_bytes(content[:-2] + b"\x05\x00")
        with pytest.raises(UserError, match="tokens.bin: altered"):
            PackedDataset(tmp_path / "d")


def test_a_large_file_is_verified_where_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "SMALL", 1000)
    count = 3 * BLOCK // 2 + 100  # tokens of two bytes: three blocks and a piece
    ids = 20 + np.arange(count) % 500
    data = write_text(tmp_path / "d", [[*ids[:-1], 2]])
    assert len(data.tokens) == count and data.meta["files"]["tokens.sums"]["bytes"] == 4 * 32
    seq_len = BLOCK // 4
    assert [row[0][0] for row in rows(data, seq_len)] == [
        int(ids[n * seq_len]) for n in range(data.num_samples(seq_len))
    ]
    with open(tmp_path / "d" / "tokens.bin", "r+b") as file:
        file.seek(2 * BLOCK + 7)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))  # another id inside the vocabulary
    data = PackedDataset(tmp_path / "d")
    for index in range(3):
        data.sample(index, seq_len, PAD)
    for index in (3, 4, 5):  # the first of them needs one token of the third block
        with pytest.raises(UserError, match=f"tokens.bin: altered, bytes {2 * BLOCK} to {3 * BLOCK}"):
            data.sample(index, seq_len, PAD)
    with pytest.raises(UserError, match="tokens.bin: altered .SHA-256"):
        verify(tmp_path / "d")


def test_sums_are_those_of_the_blocks(tmp_path):
    for count in (1, BLOCK // 2, BLOCK // 2 + 1, 5 * BLOCK // 2):
        folder = tmp_path / str(count)
        write_text(folder, [[20] * count + [2]])
        content, sums = (folder / "tokens.bin").read_bytes(), (folder / "tokens.sums").read_bytes()
        blocks = [content[n : n + BLOCK] for n in range(0, len(content), BLOCK)]
        assert sums == b"".join(hashlib.sha256(block).digest() for block in blocks)


def test_every_seeded_corruption_is_named(tmp_path):
    """Flips, cuts, insertions and swaps of every file, as opened and as verified: none silent, none a traceback."""
    write_text(tmp_path / "text", [[20 + n % 7, 30 + n, 2] for n in range(60)])
    write_sft(tmp_path / "sft", [([3, 4, 20 + n, 5, 21, 2], [0, 0, 0, 0, 1, 1], (0, 3)) for n in range(60)], 6)
    random = np.random.default_rng(7)
    for folder in (tmp_path / "text", tmp_path / "sft"):
        for file in sorted(folder.iterdir()):
            content = file.read_bytes()
            for _ in range(12):
                file.write_bytes(corrupted(content, random))
                for check in (verify, PackedDataset):
                    with pytest.raises(UserError) as error:
                        check(folder)
                    assert file.name in str(error.value) or file.name == "meta.json"
                file.write_bytes(content)
        verify(folder)


def corrupted(content, random):
    """Other bytes than ``content``."""
    place = int(random.integers(len(content)))
    damaged = bytearray(content)
    kind = random.integers(5)
    if kind < 2:
        damaged[place] ^= 1 << int(random.integers(8))
    elif kind == 2:
        del damaged[place:]
    elif kind == 3:
        damaged[place:place] = random.bytes(int(random.integers(1, 9)))
    else:
        damaged[place : place + 8] = random.bytes(len(damaged[place : place + 8]))
    return bytes(damaged) if damaged != content else content + b"\x00"


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


def test_ids_without_a_hash_are_judged_where_they_are_read(tmp_path):
    folder = tmp_path / "d"
    write_sft(folder, [([3, 4, 20, 5, 21, 2], [0, 0, 0, 0, 1, 1], (0,))] * 2, 5)
    as_version_1(folder, hashes=False)
    vocab_size = tiny_tokenizer().vocab_size
    assert PackedDataset(folder).sample(1, 5, 3)[0].max() < vocab_size
    array = np.memmap(folder / "tokens.bin", "<u2", mode="r+")
    array[8] = vocab_size
    array.flush()
    with pytest.raises(UserError, match=f"tokens.bin: altered, token id {vocab_size} at place 8 is outside"):
        PackedDataset(folder).sample(1, 5, 3)


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    says = "rows:3: token id 600 is outside the vocabulary of 600"
    with pytest.raises(UserError, match=says), PackedWriter(tmp_path / "d", tiny_tokenizer(), "text") as writer:
        writer.start_document()
        writer.add_tokens([20, 600], "rows:3")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_the_users_to_mend(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed.HashedFile, "write", full)
    says = "cannot be written .No space left on device"
    with pytest.raises(UserError, match=says), PackedWriter(tmp_path / "d", tiny_tokenizer(), "text") as writer:
        writer.start_document()
    assert list(tmp_path.iterdir()) == []


def test_a_large_file_is_put_to_disk_while_it_grows(tmp_path, monkeypatch):
    """Each byte is asked for once, and a system that does not take the advice changes nothing."""
    asked = []

    def advise(_: int, begin: int, size: int, __: int) -> None:
        asked.append((begin, begin + size))
        if len(asked) == 2:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(packed_files, "_AHEAD", 100_000)
    monkeypatch.setattr(packed_files.os, "posix_fadvise", advise)
    sums = packed_files.HashedFile(tmp_path / "sums")
    file, data = packed_files.HashedFile(tmp_path / "x", sums), os.urandom(777_777)
    for begin in range(0, len(data), 25_000):
        file.write(data[begin : begin + 25_000])
    facts = file.close()
    sums.close()
    assert [begin for begin, _ in asked] == [0, *(end for _, end in asked[:-1])] and len(asked) == 7
    assert (tmp_path / "x").read_bytes() == data
    assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert (tmp_path / "sums").stat().st_size == 32 * -(-len(data) // BLOCK)
