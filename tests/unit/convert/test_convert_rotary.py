"""The rotary base of a config.json under every name, and the scalings that are refused under each."""

from __future__ import annotations

import dataclasses
import json

import pytest

from telechat_twins.convert.hf.config import read_config, write_config
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.types import JsonObject
from tests.support.frameworks import GOLDENS


def read(case: str = "teleflm", **changes: object) -> tuple[JsonObject, ModelConfig, list[str]]:
    """A golden config without its rotary base, with keys changed (... removes one)."""
    mapping = json.loads((GOLDENS / case / "config.json").read_text())
    mapping = {key: value for key, value in mapping.items() if key not in ("rope_theta", "rotary_theta")}
    mapping = {k: v for k, v in {**mapping, **changes}.items() if v is not ...}
    return mapping, *read_config(mapping, "m/config.json")


HALF = {"rope_type": "default", "rope_theta": 5e5}
SAME: dict[str, JsonObject] = {
    "top": {"rope_theta": 500000},
    "transformers 5": {"rope_parameters": HALF},
    "without a type": {"rope_parameters": {"rope_theta": 5e5}},
    "inside the scaling": {"rope_scaling": {"type": "linear", "factor": 1.0, "rope_theta": 5e5}},
    "everywhere": {"rope_theta": 5e5, "rope_parameters": HALF, "rope_scaling": {"rope_theta": 500000}},
    "a mapping for each type of layer": {"rope_parameters": {"full_attention": HALF, "sliding_attention": HALF}},
    "all channels": {"rope_parameters": {**HALF, "partial_rotary_factor": 1.0}, "partial_rotary_factor": 1},
    "FLM's name": {"rotary_theta": 5e5},
    "NeoX's name": {"rotary_emb_base": 5e5},
}


@pytest.mark.parametrize("family", ["teleflm", "telechat2_gqa", "flm101b_like", "telechat52b_like"])
@pytest.mark.parametrize("case", SAME)
def test_every_name_is_read_and_written(case: str, family: str) -> None:
    original, config, notes = read(family, **SAME[case])
    assert config.rope_theta == 5e5 and not any("theta" in note for note in notes)
    assert write_config(config, original, None) == original
    changed = dataclasses.replace(config, rope_theta=2e6)
    written = write_config(changed, original, None)
    assert read_config(written, "x")[0] == changed
    assert "500000" not in json.dumps(written) and original == {**original, **SAME[case]}


@pytest.mark.parametrize("family", ["teleflm", "telechat2_gqa"])
def test_a_fresh_config_holds_the_base_for_old_and_new_readers(family: str) -> None:
    config = read(family, rope_theta=5e5)[1]
    written = write_config(config, None, None)
    assert written["rope_theta"] == 5e5 and written["rope_parameters"] == HALF
    assert read_config(written, "x")[0] == config


@pytest.mark.parametrize("family", ["teleflm", "telechat2_gqa", "flm101b_like"])
@pytest.mark.parametrize(
    "empty", [{}, {"rope_parameters": None}, {"rope_scaling": {}}, {"rope_parameters": {"rope_type": "default"}}]
)
def test_the_default_is_said(family: str, empty: dict) -> None:
    _, config, notes = read(family, **empty)
    name = "rotary_theta" if family.startswith("flm") else "rope_theta"
    assert config.rope_theta == 10000.0
    assert f"{name} is missing: 10000.0 is taken, as the released code does" in notes


FOREIGN: dict[str, JsonObject] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "old name of the type": {"type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 1.0},
    "llama3 without a factor": {"rope_type": "llama3", "rope_theta": 5e5},
    "a factor alone": {"factor": 8},
    "true": {"rope_type": "linear", "factor": True},
    "part of the channels": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "sections": {"rope_type": "default", "mrope_section": [16, 24, 24]},
    "attention factor": {"rope_type": "default", "attention_factor": 1.2},
    "for a type of layer": {"full_attention": HALF, "sliding_attention": {"rope_type": "linear", "factor": 8.0}},
}


