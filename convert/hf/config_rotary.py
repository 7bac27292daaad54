"""The rotary base and its scaling in config.json, under every name they go by.

Up to transformers 4 the base is ``rope_theta`` beside ``rope_scaling``; transformers 5 writes both into
``rope_parameters``, some models with a mapping for each type of layer in it. FLM's own name is ``rotary_theta``.
"""

from __future__ import annotations

from collections.abc import Iterator

from telechat_twins.convert.hf.config_keys import agreed, number
from telechat_twins.convert.hf.config_yarn import LENGTH, SCALES, kind_of, read_yarn
from telechat_twins.core.errors import UserError
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

THETA_NAMES = ("rope_theta", "rotary_theta", "rope_base", "rotary_base", "rotary_emb_base", "theta")
SECTIONS = ("rope_parameters", "rope_scaling")
# Of a section, besides the base and the type: entry -> what changes nothing. None: any value, since only types that are
# refused read the entry.
_NEUTRAL: dict[str, tuple[object, ...] | None] = {
    "factor": (1, None),
    "partial_rotary_factor": (1, None),
    "attention_factor": (1, None),
    LENGTH: None,
    "max_position_embeddings": None,
    "finetuned": None,
}


def read_theta(released: JsonObject, position: str, where: str) -> float | None:
    """The rotary base, None if no name gives it; UserError for names that contradict each other, and for a scaling that
    a model with this ``position`` (of ModelConfig) does not have."""
    given = {name: released[name] for name in THETA_NAMES if released.get(name) is not None}
    for path, section in _sections(released, where):
        if position != "yarn" or kind_of(section) not in SCALES:
            _check_section(section, path, position, where)
        given |= {f"{path}.{name}": section[name] for name in THETA_NAMES if section.get(name) is not None}
    return agreed({name: number(value, float, name, where) for name, value in given.items()}, where)


def read_position(released: JsonObject, where: str) -> JsonObject:
    """Fields of ModelConfig that say how a model of Llama's format rotates, the base aside."""
    return read_yarn(_sections(released, where), THETA_NAMES, released.get(LENGTH), where)


def write_theta(released: JsonObject, theta: float, name: str) -> None:
    """Give ``released`` another rotary base, under each name that it has; under ``name`` if it has none."""
    places = [(released, key) for key in THETA_NAMES if key in released]
    for key in SECTIONS:
        if isinstance(section := released.get(key), dict):
            released[key] = {k: dict(v) if isinstance(v, dict) else v for k, v in section.items()}
    for _, section in _sections(released, "config.json"):
        places += [(section, key) for key in THETA_NAMES if key in section]
    for place, key in places or [(released, name)]:
        place[key] = theta


def _sections(released: JsonObject, where: str) -> Iterator[tuple[str, JsonObject]]:
    """(path, mapping) of every section: the two names, and each type of layer in them."""
    for name in SECTIONS:
        section = released.get(name)
        if section is None or section == {}:
            continue
        if not isinstance(section, dict):
            raise UserError(f"{where}: {name} should be a mapping or null, found {section!r}")
        nested = [key for key, value in section.items() if isinstance(value, dict)]
        for key in nested:
            yield f"{name}.{key}", section[key]
        if len(nested) < len(section):
            yield name, {key: value for key, value in section.items() if key not in nested} if nested else section


def _check_section(section: JsonObject, path: str, position: str, where: str) -> None:
    kind = agreed({f"{path}.{k}": section[k] for k in ("rope_type", "type") if _text(section, k, path, where)}, where)
    harmless = {"default", "linear"} | ({"dynamic"} if position == "ntk" else set())
    if kind is not None and kind not in harmless:
        _refuse(f"{path} {shown(section)}", position, where)
    for name, value in section.items():
        if name in ("rope_type", "type", *THETA_NAMES):
            continue
        if name not in _NEUTRAL:
            _refuse(f"{path}.{name} {shown(value)}", position, where)
        neutral = _NEUTRAL[name]
        if neutral is not None and (isinstance(value, bool) or value not in neutral):
            _refuse(f"{path} {shown(section)}", position, where)


def _text(section: JsonObject, name: str, path: str, where: str) -> str | None:
    value = section.get(name)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {path}.{name} should be text, found {value!r}")
    return value


def _refuse(what: str, position: str, where: str) -> None:
    reason = (
        "read are plain rotations, YaRN in Llama's format, and the scalings of the families' own code; a model "
        "that was trained with another one computes something else without it"
    )
    if position == "ntk":
        reason = "TeleChat2's NTK scaling follows training_seqlen and base_seqlen, remove it to use that"
    raise UserError(f"{where}: {what} is not supported; {reason}")
