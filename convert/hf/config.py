"""config.json of a release <-> ModelConfig: TeleChat2, Tele-FLM, and FLM (TeleChat-52B and FLM-101B).

Generations of released code use slightly different keys; each row of a table lists the names one field goes by.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from telechat_twins.convert.hf.config_keys import Key, Switch, choose, chosen, defaulted, read_keys, take, token_ids
from telechat_twins.convert.hf.config_refused import GATED, Refused, check_refused, check_sizes, unknown_note
from telechat_twins.convert.hf.config_rotary import SECTIONS, read_position, read_theta, write_theta
from telechat_twins.convert.hf.config_yarn import FIELDS as YARN_FIELDS
from telechat_twins.convert.hf.config_yarn import LENGTH, section_of
from telechat_twins.convert.places import NTK_THETA_LENGTH, require_place
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.schema import from_mapping
from telechat_twins.core.types import JsonObject

_DROPOUTS = ("hidden_dropout", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class _Format:
    """One family's config.json: keys, switches, what the family always does (``fixed``), what is refused, the other
    keys of a fresh file. ``mup``: logits are multiplied by output_mult / mup_scale_factor. ``theta``: the
    written name of the rotary base."""

    keys: tuple[Key, ...]
    refused: Refused
    fresh: JsonObject
    switches: tuple[Switch, ...] = ()
    fixed: tuple[tuple[str, object], ...] = ()
    mup: bool = False
    theta: str = "rope_theta"

    @property
    def names(self) -> list[str]:
        """Every key that is read."""
        lists = [*(key.names for key in self.keys), *(switch.names for switch in self.switches)]
        return [
            *(name for names in lists for name in names),
            *self.refused,
            *self.fresh,
            *_TOKENS,
            "output_mult",
            "mup_scale_factor",
        ]


_EPSILONS = ("layer_norm_epsilon", "rms_norm_eps", "layer_norm_eps", "layernorm_epsilon", "norm_eps")
_WIDTH_NAMES = ("hidden_size", "n_embed", "n_embd", "d_model")
_FFN_NAMES = ("ffn_hidden_size", "intermediate_size", "n_inner")
_LAYER_NAMES = ("n_layer", "num_hidden_layers", "num_layers")
_HEAD_NAMES = ("n_head", "num_attention_heads", "num_heads")
_KV_NAMES = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_LENGTH_NAMES = ("seq_length", "max_position_embeddings", "n_positions")


def _first(name: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """``names`` with the one that a family writes in front."""
    return (name, *(other for other in names if other != name))


_INIT = Key("init_std", ("initializer_range",), float, 0.02, quiet=True)
_KEYS = (
    Key("vocab_size", ("vocab_size",), int),
    Key("hidden_size", ("hidden_size", "n_embed", "d_model"), int),
    Key("ffn_hidden_size", _FFN_NAMES, int),
    Key("num_layers", _LAYER_NAMES, int),
    Key("num_heads", _HEAD_NAMES, int),
    Key("num_kv_heads", _KV_NAMES, int, "num_heads"),
    # 1e-8 in one published copy of the 115B, 1e-5 in others: a guess would be wrong half of the time.
    Key("norm_eps", _EPSILONS, float),
    Key("training_seqlen", ("training_seqlen",), int, 8192),
    Key("base_seqlen", ("base_seqlen",), int, 8192),
    Key("max_seqlen", _LENGTH_NAMES, int, "training_seqlen", quiet=True),
    _INIT,
)

_MULTIPLIERS = ("input_mult", "output_mult", "mup_scale_factor")
_TELECHAT2_REFUSED: Refused = {
    "tie_word_embeddings": ((False, None), "a head tied to the embedding is not supported; TeleChat2 stores both"),
    "model_type": (("telechat", "telechat2", None), "this converter reads TeleChat2, TeleChat3, Tele-FLM, FLM, Llama"),
    "use_mup": ((False, None), "TeleChat2 has no muP multipliers"),
    **dict.fromkeys(_MULTIPLIERS, ((1, None), "TeleChat2 has no muP multipliers")),
    **GATED,
}

# Nothing in these families follows the length of a row.
_LENGTHS = (Key("training_seqlen", (), int, "max_seqlen"), Key("base_seqlen", (), int, "max_seqlen"))
_MUP: Refused = {"use_mup": ((True, None), "a model of this family without muP multipliers is not supported")}

_TELECHAT2 = _Format(
    keys=_KEYS,
    refused=_TELECHAT2_REFUSED,
    fresh={
        "architectures": ["TeleChat2ForCausalLM"],
        "model_type": "telechat",
        "hidden_act": "silu",
        "unk_token_id": 0,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "n_inner": None,
        "apply_residual_connection_post_layernorm": False,
        "embed_layernorm": False,
        "logn": False,
        "flash_attn": True,
        "skip_bias_add": False,
        "slow_but_exact": False,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "use_cache": True,
    },
)

_TELEFLM = _Format(
    keys=(
        Key("vocab_size", ("vocab_size",), int),
        Key("hidden_size", _WIDTH_NAMES, int),
        Key("ffn_hidden_size", _first("intermediate_size", _FFN_NAMES), int),
        Key("num_layers", _first("num_hidden_layers", _LAYER_NAMES), int),
        Key("num_heads", _first("num_attention_heads", _HEAD_NAMES), int),
        Key("num_kv_heads", _KV_NAMES, int, "num_heads"),
        Key("norm_eps", _first("rms_norm_eps", _EPSILONS), float),
        Key("max_seqlen", _first("max_position_embeddings", _LENGTH_NAMES), int),
        *_LENGTHS,
        _INIT,
        Key("input_mult", ("input_mult",), float),
    ),
    fixed=(("biases", "none"), ("position", "rope")),
    mup=True,
    refused={
        "tie_word_embeddings": ((False, None), "a head tied to the embedding is not supported; Tele-FLM stores both"),
        "mlp_bias": ((False, None), "biases on Tele-FLM's ffn are not supported"),
        **_MUP,
        **GATED,
    },
    fresh={
        "architectures": ["TeleFLMForCausalLM"],
        "model_type": "TeleFLM",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "pretraining_tp": 1,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_mup": True,
    },
)

# TeleChat3's format is Llama's, with its own type of YaRN. A fresh file is a Llama's, which readers have built in.
_TELECHAT3 = _Format(
    keys=(*(key for key in _TELEFLM.keys if key.field != "input_mult"),),
    switches=(
        Switch("biases", ("attention_bias", "mlp_bias"), ((False, "none"), (True, "all")), False, quiet=True),
        Switch("tied_embeddings", ("tie_word_embeddings",), ((False, False), (True, True)), False, quiet=True),
    ),
    refused={
        **{name: rule for name, rule in GATED.items() if name != "attention_bias"},
        **dict.fromkeys(_MULTIPLIERS, ((1, None), "this format has no muP multipliers")),
    },
    fresh={
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "pretraining_tp": 1,
        "use_cache": True,
    },
)

_FLM = _Format(
    keys=(
        Key("vocab_size", ("vocab_size",), int),
        Key("hidden_size", _first("n_embd", _WIDTH_NAMES), int),
        Key("ffn_hidden_size", _first("n_inner", _FFN_NAMES), int),
        Key("num_layers", _LAYER_NAMES, int),
        Key("num_heads", _HEAD_NAMES, int),
        Key("num_kv_heads", (), int, "num_heads"),
        Key("norm_eps", _EPSILONS, float),
        Key("xpos_scale_base", ("rotary_xpos_scale_base",), float, 512.0),
        Key("max_seqlen", _first("n_positions", _LENGTH_NAMES), int),
        *_LENGTHS,
        _INIT,
        Key("input_mult", ("input_mult",), float),
    ),
    # FLM-101B's config has neither of the first two keys; its code has LayerNorm and biases (GPT-2's).
    switches=(
        Switch("norm", ("use_RMSNorm",), ((False, "layernorm"), (True, "rmsnorm")), False),
        Switch("biases", ("add_bias_linear",), ((True, "all"), (False, "none")), True),
        Switch(
            "activation",
            ("activation_function", "hidden_act"),
            (
                ("gelu_fast", "gelu"),
                ("gelu_new", "gelu"),
                ("gelu_pytorch_tanh", "gelu"),
                ("silu", "swiglu"),
                ("swish", "swiglu"),
            ),
        ),
        Switch("position", ("rotary_use_xpos",), ((True, "xpos"), (False, "ntk-theta"))),
        # What transformers takes where a config does not say.
        Switch("tied_embeddings", ("tie_word_embeddings",), ((True, True), (False, False)), True),
    ),
    mup=True,
    theta="rotary_theta",
    refused={"relative_encoding": (("rotary", None), "only rotary positions are supported"), **_MUP},
    fresh={
        "architectures": ["FLM"],
        "model_type": "flm",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "relative_encoding": "rotary",
        "reorder_and_upcast_attn": True,
        "scale_attn_by_inverse_layer_idx": True,
        "scale_attn_weights": True,
        "use_cache": True,
        "use_mup": True,
    },
)

_LLAMA = ("num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps")
_FORMATS = {"telechat2": _TELECHAT2, "teleflm": _TELEFLM, "flm": _FLM, "telechat3": _TELECHAT3}
_OUTPUT = Key("logit_mult", ("output_mult",), float)
_WIDTHS = Key("logit_mult", ("mup_scale_factor",), float)


def family_of(released: JsonObject) -> str:
    """The family whose format a config.json has; TeleChat-52B calls itself telechat but is written as FLM, and a Llama
    has TeleChat3's."""
    if released.get("model_type") == "TeleFLM":
        return "teleflm"
    if released.get("model_type") in ("telechat3", "llama"):
        return "telechat3"
    return "flm" if released.get("model_type") == "flm" or "n_embd" in released else "telechat2"


