"""The published 115B index against the 115B preset: every name, every shape, the total size; no weights are made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from telechat_twins.convert.hf.config import read_config
from telechat_twins.convert.hf.folder import plan_shards, tensor_bytes
from telechat_twins.convert.names import bind, released_table
from telechat_twins.core.checkpoint.read import check_shapes
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.params import count_parameters, parameter_table
from tests.support.shared import shared_file

GOLDEN = Path(__file__).resolve().parents[2] / "goldens" / "index"
TOTAL_SIZE = 453_131_665_408  # metadata.total_size of the published index: float32


@pytest.fixture(scope="module")
def published() -> dict[str, tuple[int, ...]]:
    tensors = json.loads((GOLDEN / "tensors.json").read_text())["tensors"]
    return {name: tuple(entry["shape"]) for name, entry in tensors.items()}


@pytest.mark.parametrize("preset", ["telechat2-115b", "telechat2.5-115b", "t1-115b"])
def test_names_and_shapes_of_the_115b(published, preset):
    config = load_model_config(preset)
    table = released_table(bind(config), config)
    assert len(published) == 963
    check_shapes(table, published)
    assert {name: spec.shape for name, spec in table.items()} == published


def test_total_size(published):
    config = load_model_config("telechat2-115b")
    assert sum(tensor_bytes("F32", shape) for shape in published.values()) == TOTAL_SIZE
    assert 4 * count_parameters(config) == TOTAL_SIZE


def test_every_logical_tensor_is_bound_once():
    config = load_model_config("telechat2-115b")
    logical = [name for binding in bind(config).values() for name in binding.logical]
    assert logical == list(parameter_table(config))  # forward order as well


def test_a_preset_of_another_shape_does_not_match(published):
    config = load_model_config({"preset": "telechat2-115b", "num_kv_heads": 64})
    with pytest.raises(UserError, match=r"key_value.weight': expected \[16384, 8192\] .* found \[2048, 8192\]"):
        check_shapes(released_table(bind(config), config), published)
    config = load_model_config({"preset": "telechat2-115b", "num_layers": 95})
    with pytest.raises(UserError, match=r"unexpected 'transformer.h.95"):
        check_shapes(released_table(bind(config), config), published)


def test_the_published_files_themselves(published):
    """The index and config as downloaded, where they lie beside the checkout."""
    index = json.loads(shared_file("data/telechat2/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(published) and index["metadata"]["total_size"] == TOTAL_SIZE
    path = shared_file("data/telechat2/config.json")
    config, notes = read_config(json.loads(path.read_text()), str(path))
    assert config == load_model_config("telechat2-115b")
    assert notes == ["rope_theta is missing: 10000.0 is taken, as the released code does"]
    assert config.norm_eps == 1e-8


def test_shards_of_the_115b_stay_below_the_limit(published):
    tensors = {name: ("BF16", shape) for name, shape in published.items()}
    shards = plan_shards(tensors, 5 * 10**9)
    assert [name for shard in shards for name in shard.tensors] == list(tensors)
    assert all(shard.nbytes <= 5 * 10**9 for shard in shards) and 45 < len(shards) < 60
    assert shards[0].file == f"model-00001-of-{len(shards):05d}.safetensors"
