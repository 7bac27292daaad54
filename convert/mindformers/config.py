"""MindFormers' ``model_config`` (a section of its YAML) <-> ModelConfig: TeleChat2, TeleChat-52B and TeleChat3.

Its checkpoints say nothing of the model they belong to; the number of heads cannot be read from the weights.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from telechat_twins.convert.hf.config import read_config
from telechat_twins.convert.hf.config_keys import Key, defaulted, read_keys, take, token_ids
from telechat_twins.convert.hf.config_refused import Refused, check_refused, check_sizes
from telechat_twins.convert.hf.config_rotary import SECTIONS, THETA_NAMES, read_position, read_theta
from telechat_twins.convert.mindformers.model_keys import NEUTRAL, SECTION, refuse_unknown
from telechat_twins.convert.places import NTK_THETA_LENGTH, require_place
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.safetensors import load_json
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.schema import from_mapping, key_lines, load_yaml
from telechat_twins.core.types import JsonObject

# Defaults are those of research/telechat2/telechat_config.py.
_KEYS = (
    Key("vocab_size", ("vocab_size",), int),
    Key("hidden_size", ("hidden_size",), int),
    Key("ffn_hidden_size", ("intermediate_size", "ffn_hidden_size"), int),
    Key("num_layers", ("num_layers", "num_hidden_layers"), int),
    Key("num_heads", ("num_heads", "num_attention_heads"), int),
    Key("num_kv_heads", ("n_kv_heads", "num_key_value_heads", "num_query_groups"), int, "num_heads"),
    Key("norm_eps", ("rms_norm_eps", "layernorm_epsilon"), float),
    Key("max_seqlen", ("seq_length", "max_position_embedding", "max_position_embeddings"), int),
    Key("training_seqlen", ("pretrain_seqlen", "training_seqlen"), int, "max_seqlen", quiet=True),
    Key("base_seqlen", ("base_seqlen",), int, "training_seqlen", quiet=True),
    Key("init_std", ("sigma", "initializer_range", "init_method_std"), float, 0.0048, quiet=True),
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OUTPUT = Key("logit_mult", ("output_mult",), float)
_WIDTHS = Key("logit_mult", ("mup_scale_factor",), float)
_FIXED: dict[str, JsonObject] = {
    "telechat2": {},
    "flm": {"biases": "none", "position": "ntk-theta"},
    "telechat3": {"biases": "none", "position": "rope"},
}
# Keys that are fields of the model, or are checked against them.
FIELDS = frozenset(
    (
        *(name for key in (*_KEYS, _OUTPUT, _WIDTHS) for name in key.names),
        *("use_mup", "scaling_factor", "pet_config", *_TOKENS, *THETA_NAMES, *SECTIONS),
        *("wo_has_bias", "attn_proj_has_bias", "out_proj_has_bias", "add_mlp_fc2_bias_linear", "add_bias_linear"),
        *("head_dim", "kv_channels"),
    )
)
# Orders of the rows of MindFormers 2.x's trained matrices, of which the defaults are read.
_ORDERS: Refused = {
    **{"use_contiguous_weight_layout_attention": ((False, None), "linear_qkv is read in the order of False")},
    **{"use_interleaved_weight_layout_mlp": ((True, None), "linear_fc1 is read in the order of True")},
}


def read_model_file(path: Path) -> tuple[ModelConfig, list[str]]:
    """A model from a release's config.json (.json) or MindFormers' YAML (.yaml), and notes on what was assumed."""
    if path.suffix == ".json":
        return read_config(load_json(path, "a model's config"), str(path))
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path}: is neither a config.json nor a MindFormers .yaml")
    tree = load_yaml(path)
    model = tree.get("model") if isinstance(tree, dict) else None
    section = model.get("model_config") if isinstance(model, dict) else None
    if not isinstance(section, dict):
        raise UserError(
            f"{path}: has no section model.model_config; give the .yaml that MindFormers runs the model with"
        )
    with lines_of(path):
        check_refused(section, _ORDERS, str(path))
        return read_model_section(section, str(path))


@contextlib.contextmanager
def lines_of(path: Path) -> Iterator[None]:
    """Put the line of the key that a UserError names ("PATH: KEY ...") behind the path, where the file has that key."""
    try:
        yield
    except UserError as error:
        message = str(error)
        named = re.match(r"'?([\w.]+)", message.removeprefix(f"{path}: "))
        if named is None or not message.startswith(f"{path}: "):
            raise
        lines = key_lines(path)
        # The model's own checks say model.num_heads. A key of the model goes before one of that name elsewhere.
        name = named[1].removeprefix("model.")
        found = [dotted for dotted in lines if f".{dotted}".endswith(f".{name}")]
        found.sort(key=lambda dotted: not dotted.startswith(SECTION))
        line = f":{lines[found[0]]}" if found else ""
        raise UserError(f"{path}{line}: {message.removeprefix(f'{path}: ')}") from None


def read_model_section(section: JsonObject, where: str) -> tuple[ModelConfig, list[str]]:
    """ModelConfig from ``model.model_config``; UserError starting with ``where`` for what this decoder does not do."""
    family = _family(section, where)
    check_refused(section, {**NEUTRAL, **(_YARN if family == "telechat3" else {})}, where)
    refuse_unknown(section, FIELDS, where)
    if family != "telechat3" and section.get("scaling_factor") not in (1, None):
        raise UserError(f"{where}: scaling_factor is {section['scaling_factor']!r}; only TeleChat3's YARN has one")
    biased = family == "telechat2"
    for name in ("wo_has_bias", "attn_proj_has_bias", "out_proj_has_bias", "add_mlp_fc2_bias_linear"):
        if section.get(name) not in (biased, None):
            raise UserError(f"{where}: {name} is {section[name]!r}; a model of family {family} has it {biased}")
    found, notes = read_keys(section, _KEYS, where)
    check_sizes(section, found["hidden_size"], found["num_heads"], found["num_kv_heads"], where)
    values: JsonObject = {"family": family, **_FIXED[family], **found}
    if family == "telechat3":
        values |= _rotation(section, where)
        if values["position"] == "rope" and isinstance(section.get("scaling_factor"), dict):
            notes.append(f"{where}: scaling_factor is passed over, as in MindFormers without extend_method: YARN")
    theta = read_theta(section, values.get("position", "ntk"), where)
    if theta is None:
        theta = 10000.0
        notes.append(defaulted("theta", theta))
    values["rope_theta"] = theta
    tokens, said = token_ids(section, where, pad_default=0)
    values |= tokens
    notes += said
    if family == "telechat2":
        notes += _plain_reach(section, values, where)
        # MindFormers' training scales nothing with the length, so its YAML need not say where that begins.
        base, trained = values["base_seqlen"], values["training_seqlen"]
        notes.insert(
            0,
            f"{where}: the rotary base is taken to grow beyond {base} tokens and attention beyond {trained} "
            "(base_seqlen, pretrain_seqlen or seq_length); the release's config.json says it for certain",
        )
    if family == "flm":
        values |= {"training_seqlen": NTK_THETA_LENGTH, "base_seqlen": NTK_THETA_LENGTH}
        output, width = (take(section, key, where) for key in (_OUTPUT, _WIDTHS))
        if output is None or width is None:
            raise UserError(f"{where}: output_mult or mup_scale_factor is missing; logits are multiplied by them")
        values["logit_mult"] = output / width
    try:
        return from_mapping(ModelConfig, values, "model"), notes
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _plain_reach(section: JsonObject, values: JsonObject, where: str) -> list[str]:
    """MindFormers reads pretrain_seqlen nowhere and, without DYNAMIC_NTK, rotates plainly at any length; so does the
    model up to its ``max_seqlen``, unless the section has ``base_seqlen``, as those written here do. Notes on it."""
    trained, reach = values["training_seqlen"], values["max_seqlen"]
    if trained >= reach or section.get("extend_method") == "DYNAMIC_NTK" or section.get("base_seqlen") is not None:
        return []
    values |= {"training_seqlen": reach, "base_seqlen": reach}
    return [f"{where}: pretrain_seqlen {trained} is passed over, as in MindFormers, which rotates plainly to {reach}"]


def _family(section: JsonObject, where: str) -> str:
    key = "net_name" if section.get("net_name") else "model_name"
    name = str(section.get(key, ""))
    if name == "telechat_7b":
        raise UserError(f"{where}: {key} is {name!r}; TeleChat-7B's head is its embedding, which is not supported")
    if section.get("model_type") == "telechat3" or name.startswith("telechat3"):
        return "telechat3"
    return "flm" if section.get("use_mup") or name == "telechat_52b" else "telechat2"


_YARN = {
    "extend_method": (("None", "YARN", None), "only None and YARN are TeleChat3's"),
    "add_bias_linear": ((False, None), "TeleChat3 has no biases"),
}


def _rotation(section: JsonObject, where: str) -> JsonObject:
    """YaRN as a release's section, or as ``extend_method: YARN`` with ``scaling_factor``; else plain at any length."""
    fields = read_position(section, where)
    scaling = section.get("scaling_factor")
    if fields["position"] == "rope" and section.get("extend_method") == "YARN":
        if not isinstance(scaling, dict):
            raise UserError(f"{where}: extend_method YARN needs a mapping scaling_factor, found {scaling!r}")
        # The published code divides by no scale of mscale_all_dim, and multiplies 0.07 by mscale.
        kept = {key: value for key, value in scaling.items() if key not in ("mscale", "mscale_all_dim")}
        fields = read_position({"rope_scaling": {"type": "telechat3-yarn", **kept}}, where)
        fields["yarn_mscale"] *= scaling.get("mscale", 1.0)
    if fields["position"] == "rope":
        length = take(section, _KEYS[7], where)
        fields |= {"training_seqlen": length, "base_seqlen": length}
    return fields