def read_config(released: JsonObject, where: str) -> tuple[ModelConfig, list[str]]:
    """ModelConfig from the mapping in config.json, and notes on what was assumed or ignored.

    ``where`` (the file's path) starts every UserError: a missing or contradictory key, a wrong type, a feature that
    this decoder does not have.
    """
    family = family_of(released)
    form = _FORMATS[family]
    check_refused(released, form.refused, where)
    notes = [
        f"{name} {released[name]} is ignored: there is no dropout here" for name in _DROPOUTS if released.get(name)
    ]
    found, said = read_keys(released, form.keys, where)
    values: JsonObject = {"family": family, **dict(form.fixed), **found}
    notes += said
    for switch in form.switches:
        values[switch.field], said = choose(released, switch, where)
        notes += said
    if family == "telechat3":
        values |= read_position(released, where)
    position = values.get("position", "ntk")
    theta = read_theta(released, position, where)
    if theta is None:
        # The 115B's own code knows no rope_theta and uses 10000; the 7B-32K config carries 1e6.
        theta = 10000.0
        notes.append(defaulted(form.theta, theta))
    values["rope_theta"] = theta
    tokens, said = token_ids(released, where, pad_default=3)
    values |= tokens
    notes += said
    check_sizes(
        released, values["hidden_size"], values["num_heads"], values["num_heads"] if family == "flm" else 0, where
    )
    if position == "ntk-theta":  # a number of the released code, whatever the config's lengths
        values |= {"training_seqlen": NTK_THETA_LENGTH, "base_seqlen": NTK_THETA_LENGTH}
    if form.mup:
        output, width = (take(released, key, where) for key in (_OUTPUT, _WIDTHS))
        if output is None or width is None:
            absent = (_OUTPUT if output is None else _WIDTHS).names[0]
            raise UserError(f"{where}: {absent} is missing; logits are multiplied by it, add it")
        values["logit_mult"] = output / width
    notes += unknown_note(released, [*form.names, LENGTH] if position == "yarn" else form.names, where)
    try:
        return from_mapping(ModelConfig, values, "model"), notes
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def write_config(config: ModelConfig, original: JsonObject | None, dtype: str | None) -> JsonObject:
    """The mapping for config.json.

    With ``original`` (the mapping once read) every key is kept and only what no longer agrees with ``config`` is
    changed; without, a config is made that vLLM and the released modelling code read. ``dtype`` (float32...) sets
    ``torch_dtype``; None leaves it. UserError for a model that its family's format cannot describe.
    """
    require_place(config, "hf")
    form = _FORMATS[config.family]
    result = dict(original) if original is not None else _fresh(config)
    if original is not None:
        _update(result, original, config, form)
    if dtype is not None:
        # transformers 4.56 renamed the key; a config that has only the new one keeps it.
        present = [name for name in ("torch_dtype", "dtype") if name in result]
        result.update(dict.fromkeys(present or ["torch_dtype"], dtype))
    return result


