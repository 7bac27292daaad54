"""Adapter folders that PEFT would load in part, or otherwise than they were trained: refused, and why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from telechat_twins.convert.adapter import open_any_adapter
from telechat_twins.convert.hf.peft import open_peft, write_peft
from telechat_twins.core.checkpoint.adapter import write_adapter
from telechat_twins.core.errors import UserError
from tests.support.adapters import golden_model, modules, random_adapter, tensors

KEYS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type: only LORA is read, found 'LOHA'"),
    ({"task_type": "SEQ_CLS"}, "task_type: must be CAUSAL_LM"),
    ({"use_dora": True}, "use_dora: True is not taken over: DoRA also scales"),
    ({"bias": "all"}, "bias: 'all' is not taken over: biases of the model were trained"),
    ({"bias": "lora_only"}, "bias: 'lora_only' is not taken over"),
    ({"lora_bias": True}, "lora_bias: True is not taken over: B has a bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save: .* whole modules were trained"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices: .* rows of the embedding"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication: .* another model"),
    ({"use_qalora": True}, "use_qalora"),
    ({"alora_invocation_tokens": [3]}, "aLoRA acts only after certain tokens"),
    ({"kasa_config": {"beta": 1e-4}}, "kasa_config: .*KaSA takes singular values"),
    ({"use_rslora": 1}, "use_rslora: expected true or false, found 1"),
    ({"fan_in_fan_out": 0}, "fan_in_fan_out: expected true or false, found 0"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the base's weights"),
    ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "olora"}, "init_lora_weights: 'olora' changes the base"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights: 'loftq' changes the base"),
    ({"some_new_scale": 2.0}, "some_new_scale: 2.0 is unknown here, and may change the result"),
    ({"r": 0.5}, "r: must be a whole number"),
    ({"r": 0}, "r: must be a whole number from 1"),
    (
        {"layers_pattern": 3, "layers_to_transform": [0]},
        "layers_pattern: expected names of the list of layers, found 3",
    ),
    ({"layers_pattern": "lay.*", "layers_to_transform": [0]}, "layers_pattern: expected names .* found 'lay"),
    ({"target_modules": "x" * 1001}, "target_modules: expected a regular expression of at most 1000 characters"),
    ({"target_modules": r"(q)_\1"}, "target_modules: .* holds what is not read here"),
    ({"exclude_modules": "((q{2}v){2}k){2}"}, "exclude_modules: .* nests repetition more than 2 times"),
    ({"rank_pattern": {f"q{n}+": 2 for n in range(1001)}}, "rank_pattern: its expressions repeat too much .cost 2002"),
    ({"alpha_pattern": {"(?i)q_proj": 2}}, "alpha_pattern: .* is not a regular expression"),
    ({"lora_alpha": 0}, "lora_alpha: must be a number above 0"),
    ({"lora_alpha": "16"}, "lora_alpha: must be a number above 0, found '16'"),
    ({"rank_pattern": {"q_proj(": 4}}, r"rank_pattern: 'q_proj\(' is not a regular expression"),
    ({"alpha_pattern": {"q_proj": True}}, "alpha_pattern: q_proj: must be a number"),
    ({"rank_pattern": {"q_proj": 3}}, r"lora_A.weight': expected \[3, 48\] by the model and rank 3 .* found \[2, 48\]"),
    ({"target_modules": None}, "target_modules: must name the adapted layers"),
    (
        {"target_modules": ["q_proj"]},
        "has tensors for 'model.layers.0.self_attn.v_proj', which target_modules does not",
    ),
    ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "has no tensors for 'model.layers.0.self_attn.o_proj', which"),
    ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, "target_modules: names 'lm_head' too"),
    ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, "has tensors for 'model.layers.1.self_attn.q_proj'"),
    (
        {"layers_to_transform": [0, 2]},
        "has tensors for 'model.layers.1.self_attn.q_proj', which target_modules with layers_to_transform does not",
    ),
    ({"target_modules": ".*(q|v)_proj", "layers_to_transform": [0]}, "acts only where target_modules is a list"),
]


def _rename(old: str, new: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda held: {name.replace(old, new): array for name, array in held.items()}


def _add(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda held: {**held, name: np.ones(shape, np.float32)}


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
FILES: list[tuple[Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], str]] = [
    (
        lambda held: {n.removeprefix("base_model.model.") if ".1." in n else n: a for n, a in held.items()},
        "does not begin with base_model.model., as 8 others do, so PEFT would not load it; rename it to base_model.mod",
    ),
    (_rename("base_model.", ""), "'model.model.layers.0.self_attn.q_proj' is not a layer that takes an adapter"),
    (_rename("layers.2.", "layers.7."), "'model.layers.7.self_attn.q_proj' is not a layer that takes an adapter"),
    (lambda held: {n: a for n, a in held.items() if n != f"{FIRST}.lora_B.weight"}, "q_proj' has no lora_B"),
    (_add(f"{FIRST}.lora_magnitude_vector", (48,)), "is a magnitude of DoRA"),
    (_add(f"{FIRST}.base_layer.bias", (48,)), "is a parameter of the base"),
    (_add("base_model.model.model.embed_tokens.lora_embedding_A", (2, 157)), "is an adapter of an embedding"),
    (_add("base_model.model.lm_head.lora_A.weight", (2, 48)), "'lm_head' is not a layer that takes an adapter"),
    (_add(f"{FIRST}.lora_B.bias", (48,)), "is a bias, which is not taken over"),
    (_add(f"{FIRST}.lora_A.default.weight", (2, 48)), "is there twice"),
    (lambda held: {n: a.T.copy() for n, a in held.items()}, r"expected \[2, 48\] .* found \[48, 2\]"),
    (lambda held: {n: a.astype(np.float64) for n, a in held.items()}, "is F64; expected one of F32, F16, BF16"),
    (lambda held: {}, "has no tensors for"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = golden_model("teleflm")
    place = tmp_path_factory.mktemp("peft") / "good"
    write_peft(random_adapter(source, modules(source.config, ("q", "v"))), place)
    return place


def changed(
    folder: Path,
    place: Path,
    keys: dict[str, Any],
    edit: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda held: held,
) -> Path:
    values = {**json.loads((folder / "adapter_config.json").read_text()), **keys}
    (place / "adapter_config.json").write_text(json.dumps(values))
    save_file(edit(load_file(folder / "adapter_model.safetensors")), place / "adapter_model.safetensors")
    return place


@pytest.mark.parametrize(("keys", "says"), KEYS)
def test_keys_that_ask_for_something_else(folder: Path, tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_peft(changed(folder, tmp_path, keys), golden_model("teleflm").config)


@pytest.mark.parametrize(("edit", "says"), FILES)
def test_tensors_that_do_not_fit(
    folder: Path, tmp_path: Path, edit: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        open_peft(changed(folder, tmp_path, {}, edit), golden_model("teleflm").config)


def test_what_is_harmless_passes_and_what_is_assumed_is_noted(folder: Path, tmp_path: Path) -> None:
    config = golden_model("teleflm").config
    for keys in (
        {"init_lora_weights": "gaussian", "peft_version": "1.0", "loftq_config": {"loftq_bits": 4}},
        {
            "init_lora_weights": False,
            "eva_config": {"rho": 2.0},
            "target_modules": ".*(q|v)_proj",
            "modules_to_save": [],
        },
        {"layers_to_transform": [0, 1, 2], "layers_pattern": "layers", "exclude_modules": "lm_head", "bias": "none"},
    ):
        assert open_peft(changed(folder, tmp_path, keys), config).notes == ()
    for keys, note in (
        ({"lora_alpha": None}, "lora_alpha is missing: 8, PEFT's default"),
        ({"alpha_pattern": {"qproj": 3}}, "alpha_pattern: 'qproj' applies to no layer with an adapter"),
        ({"rank_pattern": {"mlp.*": 3}}, "rank_pattern: 'mlp.*' applies to no layer with an adapter"),
        ({"some_new_flag": None}, "some_new_flag is unknown here, and empty"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true, and the model's layers are Linear"),
    ):
        assert note in open_peft(changed(folder, tmp_path, keys), config).notes[0]
    with_name = _rename(".weight", ".default.weight")  # PEFT loads these as well
    assert open_peft(changed(folder, tmp_path, {}, with_name), config).modules == open_peft(folder, config).modules
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(UserError, match="adapter_model.bin: pickled weights are not read"):
        open_peft(tmp_path, config)
    (tmp_path / "adapter_model.bin").rename(tmp_path / "adapter_model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="an adapter in several files is not read; save it as one adapter_model.safe"):
        open_peft(tmp_path, config)


@pytest.mark.parametrize("front", ["base_model.model.", "base_model.model.model."])
def test_names_without_pefts_prefix_are_read_and_kept(folder: Path, tmp_path: Path, front: str) -> None:
    (tmp_path / "bare").mkdir()
    config, edit = golden_model("teleflm").config, _rename(front, "")
    found, plain = open_peft(changed(folder, tmp_path / "bare", {}, edit), config), open_peft(folder, config)
    assert found.modules == plain.modules and tensors(found) == tensors(plain)
    assert "names have no base_model.model. in front, as transformers saves" in found.notes[0]
    write_peft(found, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "bare" / name).read_bytes()


def test_what_is_no_adapters_folder_is_said(folder: Path, tmp_path: Path) -> None:
    source = golden_model("teleflm")
    shutil.copytree(folder, tmp_path / "steps" / "checkpoint-2")
    for path, says in (
        (tmp_path / "steps", "is no adapter; below it are .*checkpoint-2: give one of them"),
        (tmp_path / "step", "no such folder; expected an adapter; did you mean '.*/steps'"),
        (folder / "adapter_model.safetensors", "is a file; give the folder of an adapter, e.g. .*good$"),
    ):
        for opened in (lambda path: open_peft(path, source.config), lambda path: open_any_adapter(path, source)):
            with pytest.raises(UserError, match=says):
                opened(path)
    write_adapter(tmp_path / "ours", random_adapter(source, modules(source.config, ("q",))))
    for path, says in (
        (tmp_path / "ours", "made here is --from canonical"),
        (tmp_path, "give the folder that PEFT saved"),
    ):
        with pytest.raises(UserError, match=f"has no adapter_config.json, so it is no adapter of PEFT's; .*{says}"):
            open_peft(path, source.config)
