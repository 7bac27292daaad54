"""Exported folders against what vLLM, vllm-ascend and the GGUF converter read.

tests/support/loaders.py says from where.
"""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import jinja2.sandbox
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from telechat_twins.convert.copy import to_hf
from telechat_twins.convert.source import ModelSource, open_model
from telechat_twins.core.checkpoint.read import write_checkpoint
from telechat_twins.core.data.chat_layout import CHAT_TEMPLATE
from telechat_twins.core.data.chat_template import render
from telechat_twins.core.files import protobuf
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.types import JsonObject
from tests.support.data_support import VOCAB_SIZE, tiny_tokenizer_path
from tests.support.loaders import LOADERS, UNKNOWN_TYPES, attributes, llama_names, vllm_telechat2
from tests.support.shared import shared_file

SMALL = {"hidden_size": 24, "ffn_hidden_size": 20, "num_layers": 2, "vocab_size": VOCAB_SIZE}


@pytest.fixture(scope="module", params=["telechat2", "teleflm"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ModelSource, Path]:
    """(family, the model, the folder): a model that was trained here, with its tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    heads = {"num_heads": 6, "num_kv_heads": 3 if request.param == "telechat2" else 6}
    config = load_model_config({"preset": f"{request.param}-tiny", **SMALL, **heads})
    weights = init_weights(config, 3, "strong").items()
    write_checkpoint(folder / "c", 0, model={"config": config.to_dict()}, weights=weights)
    source = open_model(folder / "c")
    to_hf(source, folder / "hf", tokenizer=tiny_tokenizer_path())
    return request.param, source, folder / "hf"


@pytest.mark.parametrize("who", sorted({name for name, _ in LOADERS}))
def test_what_a_loader_reads_is_there(who: str, exported: tuple[str, ModelSource, Path]) -> None:
    family, source, folder = exported
    if (who, family) not in LOADERS:
        pytest.skip(f"{who} does not load {family}")
    loader = LOADERS[who, family]
    released = json.loads((folder / "config.json").read_text())
    assert released["architectures"][0] in loader.architectures
    # The GGUF converter reads the file, the others the object that transformers makes of it.
    answers = released if who == "GGUF" else attributes(folder)
    for group in loader.keys:
        assert any(answers.get(key) is not None for key in group), f"{who} looks for {' or '.join(group)}"
    for name in loader.files:
        assert (folder / name).is_file(), f"{who} looks for {name}"
    for key in ("num_hidden_layers", "n_layer"):
        assert answers.get(key, 2) == source.config.num_layers
    assert answers["intermediate_size"] == 20 and answers["rms_norm_eps"] == source.config.norm_eps
    assert answers["num_key_value_heads"] == source.config.num_kv_heads


def test_a_type_that_nobody_knows_brings_its_class(exported: tuple[str, ModelSource, Path]) -> None:
    _, _, folder = exported
    released = json.loads((folder / "config.json").read_text())
    assert released["model_type"] in UNKNOWN_TYPES
    module = released["auto_map"]["AutoConfig"].partition(".")[0]
    compile((folder / f"{module}.py").read_text(), module, "exec")
    # The canonical form of an exported folder keeps the file.
    assert folder / f"{module}.py" in open_model(folder).assets


def test_vllm_gets_every_tensor_in_place(exported: tuple[str, ModelSource, Path]) -> None:
    family, source, folder = exported
    config = source.config
    made = (
        vllm_telechat2(folder, attributes(folder)) if family == "telechat2" else load_file(folder / "model.safetensors")
    )
    assert set(made) == llama_names(config.num_layers, biases=family == "telechat2")
    for i in range(config.num_layers):
        for x in "qkvo":
            assert np.array_equal(
                made[f"model.layers.{i}.self_attn.{x}_proj.weight"], source.tensor(f"layers.{i}.attn.{x}.weight")
            )
        for x in ("gate", "up", "down"):
            assert np.array_equal(
                made[f"model.layers.{i}.mlp.{x}_proj.weight"], source.tensor(f"layers.{i}.ffn.{x}.weight")
            )


def test_multipliers_of_tele_flm_as_vllm_uses_them(exported: tuple[str, ModelSource, Path]) -> None:
    family, source, folder = exported
    answers = attributes(folder)
    if family != "teleflm":
        assert not {"use_mup", "input_mult", "output_mult"} & set(answers)
        return
    assert answers["use_mup"] is True and answers["input_mult"] == source.config.input_mult
    assert answers["output_mult"] / answers["mup_scale_factor"] == source.config.logit_mult


# --- chat layout and tokenizer


def rendered(messages: list[JsonObject], tools: list[JsonObject] | None, prompt: bool) -> str:
    """By the template, in the environment that transformers gives it (utils/chat_template_utils.py)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(CHAT_TEMPLATE).render(messages=messages, tools=tools, add_generation_prompt=prompt)


TEXT = st.text(max_size=12)
CALL = st.fixed_dictionaries({"name": TEXT, "arguments": st.dictionaries(TEXT, TEXT | st.integers(), max_size=2)})
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool"]), "content": TEXT}),
    st.fixed_dictionaries(
        {"role": st.sampled_from(["assistant", "bot"]), "content": TEXT | st.none()},
        optional={
            "tool_calls": st.lists(CALL | CALL.map(lambda call: {"type": "function", "function": call}), max_size=3)
        },
    ),
)


@given(st.lists(MESSAGE, min_size=1, max_size=6), st.none() | st.lists(CALL, max_size=2), st.booleans())
def test_the_template_says_what_the_program_says(
    messages: list[JsonObject], tools: list[JsonObject] | None, prompt: bool
) -> None:
    assert rendered(messages, tools, prompt) == render(messages, tools, prompt)


def test_the_template_is_the_published_one_in_effect() -> None:
    for dialogue in json.loads(shared_file("goldens/tokenizer/chat_template.json").read_text())["dialogues"]:
        made = rendered(dialogue["messages"], dialogue["tools"], dialogue["add_generation_prompt"])
        assert made == dialogue["text"], dialogue["name"]


def test_the_tokenizer_is_described(exported: tuple[str, ModelSource, Path]) -> None:
    _, source, folder = exported
    described = json.loads((folder / "tokenizer_config.json").read_text())
    assert described["chat_template"] == CHAT_TEMPLATE and described["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert [described[f"{x}_token"] for x in ("bos", "eos", "pad", "unk")] == ["<_start>", "<_end>", "<_pad>", "<_unk>"]
    names = {token["content"]: int(i) for i, token in described["added_tokens_decoder"].items() if token["special"]}
    assert (names["<_user>"], names["<_bot>"], names["<_system>"], names["<tool_call>"]) == (4, 5, 6, 9)
    assert described["model_max_length"] == source.config.max_seqlen
    said = json.loads((folder / "generation_config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"], said["pad_token_id"]) == (1, 2, 3)


def test_protobuf_is_read_to_its_end() -> None:
    message = b"\x08\x96\x01\x12\x02ab\x1d\x00\x00\x80\x3f\x21" + bytes(8)
    assert list(protobuf.fields(message)) == [(1, 150), (2, b"ab"), (3, b"\x00\x00\x80\x3f"), (4, bytes(8))]
    for cut in (1, 2, 5, 8):
        with pytest.raises(ValueError):
            list(protobuf.fields(message[:cut] if cut != 2 else b"\x0b"))
