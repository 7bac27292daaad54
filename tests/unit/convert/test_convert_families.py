"""Releases of Tele-FLM, TeleChat-52B and FLM-101B: config.json there and back, names and packing, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from telechat_twins.convert.copy import canonical_to_hf, hf_to_canonical
from telechat_twins.convert.hf.config import read_config, write_config
from telechat_twins.convert.hf.folder import HfFolder
from telechat_twins.convert.names import Conv1D, bind
from telechat_twins.convert.source import CanonicalSource, open_model
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.model.params import parameter_table
from tests.support.frameworks import GOLDENS, golden_source

CASES = ("teleflm", "telechat52b_like", "flm101b_like")


def released(case: str, **changes: object) -> dict:
    """A golden config with keys changed (... removes one)."""
    mapping = {**json.loads((GOLDENS / case / "config.json").read_text()), **changes}
    return {k: v for k, v in mapping.items() if v is not ...}


def test_what_is_read() -> None:
    tele = read_config(released("teleflm"), "x")[0]
    assert (tele.family, tele.norm, tele.activation, tele.biases, tele.position) == (
        "teleflm", "rmsnorm", "swiglu", "none", "rope",
    )  # fmt: skip
    assert (tele.input_mult, tele.logit_mult, tele.ffn_hidden_size, tele.max_seqlen) == (1.7, 0.125, 88, 128)
    chat = read_config(released("telechat52b_like"), "x")[0]
    assert (chat.family, chat.norm, chat.activation, chat.biases, chat.position) == (
        "flm", "rmsnorm", "swiglu", "none", "ntk-theta",
    )  # fmt: skip
    assert (chat.input_mult, chat.logit_mult) == (1.4, 0.5)
    assert (chat.training_seqlen, chat.base_seqlen) == (4096, 4096)  # a number of its code, not of its config
    flm, notes = read_config(released("flm101b_like"), "x")
    assert (flm.family, flm.norm, flm.activation, flm.biases, flm.position) == (
        "flm", "layernorm", "gelu", "all", "xpos",
    )  # fmt: skip
    assert (flm.input_mult, flm.logit_mult, flm.xpos_scale_base, flm.tied_embeddings) == (1.3, 0.8, 512.0, False)
    assert [note.split(" is ")[0] for note in notes] == [
        "attn_pdrop 0.1", "embd_pdrop 0.1", "resid_pdrop 0.1", "pad_token_id",
    ]  # fmt: skip


def test_keys_that_the_released_101b_lacks() -> None:
    lacking = released("flm101b_like", use_RMSNorm=..., add_bias_linear=..., tie_word_embeddings=...)
    config = read_config(lacking, "x")[0]
    assert (config.norm, config.biases, config.tied_embeddings) == ("layernorm", "all", True)
    assert "head.weight" not in parameter_table(config) and "lm_head.weight" not in bind(config)


@pytest.mark.parametrize("case", CASES)
def test_goldens_there_and_back(case: str) -> None:
    original = released(case)
    config, _ = read_config(original, "x")
    assert write_config(config, original, None) == original
    changed = replace(config, logit_mult=0.3, max_seqlen=64)
    if config.position != "ntk-theta":
        changed = replace(changed, training_seqlen=64, base_seqlen=64)
    assert read_config(write_config(changed, original, None), "x")[0] == changed


@pytest.mark.parametrize(
    "preset", ["teleflm-52b", "teleflm-1t", "teleflm-tiny", "telechat-52b", "flm-101b", "flm-tiny"]
)
def test_presets_there_and_back(preset: str) -> None:
    # No release says how the classes were initialised.
    config = replace(load_model_config(preset), matrix_init_std=None)
    written = write_config(config, None, "bfloat16")
    assert read_config(json.loads(json.dumps(written)), "x") == (config, [])


REFUSED = {
    "attention bias": ("teleflm", {"attention_bias": True}, "attention_bias is True"),
    "another gate": ("teleflm", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "tied": ("teleflm", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    "no mup": ("teleflm", {"use_mup": False}, "use_mup is False"),
    "no multiplier": ("teleflm", {"output_mult": ...}, "output_mult is missing"),
    "no scale": ("flm101b_like", {"mup_scale_factor": ...}, "mup_scale_factor is missing"),
    "no input multiplier": ("flm101b_like", {"input_mult": None}, "input_mult is missing"),
    "zero scale": ("flm101b_like", {"mup_scale_factor": 0}, "mup_scale_factor must be above 0"),
    "exact gelu": ("flm101b_like", {"activation_function": "gelu"}, "activation_function is 'gelu'; supported are"),
    "no activation": ("flm101b_like", {"activation_function": ...}, "activation_function is missing"),
    "xpos not said": ("flm101b_like", {"rotary_use_xpos": ...}, "rotary_use_xpos is missing"),
    "a number for a choice": ("flm101b_like", {"rotary_use_xpos": 1}, "rotary_use_xpos is 1; supported are"),
    "other positions": ("flm101b_like", {"relative_encoding": "alibi"}, "relative_encoding is 'alibi'"),
    "scaled": ("teleflm", {"rope_scaling": {"factor": 2.0}}, "rope_scaling"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    golden, change, says = REFUSED[case]
    with pytest.raises(UserError, match="m/config.json: ") as error:
        read_config(released(golden, **change), "m/config.json")
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("preset", "change", "field"),
    [
        ("telechat2-tiny", {"tied_embeddings": True}, "tied_embeddings"),
        ("telechat2-tiny", {"logit_mult": 0.5}, "logit_mult"),
        ("telechat2-tiny", {"position": "xpos"}, "position"),
        ("teleflm-tiny", {"biases": "outputs"}, "biases"),
        ("teleflm-tiny", {"norm": "layernorm"}, "norm"),
        ("flm-tiny", {"biases": "outputs"}, "biases"),
        ("flm-tiny", {"num_kv_heads": 2}, "num_kv_heads"),
    ],
)
def test_a_model_that_its_format_cannot_describe(preset: str, change: dict, field: str) -> None:
    with pytest.raises(UserError, match=f"model.{field}: ") as error:
        write_config(replace(load_model_config(preset), **change), None, None)
    assert "keep such a model as a checkpoint" in str(error.value)


@pytest.mark.parametrize("case", CASES)
def test_release_to_checkpoint_and_back_is_the_same_bytes(case: str, tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    golden_source(f"{case}/weights.safetensors", f"{case}/config.json", str(tmp_path / "release"))
    hf_to_canonical(HfFolder(tmp_path / "release"), tmp_path / "checkpoint")
    source = open_model(tmp_path / "checkpoint")
    assert isinstance(source, CanonicalSource)
    assert source.names() == list(source.checkpoint.names("weights"))
    canonical_to_hf(source, tmp_path / "back")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "release" / name).read_bytes(), name


def test_constants_beside_the_weights_are_passed_over(tmp_path: Path) -> None:
    case = GOLDENS / "telechat52b_like"
    weights = load_file(case / "weights.safetensors")
    constants = {f"transformer.h.{i}.attn.masked_bias": np.float32(-1e4) for i in range(3)}
    save_file({**weights, **{k: np.array(v) for k, v in constants.items()}}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((case / "config.json").read_bytes())
    assert set(HfFolder(tmp_path).bindings) == set(weights)


def test_columns_are_read_part_after_part() -> None:
    """Against the definition y = x W + b of the released Conv1D; swapped parts fit as well but are far away."""
    config: ModelConfig = load_model_config("flm-tiny")
    random = np.random.default_rng(0)
    x, whole, bias = random.normal(size=(5, 6)), random.normal(size=(6, 12)), random.normal(size=12)
    packed = Conv1D(3)
    together = np.concatenate(
        [x @ w.T + b for w, b in zip(packed.split(whole, config), packed.split(bias, config), strict=True)], 1
    )
    truth = x @ whole + bias
    np.testing.assert_allclose(together, truth, rtol=1e-14)
    parts = zip(packed.split(whole, config)[::-1], np.split(bias, 3), strict=True)
    swapped = np.concatenate([x @ w.T + b for w, b in parts], 1)
    assert np.linalg.norm(swapped - truth) > 0.5 * np.linalg.norm(truth)
    np.testing.assert_array_equal(packed.join(packed.split(whole, config), config), whole)
