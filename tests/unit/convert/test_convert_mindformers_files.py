"""``tele convert`` and MindFormers' files: whole, a rank each, .ckpt; what is known of the model; what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from telechat_twins.convert.mindformers.config import model_yaml, read_model_file
from telechat_twins.convert.mindformers.source import Known, MindFormersSource
from telechat_twins.convert.source import open_model
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.safetensors import SafetensorsFile
from telechat_twins.core.model.config import load_model_config
from tests.support.frameworks import GOLDENS
from tests.unit.convert.test_convert_command import files, tele_convert

CASE = GOLDENS / "telechat2_gqa"  # 8 heads, 4 key/value heads, vocabulary of 151


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copy(CASE / "config.json", folder)
    shutil.copy(CASE / "weights.safetensors", folder / "model.safetensors")
    return folder


def to_ms(source: Path, target: Path, *more: object) -> Path:
    assert tele_convert("--from", "hf", "--to", "mindformers", source, target, *more) == 0
    return target


def back(source: Path, target: Path, *more: object) -> Path:
    assert tele_convert("--from", "mindformers", "--to", "hf", source, target, *more) == 0
    return target


WAYS = {
    "plain": (),
    "plain ranks": ("--mp", "2"),
    "fused": ("--qkv-concat",),
    "fused ranks": ("--qkv-concat", "--mp", "4"),
    "fused whole": ("--qkv-concat", "--mp", "4", "--whole"),
    "cut by size": ("--qkv-concat", "--max-shard-size", "60KB"),
    "mcore": ("--mcore",),
}


@pytest.mark.parametrize("way", WAYS)
def test_there_and_back_is_the_same_files(way: str, hf: Path, tmp_path: Path) -> None:
    (hf / "tokenizer.model").write_bytes(b"pieces")
    made = to_ms(hf, tmp_path / "ms", *WAYS[way])
    assert files(back(made, tmp_path / "back")) == files(hf)
    assert (made / "assets" / "tokenizer.model").read_bytes() == b"pieces"
    for file in made.rglob("*.safetensors"):
        assert file.stat().st_size < 61_000 or way != "cut by size"
        load_file(file)  # the library reads it


def test_ckpt_files_are_mindspores(hf: Path, tmp_path: Path) -> None:
    ms = pytest.importorskip("mindspore")
    made = to_ms(hf, tmp_path / "ms", "--qkv-concat", "--mp", "2", "--file-format", "ckpt", "--dtype", "bfloat16")
    loaded = ms.load_checkpoint(str(made / "rank_1" / "checkpoint_1.ckpt"))
    parts = to_ms(hf, tmp_path / "st", "--qkv-concat", "--mp", "2", "--dtype", "bfloat16")
    same = SafetensorsFile(parts / "rank_1" / "checkpoint_1.safetensors")
    assert set(loaded) == set(same.tensors)
    assert all(loaded[n].asnumpy().tobytes() == same.read(n).tobytes() for n in loaded)
    assert {str(p.dtype) for p in loaded.values()} == {"BFloat16"}
    there = back(made, tmp_path / "a")
    assert files(there) == files(back(parts, tmp_path / "b"))
    # One whole file, named itself; its model is known from the folder it lies in.
    whole = to_ms(hf, tmp_path / "whole", "--file-format", "ckpt")
    assert files(back(whole / "model.ckpt", tmp_path / "c")) == files(hf)


def test_what_mindspore_saves_is_read(hf: Path, tmp_path: Path) -> None:
    """A training checkpoint: moments and counters lie between the weights."""
    ms = pytest.importorskip("mindspore")
    weights = load_file(GOLDENS / "mindformers_convert" / "telechat2_gqa" / "plain.safetensors")
    saved = [{"name": n, "data": ms.Tensor(a)} for n, a in weights.items()]
    saved += [{"name": f"adam_m.{n}", "data": ms.Tensor(a)} for n, a in weights.items()]
    saved += [{"name": "epoch_num", "data": ms.Tensor(3, ms.int32)}, {"name": "scale_sense", "data": ms.Tensor(1.0)}]
    for name in ("model.layers.0.attention.infer_attention.paged_attention_mgr.key_cache",):
        saved.append({"name": name, "data": ms.Tensor(np.zeros((2, 2), np.float16))})
    ms.save_checkpoint(saved, str(tmp_path / "telechat.ckpt"))
    source = MindFormersSource(tmp_path / "telechat.ckpt", Known(tmp_path / "telechat.ckpt", file=CASE / "config.json"))
    assert "36 tensors that are not weights are skipped (adam_m." in source.notes[-1]
    truth = open_model(CASE)
    assert all(source.tensor(n).tobytes() == truth.tensor(n).tobytes() for n in truth.names())


def test_a_vocabulary_that_ranks_cannot_share_is_whole_on_each(hf: Path, tmp_path: Path) -> None:
    parts = [SafetensorsFile(f) for f in sorted(to_ms(hf, tmp_path / "ms", "--mp", "2").rglob("checkpoint_*"))]
    assert [p.tensors["lm_head.weight"].shape for p in parts] == [(151, 48), (151, 48)]
    assert [p.tensors["model.layers.0.attention.wo.weight"].shape for p in parts] == [(48, 24), (48, 24)]
    assert [p.tensors["model.layers.0.attention.wo.bias"].shape for p in parts] == [(48,), (48,)]
    assert [p.tensors["model.layers.0.feed_forward.w1.weight"].shape for p in parts] == [(40, 48), (40, 48)]


@pytest.mark.parametrize("whole_vocabulary", [True, False])
def test_a_vocabulary_is_read_whole_or_in_parts(whole_vocabulary: bool, tmp_path: Path) -> None:
    """MindFormers' vocab_emb_dp leaves it whole on every rank."""
    config = load_model_config("telechat2-tiny")
    from telechat_twins.core.checkpoint.read import write_checkpoint
    from telechat_twins.core.model.init import init_weights

    write_checkpoint(tmp_path / "c", 0, model={"config": config.to_dict()}, weights=init_weights(config, 1).items())
    tele_convert("--from", "canonical", "--to", "mindformers", tmp_path / "c", tmp_path / "ms", "--mp", "2")
    truth = open_model(tmp_path / "c")
    for rank in range(2):
        path = tmp_path / "ms" / f"rank_{rank}" / f"checkpoint_{rank}.safetensors"
        held = load_file(path)
        assert held["lm_head.weight"].shape == (1024, 128)
        if whole_vocabulary:
            held["lm_head.weight"] = truth.tensor("head.weight")
            held["model.tok_embeddings.embedding_weight"] = truth.tensor("embed.weight")
            save_file(held, path)
    source = MindFormersSource(tmp_path / "ms", Known(tmp_path / "ms"))
    assert all(source.tensor(n).tobytes() == truth.tensor(n).tobytes() for n in truth.names())


