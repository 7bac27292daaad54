"""adapter_config.json of PEFT's LoRA: which keys are honoured, which change nothing here, and which are refused.

Read as PEFT 0.21.2 applies it (peft/tuners/lora/config.py, model.py; peft/utils/other.py: get_pattern_key;
peft/tuners/tuners_utils.py: check_target_module_exists). Every key is in one of the tables below; one in none of them
is refused unless it is empty.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from telechat_twins.convert.hf.expression import expression_cost, matches, matches_ending
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import MAX_WIDTH
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

CONFIG = "adapter_config.json"
ALL_LINEAR = "all-linear"
MAX_PATTERN = 1000  # characters of a regular expression
MAX_COST = 2000  # of the expressions of one key (convert.hf.expression): a second for a model of hundreds of layers
_LAYERS = re.compile(r"\w{1,100}")  # of layers_pattern: a name, as PEFT's own are
# Where PEFT finds a layer's number, behind a name of layers_pattern, and without one.
_BEFORE_LAYER, _ANY_LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", r".*?\.[^.]*\.(?P<idx>\d+)\."

# Of the run that made the adapter, of the file itself, or of how training computes: nothing to do with B A x.
_HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "velora_config",
)  # fmt: skip
_HONOURED = (
    "alpha_pattern", "exclude_modules", "fan_in_fan_out", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "peft_type", "r", "rank_pattern", "target_modules", "task_type", "use_rslora",
)  # fmt: skip
# Key -> why an adapter with it cannot be held; the values null, false, "none" and empty ones pass.
_REFUSED = {
    "use_dora": "DoRA also scales every row of the weight by a trained magnitude; merge it with PEFT and convert the "
    "model",
    "bias": "biases of the model were trained as well; merge it with PEFT and convert the model",
    "lora_bias": "B has a bias; merge it with PEFT and convert the model",
    "modules_to_save": "whole modules were trained beside the adapter; merge it with PEFT and convert the model",
    "trainable_token_indices": "rows of the embedding were trained; merge it with PEFT and convert the model",
    "target_parameters": "parameters that are no linear layer's weight have adapters",
    "layer_replication": "the model's layers are repeated, which is another model",
    "use_qalora": "QALoRA averages the inputs of A in groups",
    "alora_invocation_tokens": "aLoRA acts only after certain tokens",
    "megatron_config": "its layers are Megatron's",
    "monteclora_config": "MonteCLoRA draws its adapters at random",
    "use_bdlora": "BD-LoRA's A or B are block-diagonal and stored otherwise",
    "arrow_config": "Arrow routes tokens among several adapters",
    "kasa_config": "KaSA takes singular values off the base's weights and puts a diagonal between A and B",
}
# Initialisations that leave the base as it is; the others take the adapter's first value off the base's weights, so
# the adapter is of no use on the base that was released.
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION", None)


@dataclass(frozen=True)
class PeftConfig:
    """What of an adapter_config.json decides the result. ``notes``: what was assumed."""

    r: int
    alpha: float
    dropout: float
    rslora: bool
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def targets(self, module: str) -> bool:
        """Whether PEFT puts an adapter on a linear layer of this name; ``all-linear`` leaves the head out."""
        if _named(self.exclude_modules, module):
            return False
        if self.target_modules == ALL_LINEAR:
            return not re.fullmatch(r"(.*\.)?lm_head", module)
        if not _named(self.target_modules, module):
            return False
        if isinstance(self.target_modules, str) or module in self.target_modules or not self.layers:
            return True
        return _layer(module, self.layers_pattern) in self.layers

    def rank(self, module: str) -> int:
        return self.rank_pattern.get(_first_match(self.rank_pattern, module), self.r)

    def scaled_alpha(self, module: str) -> float:
        """The rank times what B A x is multiplied by: alpha, and with rank-stabilised LoRA alpha sqrt(rank)."""
        alpha = self.alpha_pattern.get(_first_match(self.alpha_pattern, module), self.alpha)
        return alpha * math.sqrt(self.rank(module)) if self.rslora else alpha


def read_peft_config(values: JsonObject, where: str) -> PeftConfig:
    """The checked config; UserError names ``where``, the key, and what to do."""
    notes = _check_keys(values, where)
    defaults = {"r": 8, "lora_alpha": 8}
    for name, value in defaults.items():
        if values.get(name) is None:
            notes.append(f"{where}: {name} is missing: {value}, PEFT's default")
    target = values.get("target_modules")
    if not target or not isinstance(target, (str, list)):
        raise UserError(
            f"{where}: target_modules: must name the adapted layers, found {shown(target)}; restore the file"
        )
    layers = values.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) and not isinstance(layers, bool) else layers or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise UserError(f"{where}: layers_to_transform: expected layer numbers, found {shown(layers)}")
    if layers and isinstance(target, str):
        raise UserError(
            f"{where}: layers_to_transform: acts only where target_modules is a list, found {shown(target)}; write the "
            "layers into that expression"
        )
    return PeftConfig(
        r=_rank(defaults["r"] if values.get("r") is None else values["r"], f"{where}: r"),
        alpha=_alpha(defaults["lora_alpha"] if values.get("lora_alpha") is None else values["lora_alpha"], where),
        dropout=_dropout(values.get("lora_dropout") or 0.0, where),
        rslora=values.get("use_rslora") is True,
        target_modules=_names(target, f"{where}: target_modules"),
        exclude_modules=_names(values.get("exclude_modules") or [], f"{where}: exclude_modules"),
        layers=tuple(layers),
        layers_pattern=_layer_patterns(values.get("layers_pattern"), f"{where}: layers_pattern"),
        rank_pattern={k: _rank(v, f"{where}: rank_pattern: {k}") for k, v in _patterns(values, "rank_pattern", where)},
        alpha_pattern={
            k: _alpha(v, where, f"alpha_pattern: {k}") for k, v in _patterns(values, "alpha_pattern", where)
        },
        notes=tuple(notes),
    )


def _check_keys(values: JsonObject, where: str) -> list[str]:
    """UserError for a key that asks for what is not done here; notes on unknown keys that are empty."""
    kind = values.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{where}: peft_type: only LORA is read, found {shown(kind)}; merge it with PEFT")
    if values.get("task_type") not in _TASKS:
        raise UserError(
            f"{where}: task_type: must be CAUSAL_LM, found {shown(values['task_type'])}: another model's head"
        )
    for name, why in _REFUSED.items():
        if (value := values.get(name)) not in (None, False, "none", [], {}):
            raise UserError(f"{where}: {name}: {shown(value)} is not taken over: {why}")
    init = values.get("init_lora_weights", True)
    if init not in _PLAIN_INIT or (isinstance(init, int) and not isinstance(init, bool)):
        raise UserError(
            f"{where}: init_lora_weights: {shown(init)} changes the base's weights before training, so the adapter "
            "does not fit the released base; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    for name in ("use_rslora", "fan_in_fan_out"):
        if (value := values.get(name)) is not None and not isinstance(value, bool):  # PEFT takes 1 for true
            raise UserError(f"{where}: {name}: expected true or false, found {shown(value)}")
    notes = []
    for name, value in values.items():
        if name in _HARMLESS or name in _HONOURED or name in _REFUSED:
            continue
        if value not in (None, False, [], {}):
            raise UserError(
                f"{where}: {name}: {shown(value)} is unknown here, and may change the result; if it does not, remove it"
            )
        notes.append(f"{where}: {name} is unknown here, and empty")
    return notes


def _patterns(values: JsonObject, name: str, where: str) -> list[tuple[str, object]]:
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise UserError(f"{where}: {name}: expected layer names with numbers, found {shown(found)}")
    _check_expressions(found, f"{where}: {name}")
    return list(found.items())


def _layer_patterns(found: object, where: str) -> tuple[str, ...]:
    patterns = [found] if isinstance(found, str) and found else found or []
    if not isinstance(patterns, list):
        raise UserError(f"{where}: expected names of the list of layers, found {shown(found)}")
    for text in patterns:
        if not isinstance(text, str) or not _LAYERS.fullmatch(text):
            raise UserError(f"{where}: expected names of at most 100 letters, digits and _, found {shown(text)}")
    return tuple(patterns)


def _names(found: object, where: str) -> str | tuple[str, ...]:
    if isinstance(found, str):
        if found != ALL_LINEAR:
            _check_expressions([found], where)
        return found
    if not isinstance(found, list) or not all(isinstance(name, str) and name for name in found):
        raise UserError(f"{where}: expected names of layers or one expression, found {shown(found)}")
    return tuple(found)


def _check_expressions(texts: Iterable[object], where: str) -> None:
    """UserError unless all are regular expressions whose match takes a bounded time (convert.hf.expression)."""
    cost = 0
    for text in texts:
        if not isinstance(text, str) or len(text) > MAX_PATTERN:
            raise UserError(
                f"{where}: expected a regular expression of at most {MAX_PATTERN} characters, found {shown(text)}"
            )
        try:
            cost += expression_cost(text)
        except ValueError as error:
            raise UserError(f"{where}: {shown(text)} {error}; name the layers in another way") from None
    if cost > MAX_COST:
        raise UserError(
            f"{where}: its expressions repeat too much (cost {cost}, at most {MAX_COST}); name the layers "
            "in another way"
        )


def _rank(value: object, where: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_WIDTH:
        raise UserError(f"{where}: must be a whole number from 1 to {MAX_WIDTH}, found {shown(value)}")
    return value


def _alpha(value: object, where: str, name: str = "lora_alpha") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise UserError(f"{where}: {name}: must be a number above 0, found {shown(value)}")
    return float(value)


def _dropout(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 0.99:
        raise UserError(f"{where}: lora_dropout: must be a share from 0 to 0.99, found {shown(value)}")
    return float(value)


def idle_patterns(settings: PeftConfig, modules: Iterable[str], where: str) -> list[str]:
    """Notes on patterns that no adapted layer among ``modules`` takes its rank or alpha from."""
    named, notes = list(modules), []
    for key, patterns in (("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)):
        used = {_first_match(patterns, module) for module in named}
        notes += [
            f"{where}: {key}: {shown(one)} applies to no layer with an adapter, as in PEFT, and changes nothing"
            for one in patterns
            if one not in used
        ]
    return notes


def _named(names: str | Sequence[str], module: str) -> bool:
    """PEFT's rule: an expression for the whole name, or a list of names or of their last parts."""
    if isinstance(names, str):
        return matches(names, module)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _layer(module: str, patterns: Sequence[str]) -> int | None:
    """The layer number in a module's name: behind one of ``patterns``, or the first number between two dots."""
    for found in [_BEFORE_LAYER.format(name) for name in patterns] or [_ANY_LAYER]:
        if match := re.match(found, module):
            return int(match["idx"])
    return None


def _first_match(patterns: Mapping[str, object], module: str) -> str:
    """The key that applies: the first in file order that matches the end of the name (PEFT's get_pattern_key)."""
    return next((key for key in patterns if matches_ending(key, module)), module)
