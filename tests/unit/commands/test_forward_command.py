"""Reading, checking and writing of `tele forward`; the numbers themselves are judged in tests/parity."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from telechat_twins.convert.source import weight_reader
from telechat_twins.core.checkpoint.read import whole, write_checkpoint
from telechat_twins.core.commands import forward
from telechat_twins.core.commands.forward import check_not_of_model, check_output, make_batch, read_inputs
from telechat_twins.core.commands.options import read_layout
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.safetensors import write_atomically
from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.parallel.layout import Layout
from tests.support.frameworks import golden_source

CONFIG = load_model_config({"preset": "telechat2-tiny", "vocab_size": 64})
GOLDEN = ("telechat2_gqa/weights.safetensors", "telechat2_gqa/config.json")
IDS = np.arange(10, dtype=np.int64).reshape(2, 5)


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


def test_labels_are_shifted_and_masked():
    labels = changed(IDS, (0, 2), IGNORE)
    mask = changed(np.ones((2, 5), np.float32), (1, 4), 0)
    batch = make_batch({"input_ids": IDS, "labels": labels, "loss_mask": mask}, CONFIG, "F")
    np.testing.assert_array_equal(batch.targets, [[1, IGNORE, 3, 4, IGNORE], [6, 7, 8, IGNORE, IGNORE]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3, 4]] * 2)
    assert batch.input_ids.dtype == batch.targets.dtype == batch.positions.dtype == np.int32
    assert batch.doc_ids is None and batch.num_targets == 6


def test_labels_may_be_left_out():
    assert make_batch({"input_ids": IDS.astype(np.int32)}, CONFIG, "F").num_targets == 0


ONES = np.ones((2, 5), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input_ids": IDS[0]}, r"input_ids must have shape \[B, S\].*found \[5\]"),
        ({"input_ids": IDS[:, :0]}, r"found \[2, 0\]"),
        ({"input_ids": IDS.astype(np.float32)}, "input_ids must be int32 or int64, found float32"),
        ({"input_ids": IDS, "labels": IDS.astype(np.int16)}, "labels must be int32 or int64, found int16"),
        (
            {"input_ids": IDS, "labels": IDS[:, :4]},
            r"labels must have the shape of input_ids, \[2, 5\], found \[2, 4\]",
        ),
        (
            {"input_ids": IDS, "labels": IDS, "loss_mask": ONES[:1]},
            r"loss_mask must have the shape of input_ids, \[2, 5\], found \[1, 5\]",
        ),
        ({"input_ids": changed(IDS, (1, 3), 64)}, r"input_ids\[1, 3\] is 64, outside the vocabulary of 64"),
        ({"input_ids": changed(IDS, (0, 1), -100)}, r"input_ids\[0, 1\] is -100, outside"),
        ({"input_ids": changed(IDS, (0, 1), 2**32 + 1)}, r"input_ids\[0, 1\] is 4294967297, outside"),
        ({"input_ids": IDS, "labels": changed(IDS, (1, 0), 99)}, r"labels\[1, 0\] is 99, neither -100 nor inside"),
        ({"input_ids": IDS, "labels": changed(IDS, (1, 0), -1)}, r"labels\[1, 0\] is -1, neither -100"),
        ({"input_ids": IDS, "labels": IDS, "loss_mask": changed(ONES, (1, 1), 0.5)}, r"loss_mask\[1, 1\] is 0.5"),
        ({"input_ids": IDS, "labels": IDS, "loss_mask": changed(ONES, (0, 0), np.nan)}, r"loss_mask\[0, 0\] is nan"),
        ({"input_ids": IDS, "loss_mask": ONES}, "loss_mask needs labels, found none"),
        ({"input_ids": IDS, "labels": np.full_like(IDS, IGNORE)}, "at least one label must count in the loss"),
        ({"input_ids": IDS, "labels": IDS, "loss_mask": 0 * ONES}, "at least one label must count in the loss"),
        ({"input_ids": IDS[:, :1], "labels": IDS[:, :1]}, "at least one label must count in the loss"),
    ],
)
def test_bad_arrays_are_refused(arrays, message):
    with pytest.raises(UserError, match="F: " + ".*" * (not message.startswith("F")) + message):
        make_batch(arrays, CONFIG, "F")


def test_other_arrays_are_named_and_left_out(tmp_path, capsys):
    path = str(tmp_path / "f.safetensors")
    save_file({"input_ids": IDS, "labels": IDS, "labels_ignore": IDS, "more": IDS}, path)
    assert sorted(read_inputs(path)) == ["input_ids", "labels"]
    assert capsys.readouterr().err == f"note: {path}: not used: labels_ignore, more\n"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["input_ids", "lables"], "unknown array 'lables'; did you mean 'labels'"),
        (["input_id"], "did you mean 'input_ids'"),
        (["tokens"], "must have input_ids, found tokens"),
    ],
)
def test_misspelt_arrays_are_refused(tmp_path, names, message):
    path = str(tmp_path / "f.safetensors")
    save_file({name: IDS for name in names}, path)
    with pytest.raises(UserError, match=message):
        read_inputs(path)


def test_torn_missing_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "f.safetensors"
    with pytest.raises(UserError, match="no such file"):
        read_inputs(str(path))
    save_file({"input_ids": IDS}, path)
    whole = path.read_bytes()
    for size in (0, 5, 30, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="f.safetensors"):
            read_inputs(str(path))
    path.write_text("not such a file at all, only text")
    with pytest.raises(UserError, match="f.safetensors"):
        read_inputs(str(path))
    with pytest.raises(UserError, match="folder|director|no such file"):
        read_inputs(str(tmp_path))


def test_output_places_are_checked_first(tmp_path):
    inputs = tmp_path / "f.safetensors"
    inputs.write_bytes(b"")
    with pytest.raises(UserError, match="must be a file, found a folder"):
        check_output(str(tmp_path), str(inputs))
    with pytest.raises(UserError, match="create it first"):
        check_output(str(tmp_path / "no" / "g"), str(inputs))
    with pytest.raises(UserError, match="must not be the file of --inputs"):
        check_output(str(tmp_path / "." / "f.safetensors"), str(inputs))
    assert check_output(str(tmp_path / "g"), str(inputs)) == tmp_path / "g"


def test_the_model_itself_is_never_the_output(tmp_path):
    weights, other = tmp_path / "model.safetensors", tmp_path / "g.safetensors"
    weights.write_bytes(b"w")
    (tmp_path / "link").symlink_to(weights)
    for out in (weights, tmp_path / "link"):
        with pytest.raises(UserError, match="must not be a file of the checkpoint"):
            check_not_of_model(out, [tmp_path / "config.json", weights])
    for _ in range(2):  # an output of before, even beside the weights, may be written again
        check_not_of_model(other, [weights])
        other.write_bytes(b"g")


def test_output_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "g.safetensors"
    strided = np.arange(6, dtype=np.float32).reshape(1, 2, 3).swapaxes(1, 2)
    write_atomically(path, {"loss": np.asarray(1.5, np.float64), "logits": strided})
    read = load_file(path)
    assert read["loss"].shape == () and read["loss"] == 1.5
    np.testing.assert_array_equal(read["logits"], strided)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("telechat_twins.core.files.atomic.os.fsync", full)
    with pytest.raises(UserError, match="cannot be written.*No space left"):
        write_atomically(path, {"loss": np.asarray(2.5)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["g.safetensors"]


@pytest.mark.parametrize(
    ("layout", "nproc", "timeout", "message"),
    [
        (None, 2, None, r"--nproc: 2 processes need a layout.*--layout tp2"),
        (None, 0, None, "--nproc: must be at least 1, found 0"),
        ("tp2.pp2", 2, None, r"--nproc: must be 4, the processes of layout pp2.tp2, found 2"),
        ("tp2.qq2", None, None, "unknown part 'qq2'"),
        ("tp2", 2, -1.0, "--timeout: must be 0"),
        ("tp2", 2, float("nan"), "--timeout: must be 0"),
    ],
)
def test_layouts_that_cannot_be_are_refused(layout, nproc, timeout, message):
    with pytest.raises(UserError, match=message):
        read_layout(layout, nproc, timeout)


def test_a_layout_says_how_many_processes():
    assert read_layout(None, None, None) == read_layout(None, 1, None) == read_layout("single", 1, None) == Layout()
    assert read_layout("tp2.ring2", None, 0.0).world == read_layout("tp2.ring2", 4, 30.0).world == 4


def test_a_model_that_the_layout_cannot_share_is_refused_before_anything_starts(tmp_path, monkeypatch):
    """telechat2-tiny has 4 heads."""
    write_checkpoint(
        tmp_path / "model",
        0,
        model={"config": CONFIG.to_dict()},
        weights=[whole(name, array) for name, array in init_weights(CONFIG, 0).items()],
    )
    save_file({"input_ids": IDS}, tmp_path / "f.safetensors")
    monkeypatch.setattr(forward, "launch_tasks", lambda *_, **__: pytest.fail("processes were started"))
    parser = argparse.ArgumentParser()
    forward.add_arguments(parser)
    words = ["--backend", "pt", "--checkpoint", tmp_path / "model", "--inputs", tmp_path / "f.safetensors"]
    args = parser.parse_args([*map(str, words), "--out", str(tmp_path / "g"), "--layout", "tp3"])
    with pytest.raises(UserError, match=r"parallel.tp: 3 does not divide model.num_heads 4; nearest tp .*: 2"):
        forward.run(args)
    assert not (tmp_path / "g").exists()


def test_a_rank_reads_boxes(tmp_path):
    weights = init_weights(CONFIG, 0)
    write_checkpoint(
        tmp_path / "model", 0, model={"config": CONFIG.to_dict()}, weights=[whole(n, w) for n, w in weights.items()]
    )
    (tmp_path / "hf").mkdir()
    read = weight_reader(str(tmp_path / "model"))
    box = (slice(3, 9), slice(5, 70))
    np.testing.assert_array_equal(read("layers.1.ffn.up.weight", box), weights["layers.1.ffn.up.weight"][box])
    source = golden_source(*GOLDEN, str(tmp_path / "hf"))
    released = weight_reader(str(source.path))
    for name in ("layers.1.attn.k.weight", "layers.1.attn.v.weight", "layers.1.attn.k.weight"):
        np.testing.assert_array_equal(released(name, box[:1]), source.tensor(name)[3:9])