def test_each_tensor_is_read_once(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = to_ms(hf, tmp_path / "ms", "--qkv-concat", "--mp", "4", "--whole")
    read: list[str] = []
    real = SafetensorsFile.read
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, name, index=None: read.append(name) or real(self, name))
    back(made, tmp_path / "back")
    assert sorted(read) == sorted(SafetensorsFile(made / "model.safetensors").tensors)


def test_from_mindformers_to_mindformers(hf: Path, tmp_path: Path) -> None:
    fused = to_ms(hf, tmp_path / "a", "--qkv-concat", "--mp", "2", "--whole")
    again = ("--from", "mindformers", "--to", "mindformers")
    assert tele_convert(*again, fused, tmp_path / "b", "--qkv-concat", "--mp", "4") == 0
    truth = to_ms(hf, tmp_path / "truth", "--qkv-concat", "--mp", "4")
    assert files(tmp_path / "b") == files(truth)
    (fused / "model.json").unlink()  # nothing says the ranks any more
    known = ("--config", CASE / "config.json")
    assert tele_convert(*again, fused, tmp_path / "c", "--qkv-concat", "--mp", "4", "--src-mp", "2", *known) == 0
    rank = Path("rank_3/checkpoint_3.safetensors")
    assert (tmp_path / "c" / rank).read_bytes() == (truth / rank).read_bytes()


