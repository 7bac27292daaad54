"""YaRN's section of config.json: TeleChat3's ``telechat3-yarn``, and the ``yarn`` of transformers, vLLM and others.

TeleChat3's type says how cos and sin are scaled by itself: 0.07 * ln(factor) + 1. The general type has 0.1 there;
transformers takes another scale from ``attention_factor``, vLLM from ``attn_factor``, which it multiplies by 0.1 *
ln(factor) + 1. What is written here holds both, so that either computes what this decoder does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from telechat_twins.convert.hf.config_keys import agreed, number
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

TELECHAT3, GENERAL = "telechat3-yarn", "yarn"
SCALES = {TELECHAT3: 0.07, GENERAL: 0.1}  # of ln(factor)
FIELDS = ("position", "yarn_factor", "yarn_fast", "yarn_slow", "yarn_mscale")
LENGTH = "original_max_position_embeddings"
# Entry of a section -> field of ModelConfig.
_ENTRIES = {
    "factor": "yarn_factor",
    LENGTH: "base_seqlen",
    "beta_fast": "yarn_fast",
    "beta_slow": "yarn_slow",
}
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "truncate": (True, None),
    "extrapolation_factor": (1, 1.0, None),
    "partial_rotary_factor": (1, 1.0, None),
    "mscale": (None,),
    "mscale_all_dim": (None,),
    "finetuned": (True, False, None),
    "max_position_embeddings": (None,),
}


def kind_of(section: Mapping[str, object]) -> str | None:
    """The type of a section under either name; None where it has none that is a text."""
    kind = section.get("type") if section.get("rope_type") is None else section["rope_type"]
    return kind if isinstance(kind, str) else None


def read_yarn(
    sections: Iterable[tuple[str, JsonObject]], theta_names: Iterable[str], length: object, where: str
) -> JsonObject:
    """Fields of ModelConfig from the sections of a config.json, each with its path; ``position`` rope without any.

    ``length``: what stands under the name of the original length outside of them, where transformers 5 looks first.
    UserError for an entry that would change the arithmetic and has no field, and for sections that contradict.
    """
    found = {path: _read_section(section, path, set(theta_names), where) for path, section in sections if len(section)}
    values: JsonObject = {}
    for name in dict.fromkeys(name for one in found.values() for name in one):
        values[name] = agreed({f"{path}: {name}": one.get(name) for path, one in found.items()}, where)
    if "base_seqlen" in values and length is not None:
        agreed(
            {LENGTH: number(length, int, LENGTH, where), f"{next(iter(found))}.{LENGTH}": values["base_seqlen"]}, where
        )
    return values or {"position": "rope"}


def _read_section(section: JsonObject, path: str, theta_names: set[str], where: str) -> JsonObject:
    kind = kind_of(section)
    if kind not in SCALES:
        return {"position": "rope"}  # checked with the rotary base
    if section.get("type") not in (kind, None):
        raise UserError(f"{where}: {path}: rope_type {kind} and type {shown(section['type'])} contradict each other")
    values: JsonObject = {"position": "yarn"}
    for name, field in _ENTRIES.items():
        given = section.get(name)
        if given is None and field in ("yarn_factor", "base_seqlen"):
            raise UserError(f"{where}: {path}.{name} is missing; YaRN needs it, add it")
        if given is not None:
            values[field] = number(given, int if field == "base_seqlen" else float, f"{path}.{name}", where)
    for name, value in section.items():
        if name in ("rope_type", "type", "attention_factor", "attn_factor", *_ENTRIES, *theta_names):
            continue
        if not any(type(value) is type(harmless) and value == harmless for harmless in _NEUTRAL.get(name, ())):
            way = "write the scale as attention_factor" if "mscale" in name else "remove it if it changes nothing"
            raise UserError(f"{where}: {path}.{name} {shown(value)} is not supported; {way}")
    values["yarn_mscale"] = _mscale(section, str(kind), values["yarn_factor"], path, where)
    return values


def _mscale(section: JsonObject, kind: str, factor: float, path: str, where: str) -> float:
    """The number before ln(factor): the type's own, or what attention_factor or attn_factor say."""
    logarithm = math.log(factor) if factor > 1.0 else 0.0
    scales = {}
    for name, unit in (("attention_factor", 1.0), ("attn_factor", SCALES[kind] * logarithm + 1.0)):
        if section.get(name) is not None:
            scales[name] = unit * number(section[name], float, f"{path}.{name}", where)
    if not scales:
        return SCALES[kind]
    first = next(iter(scales.values()))
    if any(abs(scale - first) > 1e-9 * first for scale in scales.values()):
        said = " and ".join(f"{name} {section[name]}" for name in scales)
        raise UserError(f"{where}: {path}: {said} contradict each other")
    known = next((x for x in SCALES.values() if abs(x * logarithm + 1.0 - first) <= 1e-12 * first), None)
    if known is not None:
        return known
    if logarithm == 0.0 or first < 1.0:
        raise UserError(f"{where}: {path}: a scale of {first:g} at factor {factor:g} is not supported")
    return (first - 1.0) / logarithm


def section_of(config: ModelConfig) -> JsonObject:
    """The section of a fresh config.json, for transformers and vLLM."""
    logarithm = math.log(config.yarn_factor)
    scale = config.yarn_mscale * logarithm + 1.0
    return {
        "rope_type": GENERAL,
        "rope_theta": config.rope_theta,
        **{name: getattr(config, field) for name, field in _ENTRIES.items()},
        "attention_factor": scale,
        "attn_factor": scale / (SCALES[GENERAL] * logarithm + 1.0),
    }
