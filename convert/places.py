"""Format capabilities: the table of which values of ModelConfig each checkpoint format can represent.

A format that is not a canonical checkpoint holds a model only if it, and the code that reads it, can say every number
that changes the arithmetic. A field of ModelConfig that no line here names has a place nowhere but in a canonical
checkpoint, unless it has its default: a new field is refused until someone gives it a place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.masks import describe

# Sizes and numbers that every format can say (its config or its reader's options), and a choice of the run.
ANYWHERE = (
    "family", "vocab_size", "hidden_size", "ffn_hidden_size", "num_layers", "num_heads", "num_kv_heads", "norm_eps",
    "rope_theta", "training_seqlen", "base_seqlen", "max_seqlen", "init_std", "matrix_init_std",
    "bos_token_id", "eos_token_id", "pad_token_id", "end_token_ids", "table_dtype",
)  # fmt: skip
ANY = None
NTK_THETA_LENGTH = 4096  # written into TeleChat-52B's code: beyond it the rotary base grows

_TELECHAT2 = {
    "norm": ("rmsnorm",),
    "activation": ("swiglu",),
    "biases": ("outputs",),
    "position": ("ntk",),
    "xpos_scale_base": ANY,
    "input_mult": (1.0,),
    "logit_mult": (1.0,),
    "tied_embeddings": (False,),
}
_TELEFLM = {**_TELECHAT2, "biases": ("none",), "position": ("rope",), "input_mult": ANY, "logit_mult": ANY}
_YARN = dict.fromkeys(("yarn_factor", "yarn_fast", "yarn_slow", "yarn_mscale"), ANY)
_TELECHAT3 = {
    **_TELEFLM, **_YARN, "biases": ("none", "all"), "position": ("rope", "yarn"), "tied_embeddings": (False, True),
    "input_mult": (1.0,), "logit_mult": (1.0,),
}  # fmt: skip
_TELECHAT3_MINDFORMERS = {**_TELECHAT3, "biases": ("none",), "tied_embeddings": (False,)}
_FLM = {
    "norm": ANY,
    "activation": ANY,
    "biases": ("none", "all"),
    "position": ("ntk-theta", "xpos"),
    "xpos_scale_base": ANY,
    "input_mult": ANY,
    "logit_mult": ANY,
    "tied_embeddings": ANY,
}
# MindFormers' network of TeleChat-52B knows output_mult and mup_scale_factor, and no multiplier of the embedding.
_TELECHAT_52B = {**_TELECHAT2, "biases": ("none",), "position": ("ntk-theta",), "logit_mult": ANY}

# (format, family) -> field -> the values it can hold. "hf" is the release; the others are MindFormers' forms.
PLACES: dict[tuple[str, str], Mapping[str, tuple[object, ...] | None]] = {
    ("hf", "telechat2"): _TELECHAT2,
    ("hf", "teleflm"): _TELEFLM,
    ("hf", "flm"): _FLM,
    ("hf", "telechat3"): _TELECHAT3,
    ("plain", "telechat2"): _TELECHAT2,
    ("qkv_concat", "telechat2"): _TELECHAT2,
    ("mcore", "telechat2"): _TELECHAT2,
    ("qkv_concat", "flm"): _TELECHAT_52B,
    ("plain", "telechat3"): _TELECHAT3_MINDFORMERS,
    ("mcore", "telechat3"): _TELECHAT3_MINDFORMERS,
    ("mcore_train", "telechat3"): _TELECHAT3_MINDFORMERS,
}
TITLES = {
    "hf": "the released format",
    "plain": "MindFormers' plain form",
    "qkv_concat": "MindFormers' qkv_concat form",
    "mcore": "MindFormers' mcore form",
    "mcore_train": "MindFormers' mcore form of training",
}


def why_not(config: ModelConfig, form: str) -> str | None:
    """Why the model has no place in a format (a key of TITLES), as ``model.FIELD: ...``; None if it has one."""
    holds = PLACES.get((form, config.family))
    where = f"{TITLES[form]} of family {config.family}"
    if holds is None:
        families = ", ".join(family for key, family in PLACES if key == form)
        return f"model.family: {config.family} has no place in {TITLES[form]}, which is there for {families}"
    if config.growth is not None:
        return f"model.growth: the model is between two sizes ({describe(config)}), which has no place in {where}"
    lengths = config.training_seqlen, config.base_seqlen
    if config.position == "ntk-theta" and lengths != (NTK_THETA_LENGTH, NTK_THETA_LENGTH):
        return f"model.base_seqlen: {lengths} has no place in {where}, whose code has {NTK_THETA_LENGTH}"
    # Queries, keys and values of this family are columns of one matrix, a third each.
    if config.family == "flm" and config.num_kv_heads != config.num_heads:
        return f"model.num_kv_heads: {config.num_kv_heads} has no place in {where}, which has {config.num_heads}"
    for field in dataclasses.fields(config):
        if field.name in ANYWHERE:
            continue
        mine = getattr(config, field.name)
        if field.name == "head_dim" and mine * config.num_heads == config.hidden_size:
            continue
        legal = holds.get(field.name, (_default(field),))
        if legal is not ANY and mine not in legal:
            values = " or ".join(str(value) for value in legal)
            return f"model.{field.name}: {mine} has no place in {where}, which has {values}"
    return None


def require_place(config: ModelConfig, form: str) -> None:
    """UserError if the model has no place in a format."""
    if reason := why_not(config, form):
        way = "keep such a model as a checkpoint"
        if config.growth is not None:
            way = f"train it until its masks are 1, at step {config.growth.start_step + config.growth.anneal_steps}"
        raise UserError(f"{reason}; {way}")


def _default(field: dataclasses.Field[object]) -> object:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()
