"""Released folder -> canonical checkpoint -> released folder: the same files; and bad folders are refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from telechat_twins.convert.copy import canonical_to_hf, cast, hf_to_canonical
from telechat_twins.convert.hf.folder import INDEX, HfFolder, plan_shards
from telechat_twins.convert.hf.tokenizer import load_pieces
from telechat_twins.convert.source import open_model
from telechat_twins.core.checkpoint.read import Contents, open_checkpoint, save_checkpoint, write_checkpoint
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.safetensors import SafetensorsFile
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.params import parameter_table

GOLDEN = Path(__file__).resolve().parents[2] / "goldens" / "telechat2_gqa"


def golden_weights(dtype=np.float32) -> dict[str, np.ndarray]:
    return {n: a.astype(dtype) for n, a in safetensors.numpy.load_file(GOLDEN / "weights.safetensors").items()}


def release(folder: Path, dtype=np.float32, shards: int = 1, prefix: str = "transformer.") -> Path:
    """A released folder as transformers would write it, with the library, from the golden weights."""
    folder.mkdir(parents=True)
    weights = {name.replace("transformer.", prefix): array for name, array in golden_weights(dtype).items()}
    if shards == 1:
        safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        names, weight_map = list(weights), {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: weights[name] for name in names[i::shards]}
            safetensors.numpy.save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        total = sum(a.nbytes for a in weights.values())
        index = {"metadata": {"total_size": total, "extra": 1}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index))
    shutil.copy(GOLDEN / "config.json", folder)
    (folder / "tokenizer.model").write_bytes(b"\x00pieces\xff")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TelechatTokenizer", "extra": [1]}')
    (folder / "generation_config.json").write_text('{"top_k":5}')
    (folder / "modeling_telechat.py").write_text("# code that auto_map names\n")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("shards", "prefix"), [(1, "transformer."), (3, "transformer."), (2, "")])
def test_there_and_back_gives_the_same_files(tmp_path, dtype, shards, prefix):
    source = release(tmp_path / "hf", dtype, shards, prefix)
    hf_to_canonical(HfFolder(source), tmp_path / "c", max_file_bytes=100_000)
    checkpoint = open_checkpoint(tmp_path / "c")
    assert checkpoint.names("weights") == list(parameter_table(open_model(source).config))
    assert {checkpoint.dtype("weights", n) for n in checkpoint.names("weights")} == {np.dtype(dtype)}
    assert len(list((tmp_path / "c").glob("weights-*"))) > 1
    canonical_to_hf(open_model(tmp_path / "c"), tmp_path / "back")
    assert files(tmp_path / "back") == files(source)


def test_resharded_folder_holds_the_same_tensors(tmp_path):
    source = release(tmp_path / "hf")
    hf_to_canonical(HfFolder(source), tmp_path / "c")
    canonical_to_hf(open_model(tmp_path / "c"), tmp_path / "back", max_shard_bytes=60_000)
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in golden_weights().values())
    found = {}
    for file in sorted((tmp_path / "back").glob("*.safetensors")):
        part = safetensors.numpy.load_file(file)
        assert sum(a.nbytes for a in part.values()) <= 60_000
        assert all(index["weight_map"][name] == file.name for name in part)
        found |= part
    assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in golden_weights().items()}
    back = open_model(tmp_path / "back")
    assert all(np.array_equal(back.tensor(n), open_model(source).tensor(n)) for n in back.names())


def test_dtype_is_changed_only_on_request(tmp_path):
    source = release(tmp_path / "hf")
    hf_to_canonical(HfFolder(source), tmp_path / "c", dtype="bfloat16")
    canonical_to_hf(open_model(tmp_path / "c"), tmp_path / "bf16")
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    found = SafetensorsFile(tmp_path / "bf16" / "model.safetensors")
    for name, array in golden_weights().items():
        assert found.read(name).tobytes() == array.astype(ml_dtypes.bfloat16).tobytes()
    canonical_to_hf(open_model(tmp_path / "c"), tmp_path / "fp32", dtype="float32")
    assert open_model(tmp_path / "fp32").tensor("norm.weight").dtype == np.float32


def test_a_value_beyond_the_range_is_an_error():
    with pytest.raises(UserError, match="embed.weight: value 70000 is beyond float16's range"):
        cast(np.array([1, 7e4, 3], np.float32), "float16", "embed.weight")
    kept = cast(np.array([1, np.inf, np.nan], np.float32), "float16", "w")
    assert kept.dtype == np.float16 and np.isinf(kept[1]) and np.isnan(kept[2])


def tiny_checkpoint(root: Path, **more) -> Path:
    config = load_model_config("telechat2-tiny")
    rng = np.random.default_rng(0)
    weights = [(n, rng.standard_normal(s.shape).astype(np.float32)) for n, s in parameter_table(config).items()]
    optimizer = [(f"m.{n}", a) for n, a in weights]
    return save_checkpoint(
        root, 5, Contents({"config": config.to_dict()}, weights, optimizer, {"step": 5}, **more), keep_last=1
    )  # fmt: skip


def train_tokenizer(path: Path, size: int) -> Path:
    """A small tokenizer with TeleChat2's first control tokens at their ids."""
    import io

    import sentencepiece

    model, text = io.BytesIO(), (f"line {i} of {i * 37} words and {i % 7} more" for i in range(300))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_writer=model, vocab_size=size, model_type="bpe", minloglevel=2,
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, unk_piece="<_unk>", bos_piece="<_start>", eos_piece="<_end>",
        pad_piece="<_pad>", control_symbols=["<_user>", "<_bot>"],
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


