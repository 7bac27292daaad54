"""What a released folder holds besides its weights: outdated copies, derived buffers, a tied head, sums."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from telechat_twins.convert.copy import canonical_to_hf, hf_to_canonical, to_hf
from telechat_twins.convert.hf.folder import HfFolder, check_record
from telechat_twins.convert.hf.shards import INDEX
from telechat_twins.convert.hf.sums import SUMS
from telechat_twins.convert.names import is_derived
from telechat_twins.convert.source import open_model
from telechat_twins.core.cli import main
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.types import JsonObject
from tests.support.frameworks import GOLDENS
from tests.unit.convert.test_convert_hf import golden_weights, release

NAME = "transformer.h.2.input_layernorm.weight"


def overlay(folder: Path, **more: np.ndarray) -> Path:
    """A release whose first shard has an outdated copy of a norm, which the index places in a file of its own."""
    folder.mkdir()
    weights = golden_weights()
    names = list(weights)
    parts = {
        "a.safetensors": {name: weights[name] for name in names[::2]},
        "b.safetensors": {name: weights[name] for name in names[1::2]},
        "o.safetensors": {NAME: weights[NAME]},
    }
    weight_map = {name: file for file, part in parts.items() for name in part}
    old = "a.safetensors" if NAME in parts["a.safetensors"] else "b.safetensors"
    parts[old][NAME] = weights[NAME] + 1
    parts["b.safetensors"] |= more
    for file, part in parts.items():
        save_file(part, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(GOLDENS / "telechat2_gqa" / "config.json", folder)
    return folder


def test_the_index_decides_where_a_tensor_is_read(tmp_path: Path) -> None:
    folder = HfFolder(overlay(tmp_path / "hf"))
    assert folder.read(NAME).tobytes() == golden_weights()[NAME].tobytes()
    notes = [note for note in folder.notes if "copies" in note]
    assert len(notes) == 1 and f"places elsewhere are not read: {NAME} in " in notes[0]
    assert folder.nbytes == sum(array.nbytes for array in golden_weights().values())
    hf_to_canonical(folder, tmp_path / "c")
    to_hf(open_model(tmp_path / "c"), tmp_path / "back")
    back = HfFolder(tmp_path / "back")
    assert not any("copies" in note for note in back.notes) and set(back.files) == set(folder.files)
    assert all(back.read(n).tobytes() == a.tobytes() for n, a in golden_weights().items())


BUFFERS: dict[str, np.ndarray] = {
    "transformer.rotary_emb.inv_freq": np.ones(3, np.float32),
    "transformer.h.0.self_attention.rotary_emb.inv_freq": np.ones(3, np.float32),
    "transformer.h.1.attn.rotary_emb.cos_cached": np.ones((8, 3), np.float16),
    "transformer.h.1.attn.bias": np.ones((1, 1, 8, 8), np.bool_),
    "transformer.h.1.attn.masked_bias": np.full(1, -1e4, np.float32),
    "transformer.h.0.mlp._extra_state": np.zeros(0, np.uint8),
    "transformer.position_ids": np.arange(8)[None],
}


@pytest.mark.parametrize("indexed", [False, True])
def test_derived_buffers_are_not_read(tmp_path: Path, indexed: bool) -> None:
    if indexed:
        folder = overlay(tmp_path / "hf", **BUFFERS)
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["transformer.rotary_emb.inv_freq"] = "b.safetensors"
        index["weight_map"]["transformer.h.9.rotary_emb.inv_freq"] = "b.safetensors"  # and is not there
        (folder / INDEX).write_text(json.dumps(index))
    else:
        folder = release(tmp_path / "hf")
        save_file({**golden_weights(), **BUFFERS}, folder / "model.safetensors", {"format": "pt"})
    opened = HfFolder(folder)
    notes = [note for note in opened.notes if "buffers" in note]
    assert len(notes) == 1 and "are not read: transformer." in notes[0] and "and 6 more" in notes[0]
    assert set(opened.bindings) == set(golden_weights()) and opened.dtype == "float32"
    assert opened.nbytes == sum(array.nbytes for array in golden_weights().values())
    hf_to_canonical(opened, tmp_path / "c")
    to_hf(open_model(tmp_path / "c"), tmp_path / "back")
    assert set(HfFolder(tmp_path / "back").bindings) == set(golden_weights())


def test_what_is_no_buffer_is_refused_by_name(tmp_path: Path) -> None:
    """A bias of attention has one dimension, GPT-2's mask of the same name has four."""
    assert is_derived("h.0.attn.bias", (1, 1, 8, 8)) and not is_derived("h.0.attn.bias", (48,))
    assert not is_derived("lm_head.inv_freq.weight") and not is_derived("transformer.word_embeddings.weight")
    folder = release(tmp_path / "hf")
    for name, array in (("transformer.h.0.attn.bias", np.ones(48, np.float32)), ("extra", np.ones(2, np.float32))):
        save_file({**golden_weights(), name: array}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=f"unexpected '{name}'"):
            HfFolder(folder)