@pytest.mark.parametrize("family", ["teleflm", "telechat2_gqa", "flm101b_like"])
@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_scaling_is_refused_under_both_names(case: str, name: str, family: str) -> None:
    with pytest.raises(UserError, match=rf"^m/config\.json: {name}.* is not supported; ") as error:
        read(family, **{name: FOREIGN[case]})
    assert "\n" not in str(error.value)


REFUSED: dict[str, tuple[JsonObject, str]] = {
    "two bases": ({"rope_theta": 1e4, "rope_parameters": HALF}, "rope_theta 1.* and rope_parameters.* contradict"),
    "two sections": ({"rope_parameters": HALF, "rope_scaling": {"rope_theta": 1e6}}, "rope_parameters.* contradict"),
    "two names": ({"rope_theta": 1e4, "rotary_theta": 1e5}, "rope_theta .* and rotary_theta .* contradict"),
    "two types": ({"rope_scaling": {"type": "default", "rope_type": "linear"}}, "rope_type linear and .* contradict"),
    "layers differ": ({"rope_parameters": {"full": HALF, "sliding": {"rope_theta": 1e4}}}, "contradict"),
    "text": ({"rope_parameters": {"rope_theta": "500000"}}, "rope_parameters.rope_theta should be a number"),
    "zero": ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta must be above 0"),
    "infinite": ({"rope_theta": float("inf")}, "rope_theta is inf"),
    "too large": ({"rope_theta": 1e39}, r"rope_theta: 1e\+39 is not between 1e-30 and 1e\+30; beyond them float32"),
    "too small": ({"rope_parameters": {"rope_theta": 1e-300}}, "rope_theta: 1e-300 is not between"),
    "a long scaling": ({"rope_scaling": {"type": "longrope", "long_factor": [1.5] * 999}}, r"^.{,500}$"),
    "no way out that computes something else": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "a model that was trained with another one computes"
    ),
    "a list": ({"rope_parameters": [HALF]}, "rope_parameters should be a mapping"),
    "a number for a type": ({"rope_parameters": {"rope_type": 3}}, "rope_type should be text, found 3"),
    "part at the top": ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
    "a ratio": ({"rope_ratio": 50}, "rope_ratio is 50; a multiplied rotary base is not supported"),
    "a name not heard of": ({"rope_freq_base": 5e5}, "rope_freq_base' is 500000.0; no rotary key of this name"),
    "no rotation": ({"use_rope": False}, "use_rope is False; a model without rotary positions"),
    "another kind of position": ({"position_embedding_type": "alibi"}, "only rotary positions"),
    "a dynamic base": ({"use_dynamic_ntk": True}, "use_dynamic_ntk is True; a scaling by the length"),
    "local base": ({"rope_local_base_freq": 1e4}, "a rotary base that differs between layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        read(**changes)
    assert str(error.value).startswith("m/config.json: ") and "\n" not in str(error.value)


def test_rotary_keys_that_say_nothing_are_taken() -> None:
    said = {"rope_ratio": 1, "use_rope": True, "position_embedding_type": "rope", "rope_type": "default"}
    empty = {"rope_freq_base": None, "use_dynamic_ntk": False, "xpos_extra": {}}
    assert read(rope_theta=5e5, **said, **empty)[1] == read(rope_theta=5e5)[1]


def test_the_dynamic_type_of_the_32k_release_means_telechat2s_own_growth() -> None:
    """With factor 1 transformers' own "dynamic" grows beyond the trained length, as TeleChat2 does and Tele-FLM not."""
    section = {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 1e6}
    for name in ("rope_scaling", "rope_parameters"):
        assert read("telechat2_gqa", **{name: section})[1].rope_theta == 1e6
        with pytest.raises(UserError, match=f"{name} .*dynamic.* is not supported"):
            read("teleflm", **{name: section})
