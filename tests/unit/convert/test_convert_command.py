"""``tele convert``: what it prints, what it refuses, and that nothing is lost."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest

from telechat_twins.core.commands import convert
from telechat_twins.core.errors import UserError

GOLDEN = Path(__file__).resolve().parents[2] / "goldens" / "telechat2_gqa"


def tele_convert(*words: object) -> int:
    parser = argparse.ArgumentParser(prog="tele convert")
    convert.add_arguments(parser)
    return convert.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def released(tmp_path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copy(GOLDEN / "config.json", folder)
    shutil.copy(GOLDEN / "weights.safetensors", folder / "model.safetensors")
    (folder / "tokenizer.model").write_bytes(b"pieces")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def to_canonical(source, target, *more):
    return tele_convert("--from", "hf", "--to", "canonical", source, target, *more)


def to_hf(source, target, *more):
    return tele_convert("--from", "canonical", "--to", "hf", source, target, *more)


def test_there_and_back(tmp_path, released, capsys):
    assert to_canonical(released, tmp_path / "c") == 0
    assert to_hf(tmp_path / "c", tmp_path / "back") == 0
    assert files(tmp_path / "back") == files(released)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].startswith("note: rope_theta is missing: 10000.0")
    assert printed.out.splitlines()[1].startswith(f"wrote {tmp_path / 'c'}: 281.7 kB of tensors in ")
    assert printed.err == ""  # no bar outside a terminal: a log keeps its lines


def test_sizes_and_dtype(tmp_path, released):
    to_canonical(released, tmp_path / "c", "--max-shard-size", "100KB", "--dtype", "bfloat16")
    assert len(list((tmp_path / "c").glob("weights-*"))) > 1
    to_hf(tmp_path / "c", tmp_path / "back", "--max-shard-size", "50KB")
    shards = sorted((tmp_path / "back").glob("model-*"))
    assert len(shards) > 2 and all(s.stat().st_size < 60_000 for s in shards)
    assert [convert.parse_size(t) for t in ("5GB", "1.5 GiB", "7", "2mb")] == [5 * 10**9, 3 << 29, 7, 2_000_000]
    for text in ("", "GB", "5XB", "-1GB", "0GB", "1e3"):
        with pytest.raises(UserError, match="--max-shard-size"):
            convert.parse_size(text)


def test_what_is_in_the_way_is_kept(tmp_path, released):
    to_canonical(released, tmp_path / "c")
    before = files(tmp_path / "c")
    with pytest.raises(UserError, match=f"{tmp_path / 'c'}: exists and is not empty; .* --force"):
        to_canonical(released, tmp_path / "c")
    assert files(tmp_path / "c") == before
    to_canonical(released, tmp_path / "c", "--force", "--dtype", "float16")
    assert files(tmp_path / "c") != before
    (tmp_path / "empty").mkdir()
    assert to_hf(tmp_path / "c", tmp_path / "empty") == 0


def test_force_replaces_models_only(tmp_path, released):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(UserError, match="replaces a model and nothing else, but this folder holds no model"):
        to_canonical(released, tmp_path / "thesis", "--force")
    to_canonical(released, tmp_path / "c")
    (tmp_path / "c" / "notes").mkdir()
    with pytest.raises(UserError, match="this folder also holds 'notes'"):
        to_canonical(released, tmp_path / "c", "--force")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="DST must be a folder"):
        to_canonical(released, tmp_path / "file", "--force")
    for inside in (released / "c", released, tmp_path):
        with pytest.raises(UserError, match="DST must not be, contain or lie in SRC"):
            to_canonical(released, inside, "--force")
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"


def test_failure_half_way_leaves_nothing_readable_and_the_old_model(tmp_path, released, monkeypatch):
    to_canonical(released, tmp_path / "c")
    to_hf(tmp_path / "c", tmp_path / "back")
    before = files(tmp_path)
    from telechat_twins.core.files.safetensors import SafetensorsWriter

    real, calls = SafetensorsWriter.add, []

    def failing(self, name, array):
        calls.append(name)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        real(self, name, array)

    for convert_again in (
        lambda: to_canonical(released, tmp_path / "c", "--force"),
        lambda: to_hf(tmp_path / "c", tmp_path / "back", "--force"),
        lambda: to_hf(tmp_path / "c", tmp_path / "fresh"),
    ):
        monkeypatch.setattr(SafetensorsWriter, "add", failing)
        calls.clear()
        with pytest.raises(UserError, match="the disk is full while saving; it needs 28.\\.. kB"):
            convert_again()
        monkeypatch.undo()
        assert files(tmp_path) == before


def test_altered_checkpoint_is_refused_before_anything_is_written(tmp_path, released):
    to_canonical(released, tmp_path / "c")
    weights = tmp_path / "c" / "weights-00001.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="weights-00001.safetensors: altered: SHA-256 should be"):
        to_hf(tmp_path / "c", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_mistakes_in_the_command(tmp_path, released):
    with pytest.raises(UserError, match="--to hf: is what SRC is already"):
        tele_convert("--from", "hf", "--to", "hf", released, tmp_path / "x")
    with pytest.raises(UserError, match="use --from hf"):
        to_hf(released, tmp_path / "x")
    to_canonical(released, tmp_path / "c")
    with pytest.raises(UserError, match="config.json: no such file"):
        to_canonical(tmp_path / "c", tmp_path / "x")
    with pytest.raises(UserError, match="--tokenizer: .*none: no such file"):
        to_hf(tmp_path / "c", tmp_path / "x", "--tokenizer", tmp_path / "none")
    with pytest.raises(UserError, match="--tokenizer: goes with --to hf"):
        to_canonical(released, tmp_path / "x", "--tokenizer", tmp_path / "none")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file/x: cannot be written"):
        to_canonical(released, tmp_path / "file" / "x")
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_without_tokenizer_says_so(tmp_path, released, capsys):
    (released / "tokenizer.model").unlink()
    to_canonical(released, tmp_path / "c")
    to_hf(tmp_path / "c", tmp_path / "back")
    assert "note: the checkpoint carries no tokenizer; give --tokenizer" in capsys.readouterr().out