def test_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    folder = release(tmp_path / "hf", shards=2)
    save_file(golden_weights(), folder / "model.safetensors")
    save_file({"x": np.ones(2)}, folder / "adapter_model.safetensors")
    assert (
        f"files that {INDEX} does not name are not read: adapter_model.safetensors and 1 more" in HfFolder(folder).notes
    )
    (folder / INDEX).unlink()
    assert any(
        note.startswith("files beside model.safetensors are not read: adapter") for note in HfFolder(folder).notes
    )


def tied(folder: Path, head: np.ndarray | None) -> Path:
    folder.mkdir()
    weights = load_file(GOLDENS / "flm101b_like" / "weights.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"] if head is None else head
    save_file(weights, folder / "model.safetensors")
    config = json.loads((GOLDENS / "flm101b_like" / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path: Path) -> None:
    folder = HfFolder(tied(tmp_path / "same", None))
    assert folder.config.tied_embeddings and "lm_head.weight" not in folder.bindings
    assert any(note.startswith("tie_word_embeddings is missing: True is taken") for note in folder.notes)
    assert any(note.startswith("lm_head.weight is not read: it is the embedding") for note in folder.notes)
    other = load_file(GOLDENS / "flm101b_like" / "weights.safetensors")["lm_head.weight"]
    with pytest.raises(
        UserError, match="lm_head.weight is not transformer.wte.weight; set tie_word_embeddings to false"
    ):
        HfFolder(tied(tmp_path / "other", other))


def test_an_index_need_not_agree_on_a_tied_head(tmp_path: Path) -> None:
    """The index may name a head that no file holds, and a file one that the index does not: it is the embedding."""
    wanted = dict(HfFolder(tied(tmp_path / "one", None)).logical())
    weights = load_file(tmp_path / "one" / "model.safetensors")
    for case, indexed, held in (("named", True, False), ("held", False, True)):
        folder = shutil.copytree(tmp_path / "one", tmp_path / case)
        (folder / "model.safetensors").unlink()
        save_file({n: t for n, t in weights.items() if held or n != "lm_head.weight"}, folder / "a.safetensors")
        places = {name: "a.safetensors" for name in weights if indexed or name != "lm_head.weight"}
        (folder / INDEX).write_text(json.dumps({"weight_map": places}))
        found = dict(HfFolder(folder).logical())
        assert all((found[name] == tensor).all() for name, tensor in wanted.items()) and found.keys() == wanted.keys()
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds tensor 'lm_head.weight', which"):
        HfFolder(folder)


def test_an_embedding_that_is_stored_as_the_tied_head(tmp_path: Path) -> None:
    """As safetensors' own save_model stores it, which keeps the first of two names."""
    wanted = dict(HfFolder(tied(tmp_path / "both", None)).logical())
    weights = load_file(tmp_path / "both" / "model.safetensors")
    del weights["transformer.wte.weight"]
    folder = shutil.copytree(tmp_path / "both", tmp_path / "head")
    save_file(weights, folder / "model.safetensors")
    source = open_model(folder)
    assert "transformer.wte.weight is missing: lm_head.weight is read for it, by tie_word_embeddings" in source.notes
    found = dict(source.logical())
    assert all((found[name] == tensor).all() for name, tensor in wanted.items()) and found.keys() == wanted.keys()
    assert (source.read("embed.weight", (slice(3, 5), slice(0, 4))) == wanted["embed.weight"][3:5, :4]).all()
    hf_to_canonical(HfFolder(folder), tmp_path / "c")
    canonical_to_hf(open_model(tmp_path / "c"), tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert (back["transformer.wte.weight"] == wanted["embed.weight"]).all()
    assert dict(open_model(tmp_path / "back").logical()).keys() == wanted.keys()


def test_an_index_is_read_with_a_byte_order_mark_and_refused_in_another_encoding(tmp_path: Path) -> None:
    folder = release(tmp_path / "hf", shards=2)
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text, encoding="utf-8-sig")
    assert HfFolder(folder).indexed
    (folder / INDEX).write_text(text, encoding="utf-16")
    with pytest.raises(UserError, match=r"index.json: is not UTF-8 text \(byte 0, line 1\); convert the file"):
        HfFolder(folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("w/a.safetensors", "lies in another folder; .* into one"),
        ("a" * 300, "a name has 1 to 255 bytes"),
    ],
)
def test_names_of_files_that_an_index_may_not_give(name: str, says: str, tmp_path: Path) -> None:
    folder = release(tmp_path / "hf", shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=says):
        HfFolder(folder)


