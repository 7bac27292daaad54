"""config.json of a release <-> ModelConfig: TeleChat2, Tele-FLM, and FLM (TeleChat-52B and FLM-101B).

Generations of released code use slightly different keys; each row of a table lists the names one field goes by.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from convert.places import NTK_THETA_LENGTH, require_place
from core.config import ModelConfig
from core.errors import UserError
from core.schema import from_mapping

REQUIRED = object()


@dataclass(frozen=True)
class Key:
    """A field of ModelConfig, the released names it goes by (the first is written), its type, and its default.

    The default is a number, or the name of an earlier field, or required. ``said`` defaults are reported as a note.
    A field without names is never stored.
    """

    field: str
    names: tuple[str, ...]
    kind: type
    default: Any = REQUIRED
    said: bool = False


@dataclass(frozen=True)
class _Switch:
    """A field of ModelConfig that the release stores as a choice: the key, released value -> our value, its default.

    The first released value that stands for ours is written.
    """

    field: str
    name: str
    values: tuple[tuple[Any, Any], ...]
    default: Any = REQUIRED


@dataclass(frozen=True)
class _Format:
    """One family's config.json: keys, switches, what the family always does (``fixed``), what is refused, what a fresh
    file says besides. ``mup``: logits are multiplied by output_mult / mup_scale_factor."""

    keys: tuple[Key, ...]
    refused: dict[str, tuple[tuple[Any, ...], str]]
    fresh: dict[str, Any]
    switches: tuple[_Switch, ...] = ()
    fixed: tuple[tuple[str, Any], ...] = ()
    mup: bool = False


_KEYS = (
    Key("vocab_size", ("vocab_size",), int),
    Key("hidden_size", ("hidden_size", "n_embed"), int),
    Key("ffn_hidden_size", ("ffn_hidden_size", "intermediate_size"), int),
    Key("num_layers", ("n_layer", "num_hidden_layers"), int),
    Key("num_heads", ("n_head", "num_attention_heads"), int),
    Key("num_kv_heads", ("num_key_value_heads",), int, "num_heads"),
    # 1e-8 in one published copy of the 115B, 1e-5 in others: a guess would be wrong half of the time.
    Key("norm_eps", ("layer_norm_epsilon", "rms_norm_eps"), float),
    # The 115B's own code knows no rope_theta and uses 10000; the 7B-32K config carries 1e6.
    Key("rope_theta", ("rope_theta",), float, 10000.0),
    Key("training_seqlen", ("training_seqlen",), int, 8192, said=True),
    Key("base_seqlen", ("base_seqlen",), int, 8192, said=True),
    Key("max_seqlen", ("seq_length", "max_position_embeddings"), int, "training_seqlen"),
    Key("init_std", ("initializer_range",), float, 0.02),
    Key("bos_token_id", ("bos_token_id",), int, 1),
    Key("eos_token_id", ("eos_token_id",), int, 2),
    Key("pad_token_id", ("pad_token_id",), int, 3),
)

# Keys whose value would change the arithmetic to something this decoder does not do: key -> (harmless values, reason).
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "embed_layernorm": ((False, None), "a norm after the embedding is not supported"),
    "tie_word_embeddings": ((False, None), "a head tied to the embedding is not supported; TeleChat2 stores both"),
    "apply_residual_connection_post_layernorm": ((False, None), "a residual taken after the norm is not supported"),
    "model_type": (("telechat", "telechat2", None), "this converter reads TeleChat2, Tele-FLM and FLM"),
    "quantization_config": ((None,), "quantised weights are not supported; convert the unquantised release"),
}


_IDS = (
    Key("bos_token_id", ("bos_token_id",), int, 1),
    Key("eos_token_id", ("eos_token_id",), int, 2),
    Key("pad_token_id", ("pad_token_id",), int, 3),
)
# Nothing in these families follows the length of a row.
_LENGTHS = (Key("training_seqlen", (), int, "max_seqlen"), Key("base_seqlen", (), int, "max_seqlen"))
_QUANTISED = {"quantization_config": _UNSUPPORTED["quantization_config"]}
_MUP = {"use_mup": ((True, None), "a model of this family without muP multipliers is not supported")}

_TELECHAT2 = _Format(
    keys=_KEYS,
    refused=_UNSUPPORTED,
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
        Key("hidden_size", ("hidden_size",), int),
        Key("ffn_hidden_size", ("intermediate_size",), int),
        Key("num_layers", ("num_hidden_layers",), int),
        Key("num_heads", ("num_attention_heads",), int),
        Key("num_kv_heads", ("num_key_value_heads",), int, "num_heads"),
        Key("norm_eps", ("rms_norm_eps",), float),
        Key("rope_theta", ("rope_theta",), float, 10000.0),
        Key("max_seqlen", ("max_position_embeddings",), int),
        *_LENGTHS,
        Key("init_std", ("initializer_range",), float, 0.02),
        Key("input_mult", ("input_mult",), float),
        *_IDS,
    ),
    fixed=(("biases", "none"), ("position", "rope")),
    mup=True,
    refused={
        "attention_bias": ((False, None), "biases on Tele-FLM's attention are not supported"),
        "hidden_act": (("silu", None), "Tele-FLM's ffn is gated by silu"),
        "tie_word_embeddings": ((False, None), "a head tied to the embedding is not supported; Tele-FLM stores both"),
        **_MUP,
        **_QUANTISED,
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

_FLM = _Format(
    keys=(
        Key("vocab_size", ("vocab_size",), int),
        Key("hidden_size", ("n_embd",), int),
        Key("ffn_hidden_size", ("n_inner",), int),
        Key("num_layers", ("n_layer",), int),
        Key("num_heads", ("n_head",), int),
        Key("num_kv_heads", (), int, "num_heads"),
        Key("norm_eps", ("layer_norm_epsilon",), float),
        Key("rope_theta", ("rotary_theta",), float, 10000.0),
        Key("xpos_scale_base", ("rotary_xpos_scale_base",), float, 512.0),
        Key("max_seqlen", ("n_positions",), int),
        *_LENGTHS,
        Key("init_std", ("initializer_range",), float, 0.02),
        Key("input_mult", ("input_mult",), float),
        *_IDS,
    ),
    # FLM-101B's config has neither of the first two keys; its code has LayerNorm and biases (GPT-2's).
    switches=(
        _Switch("norm", "use_RMSNorm", ((False, "layernorm"), (True, "rmsnorm")), False),
        _Switch("biases", "add_bias_linear", ((True, "all"), (False, "none")), True),
        _Switch("activation", "activation_function", (("gelu_fast", "gelu"), ("gelu_new", "gelu"), ("silu", "swiglu"))),
        _Switch("position", "rotary_use_xpos", ((True, "xpos"), (False, "ntk-theta"))),
        # What transformers takes where a config does not say.
        _Switch("tied_embeddings", "tie_word_embeddings", ((True, True), (False, False)), True),
    ),
    mup=True,
    refused={
        "relative_encoding": (("rotary", None), "only rotary positions are supported"),
        "scale_attn_weights": ((True, None), "attention without its scale is not supported"),
        **_MUP,
        **_QUANTISED,
    },
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
_FORMATS = {"telechat2": _TELECHAT2, "teleflm": _TELEFLM, "flm": _FLM}
_OUTPUT = Key("logit_mult", ("output_mult",), float)
_WIDTHS = Key("logit_mult", ("mup_scale_factor",), float)


def family_of(released: dict[str, Any]) -> str:
    """The family whose format a config.json has; TeleChat-52B calls itself telechat but is written as FLM."""
    if released.get("model_type") == "TeleFLM":
        return "teleflm"
    return "flm" if released.get("model_type") == "flm" or "n_embd" in released else "telechat2"


def read_config(released: dict[str, Any], where: str) -> tuple[ModelConfig, list[str]]:
    """ModelConfig from the mapping in config.json, and notes on what was assumed or ignored.

    ``where`` (the file's path) starts every UserError: a missing or contradictory key, a wrong type, a feature that
    this decoder does not have.
    """
    family = family_of(released)
    form = _FORMATS[family]
    for name, (harmless, reason) in form.refused.items():
        if released.get(name) not in harmless:
            raise UserError(f"{where}: {name} is {released[name]!r}; {reason}")
    _check_rope_scaling(released.get("rope_scaling"), where)
    notes = []
    for name in ("hidden_dropout", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if released.get(name):
            notes.append(f"{name} {released[name]} is ignored: there is no dropout here")
    values: dict[str, Any] = {"family": family, **dict(form.fixed)}
    for key in form.keys:
        value = take(released, key, where)
        if value is None:
            if key.default is REQUIRED:
                raise UserError(f"{where}: {' or '.join(key.names)} is missing; it has no safe default, add it")
            value = values[key.default] if isinstance(key.default, str) else key.default
            if key.said:
                notes.append(f"{key.names[0]} is missing: {value} is taken, as the released code does")
        values[key.field] = value
    for switch in form.switches:
        values[switch.field] = _choose(released, switch, where)
    if values.get("position") == "ntk-theta":  # a number of the released code, whatever the config's lengths
        values |= {"training_seqlen": NTK_THETA_LENGTH, "base_seqlen": NTK_THETA_LENGTH}
    if form.mup:
        parts = [take(released, key, where) for key in (_OUTPUT, _WIDTHS)]
        if None in parts:
            absent = (_OUTPUT, _WIDTHS)[parts.index(None)].names[0]
            raise UserError(f"{where}: {absent} is missing; logits are multiplied by it, add it")
        values["logit_mult"] = parts[0] / parts[1]
    try:
        return from_mapping(ModelConfig, values, "model"), notes
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def write_config(config: ModelConfig, original: dict[str, Any] | None, dtype: str | None) -> dict[str, Any]:
    """The mapping for config.json.

    With ``original`` (the mapping once read) every key is kept and only what no longer agrees with ``config`` is
    changed; without, a config is made that vLLM and the released modelling code read. ``dtype`` (float32...) sets
    ``torch_dtype``; None leaves it. UserError for a model that its family's format cannot describe.
    """
    require_place(config, "hf")
    form = _FORMATS[config.family]
    result = dict(original) if original is not None else _fresh(config)
    if original is not None:
        before, _ = read_config(original, "config.json")
        for key in form.keys:
            value = getattr(config, key.field)
            if value != getattr(before, key.field):
                present = [name for name in key.names if name in original]
                result.update(dict.fromkeys(present or key.names[:1], value))
        for switch in form.switches:
            if getattr(config, switch.field) != getattr(before, switch.field):
                result[switch.name] = _released_choice(config, switch)
        if form.mup and config.logit_mult != before.logit_mult:
            result.update(output_mult=config.logit_mult, mup_scale_factor=1.0)
    if dtype is not None:
        # transformers 4.56 renamed the key; a config that has only the new one keeps it.
        result["dtype" if "dtype" in result and "torch_dtype" not in result else "torch_dtype"] = dtype
    return result


def dump_config(released: dict[str, Any]) -> str:
    """The text of config.json."""
    return json.dumps(released, indent=2, ensure_ascii=False) + "\n"


def _fresh(config: ModelConfig) -> dict[str, Any]:
    form = _FORMATS[config.family]
    result = {
        **form.fresh,
        **{key.names[0]: getattr(config, key.field) for key in form.keys if key.names},
        **{switch.name: _released_choice(config, switch) for switch in form.switches},
    }
    if form.mup:
        result.update(output_mult=config.logit_mult, mup_scale_factor=1.0)
    if config.family == "telechat2":
        result["max_position_embeddings"] = config.max_seqlen
        # Llama's names for the same, which the GGUF converter of the release reads and others fall back on.
        result |= {name: getattr(config, key.field) for key in form.keys for name in key.names[1:] if name in _LLAMA}
    if config.family == "flm" and config.norm == "rmsnorm":  # TeleChat-52B
        result.update(architectures=["TELECHAT"], model_type="telechat")
    return result


def _choose(released: dict[str, Any], switch: _Switch, where: str) -> Any:
    """Our value for what a release chose."""
    value = released.get(switch.name)
    if value is None:
        if switch.default is REQUIRED:
            raise UserError(f"{where}: {switch.name} is missing; it has no safe default, add it")
        value = switch.default
    for theirs, ours in switch.values:
        if type(value) is type(theirs) and value == theirs:
            return ours
    legal = ", ".join(repr(theirs) for theirs, _ in switch.values)
    raise UserError(f"{where}: {switch.name} is {value!r}; supported are {legal}")


def _released_choice(config: ModelConfig, switch: _Switch) -> Any:
    """What the release calls our value."""
    mine = getattr(config, switch.field)
    return next(theirs for theirs, ours in switch.values if ours == mine)


def take(released: dict[str, Any], key: Key, where: str) -> Any:
    """The value of a key under any of its names, None if absent or null."""
    given = {name: released[name] for name in key.names if released.get(name) is not None}
    for name, value in given.items():
        fits = type(value) is int or (key.kind is float and type(value) is float)
        if not fits:
            raise UserError(f"{where}: {name} should be a {'whole ' * (key.kind is int)}number, found {value!r}")
        if not math.isfinite(value):
            raise UserError(f"{where}: {name} is {value}, which is no number to work with")
        if value < 0 or (value == 0 and not name.endswith("_token_id")):
            raise UserError(f"{where}: {name} must be above 0, found {value}")
    # max_position_embeddings may exceed seq_length, which names the trained length; the first name counts.
    if len(set(given.values())) > 1 and key.field != "max_seqlen":
        raise UserError(f"{where}: {' and '.join(f'{n} {v}' for n, v in given.items())} contradict each other")
    return key.kind(next(iter(given.values()))) if given else None


def _check_rope_scaling(scaling: Any, where: str) -> None:
    """The released NTK scaling follows the sequence lengths; a factor other than 1 asks for something else."""
    if scaling is None:
        return
    if not isinstance(scaling, dict) or scaling.get("factor", 1.0) != 1.0:
        raise UserError(
            f"{where}: rope_scaling {scaling!r} is not supported; TeleChat2's NTK scaling follows training_seqlen and "
            "base_seqlen, remove rope_scaling to use it"
        )