def test_a_model_trained_here_becomes_a_complete_release(tmp_path):
    """From the run folder; with the tokenizer it was trained with, or one given."""
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model", 60)
    tiny_checkpoint(tmp_path / "run", assets=[tokenizer])
    source = open_model(tmp_path / "run")
    assert source.tokenizer_path.read_bytes() == tokenizer.read_bytes()
    canonical_to_hf(source, tmp_path / "hf")
    assert sorted(files(tmp_path / "hf")) == [
        "config.json", "configuration_telechat2.py", "generation_config.json", "model.safetensors", "tokenizer.model",
        "tokenizer_config.json",
    ]  # fmt: skip
    with safetensors.safe_open(tmp_path / "hf" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    back = open_model(tmp_path / "hf")
    assert back.config == source.config and back.names() == source.names()
    assert all(back.tensor(n).tobytes() == source.tensor(n).tobytes() for n in back.names())
    described = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    controls = {i: token["content"] for i, token in described["added_tokens_decoder"].items()}
    assert controls == dict(zip("012345", ("<_unk>", "<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>"), strict=True))
    assert (described["bos_token"], described["eos_token"]) == ("<_start>", "<_end>")
    other = train_tokenizer(tmp_path / "other.model", 70)
    canonical_to_hf(source, tmp_path / "hf2", tokenizer=other)
    assert (tmp_path / "hf2" / "tokenizer.model").read_bytes() == other.read_bytes()


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    tiny_checkpoint(tmp_path / "run")
    source = open_model(tmp_path / "run")
    assert source.tokenizer_path is None
    (tmp_path / "text.model").write_text("no tokenizer")
    with pytest.raises(UserError, match="text.model: is not a SentencePiece model"):
        canonical_to_hf(source, tmp_path / "hf", tokenizer=tmp_path / "text.model")
    small = dataclasses.replace(source.config, vocab_size=50)
    with pytest.raises(UserError, match="has 60 pieces, the model's vocab_size is 50"):
        load_pieces(train_tokenizer(tmp_path / "t.model", 60), small)
    assert not (tmp_path / "hf").exists()


def test_a_release_trained_further_keeps_its_config_and_files(tmp_path):
    """Weights became float32 masters: the shards keep their cut, torch_dtype follows, other keys stay."""
    source = release(tmp_path / "hf", ml_dtypes.bfloat16, shards=2)
    hf_to_canonical(HfFolder(source), tmp_path / "c")
    start = open_model(tmp_path / "c")
    weights = [(n, start.tensor(n).astype(np.float32) + 1) for n in start.names()]
    write_checkpoint(tmp_path / "t", 9, model=start.checkpoint.model, weights=weights, assets=start.checkpoint.assets)
    canonical_to_hf(open_model(tmp_path / "t"), tmp_path / "back")
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("hf", "back"))
    assert after == {**before, "torch_dtype": "float32"}
    maps = [json.loads((tmp_path / f / INDEX).read_text()) for f in ("hf", "back")]
    assert maps[0]["weight_map"] == maps[1]["weight_map"]
    assert maps[1]["metadata"]["total_size"] == 2 * maps[0]["metadata"]["total_size"]


