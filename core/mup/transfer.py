"""muP transfer rules: hyper-parameters of a narrow model for a model of another width.

r is the ratio of the widths. The rules are those of table 8 of Tensor Programs V (Yang et al., arXiv 2203.03466), as in
mup, Mu-scaling and Megatron-LM: embeddings and head keep learning rate and standard deviation, and logits are divided
by r. Depth, data, batch and schedule must be the same; the head size is kept, and with it the attention scale.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from telechat_twins.core.config import OptimConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.types import JsonObject

DIGITS = 12  # of a transferred value: more than a search determines, few enough to hide rounding of the division


@dataclass(frozen=True)
class TransferRule:
    """Rule that multiplies ``option`` (section.name) by r ** ``power``; an unset option has ``default``'s value."""

    what: str
    option: str
    power: float
    default: str = ""

    @property
    def text(self) -> str:
        return {0.0: "same", 1.0: "x r", -1.0: "/ r", -0.5: "/ sqrt(r)"}[self.power]


RULES = (
    TransferRule("learning rate", "optim.lr", 0.0),
    TransferRule("matrix learning rate", "optim.matrix_lr", -1.0, "optim.lr"),
    TransferRule("minimum learning rate", "optim.min_lr", 0.0),
    TransferRule("standard deviation", "model.init_std", 0.0),
    TransferRule("matrix standard deviation", "model.matrix_init_std", -0.5, "model.init_std"),
    TransferRule("input multiplier", "model.input_mult", 0.0),
    TransferRule("logit multiplier", "model.logit_mult", -1.0),
    TransferRule("weight decay", "optim.weight_decay", 0.0),
    # Decoupled weight decay acts through rate x decay, which this rule keeps constant.
    TransferRule("matrix weight decay", "optim.matrix_weight_decay", 1.0, "optim.weight_decay"),
)


# Options that depend on the width or have a rule; all other options of a model are the same at all widths.
_WIDTH = ("hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads", "num_layers", "head_dim")
_OWN = {*_WIDTH, *(rule.option.removeprefix("model.") for rule in RULES)}


def value_of(rule: TransferRule, model: ModelConfig, optim: OptimConfig) -> float:
    """The value of a rule's option in a config, or that of its default."""
    sections = {"model": model, "optim": optim}
    for option in (rule.option, rule.default):
        section, _, name = option.partition(".")
        value = getattr(sections[section], name)
        if value is not None:
            return float(value)
    raise ValueError(f"{rule.option} has no value and no default")


def transfer(model: ModelConfig, optim: OptimConfig, target: ModelConfig) -> tuple[ModelConfig, OptimConfig]:
    """``target`` and ``optim`` with the hyper-parameters of ``model`` and ``optim`` transferred to the target's width.

    At the same width all values are unchanged, so a narrow model and its transfer are the same run bit for bit.
    """
    r = target.hidden_size / model.hidden_size
    changes: dict[str, JsonObject] = {"model": {}, "optim": {}}
    sections: JsonObject = {"model": model, "optim": optim}
    for rule in RULES:
        section, _, name = rule.option.partition(".")
        value = getattr(sections[section], name)
        if r != 1.0 and rule.power:
            value = float(f"{value_of(rule, model, optim) * r**rule.power:.{DIGITS}g}")
        changes[section][name] = value
    return dataclasses.replace(target, **changes["model"]), dataclasses.replace(optim, **changes["optim"])


def at_width(model: ModelConfig, width: int, ffn: int | None = None) -> ModelConfig:
    """``model`` at another width: more or fewer heads of the same size and grouping, and an ffn in proportion.

    ``ffn``: width of the ffn, if it is not to be in proportion. Hyper-parameters are unchanged (see ``transfer``).
    UserError for a width that is not a multiple of the heads' or has no whole ffn width.
    """
    heads, rest = divmod(width, model.head_dim)
    group = model.num_heads // model.num_kv_heads
    step = model.head_dim * group
    if width < 1 or rest or heads % group:
        what = f"head size {model.head_dim}" + (f" x {group} heads that share keys" if group > 1 else "")
        raise UserError(f"width {width}: must be a multiple of {step} ({what}); nearest: {_nearest(width, step)}")
    if ffn is None:
        ffn, rest = divmod(model.ffn_hidden_size * width, model.hidden_size)
        if rest:
            step = model.hidden_size // math.gcd(model.ffn_hidden_size, model.hidden_size)
            step = math.lcm(step, model.head_dim * group)
            raise UserError(
                f"width {width}: an ffn in proportion ({model.ffn_hidden_size} at width {model.hidden_size}) must have "
                f"a whole width; give one by --ffn, or take a multiple of {step}, nearest: {_nearest(width, step)}"
            )
    sizes = {"hidden_size": width, "ffn_hidden_size": ffn, "num_heads": heads, "num_kv_heads": heads // group}
    return load_model_config({**model.to_dict(), **sizes}, f"width {width}")


def warnings(model: ModelConfig, target: ModelConfig) -> list[str]:
    """Differences between ``target`` and ``model`` beyond the width, which muP's rules do not cover."""
    found = []
    if model.num_layers != target.num_layers:
        found.append(
            f"depth {model.num_layers} -> {target.num_layers}: muP has no rule for depth; "
            "the narrow model should have as many layers as the wide one"
        )
    if model.head_dim != target.head_dim:
        found.append(
            f"head size {model.head_dim} -> {target.head_dim}: the attention scale is correct for one head size only"
        )
    group, other = (one.num_heads // one.num_kv_heads for one in (model, target))
    if group != other:
        found.append(f"query heads per kv head {group} -> {other}: not a difference in width")
    ratio = target.ffn_hidden_size * model.hidden_size / (model.ffn_hidden_size * target.hidden_size)
    if abs(ratio - 1) > 1e-9:
        found.append(f"the ffn grows {ratio:.3f} times as much as the hidden size, by whose ratio the rules transfer")
    ours, theirs = model.to_dict(), target.to_dict()
    differing = [f"{n} {ours[n]} -> {theirs[n]}" for n in ours if n not in _OWN and ours[n] != theirs[n]]
    if differing:
        found.append(f"{', '.join(differing)}: not a difference in width")
    return found


def _nearest(width: int, step: int) -> int:
    return max(step, round(width / step) * step)
