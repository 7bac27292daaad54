"""config.json <-> ModelConfig: every key, both directions, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from telechat_twins.convert.hf.config import read_config, write_config
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import load_model_config

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
RELEASED = json.loads((GOLDENS / "telechat2_gqa" / "config.json").read_text())


def read(**changes):
    """The golden config with keys changed (... removes one)."""
    mapping = {**RELEASED, **changes}
    return read_config({k: v for k, v in mapping.items() if v is not ...}, "m/config.json")


@pytest.mark.parametrize("path", sorted(GOLDENS.glob("telechat2_*/**/config.json")), ids=lambda p: p.parent.name)
def test_goldens_there_and_back(path):
    released = json.loads(path.read_text())
    config, notes = read_config(released, str(path))
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (
        released["n_layer"], released["n_head"], released["num_key_value_heads"],
    )  # fmt: skip
    assert (config.training_seqlen, config.base_seqlen, config.max_seqlen) == (
        released["training_seqlen"], released["base_seqlen"], released["seq_length"],
    )  # fmt: skip
    assert config.norm_eps == released["layer_norm_epsilon"] and config.rope_theta == 10000.0
    assert notes == ["rope_theta is missing: 10000.0 is taken, as the released code does"]
    assert write_config(config, released, None) == released


@pytest.mark.parametrize("preset", ["telechat2-115b", "telechat2-3b", "telechat2-tiny"])
def test_presets_there_and_back(preset):
    config = load_model_config(preset)
    released = write_config(config, None, "float32")
    assert read_config(json.loads(json.dumps(released)), "x") == (config, [])
    assert released["torch_dtype"] == "float32" and "auto_map" not in released


def test_what_vllm_and_the_released_code_look_for():
    """vLLM picks its model class by architectures and its config class by model_type; both read these keys."""
    released = write_config(load_model_config("telechat2-tiny"), None, "bfloat16")
    assert released["architectures"] == ["TeleChat2ForCausalLM"] and released["model_type"] == "telechat"
    assert set(released) >= {
        "vocab_size", "hidden_size", "n_layer", "n_head", "num_key_value_heads", "ffn_hidden_size",
        "layer_norm_epsilon", "training_seqlen", "base_seqlen", "seq_length", "rope_theta", "tie_word_embeddings",
        "hidden_dropout", "attention_dropout", "apply_residual_connection_post_layernorm", "flash_attn",
        "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "embed_layernorm",
    }  # fmt: skip


def test_other_names_of_the_same_keys():
    config, _ = read()
    other, _ = read(
        n_layer=..., num_hidden_layers=3, n_head=..., num_attention_heads=8, hidden_size=..., n_embed=48,
        ffn_hidden_size=..., intermediate_size=80, layer_norm_epsilon=..., rms_norm_eps=1e-5,
    )  # fmt: skip
    assert other == config


def test_the_7b_32k_config():
    config, notes = read(
        rope_theta=1000000, rope_scaling={"factor": 1.0, "rope_type": "dynamic"}, seq_length=32768,
        max_position_embeddings=65536, torch_dtype="bfloat16", architectures=["TeleChat2ForCausalLM"],
    )  # fmt: skip
    assert config.rope_theta == 1e6 and config.max_seqlen == 32768 and notes == []


def test_defaults():
    assert read(num_key_value_heads=None)[0].num_kv_heads == 8
    assert read(num_key_value_heads=...)[0].num_kv_heads == 8
    assert read(pad_token_id=...)[0].pad_token_id == 3
    assert read(seq_length=...)[0].max_seqlen == 64
    assert read(seq_length=..., max_position_embeddings=100)[0].max_seqlen == 100
    config, notes = read(training_seqlen=..., base_seqlen=..., hidden_dropout=0.1)
    assert (config.training_seqlen, config.base_seqlen) == (8192, 8192)
    assert notes[0].startswith("hidden_dropout 0.1 is ignored")
    assert [n.split(" is ")[0] for n in notes[1:]] == ["training_seqlen", "base_seqlen", "rope_theta"]
    said = [n.split(" is ")[0] for n in read(num_key_value_heads=..., bos_token_id=..., eos_token_id=None)[1]]
    assert said == ["num_key_value_heads", "rope_theta", "bos_token_id", "eos_token_id"]


REFUSED = {
    "no epsilon": ({"layer_norm_epsilon": ...}, "layer_norm_epsilon or rms_norm_eps is missing"),
    "null epsilon": ({"layer_norm_epsilon": None}, "layer_norm_epsilon or rms_norm_eps is missing"),
    "no vocabulary": ({"vocab_size": ...}, "vocab_size is missing"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings is True; a head tied"),
    "norm after embedding": ({"embed_layernorm": True}, "embed_layernorm is True"),
    "post norm": ({"apply_residual_connection_post_layernorm": True}, "is not supported"),
    "another model": ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
    "scaled": ({"rope_scaling": {"factor": 3.0, "rope_type": "dynamic"}}, "rope_scaling .* is not supported"),
    "text": ({"n_layer": "3"}, "n_layer should be a whole number, found '3'"),
    "true": ({"n_head": True}, "n_head should be a whole number"),
    "fraction": ({"hidden_size": 48.0}, "hidden_size should be a whole number"),
    "zero": ({"n_layer": 0}, "n_layer must be above 0"),
    "negative": ({"num_key_value_heads": -4}, "num_key_value_heads must be above 0"),
    "infinite": ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon is inf"),
    "no number": ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
    "absurd": ({"n_layer": 10**9}, "num_layers: must be at most"),
    "contradiction": ({"num_hidden_layers": 4}, "n_layer 3 and num_hidden_layers 4 contradict"),
    "heads": ({"n_head": 7}, "num_heads: 7 does not divide"),
    "kv heads": ({"num_key_value_heads": 3}, "num_kv_heads: 3 does not divide"),
    "token ids": ({"eos_token_id": [2, 151]}, "end_token_ids: 151 is outside"),
    "no end": ({"eos_token_id": []}, "eos_token_id is an empty list"),
    "an end below 0": ({"eos_token_id": [2, -1]}, "eos_token_id must be 0 or more, found -1"),
    "an end that is text": ({"eos_token_id": ["2"]}, "eos_token_id should be a whole number, found '2'"),
    "pad -2": ({"pad_token_id": -2}, "pad_token_id must be 0 or more"),
    "pad list": ({"pad_token_id": [3]}, r"pad_token_id should be a whole number, found \[3\]"),
    "true as pad": ({"pad_token_id": True}, "pad_token_id should be a whole number"),
    "huge": ({"norm_eps": 10**400}, "norm_eps is an integer of 1329 bits"),
    "another gate": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; the ffn of this family is gated by silu"),
    "multiplier": ({"output_mult": 0.5}, "output_mult is 0.5; TeleChat2 has no muP"),
    "head size": ({"head_dim": 8}, "head_dim is 8, but hidden_size / heads is 6"),
    "head size as text": ({"head_dim": "6"}, "head_dim is '6'"),
    "window": ({"sliding_window": 4096}, "sliding_window is 4096"),
    "layer types": ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types is"),
    "capped": ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0"),
    "experts": ({"num_experts": 8}, "mixtures of experts are not supported"),
    "experts a token": ({"num_experts_per_tok": 2}, "mixtures of experts are not supported"),
    "clipped": ({"clip_qkv": 8.0}, "clip_qkv is 8.0; clipped queries"),
    "another gate's name": ({"hidden_activation": "gelu_pytorch_tanh"}, "gated by silu"),
    "another norm": ({"norm_type": "layernorm"}, "norm_type is 'layernorm'; the norms of this family are RMSNorm"),
    "both ways": ({"is_causal": False}, "is_causal is False; only decoders"),
    "head bias": ({"lm_head_bias": True}, "a bias of the head"),
    "softmax": ({"softmax_scale": 0.5}, "attention is scaled by the root"),
    "qk norm": ({"use_qk_norm": True}, "norms of queries and keys"),
    "two norms": ({"rms_norm_eps": 1e-6}, "layer_norm_epsilon 1e-05 and rms_norm_eps 1e-06 contradict"),
    "two widths": ({"n_embed": 96}, "hidden_size 48 and n_embed 96 contradict"),
    "two ffns": ({"intermediate_size": 81}, "ffn_hidden_size 80 and intermediate_size 81 contradict"),
    "token id": ({"eos_token_id": 151}, "eos_token_id: 151 is outside"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        read(**changes)
    assert str(caught.value).startswith("m/config.json: ") and "\n" not in str(caught.value)


def test_only_what_changed_is_written_back():
    original = {**RELEASED, "num_hidden_layers": 3, "something_new": [1, {"a": None}], "torch_dtype": "bfloat16"}
    config, _ = read_config(original, "x")
    assert write_config(config, original, None) == original
    import dataclasses

    longer = dataclasses.replace(config, max_seqlen=128, num_layers=4, rope_theta=5e5)
    written = write_config(longer, original, "float32")
    changed = {k: v for k, v in written.items() if original.get(k, ...) != v}
    assert changed == {
        "seq_length": 128, "n_layer": 4, "num_hidden_layers": 4, "rope_theta": 5e5, "torch_dtype": "float32",
    }  # fmt: skip
    assert read_config(written, "x")[0] == longer
    assert write_config(config, {**RELEASED, "dtype": "bfloat16"}, "float32")["dtype"] == "float32"


def test_tokens_that_end_and_no_padding():
    """A list of ends as newer releases have it, null and -1 for no padding; written back as they were."""
    config, _ = read(eos_token_id=[2, 5, 2, 7], pad_token_id=-1)
    assert (config.eos_token_id, config.end_token_ids, config.pad_token_id) == (2, (5, 7), None)
    assert config.stop_ids == {2, 5, 7} and config.filler_id == 2
    assert read(pad_token_id=None)[0].pad_token_id is None
    original = {**RELEASED, "eos_token_id": [2, 5, 2, 7], "pad_token_id": -1}
    assert write_config(config, original, None) == original
    fresh = write_config(config, None, None)
    assert (fresh["eos_token_id"], fresh["pad_token_id"]) == ([2, 5, 7], None)
    assert read_config(json.loads(json.dumps(fresh)), "x") == (config, [])


def test_keys_that_nothing_reads_are_named():
    assert read(rope_theta=1e4, something="new", other=1)[1] == [
        "keys that are not known here are not read: 'something', 'other'"
    ]


@pytest.mark.parametrize("format", ["RELEASED", "LLAMA"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text_config": {"rope_theta": 5e5}}, "'text_config' holds 'rope_theta', which says what a model computes"),
        ({"thinker_config": {"text_config": {"hidden_size": 1}}}, "'thinker_config' holds 'hidden_size'"),
        ({"vision_config": {"num_hidden_layers": 1}}, "give the text model alone"),
        ({"ffn_config": {"ffn_act_fn": "gelu"}}, "'ffn_config' holds 'ffn_act_fn'"),
        ({"ropeTheta": 5e5}, "'ropeTheta' is 500000.0; no rotary key of this name is known here"),
        ({"base_frequency": 5e5}, "'base_frequency' is 500000.0; no rotary key"),
        ({"quant_method": "awq"}, "'quant_method' is 'awq', which is not known here and by its name may change"),
        ({"logits_scale": 0.5}, "'logits_scale' is 0.5, which is not known here"),
        ({"attnLogitCap": 30}, "'attnLogitCap' is 30"),
        ({"use_gated_attention": True}, "'use_gated_attention' is True"),
        ({"output_mult": 0.5}, "output_mult is 0.5; "),
    ],
)
def test_keys_that_may_change_the_arithmetic_are_refused(changes, says, format):
    given = {"RELEASED": RELEASED, "LLAMA": LLAMA}[format]
    with pytest.raises(UserError) as error:
        read_config({**given, **changes}, "m/config.json")
    assert str(error.value).startswith("m/config.json: ") and says in str(error.value)


def test_keys_that_change_nothing_by_their_value_are_let_pass():
    same = {"logits_scale": 1.0, "logit_cap": None, "use_window": False, "talker_config": {}, "rope_freqs": []}
    same |= {"dispatch": {"auto_map": {}, "top_p": 0.5}}
    for given in (RELEASED, LLAMA):
        assert read_config({**given, **same}, "x")[0] == read_config(given, "x")[0]


LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
    "pad_token_id": 3,
}