def test_sources_agree(tmp_path):
    source = release(tmp_path / "hf", shards=2)
    hf_to_canonical(HfFolder(source), tmp_path / "c")
    hf, canonical = open_model(source), open_model(tmp_path / "c")
    assert hf.names() == canonical.names() and hf.config == canonical.config
    for name in hf.names():
        assert hf.tensor(name).tobytes() == canonical.tensor(name).tobytes()
    assert hf.tokenizer_path == source / "tokenizer.model"
    for model in (hf, canonical):
        assert set(model.files()) == {p for p in model.path.rglob("*") if p.is_file()}
    gradients = {name: hf.tensor(name) for name in hf.names()}
    assert canonical.export(gradients) == gradients
    assert set(hf.export(gradients)) == set(golden_weights())
    for opened in (hf, canonical):
        with pytest.raises(UserError, match="layers.9"):
            opened.tensor("layers.9.attn.q.weight")


def test_each_released_tensor_is_read_once(tmp_path, monkeypatch):
    folder = HfFolder(release(tmp_path / "hf"))
    read = []
    real = SafetensorsFile.read
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, name, index=None: read.append(name) or real(self, name))
    hf_to_canonical(folder, tmp_path / "c")
    assert sorted(read) == sorted(golden_weights())


def test_plan_of_shards():
    tensors = {"a": ("F32", (10,)), "b": ("F32", (10,)), "c": ("BF16", (100,)), "d": ("F32", (1,))}
    shards = plan_shards(tensors, 80)
    assert [list(s.tensors) for s in shards] == [["a", "b"], ["c"], ["d"]]
    assert [s.file for s in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [s.file for s in plan_shards(tensors, 1000)] == ["model.safetensors"]


def change_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def first_shard(folder: Path) -> Path:
    return folder / "model-00001-of-00002.safetensors"


NORM = "transformer.ln_f.weight"
BAD = {
    "index leads up": (lambda f: change_index(f, lambda m: m.update({NORM: "../x.safetensors"})), "points outside"),
    "index leads away": (lambda f: change_index(f, lambda m: m.update({NORM: "/etc/hosts"})), "points outside"),
    "index backslash": (lambda f: change_index(f, lambda m: m.update({NORM: "..\\x"})), "points outside"),
    "index names no file": (lambda f: change_index(f, lambda m: m.update({NORM: ""})), "points outside"),
    "shard missing": (lambda f: first_shard(f).unlink(), "model-00001-of-00002.safetensors: missing"),
    "shard lacks tensor": (
        lambda f: change_index(f, lambda m: m.update({"ghost": "model-00001-of-00002.safetensors"})),
        "00001-of-00002.safetensors: lacks tensor 'ghost'",
    ),
    "index forgets tensor": (
        lambda f: change_index(f, lambda m: m.pop(NORM)), "holds tensor 'transformer.ln_f.weight', which"
    ),
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), "index.json: damaged"),
    "index key twice": (lambda f: (f / INDEX).write_text('{"a":1,"a":2}'), "key 'a' appears twice"),
    "index empty": (lambda f: (f / INDEX).write_text("{}"), "weight_map must say"),
    "index lists": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": ["b"]}}'), "weight_map must say"),
    "shard truncated": (lambda f: os.truncate(first_shard(f), 9000), "00001-of-00002.safetensors: truncated"),
    "shard empty": (lambda f: os.truncate(first_shard(f), 0), "00001-of-00002.safetensors: truncated"),
    "config missing": (lambda f: (f / "config.json").unlink(), "no model found"),
    "config damaged": (lambda f: (f / "config.json").write_text("{,}"), "config.json: damaged"),
    "config of another model": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("80", "96")),
        r"gate_proj.weight': expected \[96, 48\] by the model's config, found \[80, 48\]",
    ),
    "more layers in config": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('layer": 3', 'layer": 4')),
        "missing 'transformer.h.3.input_layernorm.weight', .* and 6 more",
    ),
    "nothing": (lambda f: [p.unlink() for p in f.glob("model*")], "holds neither model.safetensors nor"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_folder_is_refused(tmp_path, case):
    spoil, message = BAD[case]
    folder = release(tmp_path / "hf", shards=2)
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_model(folder)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_altered_name_in_the_only_file_names_that_file(tmp_path):
    file = release(tmp_path / "hf") / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"lm_head.weight"', b'",m_head.weight"'))
    with pytest.raises(UserError, match="hf/model.safetensors: .*missing 'lm_head.weight'; unexpected ',m_head"):
        open_model(tmp_path / "hf")


def test_pickled_weights_are_not_read(tmp_path):
    folder = release(tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: pickled weights are not read .* to safetensors"):
        open_model(folder)


def test_whole_numbers_are_no_weights(tmp_path):
    folder = release(tmp_path / "hf", np.int8)
    with pytest.raises(UserError, match="is I8; expected one of F64, F32, F16, BF16"):
        open_model(folder)


def test_links_of_a_hub_cache_are_followed(tmp_path):
    folder = release(tmp_path / "snapshot")
    (tmp_path / "blobs").mkdir()
    for file in list(folder.iterdir()):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(tmp_path / "blobs" / file.name)
    hf_to_canonical(HfFolder(folder), tmp_path / "c")
    assert not any(p.is_symlink() for p in (tmp_path / "c").rglob("*"))
    assert open_model(tmp_path / "c").tokenizer_path.read_bytes() == b"\x00pieces\xff"


def test_a_checkpoint_that_does_not_fit_its_own_config(tmp_path):
    config = load_model_config("telechat2-tiny").to_dict()
    for model, weights, message in (
        ({}, [], "model.json: holds no config"),
        ({"config": {**config, "num_layer": 3}}, [], "unknown key 'num_layer'; did you mean 'num_layers'"),
        ({"config": config}, [("embed.weight", np.zeros((2, 2), np.float32))], "missing 'layers.0.attn_norm.weight'"),
    ):
        write_checkpoint(tmp_path / "c", 1, model=model, weights=weights)
        with pytest.raises(UserError, match=message):
            open_model(tmp_path / "c")
    for name, file in (("a", "latest"), ("b", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    with pytest.raises(UserError, match=f"no model found; .* below it are {tmp_path}/b, {tmp_path}/a$"):
        open_model(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        open_model(tmp_path / "none")


def test_a_recorded_file_name_cannot_lead_outside(tmp_path):
    """The layout in model.json decides where files are written: it may name no other folder."""
    hf_to_canonical(HfFolder(release(tmp_path / "hf")), tmp_path / "c")
    start = open_model(tmp_path / "c")
    model = start.checkpoint.model
    model["hf"]["shards"][0]["file"] = "../../evil.safetensors"
    write_checkpoint(tmp_path / "d", 0, model=model, weights=[(n, start.tensor(n)) for n in start.names()])
    with pytest.raises(UserError, match="points outside"):
        canonical_to_hf(open_model(tmp_path / "d"), tmp_path / "back")
    assert not (tmp_path / "back").exists()