# --- which model it is


def test_the_yaml_says_which_model_it_is(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = to_ms(hf, tmp_path / "ms", "--qkv-concat")
    section = yaml.safe_load((made / "model_config.yaml").read_text())["model"]["model_config"]
    assert (section["num_heads"], section["n_kv_heads"], section["intermediate_size"]) == (8, 4, 80)
    assert section["qkv_concat"] is True
    (made / "model.json").unlink()
    with pytest.raises(UserError, match="do not say which model they are; give --model PRESET, or --config"):
        back(made, tmp_path / "x")
    made.joinpath("model_config.yaml").rename(tmp_path / "mine.yaml")
    there = back(made, tmp_path / "back", "--config", tmp_path / "mine.yaml")
    assert "note: " in capsys.readouterr().out
    assert open_model(there).config == open_model(hf).config
    made_again, first = load_file(there / "model.safetensors"), load_file(hf / "model.safetensors")
    assert {n: a.tobytes() for n, a in made_again.items()} == {n: a.tobytes() for n, a in first.items()}


@pytest.mark.parametrize("preset", ["telechat2-7b", "telechat2-115b", "telechat-52b"])
def test_yaml_there_and_back(preset: str, tmp_path: Path) -> None:
    config = load_model_config(preset)
    (tmp_path / "m.yaml").write_text(model_yaml(config, "qkv_concat"))
    assert read_model_file(tmp_path / "m.yaml")[0] == config


YAML = {"type": "TelechatConfig", "seq_length": 64, "hidden_size": 48, "num_layers": 3, "num_heads": 8, "n_kv_heads": 4,
        "vocab_size": 151, "rms_norm_eps": 1e-5, "intermediate_size": 80}  # fmt: skip
BAD_YAML = {
    "no epsilon": ({"rms_norm_eps": None}, "rms_norm_eps or layernorm_epsilon is missing; it has no safe default"),
    "no heads": ({"num_heads": None}, "num_heads or num_attention_heads is missing"),
    "biases": ({"qkv_has_bias": True}, "qkv_has_bias is True"),
    "no output bias": ({"wo_has_bias": False}, "wo_has_bias is False; a model of family telechat2 has it True"),
    "interpolated": ({"extend_method": "PI"}, "extend_method is 'PI'"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "part of the channels": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "a multiplied base": ({"rope_ratio": 8}, "rope_ratio is 8"),
    "experts": ({"moe_config": {"expert_num": 16}}, "moe_config is"),
    "a window": ({"window_size": [128, 0]}, "window_size is"),
    "an unknown key": (
        {"attention_temprature": 3},
        "'attention_temprature' is 3; no key of model.model_config has this",
    ),
    "a mistyped key": ({"rms_norm_epss": 3}, "so it may change the arithmetic; did you mean 'rms_norm_eps'"),
    "another head size": ({"head_dim": 8}, "head_dim is 8, but hidden_size / heads is 6"),
    "another order of rows": ({"use_contiguous_weight_layout_attention": True}, "read in the order of False"),
    "heads": ({"num_heads": 7}, "num_heads: 7 does not divide"),
    "no multiplier": ({"use_mup": True}, "output_mult or mup_scale_factor is missing"),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_bad_yaml_is_refused(case: str, tmp_path: Path) -> None:
    change, says = BAD_YAML[case]
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"model": {"model_config": {**YAML, **change}}}))
    with pytest.raises(UserError, match=says) as caught:
        read_model_file(tmp_path / "m.yaml")
    line = sorted({**YAML, **change}).index(next(iter(change))) + 3  # safe_dump sorts, behind two headings
    told = "" if case == "no multiplier" else f":{line}"  # which names the keys that are not there
    assert str(caught.value).startswith(f"{tmp_path}/m.yaml{told}: ") and "\n" not in str(caught.value)


