"""The bookkeeping of a job of layouts: rows, pieces, and their way back into whole tensors; no framework, no ranks."""

from __future__ import annotations

import json
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest

from telechat_twins.core.checkpoint.read import TensorPiece, whole
from telechat_twins.core.model.batch import IGNORE, Batch
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.parallel.layout import parse_layout
from telechat_twins.core.parallel.sequence import split_batch
from telechat_twins.core.parity.layouts import expected_of
from telechat_twins.core.parity.worker import (
    Task,
    _logits_pieces,
    _write_pieces,
    collect,
    launch_tasks,
    pad_rows,
    read_batch,
    row_multiple,
    write_batch,
)

MODEL = ModelConfig(
    vocab_size=11, hidden_size=16, ffn_hidden_size=16, num_layers=4, num_heads=4, num_kv_heads=2, norm_eps=1e-5,
    training_seqlen=64, base_seqlen=64, max_seqlen=64,
)  # fmt: skip
Coord = namedtuple("Coord", "pp dp cp tp")


def batch(rows=3, length=7, documents=False):
    ids = np.arange(rows * length, dtype=np.int32).reshape(rows, length) % 11
    doc_ids = np.zeros_like(ids) if documents else None
    return Batch(ids, ids.copy(), np.tile(np.arange(length, dtype=np.int32), (rows, 1)), doc_ids)


def task(layout, path="", **changes):
    return Task(name=layout, model=MODEL, layout=parse_layout(layout), batch=path, **changes)


def test_rows_are_padded_with_copies_that_count_nothing():
    padded = pad_rows(batch(documents=True), 4)
    assert padded.input_ids.shape == padded.positions.shape == padded.doc_ids.shape == (4, 7)
    np.testing.assert_array_equal(padded.input_ids[3], padded.input_ids[2])
    assert (padded.targets[3] == IGNORE).all() and padded.num_targets == batch().num_targets
    same = batch()
    assert pad_rows(same, 3) is same


@pytest.mark.parametrize(
    ("layout", "micro_batch", "multiple"),
    [("tp2", 1, 1), ("dp2", 3, 6), ("pp2", 1, 1), ("pp2.vpp2", 1, 2), ("dp2.pp4.vpp2", 2, 16)],
)
def test_rows_are_shared_evenly(layout, micro_batch, multiple):
    assert row_multiple(task(layout, micro_batch=micro_batch)) == multiple


@pytest.mark.parametrize("documents", [False, True])
def test_batches_come_back(tmp_path, documents):
    found = read_batch(write_batch(tmp_path / "new" / "b.safetensors", batch(documents=documents)))
    assert (found.doc_ids is not None) is documents
    for name in ("input_ids", "targets", "positions"):
        np.testing.assert_array_equal(getattr(found, name), getattr(batch(), name))


@pytest.mark.parametrize(
    ("layout", "starts"),
    [("tp2", ()), ("dp2", ()), ("ring2", ()), ("ring2.ulysses2", ()), ("dp2.tp4.ulysses2", ()), ("ring2.tp2", (4,))],
)
def test_logits_of_all_ranks_make_up_the_whole(tmp_path, layout, starts):
    """3 rows of 7 (8 with documents, which are dealt row by row) of a vocabulary of 11: nothing divides."""
    size = 3 if starts else 1
    made = task(layout, micro_batch=size)
    rows, length = 3, 8 if starts else 7
    data = batch(rows, length, documents=bool(starts))
    for row in range(rows if starts else 0):
        data.doc_ids[row, starts[0] * (row > 0) :] = 1
    padded = pad_rows(data, row_multiple(made))
    truth = np.random.default_rng(0).standard_normal((rows, length, 11)).astype(np.float32)
    share = len(padded.input_ids) // made.layout.dp
    columns = -(-11 // made.layout.tp)
    for rank in range(made.layout.world):
        coord = made.layout.coord(rank)
        pieces = []
        for first in range(coord.dp * share, (coord.dp + 1) * share, size):
            part = padded.rows(first, first + size)
            index = split_batch(part, made.layout, coord.cp).index
            held = np.full((size, index.shape[1], columns), np.nan, np.float32)  # of padding, which is not written
            for row, places in enumerate(np.broadcast_to(index, (size, index.shape[1]))):
                real = np.flatnonzero(places < length)
                own = truth[min(first + row, rows - 1), :, coord.tp * columns : (coord.tp + 1) * columns]
                held[row, real, : own.shape[1]] = own[places[real]]
            pieces += _logits_pieces(held, part, first, made, coord, (rows, length))
        _write_pieces(tmp_path, "logits", rank, pieces)
        leave_numbers(tmp_path, rank)
    found = collect(tmp_path, made.layout.world)
    assert found.problems == []
    np.testing.assert_array_equal(found.logits, truth)


def leave_numbers(folder, rank, loss=1.5):
    record = {"losses": [loss], "norms": [2.0], "log_probs": [], "loss_scale": 1.0, "peak": 1, "seconds": 0.1}
    record["traffic"] = [["send", "x", 1, 8]]
    (folder / f"rank-{rank}.json").write_text(json.dumps(record))


def test_what_does_not_fit_together_is_said(tmp_path):
    half = np.ones((2, 4), np.float32)
    for rank in range(2):
        pieces = [TensorPiece("a", half, (2 * rank, 0), (4, 4)), TensorPiece("b", half, (rank, 0), (4, 4))]
        _write_pieces(tmp_path, "gradients", rank, [*pieces, *([whole("c", half)] if rank else [])])
        leave_numbers(tmp_path, rank, loss=1.5 + rank)
    found = collect(tmp_path, 2)
    assert sorted(found.gradients) == ["a", "c"]
    assert found.problems == [
        "losses differ between ranks: [[1.5], [2.5]]",
        "gradients: the 2 pieces of 'b' cover 16 of 16 elements and overlap",
    ]
    assert found.traffic == [{("send", "x"): [1, 8]}] * 2 and found.weights == {} and found.logits is None


def test_one_launch_has_one_number_of_processes(tmp_path):
    with pytest.raises(ValueError, match=r"\[2, 4\]"):
        launch_tasks("pt", [task("tp2"), task("tp4")], tmp_path)


def test_what_ranks_must_do_is_known_beforehand(tmp_path):
    path = write_batch(tmp_path / "b.safetensors", batch(4))
    traffic, peaks = expected_of(task("pp2.vpp2", path))
    assert peaks == [5, 3] and [sorted(t) for t in traffic] == [
        [("send", "backward_out"), ("send", "forward_out")],
        [("send", "backward_out"), ("send", "forward_out")],
    ]
    assert traffic[0]["send", "forward_out"] == [8, 8 * 7 * 16 * 4]  # 4 rows through 2 chunks
    assert "recompute full" in expected_of(task("tp2", path, recompute="full"))[0]
    mixed = replace(batch(2, 8), doc_ids=np.array([[0] * 4 + [1] * 4, [0] * 3 + [1] * 5], np.int32))
    said, _ = expected_of(task("ring2", write_batch(tmp_path / "c.safetensors", mixed)))
    assert "only some micro-batches" in said
