"""TeleChat3's release and Llama's format: config.json there and back, YaRN's section by every writer, names, biases."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from telechat_twins.convert.copy import canonical_to_hf, hf_to_canonical, to_mindformers
from telechat_twins.convert.hf.config import read_config, write_config
from telechat_twins.convert.hf.folder import HfFolder
from telechat_twins.convert.mindformers.config import read_model_file, read_model_section
from telechat_twins.convert.mindformers.source import Known, MindFormersSource
from telechat_twins.convert.names import bind
from telechat_twins.convert.source import open_model
from telechat_twins.core.checkpoint.read import write_checkpoint
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.model.params import count_parameters, parameter_table
from telechat_twins.core.types import JsonObject
from tests.support.frameworks import GOLDENS, golden_source

# Of the released TeleChat3-36B-Thinking.
SECTION: JsonObject = {
    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "telechat3-yarn", "type": "telechat3-yarn",
}  # fmt: skip
RELEASED: JsonObject = {
    "architectures": ["Telechat3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 6144, "initializer_range": 0.0048,
    "intermediate_size": 24576, "max_position_embeddings": 32768, "mlp_bias": False, "model_type": "telechat3",
    "num_attention_heads": 48, "num_hidden_layers": 64, "num_key_value_heads": 8, "pad_token_id": 3,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": SECTION, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.53.2", "use_cache": True,
    "vocab_size": 131072,
}  # fmt: skip


def read(**changes: object) -> tuple[ModelConfig, list[str]]:
    mapping = {key: value for key, value in {**RELEASED, **changes}.items() if value is not ...}
    return read_config(mapping, "m/config.json")


def test_the_release_is_the_preset() -> None:
    config, notes = read()
    assert (config, notes) == (load_model_config("telechat3-36b"), [])
    assert write_config(config, RELEASED, None) == RELEASED
    assert count_parameters(config) == 36_239_579_136


@pytest.mark.parametrize("preset", ["telechat3-36b", "telechat3-tiny"])
@pytest.mark.parametrize(
    "changes", [{}, {"biases": "all"}, {"position": "rope", "yarn_factor": 1.0}, {"tied_embeddings": True}]
)
def test_a_fresh_config_there_and_back(preset: str, changes: dict) -> None:
    config = replace(load_model_config(preset), **changes)
    if config.position == "rope":
        config = replace(config, base_seqlen=config.max_seqlen)
    written = json.loads(json.dumps(write_config(config, None, "bfloat16")))
    assert (written["model_type"], written["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert read_config(written, "x") == (config, [])


LOG = math.log(4.0)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
SCALES: dict[str, tuple[JsonObject, float]] = {
    "the paper's": (YARN, 0.1),
    "transformers' name": ({**YARN, "attention_factor": 0.07 * LOG + 1}, 0.07),
    "vLLM's name": ({**YARN, "attn_factor": (0.07 * LOG + 1) / (0.1 * LOG + 1)}, 0.07),
    "none": ({**YARN, "attention_factor": 1.0}, 0.0),
    "another": ({**YARN, "attention_factor": 1.5}, 0.5 / LOG),
    "what changes nothing": ({**YARN, "truncate": True, "mscale": None, "extrapolation_factor": 1}, 0.1),
}


@pytest.mark.parametrize("case", SCALES)
def test_the_scale_under_every_name(case: str) -> None:
    section, expected = SCALES[case]
    for keys in ({"rope_scaling": section}, {"rope_scaling": ..., "rope_parameters": {**section, "rope_theta": 1e6}}):
        assert read(**keys)[0].yarn_mscale == pytest.approx(expected, abs=1e-15)


REFUSED: dict[str, tuple[JsonObject, str]] = {
    "no factor": ({"factor": None}, r"rope_scaling\.factor is missing; YaRN needs it"),
    "no length": ({"original_max_position_embeddings": None}, "original_max_position_embeddings is missing"),
    "DeepSeek's scales": ({"mscale": 1.0, "mscale_all_dim": 1.0}, "mscale 1.0 is not supported; write the"),
    "no truncation": ({"truncate": False}, "truncate False is not supported"),
    "a number for a switch": ({"truncate": 1}, "truncate 1 is not"),
    "a list for a type": ({"rope_type": ["yarn"]}, r"rope_scaling\.rope_type should be text, found \['yarn'\]"),
    "an unknown entry": ({"gamma": 2}, "gamma 2 is not supported"),
    "two scales": ({"attention_factor": 1.2, "attn_factor": 1.0}, "attention_factor 1.2 and attn_factor 1.0 contra"),
    "a shrinking scale": ({"attention_factor": 0.9}, "a scale of 0.9 at factor 4 is not supported"),
    "another type": ({"rope_type": "llama3", "type": "llama3"}, "llama3.* is not supported"),
    "two types": ({"rope_type": "yarn"}, "contradict"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        read(rope_scaling={key: value for key, value in {**SECTION, **changes}.items() if value is not None})
    assert str(error.value).startswith("m/config.json: ")


def test_sections_and_biases_that_contradict_are_refused() -> None:
    with pytest.raises(UserError, match="yarn_factor.* contradict"):
        read(rope_parameters={**SECTION, "factor": 8.0, "rope_theta": 1e6})
    with pytest.raises(UserError, match="attention_bias True and mlp_bias False contradict"):
        read(attention_bias=True)


def test_contradicting_sections_are_named() -> None:
    layers = {"full_attention": {**YARN, "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default"}}
    with pytest.raises(
        UserError,
        match=r"rope_parameters.full_attention: position yarn and rope_parameters.sliding_attention: position",
    ):
        read(rope_scaling=..., rope_parameters=layers)
    with pytest.raises(UserError, match=r"rope_parameters: yarn_factor 8.0 and rope_scaling: yarn_factor 4.0 contra"):
        read(rope_parameters={**SECTION, "factor": 8.0, "rope_theta": 1e6})


def test_a_type_that_is_null_is_none() -> None:
    for null, given in (("rope_type", "type"), ("type", "rope_type")):
        config = read(rope_scaling={**YARN, "rope_type": None, given: "yarn", null: None})[0]
        assert config == read(rope_scaling=YARN)[0] and config.position == "yarn"


def test_the_original_length_outside_of_the_section() -> None:
    """transformers 5 lets it replace the section's."""
    config, notes = read(original_max_position_embeddings=8192)
    assert (config, notes) == read()
    with pytest.raises(UserError, match=r"gs 4096 and rope_scaling.original_max_position_embeddings 8192 contradict"):
        read(original_max_position_embeddings=4096)
    with pytest.raises(UserError, match="original_max_position_embeddings should be a whole number"):
        read(original_max_position_embeddings="8192")
    original = {**RELEASED, "original_max_position_embeddings": 8192}
    changed = replace(config, base_seqlen=4096)
    assert read_config(write_config(changed, original, None), "x")[0] == changed


