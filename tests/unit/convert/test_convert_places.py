"""What each format has a place for: every field of a model is accounted for, and what has none is refused by name."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest

from telechat_twins.convert.copy import to_hf, to_mindformers
from telechat_twins.convert.places import ANYWHERE, PLACES, TITLES, require_place, why_not
from telechat_twins.convert.source import open_model
from telechat_twins.core.checkpoint.read import write_checkpoint
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig, load_model_config, preset_names
from telechat_twins.core.model.params import parameter_table


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_has_its_place(preset: str) -> None:
    config = load_model_config(preset)
    forms = {form for form in TITLES if why_not(config, form) is None}
    legacy = {"plain", "qkv_concat", "mcore"}
    telechat3 = {"hf", "plain", "mcore", "mcore_train"}
    families = {"telechat2": {"hf", *legacy}, "teleflm": {"hf"}, "flm": {"hf"}, "telechat3": telechat3}
    expected = families[config.family]
    assert forms == expected | ({"qkv_concat"} if preset == "telechat-52b" else set())


def test_tables_name_fields_that_exist_once() -> None:
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    for key, holds in PLACES.items():
        assert set(holds) | set(ANYWHERE) <= fields, key
        assert not set(holds) & set(ANYWHERE), key


REFUSED = [
    ("telechat2-tiny", "hf", {"biases": "all"}, "model.biases: all has no place in the released format of family tele"),
    ("telechat2-tiny", "plain", {"logit_mult": 0.5}, "model.logit_mult: 0.5 has no place in MindFormers' plain form"),
    ("telechat2-tiny", "qkv_concat", {"position": "rope"}, "model.position: rope has no place"),
    ("telechat2-tiny", "mcore", {"tied_embeddings": True}, "model.tied_embeddings: True has no place"),
    ("teleflm-tiny", "plain", {}, "model.family: teleflm has no place in MindFormers' plain form, which is there for"),
    ("flm-tiny", "qkv_concat", {}, "model.norm: layernorm has no place in MindFormers' qkv_concat form of family flm"),
    ("flm-tiny", "hf", {"num_kv_heads": 2}, "model.num_kv_heads: 2 has no place in the released format of family flm"),
    ("telechat-52b", "qkv_concat", {"input_mult": 2.0}, "model.input_mult: 2.0 has no place"),
    ("telechat3-tiny", "hf", {"biases": "outputs"}, "model.biases: outputs has no place in the released format of"),
    ("telechat3-tiny", "hf", {"position": "ntk"}, "model.position: ntk has no place in the released format of family"),
    (
        "telechat2-tiny",
        "mcore_train",
        {},
        "model.family: telechat2 has no place in MindFormers' mcore form of training",
    ),
    (
        "telechat3-tiny",
        "mcore",
        {"biases": "all"},
        "model.biases: all has no place in MindFormers' mcore form of family",
    ),
    ("teleflm-tiny", "hf", {"position": "yarn"}, "model.position: yarn has no place in the released format of family"),
    ("telechat-52b", "plain", {}, "model.family: flm has no place in MindFormers' plain form"),
]


@pytest.mark.parametrize(("preset", "form", "changes", "says"), REFUSED, ids=[says for *_, says in REFUSED])
def test_refused(preset: str, form: str, changes: dict, says: str) -> None:
    with pytest.raises(UserError) as caught:
        require_place(replace(load_model_config(preset), **changes), form)
    assert str(caught.value).startswith(says) and str(caught.value).endswith("; keep such a model as a checkpoint")


def test_a_field_that_no_table_names_has_no_place() -> None:
    """So a mechanism that is added later is refused everywhere until someone gives it a place."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(ModelConfig):
        another_norm: float = 1.0
        grown_from: tuple[int, ...] = dataclasses.field(default_factory=tuple)

    plain = Later(**load_model_config("telechat2-tiny").to_dict())
    forms = [form for form, family in PLACES if family == "telechat2"]
    assert all(why_not(plain, form) is None for form in forms)
    for form in forms:
        reason = why_not(replace(plain, another_norm=2.0), form)
        assert reason is not None and reason.startswith("model.another_norm: 2.0 has no place in ")
        assert reason.endswith("which has 1.0")
        assert "model.grown_from: (3,)" in str(why_not(replace(plain, grown_from=(3,)), form))


def test_nothing_is_written_of_a_model_without_place(tmp_path: Path) -> None:
    config = replace(load_model_config("telechat2-tiny"), biases="all")
    import numpy as np

    weights = [(name, np.zeros(spec.shape, np.float32)) for name, spec in parameter_table(config).items()]
    write_checkpoint(tmp_path / "c", 0, model={"config": config.to_dict()}, weights=weights)
    source = open_model(tmp_path / "c")
    source.tensor = lambda name: pytest.fail(f"{name} was read first")  # type: ignore[method-assign]
    with pytest.raises(UserError, match="model.biases: all has no place"):
        to_hf(source, tmp_path / "x")
    with pytest.raises(UserError, match="model.biases: all has no place"):
        to_mindformers(source, tmp_path / "x", "plain")
    assert not (tmp_path / "x").exists()