def dump_config(released: JsonObject) -> str:
    """The text of config.json."""
    return json.dumps(released, indent=2, ensure_ascii=False) + "\n"


def token_keys(config: ModelConfig) -> JsonObject:
    """bos, eos and pad as a config holds them: eos is a list where several tokens end generation."""
    ends = (config.eos_token_id, *config.end_token_ids)
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(ends) if len(ends) > 1 else ends[0],
        "pad_token_id": config.pad_token_id,
    }


def _update(result: JsonObject, original: JsonObject, config: ModelConfig, form: _Format) -> None:
    """Change what no longer agrees with ``config``, under every name it has."""
    before, _ = read_config(original, "config.json")
    for key in form.keys:
        value = getattr(config, key.field)
        if value != getattr(before, key.field):
            present = [name for name in key.names if original.get(name) is not None]
            result.update(dict.fromkeys(present or key.names[:1], value))
    for switch in form.switches:
        if getattr(config, switch.field) != getattr(before, switch.field):
            present = [name for name in switch.names if original.get(name) is not None]
            result.update(dict.fromkeys(present or switch.names[:1], chosen(switch, getattr(config, switch.field))))
    if config.rope_theta != before.rope_theta:
        write_theta(result, config.rope_theta, form.theta)
    if any(getattr(config, field) != getattr(before, field) for field in (*YARN_FIELDS, "base_seqlen")):
        result.update({**dict.fromkeys(SECTIONS), **_sections(config)} if config.family == "telechat3" else {})
        result.update({LENGTH: config.base_seqlen} if original.get(LENGTH) is not None else {})
    # Which further tokens end generation is the release's word, in config.json or generation_config.json.
    result.update({k: v for k, v in token_keys(config).items() if getattr(config, k) != getattr(before, k)})
    for name in ("head_dim", "kv_channels"):
        if original.get(name) is not None:
            result[name] = config.head_dim
    if config.family == "flm" and original.get("num_key_value_heads") is not None:
        result["num_key_value_heads"] = config.num_heads
    if form.mup and config.logit_mult != before.logit_mult:
        result.update(output_mult=config.logit_mult, mup_scale_factor=1.0)