def test_a_changed_stretch_is_written_for_every_reader() -> None:
    changed = replace(read()[0], yarn_factor=8.0, max_seqlen=65536, training_seqlen=65536)
    assert read_config(write_config(changed, RELEASED, None), "x")[0] == changed


def test_files_there_and_back(tmp_path: Path) -> None:
    """The same bytes from a release, and with every bias."""
    release = tmp_path / "release"
    release.mkdir()
    for golden, name in (("weights.safetensors", "model.safetensors"), ("config.json", "config.json")):
        (release / name).write_bytes((GOLDENS / "telechat3" / golden).read_bytes())
    hf_to_canonical(HfFolder(release), tmp_path / "c")
    canonical_to_hf(open_model(tmp_path / "c"), tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (release / name).read_bytes()

    config = replace(open_model(release).config, biases="all")
    random = np.random.default_rng(3)
    weights = {n: random.normal(size=s.shape).astype(np.float32) for n, s in parameter_table(config).items()}
    write_checkpoint(tmp_path / "b", 0, model={"config": config.to_dict()}, weights=weights.items())
    canonical_to_hf(open_model(tmp_path / "b"), tmp_path / "biased")
    source = open_model(tmp_path / "biased")
    assert source.config == config and "model.layers.1.mlp.gate_proj.bias" in bind(config)
    assert all(np.array_equal(source.tensor(name), array) for name, array in weights.items())


@pytest.mark.parametrize("form", ["plain", "mcore", "mcore_train"])
def test_mindformers_there_and_back(form: str, tmp_path: Path) -> None:
    source = golden_source("telechat3/weights.safetensors", "telechat3/config.json")
    source.record, source.assets = None, ()
    to_mindformers(source, tmp_path / "ms", form)
    back = MindFormersSource(tmp_path / "ms", Known(tmp_path / "ms"))
    assert (back.form, back.config) == (form, source.config)
    for name, array in source.logical():
        assert np.array_equal(back.tensor(name), array), name
        box = tuple(slice(size // 4, size) for size in array.shape)
        assert np.array_equal(back.read(name, box), array[box]), name
    if form == "plain":
        assert read_model_file(tmp_path / "ms" / "model_config.yaml")[0] == source.config


def test_the_fused_matrices_of_training_are_in_mindformers_order(tmp_path: Path) -> None:
    """As its converter writes them (parallel_core/utils/model_mixin.py), here in loops."""
    source = golden_source("telechat3/weights.safetensors", "telechat3/config.json")
    to_mindformers(source, tmp_path / "ms", "mcore_train")
    stored = load_file(tmp_path / "ms" / "model.safetensors")
    config = source.config
    D, per = config.head_dim, config.num_heads // config.num_kv_heads
    names = ("attn.q", "attn.k", "attn.v", "ffn.gate", "ffn.up")
    q, k, v, gate, up = (source.tensor(f"layers.1.{name}.weight") for name in names)
    rows: list[np.ndarray] = []
    for group in range(config.num_kv_heads):
        head = slice(group * D, (group + 1) * D)
        rows += [*q[group * per * D : (group + 1) * per * D], *k[head], *v[head]]
    assert np.array_equal(stored["decoder.layers.1.self_attention.linear_qkv.weight"], np.array(rows))
    turns = [row for pair in zip(gate, up, strict=True) for row in pair]
    assert np.array_equal(stored["decoder.layers.1.mlp.linear_fc1.weight"], np.array(turns))
    assert not np.array_equal(rows, np.concatenate([q, k, v]))  # the contiguous order is another matrix


def test_sections_of_mindformers_yaml() -> None:
    """The published finetune_telechat3_36b.yaml (extend_method None), its YARN, and 2.1's mcore names."""
    legacy: JsonObject = {
        "net_name": "telechat3_36b", "seq_length": 8192, "hidden_size": 6144, "num_layers": 64, "num_heads": 48,
        "n_kv_heads": 8, "sigma": 0.0048, "vocab_size": 131072, "rms_norm_eps": 1e-5, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 3, "out_proj_has_bias": False, "intermediate_size": 24576, "theta": 10000,
        "extend_method": "None",
        "scaling_factor": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                           "original_max_position_embeddings": 8192},
    }  # fmt: skip
    config = read_model_section(legacy, "f.yaml")[0]
    assert (config.family, config.position, config.biases, config.max_seqlen) == ("telechat3", "rope", "none", 8192)
    yarn = read_model_section({**legacy, "extend_method": "YARN"}, "f.yaml")[0]
    assert (yarn.position, yarn.yarn_factor, yarn.base_seqlen, yarn.yarn_mscale) == ("yarn", 16.0, 8192, 0.07)
    mcore = {
        "model_type": "telechat3", "num_hidden_layers": 64, "num_attention_heads": 48, "num_key_value_heads": 8,
        "hidden_size": 6144, "intermediate_size": 24576, "max_position_embeddings": 8192, "seq_length": 8192,
        "vocab_size": 131072, "rms_norm_eps": 1e-5, "rope_theta": 10000, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 3, "attention_bias": False, "initializer_range": 0.0048,
    }  # fmt: skip
    assert read_model_section(mcore, "f.yaml")[0] == config
