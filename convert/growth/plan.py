"""Growth plan: sizes, blocks and multipliers of a growth step, decided and checked before a tensor is read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.growth import METHODS, SIZES, Growth, axis_maps, sizes_of
from telechat_twins.core.model.growth_mask import GrowthMask, head_map
from telechat_twins.core.model.masks import describe
from telechat_twins.core.types import JsonObject

DEPTHS = ("insert", "stack")
MULTIPLIERS = ("keep", "fold")

# What is taken from the target besides sizes: it has no part in the function of the model that grows.
_TAKEN = ("init_std", "matrix_init_std", "max_seqlen")
# A target may say these otherwise than the model that grows; everything else makes it another model.
_FREE = (*SIZES, *_TAKEN, "logit_mult", "input_mult", "vocab_tokens")
# What only growth itself writes.
_OWN = ("norm_divisor", "growth")


@dataclass(frozen=True)
class Options:
    """How to grow. ``depth``: insert spreads copies evenly through the model, each behind what it copies; stack puts
    them on top; a list names for each block of the target the old block it continues or copies (-1: a fresh one).
    ``fresh_layers``: new blocks have random weights instead of copies. ``multipliers``: keep those of the model that
    grows, or fold the change to the target's into its tensors. ``scheme`` is core.model.init's, of the new entries."""

    method: str = "masked"
    anneal_steps: int = 1000
    depth: str | Sequence[int] = "insert"
    fresh_layers: bool = False
    multipliers: str = "keep"
    grow_head_dim: bool = False
    seed: int = 0
    scheme: str = "normal"


@dataclass(frozen=True)
class GrowthPlan:
    """``config``: of the grown model. ``growth``: the step, for its history. ``scales``: what the old entries of a
    parameter are multiplied by so that the function stays. ``notes``: what the user may not expect."""

    source: ModelConfig
    config: ModelConfig
    growth: Growth
    options: Options
    scales: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def scale(self, name: str) -> float:
        """Of a parameter of the grown model. Wider heads divide their scores by more, which their keys make up for."""
        keys = math.sqrt(self.config.head_dim / self.source.head_dim) if ".attn.k." in name else 1.0
        return self.scales.get(name, 1.0) * keys


def plan_growth(
    source: ModelConfig, target: ModelConfig, options: Options, step: int = 0, optimizer_steps: int = 0
) -> GrowthPlan:
    """The step from ``source`` to the sizes of ``target``.

    UserError, naming the field and both values, for what cannot grow: a smaller size, another family, heads that break
    their groups, another head size without ``grow_head_dim``, a model whose masks have not come to 1.
    """
    if options.method not in METHODS:
        raise UserError(f"--method: '{options.method}' is not one of {', '.join(METHODS)}")
    if source.growth is not None:
        raise UserError(
            f"the model is still growing ({describe(source)}); train until its mask is 1 (anneal_steps "
            f"{source.growth.anneal_steps} after step {source.growth.start_step}), then grow it again"
        )
    _require_one_model(source, target)
    _check_head_dim(source, target, options.grow_head_dim)
    before, after = sizes_of(source), sizes_of(target)
    axis_maps(before, after)  # refuses heads that break their groups
    layers, new_layers = _layers(options, source.num_layers, target.num_layers)
    notes: list[str] = []
    scales: dict[str, float] = {}
    values: JsonObject = {name: getattr(target, name) for name in (*SIZES, *_TAKEN)}
    values |= _multipliers(source, target, options, scales, notes)
    values["vocab_tokens"] = _vocab_tokens(source, target)
    values["norm_divisor"] = _norm_divisor(source, target, options.method)
    if source.position == "ntk" and before.head_dim != after.head_dim:
        notes.append(
            f"head size {before.head_dim} -> {after.head_dim}: exact up to base_seqlen {source.base_seqlen}; beyond it "
            "the rotary base grows by a power that depends on the head size"
        )
    wider = before.hidden_size < after.hidden_size or before.ffn_hidden_size < after.ffn_hidden_size
    fresh_heads = bool((head_map(before.heads, after.heads) < 0).any())
    if options.method == "masked" and (wider or fresh_heads or new_layers):
        values["growth"] = GrowthMask(
            mask=0.0,
            start_step=step,
            anneal_steps=options.anneal_steps,
            hidden_size=before.hidden_size,
            ffn_hidden_size=before.ffn_hidden_size,
            num_heads=before.num_heads,
            num_kv_heads=before.num_kv_heads,
            new_layers=new_layers,
        )
    config = dataclasses.replace(source, **values)
    growth = Growth(
        method=options.method,
        step=step,
        optimizer_steps=optimizer_steps,
        seed=options.seed,
        before=before,
        after=after,
        layers=layers,
        new_layers=new_layers,
    )
    return GrowthPlan(source, config, growth, options, scales, tuple(notes))


def _require_one_model(source: ModelConfig, target: ModelConfig) -> None:
    for spec in dataclasses.fields(ModelConfig):
        old, new = getattr(source, spec.name), getattr(target, spec.name)
        if spec.name in _OWN:
            if new is not None and new != old:
                raise UserError(f"target.{spec.name}: is for `tele grow` to set; leave it out")
        elif spec.name not in _FREE and old != new:
            what = "growth stays within a family" if spec.name == "family" else "growth changes sizes only"
            raise UserError(f"target.{spec.name}: the model has {old!r}, the target {new!r}; {what}")
    for name in SIZES:
        old, new = getattr(source, name), getattr(target, name)
        if name == "vocab_size":
            old = source.num_tokens  # rows that only pad may go
        if new < old:
            raise UserError(f"target.{name}: {new} is smaller than the {old} of the model; growth only adds")


def _layers(options: Options, old: int, new: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each block of the target the old block it continues or copies (-1: none), and which blocks are new."""
    depth = options.depth
    if not isinstance(depth, str):
        layers = list(depth)
    elif depth == "insert":
        layers = [j * old // new for j in range(new)]
    elif depth == "stack":
        layers = list(range(old)) * (new // old) + list(range(old - new % old, old))
    else:
        raise UserError(f"--depth: '{depth}' is not one of {', '.join(DEPTHS)} or a list of blocks")
    if len(layers) != new:
        raise UserError(f"--depth: {len(layers)} blocks are named, the target has num_layers {new}")
    for i in layers:
        if not -1 <= i < old:
            raise UserError(f"--depth: there is no block {i} among the {old} of the model; -1 stands for a fresh one")
    # The first block that is made from an old one continues it; every other is new.
    new_layers = tuple(n for n, i in enumerate(layers) if i < 0 or i in layers[:n])
    continued = [i for n, i in enumerate(layers) if n not in new_layers]
    if continued != list(range(old)):
        raise UserError(
            f"--depth: blocks 0 to {old - 1} must all appear, and first appear in this order, or the model's function "
            f"is lost; they appear as {', '.join(map(str, continued))}"
        )
    if options.fresh_layers:
        layers = [-1 if n in new_layers else i for n, i in enumerate(layers)]
    return tuple(layers), new_layers


def _multipliers(
    source: ModelConfig, target: ModelConfig, options: Options, scales: dict[str, float], notes: list[str]
) -> dict[str, float]:
    """input_mult and logit_mult of the grown model; changes of them go into ``scales``."""
    if options.multipliers not in MULTIPLIERS:
        raise UserError(f"--multipliers: '{options.multipliers}' is not one of {', '.join(MULTIPLIERS)}")
    values = {}
    for name in ("input_mult", "logit_mult"):
        old, new = getattr(source, name), getattr(target, name)
        values[name] = new if options.multipliers == "fold" else old
        if old == new:
            continue
        if options.multipliers == "keep":
            notes.append(f"{name} stays {old:g}; the target says {new:g} (--multipliers fold takes that)")
            continue
        if name == "input_mult":
            _scale(scales, "embed.weight", old / new)
        # A tied table is also the head: what it gains there, and what the logits lose, the final norm makes up for.
        at_head = old / new if name == "logit_mult" else (new / old if source.tied_embeddings else 1.0)
        if source.tied_embeddings:
            for kind in ("weight", *(["bias"] if source.norm == "layernorm" else [])):
                _scale(scales, f"norm.{kind}", at_head)
        elif at_head != 1.0:
            _scale(scales, "head.weight", at_head)
        notes.append(f"{name} becomes {new:g} (was {old:g}), folded into {', '.join(scales)}")
    return values


def _scale(scales: dict[str, float], name: str, factor: float) -> None:
    scales[name] = scales.get(name, 1.0) * factor


def _vocab_tokens(source: ModelConfig, target: ModelConfig) -> int | None:
    """New rows pad: they would take probability from the tokens if they could be predicted."""
    if target.vocab_tokens not in (None, source.num_tokens):
        raise UserError(
            f"target.vocab_tokens: {target.vocab_tokens}, the model has {source.num_tokens} tokens; growth adds rows "
            "that pad, new tokens would change the function"
        )
    return None if target.vocab_size == source.num_tokens else source.num_tokens


def _norm_divisor(source: ModelConfig, target: ModelConfig, method: str) -> float | None:
    """Without masks new channels are not counted. Under masks RMSNorm counts them by their mask, and keeps the ratio to
    the width that it had; LayerNorm goes on with the channels it counted."""
    divisor = source.norm_divisor
    if method == "zero":
        divisor = divisor or float(source.hidden_size)
    elif divisor is not None and source.norm == "rmsnorm":
        divisor *= target.hidden_size / source.hidden_size
    return None if divisor == target.hidden_size else divisor


def _check_head_dim(source: ModelConfig, target: ModelConfig, allowed: bool) -> None:
    old, new = source.head_dim, target.head_dim
    if old != new and not allowed:
        heads = f"num_heads: {target.hidden_size // old} or " if target.hidden_size % old == 0 else ""
        raise UserError(
            f"target.head_dim: {new} (hidden_size {target.hidden_size}, num_heads {target.num_heads}), the model has "
            f"{old}; put {heads}head_dim: {old} into the target, or ask for another head size with --grow-head-dim"
        )
    if new % old:
        raise UserError(f"target.head_dim: {new} is not a multiple of the model's {old}; rotary pairs would not match")