def test_defaults_of_the_yaml(tmp_path: Path) -> None:
    section = {name: value for name, value in YAML.items() if name != "n_kv_heads"}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"model": {"model_config": section}}))
    config, notes = read_model_file(tmp_path / "m.yaml")
    assert (config.num_kv_heads, config.rope_theta, config.training_seqlen, config.pad_token_id) == (8, 10000.0, 64, 0)
    assert notes and "grow beyond 64 tokens" in notes[0]


def test_telechat_52b_needs_no_word_for_its_form_but_one_for_its_ranks(tmp_path: Path) -> None:
    """The golden's multiplier of the embedding has no place in MindFormers; the released model's 1.0 has."""
    case = GOLDENS / "telechat52b_like"
    (tmp_path / "hf").mkdir()
    shutil.copy(case / "weights.safetensors", tmp_path / "hf" / "model.safetensors")
    shutil.copy(case / "config.json", tmp_path / "hf")
    with pytest.raises(UserError, match="model.input_mult: 1.4 has no place"):
        to_ms(tmp_path / "hf", tmp_path / "x")
    released = {**json.loads((case / "config.json").read_text()), "input_mult": 1.0}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(released))
    made = to_ms(tmp_path / "hf", tmp_path / "ms", "--mp", "2", "--whole")
    assert "model.layers.0.attention.w_qkv.weight" in SafetensorsFile(made / "model.safetensors").tensors
    assert files(back(made, tmp_path / "back")) == files(tmp_path / "hf")
    (made / "model.json").unlink()
    known = ("--config", made / "model_config.yaml")
    with pytest.raises(UserError, match="ordered for a number of ranks that the file does not record; give --mp as"):
        back(made, tmp_path / "y", *known)
    again, first = (
        load_file(folder / "model.safetensors")
        for folder in (back(made, tmp_path / "y", *known, "--mp", "2"), tmp_path / "hf")
    )
    assert {n: a.tobytes() for n, a in again.items()} == {n: a.tobytes() for n, a in first.items()}


def test_other_files_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("a: 1")
    with pytest.raises(UserError, match="has no section model.model_config"):
        read_model_file(tmp_path / "m.yaml")
    with pytest.raises(UserError, match="is neither a config.json nor a MindFormers .yaml"):
        read_model_file(tmp_path / "m.txt")


# --- what is refused


def drop(folder: Path, name: str) -> None:
    held = load_file(folder)
    held.pop(name)
    save_file(held, folder)


def change(file: Path, name: str, to: Callable[[np.ndarray], np.ndarray]) -> None:
    held = load_file(file)
    held[name] = np.ascontiguousarray(to(held[name]))
    save_file(held, file)