def _sections(config: ModelConfig) -> JsonObject:
    """The rotary sections of a fresh config.json: transformers 5 reads the first, others the second."""
    if config.position == "yarn":
        return {name: section_of(config) for name in SECTIONS}
    return {"rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"}}


def _fresh(config: ModelConfig) -> JsonObject:
    form = _FORMATS[config.family]
    result = {
        **form.fresh,
        **{key.names[0]: getattr(config, key.field) for key in form.keys if key.names},
        form.theta: config.rope_theta,
        **token_keys(config),
        **{switch.names[0]: chosen(switch, getattr(config, switch.field)) for switch in form.switches},
    }
    if form.theta == "rope_theta":  # where transformers 5 looks; older readers take the key beside it
        result |= _sections(config)
    if form.mup:
        result.update(output_mult=config.logit_mult, mup_scale_factor=1.0)
    if config.family == "telechat2":
        result["max_position_embeddings"] = config.max_seqlen
        # Llama's names for the same, which the GGUF converter of the release reads and others fall back on.
        result |= {name: getattr(config, key.field) for key in form.keys for name in key.names[1:] if name in _LLAMA}
    if config.family == "telechat3":
        result["mlp_bias"] = result["attention_bias"]
    if config.family == "flm" and config.norm == "rmsnorm":  # TeleChat-52B
        result.update(architectures=["TELECHAT"], model_type="telechat")
    return result