def model_yaml(config: ModelConfig, form: str) -> str:
    """The text of a YAML with the ``model.model_config`` that goes with a checkpoint in a form (plain, qkv_concat)."""
    said = "# What belongs under model.model_config in the YAML that MindFormers runs this checkpoint with.\n"
    return said + yaml.safe_dump({"model": {"model_config": model_section(config, form)}}, sort_keys=False)


def model_section(config: ModelConfig, form: str) -> JsonObject:
    """``model.model_config`` of a model in a form; UserError for a model that the form cannot hold."""
    form = "qkv_concat" if config.family == "flm" else form
    require_place(config, form)
    section: JsonObject = {"type": "TelechatConfig"}
    section |= {key.names[0]: getattr(config, key.field) for key in _KEYS}
    # The further tokens that end generation are in model.json beside it: MindFormers' config has one.
    section |= {"theta": config.rope_theta, **{name: getattr(config, name) for name in _TOKENS}}
    if config.family == "telechat3":
        section |= {
            "net_name": "telechat3_36b",
            "out_proj_has_bias": False,
            "qkv_concat": False,
            "extend_method": "None",
        }
        if config.position == "yarn":
            scaling = {"factor": config.yarn_factor, "original_max_position_embeddings": config.base_seqlen}
            scaling |= {"beta_fast": config.yarn_fast, "beta_slow": config.yarn_slow}
            scaling |= {"mscale": round(config.yarn_mscale / 0.07, 12), "mscale_all_dim": 1.0}
            section |= {"extend_method": "YARN", "scaling_factor": scaling}
    elif config.family == "flm":
        section |= {"net_name": "telechat_52b", "use_mup": True, "output_mult": config.logit_mult}
        section |= {"mup_scale_factor": 1.0, "wo_has_bias": False}
    else:
        section |= {"wo_has_bias": True, "out_proj_has_bias": True, "qkv_concat": form == "qkv_concat"}
    return section