@pytest.mark.parametrize("rows", [-8, 8])
def test_a_vocabulary_of_another_number_of_rows_than_the_config_says(rows: int, tmp_path: Path) -> None:
    folder = release(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    held = config["vocab_size"]
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": held + rows}))
    with pytest.raises(
        UserError, match=rf"config.json: vocab_size is {held + rows}, but .* has {held} rows; write {held}"
    ):
        HfFolder(folder)


def test_generation_settings_say_what_else_ends(tmp_path: Path) -> None:
    folder = release(tmp_path / "hf")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    cases: tuple[tuple[JsonObject, tuple[int, ...], list[str]], ...] = (
        ({"eos_token_id": 2}, (), []),
        ({"eos_token_id": [2, 9, 4]}, (9, 4), ["generation_config.json: token 9, 4 ends generation as well"]),
        ({"eos_token_id": 7}, (7,), ["generation_config.json: token 7 ends generation as well"]),
        ({"eos_token_id": [2, 5000]}, (), ["generation_config.json: eos_token_id 5000 is outside"]),
    )  # fmt: skip
    for settings, ends, said in cases:
        (folder / "generation_config.json").write_text(json.dumps(settings))
        opened = HfFolder(folder)
        assert opened.config.end_token_ids == ends and opened.config.stop_ids == {2, *ends}
        found = [note for note in opened.notes if note.startswith("generation")]
        assert len(found) == len(said) and all(map(str.startswith, found, said))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    hf_to_canonical(HfFolder(folder), tmp_path / "c")
    assert open_model(tmp_path / "c").config.stop_ids == {2, 9}
    to_hf(open_model(tmp_path / "c"), tmp_path / "back")
    before["generation_config.json"] = b'{"eos_token_id": [2, 9]}'
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == before
    for damaged, says in (
        ("{", "damaged"),
        ('{"eos_token_id": "2"}', "eos_token_id should be a whole number, found '2'"),
    ):
        (folder / "generation_config.json").write_text(damaged)
        with pytest.raises(UserError, match=f"generation_config.json: {says}"):
            HfFolder(folder)


def summed(folder: Path) -> Path:
    """A release with sums, in two shards, made by the command."""
    release(folder.with_name("src"), shards=2)
    assert (
        main(["convert", "--from", "hf", "--to", "canonical", str(folder.with_name("src")), str(folder.with_name("c"))])
        == 0
    )
    assert (
        main(["convert", "--from", "canonical", "--to", "hf", "--sums", str(folder.with_name("c")), str(folder)]) == 0
    )
    return folder


def test_sums_are_those_of_the_files_and_do_not_travel(tmp_path: Path) -> None:
    folder = summed(tmp_path / "hf")
    lines = (folder / SUMS).read_text().splitlines()
    files = {path.name: path for path in folder.iterdir() if path.name != SUMS}
    assert lines == [f"{hashlib.sha256(files[n].read_bytes()).hexdigest()}  {n}" for n in sorted(files)]
    assert {p.name for p in (tmp_path / "src").iterdir()} == set(files)
    source = open_model(folder)
    assert set(source.files()) == set(folder.iterdir())
    hf_to_canonical(HfFolder(folder), tmp_path / "again")
    to_hf(open_model(tmp_path / "again"), tmp_path / "back")
    assert {p.name for p in (tmp_path / "back").iterdir()} == set(files)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def change_sums(folder: Path, change: Callable[[str], str]) -> None:
    (folder / SUMS).write_text(change((folder / SUMS).read_text()))


SHARD = "model-00001-of-00002.safetensors"
ALTERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a weight": (lambda f: flip(f / SHARD), f"{SHARD}: altered: SHA-256 should be"),
    "the tokenizer": (lambda f: flip(f / "tokenizer.model"), "tokenizer.model: altered"),
    "the config, still JSON": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("1e-05", "1e-06")),
        "config.json: altered",
    ),
    "a shard gone": (lambda f: (f / SHARD).unlink(), f"{SHARD}: missing; SHA256SUMS lists it"),
    "a file more": (lambda f: (f / "chat_template.jinja").write_text("x"), "chat_template.jinja: SHA256SUMS does not"),
    "sums empty": (lambda f: change_sums(f, lambda text: ""), "SHA256SUMS: damaged, it is empty"),
    "sums cut": (lambda f: change_sums(f, lambda text: text[:-9]), r"SHA256SUMS does not list it|is missing|missing;"),
    "a line less": (lambda f: change_sums(f, lambda text: text.split("\n", 1)[1]), "config.json: SHA256SUMS does not"),
    "a line twice": (lambda f: change_sums(f, lambda text: text + text.split("\n", 1)[0]), "names a file twice"),
    "no sum": (lambda f: change_sums(f, lambda text: "hello\n" + text), "SHA256SUMS:1: damaged, the line is not"),
    "a path": (lambda f: change_sums(f, lambda text: text.replace("config.json", "../config.json")), "SHA256SUMS:1"),
    "no text": (lambda f: (f / SUMS).write_bytes(b"\xff\xfe"), "SHA256SUMS: damaged, not UTF-8"),
}


