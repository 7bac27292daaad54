"""config.json of a TeleChat2 release <-> ModelConfig.

Two generations of released code use slightly different keys; each row of the table lists the names one field goes by.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from core.config import ModelConfig
from core.errors import UserError
from core.schema import from_mapping

_REQUIRED = object()


@dataclass(frozen=True)
class _Key:
    """A field of ModelConfig, the released names it goes by (the first is written), its type, and its default.

    The default is a number, or the name of another field, or required. ``said`` defaults are reported as a note.
    """

    field: str
    names: tuple[str, ...]
    kind: type
    default: Any = _REQUIRED
    said: bool = False


_KEYS = (
    _Key("vocab_size", ("vocab_size",), int),
    _Key("hidden_size", ("hidden_size", "n_embed"), int),
    _Key("ffn_hidden_size", ("ffn_hidden_size", "intermediate_size"), int),
    _Key("num_layers", ("n_layer", "num_hidden_layers"), int),
    _Key("num_heads", ("n_head", "num_attention_heads"), int),
    _Key("num_kv_heads", ("num_key_value_heads",), int, "num_heads"),
    # 1e-8 in one published copy of the 115B, 1e-5 in others: a guess would be wrong half of the time.
    _Key("norm_eps", ("layer_norm_epsilon", "rms_norm_eps"), float),
    # The 115B's own code knows no rope_theta and uses 10000; the 7B-32K config carries 1e6.
    _Key("rope_theta", ("rope_theta",), float, 10000.0),
    _Key("training_seqlen", ("training_seqlen",), int, 8192, said=True),
    _Key("base_seqlen", ("base_seqlen",), int, 8192, said=True),
    _Key("max_seqlen", ("seq_length", "max_position_embeddings"), int, "training_seqlen"),
    _Key("init_std", ("initializer_range",), float, 0.02),
    _Key("bos_token_id", ("bos_token_id",), int, 1),
    _Key("eos_token_id", ("eos_token_id",), int, 2),
    _Key("pad_token_id", ("pad_token_id",), int, 3),
)

# Keys whose value would change the arithmetic to something this decoder does not do: key -> (harmless values, reason).
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "embed_layernorm": ((False, None), "a norm after the embedding is not supported"),
    "tie_word_embeddings": ((False, None), "a head tied to the embedding is not supported; TeleChat2 stores both"),
    "apply_residual_connection_post_layernorm": ((False, None), "a residual taken after the norm is not supported"),
    "model_type": (("telechat", "telechat2", None), "this converter reads TeleChat2"),
    "quantization_config": ((None,), "quantised weights are not supported; convert the unquantised release"),
}


def read_config(released: dict[str, Any], where: str) -> tuple[ModelConfig, list[str]]:
    """ModelConfig from the mapping in config.json, and notes on what was assumed or ignored.

    ``where`` (the file's path) starts every UserError: a missing or contradictory key, a wrong type, a feature that
    this decoder does not have.
    """
    for name, (harmless, reason) in _UNSUPPORTED.items():
        if released.get(name) not in harmless:
            raise UserError(f"{where}: {name} is {released[name]!r}; {reason}")
    _check_rope_scaling(released.get("rope_scaling"), where)
    notes = []
    for name in ("hidden_dropout", "attention_dropout"):
        if released.get(name):
            notes.append(f"{name} {released[name]} is ignored: there is no dropout here")
    values: dict[str, Any] = {}
    for key in _KEYS:
        value = _take(released, key, where)
        if value is None:
            if key.default is _REQUIRED:
                raise UserError(f"{where}: {' or '.join(key.names)} is missing; it has no safe default, add it")
            value = values[key.default] if isinstance(key.default, str) else key.default
            if key.said:
                notes.append(f"{key.names[0]} is missing: {value} is taken, as the released code does")
        values[key.field] = value
    try:
        return from_mapping(ModelConfig, values, "model"), notes
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def write_config(config: ModelConfig, original: dict[str, Any] | None, dtype: str | None) -> dict[str, Any]:
    """The mapping for config.json.

    With ``original`` (the mapping once read) every key is kept and only what no longer agrees with ``config`` is
    changed; without, a config is made that vLLM and the released modelling code read. ``dtype`` (float32...) sets
    ``torch_dtype``; None leaves it.
    """
    result = dict(original) if original is not None else _fresh(config)
    if original is not None:
        before, _ = read_config(original, "config.json")
        for key in _KEYS:
            value = getattr(config, key.field)
            if value != getattr(before, key.field):
                present = [name for name in key.names if name in original]
                result.update(dict.fromkeys(present or key.names[:1], value))
    if dtype is not None:
        # transformers 4.56 renamed the key; a config that has only the new one keeps it.
        result["dtype" if "dtype" in result and "torch_dtype" not in result else "torch_dtype"] = dtype
    return result


def dump_config(released: dict[str, Any]) -> str:
    """The text of config.json."""
    return json.dumps(released, indent=2, ensure_ascii=False) + "\n"


def _fresh(config: ModelConfig) -> dict[str, Any]:
    """No auto_map: it would name code files that are not in the folder. vLLM knows this architecture by itself."""
    return {
        "architectures": ["TeleChat2ForCausalLM"],
        "model_type": "telechat",
        **{key.names[0]: getattr(config, key.field) for key in _KEYS},
        "max_position_embeddings": config.max_seqlen,
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
    }


def _take(released: dict[str, Any], key: _Key, where: str) -> Any:
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
