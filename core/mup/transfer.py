"""muP transfer rules: hyper-parameters of a narrow model carried over to another width.

r is the ratio of the widths. The form is that of table 8 of Tensor Programs V (Yang et al., arXiv 2203.03466), which
mup, Mu-scaling and Megatron-LM have too: embeddings and head keep rate and deviation, and the logits are divided by r.
Depth, data, batch and schedule must be the same; the head size stays, and with it attention's scale.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from telechat_twins.core.config import OptimConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.types import JsonObject

DIGITS = 12  # of a transferred number: more than any search finds, fewer than a division leaves behind


@dataclass(frozen=True)
class TransferRule:
    """``option`` (section.name) is multiplied by r ** ``power``; one without a value has that of ``default``."""

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
    # Decoupled decay acts through rate x decay, which so stays what it was.
    TransferRule("matrix weight decay", "optim.matrix_weight_decay", 1.0, "optim.weight_decay"),
)


# What a width or a rule of its own may change; everything else of a model is the same at all widths.
_WIDTH = ("hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads", "num_layers", "head_dim")
_OWN = {*_WIDTH, *(rule.option.removeprefix("model.") for rule in RULES)}


def value_of(rule: TransferRule, model: ModelConfig, optim: OptimConfig) -> float:
    """The number of a rule's option in a config, where it has none that of its default."""
    sections = {"model": model, "optim": optim}
    for option in (rule.option, rule.default):
        section, _, name = option.partition(".")
        value = getattr(sections[section], name)
        if value is not None:
            return float(value)
    raise ValueError(f"{rule.option} has no value and no default")


def transfer(model: ModelConfig, optim: OptimConfig, target: ModelConfig) -> tuple[ModelConfig, OptimConfig]:
    """``target`` and ``optim`` with the hyper-parameters of ``model`` and ``optim``, carried over to target's width.

    At the same width nothing changes, so that a narrow model and its own transfer are the same run bit for bit.
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
    """The shape of ``model`` at another width: more or fewer heads of the same size and grouping, ffn in proportion.

    ``ffn``: its width, where it is not to be in proportion. Hyper-parameters stay; ``transfer`` changes them. Raises
    UserError for a width that the heads or the ffn cannot have.
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
                f"width {width}: an ffn of {model.ffn_hidden_size} at {model.hidden_size} has no whole width there; "
                f"say which with --ffn, or take a multiple of {step}, nearest: {_nearest(width, step)}"
            )
    sizes = {"hidden_size": width, "ffn_hidden_size": ffn, "num_heads": heads, "num_kv_heads": heads // group}
    return load_model_config({**model.to_dict(), **sizes}, f"width {width}")


def warnings(model: ModelConfig, target: ModelConfig) -> list[str]:
    """What makes ``target`` differ from ``model`` in more than its width, of which muP's rules know nothing."""
    found = []
    if model.num_layers != target.num_layers:
        found.append(
            f"depth {model.num_layers} -> {target.num_layers}: muP has no rule for depth; "
            "the narrow model should have the layers of the wide one"
        )
    if model.head_dim != target.head_dim:
        found.append(
            f"head size {model.head_dim} -> {target.head_dim}: attention's scale is right at one head size only"
        )
    group, other = (one.num_heads // one.num_kv_heads for one in (model, target))
    if group != other:
        found.append(f"query heads a kv head {group} -> {other}: not a matter of width")
    ratio = target.ffn_hidden_size * model.hidden_size / (model.ffn_hidden_size * target.hidden_size)
    if abs(ratio - 1) > 1e-9:
        found.append(f"the ffn grows {ratio:.3f} times as much as the hidden size, whose ratio the rules take")
    ours, theirs = model.to_dict(), target.to_dict()
    differing = [f"{n} {ours[n]} -> {theirs[n]}" for n in ours if n not in _OWN and ours[n] != theirs[n]]
    if differing:
        found.append(f"{', '.join(differing)}: not a matter of width")
    return found


def _nearest(width: int, step: int) -> int:
    return max(step, round(width / step) * step)
