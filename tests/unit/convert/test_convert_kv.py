"""The packing of keys and values, judged by numbers: a float64 decoder on the published goldens.

Shapes cannot tell [K_0; V_0; K_1; V_1; ...] from [all K; all V]. The goldens' own meta.json says how far the float64
logits move when the rows are taken in the wrong order; the decoder below must see exactly that, so the check is known
to bite.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.convert.names import Binding, InterleavedKeyValue, bind
from telechat_twins.convert.source import open_model
from telechat_twins.core.files.safetensors import SafetensorsFile
from telechat_twins.core.model.config import ModelConfig
from tests.support.numpy_decoder import logits

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"


class AllKeysThenAllValues(InterleavedKeyValue):
    """The planted fault: shapes fit, rows are mixed up."""

    def split(self, whole, config):
        return list(np.split(whole, 2))


@pytest.mark.parametrize("case", ["telechat2_gqa", "telechat2_mha"])
def test_left_out_permutation_is_caught(case, monkeypatch):
    source = open_model(GOLDENS / case)
    io = SafetensorsFile(GOLDENS / case / "io.safetensors")
    ids, expected = io.read("input_ids"), io.read("fp64.logits")
    right = np.abs(logits(source.config, source.tensor, ids) - expected).max()
    monkeypatch.setattr(InterleavedKeyValue, "split", AllKeysThenAllValues.split)
    wrong = np.abs(logits(source.config, source.tensor, ids) - expected).max()
    known = json.loads((GOLDENS / case / "meta.json").read_text())["sensitivity"]["kv_flat"]
    print(f"{case}: max abs error of float64 logits {right:.1e}; with kv taken as [all K; all V] {wrong:.3f}")
    # goldens/README: separate float64 code reproduces the logits to better than 1e-12.
    assert right < 1e-12
    assert wrong == pytest.approx(known, rel=1e-9) and wrong > 1


def test_rows_of_the_packed_tensor():
    """Row by row, from the published description: view(kv heads, 2 * head_dim, hidden), K the first half."""
    config = ModelConfig(
        vocab_size=8, hidden_size=12, ffn_hidden_size=8, num_layers=1, num_heads=6, num_kv_heads=3, norm_eps=1e-5,
        training_seqlen=8, base_seqlen=8, max_seqlen=8,
    )  # fmt: skip
    binding: Binding = bind(config)["transformer.h.0.self_attention.key_value.weight"]
    assert binding.shape == (12, 12)
    packed = np.arange(12)[:, None].repeat(12, 1)  # row r holds r
    parts = binding.split(packed, config)
    assert parts["layers.0.attn.k.weight"][:, 0].tolist() == [0, 1, 4, 5, 8, 9]
    assert parts["layers.0.attn.v.weight"][:, 0].tolist() == [2, 3, 6, 7, 10, 11]
    assert np.array_equal(binding.join(parts, config), packed)


def test_gradients_go_back_into_the_packing_of_the_release():
    """export of split gradients is the published gradient file, byte for byte."""
    source = open_model(GOLDENS / "telechat2_gqa")
    published = SafetensorsFile(GOLDENS / "telechat2_gqa" / "grads_fp32table.safetensors")
    bindings = source.folder.bindings
    logical = {
        name: part
        for released, binding in bindings.items()
        for name, part in binding.split(published.read(released), source.config).items()
    }
    assert set(logical) == set(source.names())
    exported = source.export(logical)
    assert set(exported) == set(published.tensors)
    assert all(exported[name].tobytes() == published.read(name).tobytes() for name in exported)