@pytest.mark.parametrize("case", ALTERED)
def test_what_differs_from_its_sum_is_refused(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, case: str
) -> None:
    spoil, message = ALTERED[case]
    folder = tmp_path / "hf"
    shutil.copytree(_summed(tmp_path_factory), folder)
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        open_model(folder)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


_made: list[Path] = []


def _summed(factory: pytest.TempPathFactory) -> Path:
    if not _made:
        _made.append(summed(factory.mktemp("sums") / "hf"))
    return _made[0]


def test_a_damaged_record_of_the_release_is_refused(tmp_path: Path) -> None:
    record = HfFolder(release(tmp_path / "hf")).source_record()
    check_record(json.loads(json.dumps(record)), "model.json")
    shards = record["shards"]
    for change in (
        None, [], {**record, "prefix": None}, {**record, "indexed": 1}, {**record, "shards": [3]},
        {**record, "shards": [{**shards[0], "tensors": [1]}]},
        {**record, "shards": [{**shards[0], "metadata": {"a": 1}}]},
        {key: value for key, value in record.items() if key != "config"},
    ):  # fmt: skip
        with pytest.raises(UserError, match="^model.json: damaged, hf does not describe"):
            check_record(change, "model.json")


def test_sums_go_with_releases_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in ("canonical", "mindformers"):
        assert main(["convert", "--from", "hf", "--to", target, "--sums", str(tmp_path), str(tmp_path / "x")]) == 2
        assert "--sums: goes with --to hf" in capsys.readouterr().err


def test_the_config_of_a_model_that_ends_twice_goes_through_a_checkpoint(tmp_path: Path) -> None:
    """end_token_ids and no padding token: in model.json, and in a fresh release."""
    import dataclasses

    from telechat_twins.core.checkpoint.read import write_checkpoint

    config = dataclasses.replace(load_model_config("telechat2-tiny"), end_token_ids=(4, 5), pad_token_id=None)
    weights = [(name, np.zeros(spec.shape, np.float32)) for name, spec in parameter_table(config).items()]
    write_checkpoint(tmp_path / "c", 0, model={"config": config.to_dict()}, weights=weights)
    source = open_model(tmp_path / "c")
    assert source.config == config
    to_hf(source, tmp_path / "hf")
    assert HfFolder(tmp_path / "hf").config == config
    settings = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert (settings["eos_token_id"], settings["pad_token_id"]) == ([2, 4, 5], None)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            {"model-00001-of-00002.safetensors": b"", "model-00002-of-00002.safetensors": b""},
            "and 1 more, of which the",
        ),
        ({"model-00001-of-00001.safetensors": b""}, "if model-00001-of-00001.safetensors is the whole model, rename"),
        ({"pytorch_model.bin.index.json": b"{}"}, "pytorch_model.bin.index.json is that of pickled files"),
        ({"model.safetensors.index.fp16.json": b"{}", "a.fp16.safetensors": b""}, "is that of a variant: rename it to"),
        ({"model.safetensors.incomplete": b""}, "model.safetensors.incomplete is a download that was cut off"),
        ({}, "download the release's weights"),
        ({"model.safetensors": LFS}, "model.safetensors: is a pointer of Git LFS, and the file itself was not fetched"),
        ({INDEX: LFS}, "index.json: is a pointer of Git LFS"),
        ({"model.safetensors": b"<!DOCTYPE html><html>"}, "truncated, or not a safetensors file"),
    ],
)
def test_folders_without_their_weights_say_the_way_out(files: dict[str, bytes], says: str, tmp_path: Path) -> None:
    shutil.copy(GOLDENS / "telechat2_gqa" / "config.json", tmp_path)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        HfFolder(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)
