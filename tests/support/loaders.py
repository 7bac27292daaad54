"""What those who load exported folders read of them: architectures, config keys, tensor names, small files.

Written down from their sources, which are named; none of them is needed to check a folder against it. vllm-ascend has
no classes of its own for these models and runs vLLM's. llama.cpp knows neither; the release brings a converter.
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from telechat_twins.core.types import JsonObject

VLLM = "vllm-project/vllm"


@dataclass(frozen=True)
class Loader:
    """``keys``: of each group at least one must be readable from the config. ``files``: beside the weights."""

    source: str
    architectures: tuple[str, ...]
    keys: tuple[tuple[str, ...], ...]
    files: tuple[str, ...]


# What vLLM's Llama classes take from the config object (not from config.json: the class's attribute_map counts).
_LLAMA = (
    ("vocab_size",), ("hidden_size",), ("num_hidden_layers",), ("num_attention_heads",), ("num_key_value_heads",),
    ("intermediate_size",), ("rms_norm_eps",), ("hidden_act",), ("rope_theta",), ("max_position_embeddings",),
    ("tie_word_embeddings",), ("bos_token_id",), ("eos_token_id",),
)  # fmt: skip
_TEXT = ("config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json")

LOADERS: dict[tuple[str, str], Loader] = {
    ("vLLM", "telechat2"): Loader(
        f"{VLLM} vllm/model_executor/models/telechat2.py at 0c4bb0e, registry.py at bf8e762",
        ("TeleChatForCausalLM", "TeleChat2ForCausalLM"),
        (*_LLAMA, ("n_layer",), ("n_head",), ("ffn_hidden_size",), ("layer_norm_epsilon",)),
        _TEXT,
    ),
    ("vLLM", "teleflm"): Loader(
        f"{VLLM} vllm/model_executor/models/teleflm.py at 0cd6c7b",
        ("TeleFLMForCausalLM",),
        (*_LLAMA, ("use_mup",), ("input_mult",), ("output_mult",), ("mup_scale_factor",)),
        _TEXT,
    ),
    ("GGUF", "telechat2"): Loader(
        "Tele-AI/TeleChat2 ollama/convert_hf_to_gguf.py at 27da1a0 (from config.json itself)",
        ("TeleChatForCausalLM", "TeleChat2ForCausalLM"),
        (
            ("num_hidden_layers", "n_layer"), ("max_position_embeddings",), ("hidden_size",), ("intermediate_size",),
            ("num_attention_heads", "n_head"), ("num_key_value_heads",), ("rope_theta",), ("rms_norm_eps",),
            ("layer_norm_epsilon",), ("vocab_size",),
        ),
        ("tokenizer.model",),
    ),
}  # fmt: skip

# vllm/transformers_utils/config.py at 0036026: types that neither it nor transformers (4.57, 5.24) knows are read with
# the class that auto_map names, from a file in the folder, when the user trusts it.
UNKNOWN_TYPES = ("telechat", "TeleFLM")


def attributes(folder: Path) -> JsonObject:
    """What the config object answers: config.json, and Llama's names by way of the class's attribute_map."""
    released = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = dict(released)
    if released["model_type"] in UNKNOWN_TYPES:
        module, _, name = released["auto_map"]["AutoConfig"].partition(".")
        tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
        (kind,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        values = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in kind.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        assert values["model_type"] == released["model_type"]
        found |= {theirs: released[ours] for theirs, ours in values.get("attribute_map", {}).items()}
    return found


def vllm_telechat2(folder: Path, config: JsonObject) -> dict[str, np.ndarray]:
    """The folder's tensors under the names of vLLM's Llama, split as its loader does, before they are stacked."""
    heads = config["n_head"]
    size = config["hidden_size"] // heads
    made = {}
    for name, array in load_file(folder / "model.safetensors").items():
        if name.startswith("transformer."):
            name = "model." + name.removeprefix("transformer.")
        for old, new in (
            (".h.", ".layers."), (".self_attention.", ".self_attn."), (".word_embeddings.", ".embed_tokens."),
            (".dense.", ".o_proj."), (".ln_f.", ".norm."),
        ):  # fmt: skip
            name = name.replace(old, new)
        if "self_attn.key_value" in name:
            # Over all heads, of which there may be fewer for keys and values: what lies beyond the end is empty.
            starts = [i * size * 2 for i in range(heads)]
            made[name.replace("key_value", "k_proj")] = np.concatenate([array[s : s + size] for s in starts])
            made[name.replace("key_value", "v_proj")] = np.concatenate([array[s + size : s + 2 * size] for s in starts])
        else:
            made[name.replace(".query", ".q_proj")] = array
    return made


def llama_names(layers: int, biases: bool) -> set[str]:
    """Every parameter of vLLM's Llama, before q, k, v and gate, up are stacked."""
    block = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    block += [f"self_attn.{x}_proj.weight" for x in "qkvo"] + [f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    block += ["self_attn.o_proj.bias", "mlp.down_proj.bias"] * biases
    every = {f"model.layers.{i}.{name}" for i in range(layers) for name in block}
    return {*every, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