RANK1 = "rank_1/checkpoint_1.safetensors"
NORM, FUSED = "model.layers.1.attention_norm.weight", "model.layers.2.attention.w_qkv.weight"
BROKEN = {
    "a rank is missing": (lambda f: shutil.rmtree(f / "rank_0"), "ms/rank_0: missing; the folders of all ranks"),
    "the last rank is missing": (lambda f: shutil.rmtree(f / "rank_1"), "says 2 ranks, found 1 rank folders"),
    "the last rank is missing, and nothing says so": (
        lambda f: [shutil.rmtree(f / "rank_1"), (f / "model.json").unlink(), shutil.copy(CASE / "config.json", f)],
        "ffn_hidden_size: the weights have 40, the config says 80",  # reads as a model half as wide
    ),
    "a rank is empty": (lambda f: (f / RANK1).unlink(), "rank_1: holds no .safetensors and no .ckpt"),
    "a rank is pickled": (
        lambda f: (f / RANK1).rename(f / "rank_1" / "a.bin"), "rank_1/a.bin: pickled weights are not read"
    ),
    "two checkpoints": (
        lambda f: shutil.copy(f / RANK1, f / "rank_1" / "b.safetensors"), "holds tensor '.*', as does .*; leave one"
    ),
    "a tensor is missing": (lambda f: drop(f / RANK1, NORM), f"ms/rank_1: tensors do not fit .* missing '{NORM}'"),
    "copies differ": (
        lambda f: change(f / RANK1, NORM, lambda a: a + 1), f"checkpoint_1.safetensors: '{NORM}' of rank 1 differs"
    ),
    "a part of another size": (
        lambda f: change(f / RANK1, FUSED, lambda a: a[:-6]),
        "expected \\[48, 48\\] by the model's config, found \\[42, 48\\]",
    ),
    "dtypes differ": (
        lambda f: change(f / RANK1, NORM, lambda a: a.astype(np.float16)), "is F16, rank 0's is F32; ranks must agree"
    ),
    "whole numbers": (
        lambda f: [change(f / rank, NORM, lambda a: a.astype(np.int8)) for rank in (RANK1.replace("1", "0"), RANK1)],
        "is I8; expected one of F64, F32, F16, BF16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_ranks_are_refused(case: str, hf: Path, tmp_path: Path) -> None:
    spoil, says = BROKEN[case]
    made = to_ms(hf, tmp_path / "ms", "--qkv-concat", "--mp", "2")
    spoil(made)
    with pytest.raises(UserError, match=says) as caught:
        back(made, tmp_path / "x")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"num_layers": 4}, "num_layers: the weights have 3, the config says 4"),
        ({"hidden_size": 64}, "hidden_size: the weights have 48, the config says 64"),
        ({"vocab_size": 152}, "vocab_size: the weights have 151, the config says 152"),
        ({"intermediate_size": 96}, "ffn_hidden_size: the weights have 80, the config says 96"),
        ({"n_kv_heads": 8}, "w_qkv.weight': expected \\[144, 48\\] by the model's config, found \\[96, 48\\]"),
    ],
)
def test_a_config_that_contradicts_the_weights(field: dict, says: str, hf: Path, tmp_path: Path) -> None:
    made = to_ms(hf, tmp_path / "ms", "--qkv-concat")
    (made / "model.json").unlink()
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"model": {"model_config": {**YAML, **field}}}))
    with pytest.raises(UserError, match=says):
        back(made, tmp_path / "x", "--config", tmp_path / "m.yaml")


def test_ranks_that_the_model_cannot_be_shared_among(hf: Path, tmp_path: Path) -> None:
    for mp in (3, 8):
        with pytest.raises(
            UserError, match=f"--mp {mp}: does not divide the model's 4 key/value heads.*possible: 1, 2, 4"
        ):
            to_ms(hf, tmp_path / "x", "--qkv-concat", "--mp", mp)
    assert not (tmp_path / "x").exists()


