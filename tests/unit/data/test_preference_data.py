"""Preference pairs on disk and in batches, the loss weight of a source, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.data.blend import Blend, open_blend
from telechat_twins.core.data.packed import PackedDataset
from telechat_twins.core.data.preference import PreferenceWriter
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.batch import IGNORE, Batch
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.parallel.sequence import split_batch
from telechat_twins.core.train.reference import check_preference
from tests.support.data_support import reseal, tiny_tokenizer
from tests.support.packed import write_packed, write_pairs

VOCAB, LENGTH = 61, 24
CHOSEN, REJECTED = ([5, 6, 7, 8, 2], [0, 0, 0, 1, 1]), ([5, 6, 9, 2], [0, 0, 1, 1])


def config(*sources: dict[str, object], **sections: object) -> RunConfig:
    return run_config_from_dict(
        {
            "model": {"preset": "telechat2-tiny", "vocab_size": VOCAB},
            "data": {"sources": list(sources), "seq_len": LENGTH},
            "train": {"steps": 4, "global_batch": 4, "micro_batch": 2},
            "optim": {"lr": 1e-3},
            **sections,
        }
    )


def blend(run: RunConfig) -> Blend:
    return open_blend(run.data, 7, VOCAB, 3)


def test_a_pair_by_hand(tmp_path: Path) -> None:
    with PreferenceWriter(tmp_path / "p", tiny_tokenizer(), 8) as writer:
        writer.add_pair(*CHOSEN, *REJECTED, "rows.jsonl:1")
        meta = writer.finish({"note": "hand"})
    assert (meta["kind"], meta["pairs"], meta["sequences"], meta["targets"], meta["max_length"]) == (
        "preference", 1, 2, 4, 8
    )  # fmt: skip
    data = PackedDataset(tmp_path / "p")
    ids, targets, positions, _ = data.sample(0, 8, 3)
    assert ids.tolist() == [5, 6, 7, 8, 2, 3, 3, 3] and positions.tolist() == list(range(8))
    assert targets.tolist() == [IGNORE, IGNORE, 8, 2, *[IGNORE] * 4]
    assert data.sample(1, 8, 3)[1].tolist() == [IGNORE, 9, 2, *[IGNORE] * 5]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((([5] * 9, [1] * 9), REJECTED), "r:3: 'chosen' has 9 tokens with its prompt, at most 8 fit"),
        ((CHOSEN, ([5, 6], [1, 0])), "r:3: no token of 'rejected' is an answer"),
        ((CHOSEN, CHOSEN), "r:3: 'chosen' and 'rejected' are the same tokens"),
    ],
)
def test_a_pair_that_teaches_nothing_is_refused(tmp_path: Path, pair, message: str) -> None:
    with PreferenceWriter(tmp_path / "p", tiny_tokenizer(), 8) as writer, pytest.raises(UserError, match=message):
        writer.add_pair(*pair[0], *pair[1], "r:3")
    assert not (tmp_path / "p").exists()


def test_half_a_pair_is_damage(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "p", VOCAB, LENGTH)
    meta = json.loads((folder / "meta.json").read_text())
    reseal(folder, sequences=meta["sequences"] - 1)
    with pytest.raises(UserError, match="odd number of 'sequences'"):
        PackedDataset(folder)


def test_batches_hold_whole_pairs(tmp_path: Path) -> None:
    """Neighbouring rows share a prompt, each pair comes once an epoch, and any cut of the rows gives the same rows."""
    pairs = blend(config({"path": str(write_pairs(tmp_path / "p", VOCAB, LENGTH, pairs=10))}))
    assert pairs.pairs and pairs.num_samples == [10] and pairs.num_rows == 20
    epoch = pairs.batch(0, 20)
    assert epoch.weights is None and epoch.reference is None
    prompts = {tuple(row[:3]) for row in epoch.input_ids[0::2].tolist()}
    assert len(prompts) == 10
    for chosen, rejected in zip(epoch.input_ids[0::2], epoch.input_ids[1::2], strict=True):
        first = int(np.argmax(chosen != rejected))
        assert first >= 3, "they share their prompt"
        # The chosen answer counts up, the rejected one down.
        assert {int(d) for d in np.diff(chosen[first : first + 3])} <= {1, 5 - VOCAB}
        assert {int(d) for d in np.diff(rejected[first : first + 3])} <= {-1, VOCAB - 5}
    np.testing.assert_array_equal(pairs.batch(6, 4).input_ids, epoch.input_ids[6:10])
    pairs.reference = [np.arange(20.0)]
    reference = pairs.batch(0, 20).reference
    assert reference is not None and sorted(reference) == list(range(20))
    assert (reference[1::2] == reference[0::2] + 1).all() and (reference[0::2] % 2 == 0).all()


def test_loss_weight_of_a_source(tmp_path: Path) -> None:
    paths = [str(write_packed(tmp_path / name, VOCAB, LENGTH, 20, seed)) for seed, name in enumerate("ab")]
    mixed = blend(config({"path": paths[0]}, {"path": paths[1], "loss_weight": 0.25}))
    found = mixed.batch(0, 6)
    sources = [mixed.locate(n).source for n in range(6)]
    assert found.weights is not None and found.weights.dtype == np.float32
    assert set(sources) == {0, 1}
    np.testing.assert_array_equal(
        found.weights, np.repeat([[1.0, 0.25][k] for k in sources], LENGTH).reshape(6, LENGTH)
    )
    plain = blend(config({"path": paths[0]}, {"path": paths[1]}))
    assert plain.batch(0, 6).weights is None and plain.digest() != mixed.digest()


def test_weights_and_reference_follow_rows_and_splits() -> None:
    random = np.random.default_rng(0)
    ids = random.integers(0, 9, (4, 10)).astype(np.int32)
    whole = Batch(ids, ids, np.tile(np.arange(10, dtype=np.int32), (4, 1)), None, random.random((4, 10), np.float32))
    part = whole.rows(2, 4)
    assert part.weights is not None and whole.weights is not None
    np.testing.assert_array_equal(part.weights, whole.weights[2:])
    for rank in range(2):
        local = split_batch(part, Layout(cp=2), rank)
        assert local.weights is not None and local.weights.dtype == np.float32
        real = local.index[0] < 10
        np.testing.assert_array_equal(local.weights[:, real], part.weights[:, local.index[0][real]])
        assert not local.weights[:, ~real].any()
    pairs = Batch(ids, ids, whole.positions, reference=np.array([-1.0, -2.0, np.nan, np.nan]))
    assert (whole.num_terms, pairs.num_terms, pairs.rows(0, 2).num_terms, pairs.rows(2, 4).num_terms) == (40, 1, 1, 0)


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    pairs, rows = str(write_pairs(tmp_path / "p", VOCAB, LENGTH)), str(write_packed(tmp_path / "s", VOCAB, LENGTH, 9))
    with pytest.raises(UserError, match=r"data.sources\[1\].path: .* is of kind 'sft' and .* of kind 'preference'"):
        blend(config({"path": pairs}, {"path": rows}))
    dpo = {"preference": {"beta": 0.1}}
    with pytest.raises(UserError, match="preference: needs pairs, and data.sources.0. .* is of kind 'sft'"):
        check_preference(run := config({"path": rows}, **dpo), blend(run))
    with pytest.raises(UserError, match="holds preference pairs; add a `preference:` section"):
        check_preference(run := config({"path": pairs}), blend(run))
    with pytest.raises(UserError, match="train.micro_batch: 1 is odd"):
        config({"path": pairs}, train={"steps": 4, "global_batch": 4, "micro_batch": 1}, **dpo)
    with pytest.raises(UserError, match="loss_weight: 0.5 has no meaning in preference training"):
        config({"path": pairs, "loss_weight": 0.5}, **dpo)
    with pytest.raises(UserError, match="label_smoothing: 0.5 leaves no preference"):
        config({"path": pairs}, preference={"label_smoothing": 0.5})
    with pytest.raises(UserError, match="preference.reference: live needs a base"):
        config({"path": pairs}, preference={"reference": "live"})
    check_preference(run := config({"path": pairs}, **dpo), blend(run))