def test_ranks_said_wrongly(hf: Path, tmp_path: Path) -> None:
    made = to_ms(hf, tmp_path / "ms", "--qkv-concat", "--mp", "2")
    with pytest.raises(UserError, match="--mp 4: .* has 2 rank folders; leave --mp out"):
        back(made, tmp_path / "x", "--mp", "4")
    said = json.loads((made / "model.json").read_text())
    said["mindformers"]["mp"] = 4
    (made / "model.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="model.json says 4 ranks, found 2 rank folders"):
        back(made, tmp_path / "x")
    whole = to_ms(hf, tmp_path / "whole", "--qkv-concat", "--mp", "2", "--whole")
    with pytest.raises(UserError, match="--mp 4: .*model.json says 2; leave --mp out"):
        back(whole, tmp_path / "x", "--mp", "4")


def test_what_is_assumed_is_said(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = to_ms(hf, tmp_path / "ms", "--qkv-concat")
    (made / "model.json").unlink()
    back(made, tmp_path / "x", "--config", CASE / "config.json")
    assert "note: w_qkv is taken as one rank's" in capsys.readouterr().out
    with pytest.raises(UserError, match="--model: has .*, but .*model.json says .*; leave --model out"):
        back(to_ms(hf, tmp_path / "said"), tmp_path / "y", "--model", "telechat2-tiny")


def test_files_that_are_no_checkpoint(hf: Path, tmp_path: Path) -> None:
    for name, content, says in (
        ("text.ckpt", b"no checkpoint at all", "is not a MindSpore checkpoint; it looks like text"),
        ("zip.ckpt", b"PK\x03\x04" + bytes(50), "it looks like a zip archive, which is what torch.save writes"),
        ("a.txt", b"", "is neither a .safetensors nor a .ckpt file"),
        ("a.safetensors", b"", "truncated"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=says) as caught:
            back(tmp_path / name, tmp_path / "x", "--config", CASE / "config.json")
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file or folder"):
        back(tmp_path / "gone", tmp_path / "x", "--config", CASE / "config.json")


def test_without_mindspore_a_ckpt_says_what_is_missing(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mindspore", None)
    with pytest.raises(UserError, match="model.ckpt: .* written by MindSpore, .* install the extra 'ms', or"):
        to_ms(hf, tmp_path / "x", "--file-format", "ckpt")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["transformer.ln_f.weight"], "has the names of a release; use --from hf"),
        (["model.layers.0.attention.wk.weight"], "has Llama's attention.wk and attention.wv"),
        (["a", "b"], "holds none of MindFormers' names for TeleChat2 \\(found 'a', 'b'\\)"),
    ],
)
def test_other_names_are_not_mindformers(names: list[str], says: str, tmp_path: Path) -> None:
    save_file({name: np.zeros(2, np.float32) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=says):
        MindFormersSource(tmp_path, Known(tmp_path, preset="telechat2-tiny"))


def test_parts_of_different_dtype_are_not_fused_silently(hf: Path, tmp_path: Path) -> None:
    change(hf / "model.safetensors", "transformer.h.1.self_attention.query.weight", lambda a: a.astype(np.float16))
    with pytest.raises(UserError, match="w_qkv.weight: its parts differ in dtype .*; give --dtype to make them one"):
        to_ms(hf, tmp_path / "x", "--qkv-concat")
    to_ms(hf, tmp_path / "plain")
    made = to_ms(hf, tmp_path / "made", "--qkv-concat", "--dtype", "bfloat16")
    assert SafetensorsFile(made / "model.safetensors").read(FUSED).dtype == ml_dtypes.bfloat16


COMMANDS = [
    (("--from", "hf", "--to", "hf"), "--to hf: is what SRC is already"),
    (("--from", "hf", "--to", "canonical", "--mp", "2"), "--mp: goes with --from mindformers or --to"),
    (("--from", "hf", "--to", "canonical", "--qkv-concat"), "--qkv-concat: goes with --to mindformers"),
    (("--from", "hf", "--to", "canonical", "--file-format", "ckpt"), "--file-format: goes with --to mindformers"),
    (("--from", "hf", "--to", "canonical", "--model", "telechat2-tiny"), "--model: goes with --from mindformers"),
    (("--from", "hf", "--to", "mindformers", "--src-mp", "2"), "--src-mp: is for --from mindformers --to mindformers"),
    (("--from", "hf", "--to", "mindformers", "--mp", "0"), "--mp 0: must be at least 1"),
    (("--from", "hf", "--to", "mindformers", "--mcore", "--mp", "2"), "--mp: the loader of --mcore cuts"),
    (("--from", "hf", "--to", "mindformers", "--whole"), "--whole: without --mp 2 or more DST is whole anyway"),
    (("--from", "hf", "--to", "mindformers", "--mp", "2", "--max-shard-size", "1GB"), "--max-shard-size: a .ckpt and"),
    (("--from", "hf", "--to", "mindformers", "--tokenizer", "F"), "--tokenizer: goes with --to hf"),
    (("--from", "mindformers", "--to", "hf", "--model", "telechat2-tiny", "--config", "F"), "both say which model"),
]


@pytest.mark.parametrize(("words", "says"), COMMANDS, ids=[says for _, says in COMMANDS])
def test_options_that_do_not_go_together(words: tuple[str, ...], says: str, hf: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        tele_convert(*words, hf, tmp_path / "x")


def test_force_replaces_a_mindformers_folder(hf: Path, tmp_path: Path) -> None:
    made = to_ms(hf, tmp_path / "ms", "--mp", "2")
    to_ms(hf, made, "--force")
    assert (made / "model.safetensors").is_file() and not (made / "rank_0").exists()
