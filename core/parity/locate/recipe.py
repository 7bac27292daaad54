"""What a suspect operator is replayed from: which whole tensors of a record, reshaped how, with which settings.

A recipe names tensors by quantity; it is filled from either side's record, so that both sides' inputs meet the same
operator. ``results`` are the quantities that the operator must have made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from telechat_twins.core.config import RunConfig
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.model.lora import lora_scale, lora_table
from telechat_twins.core.model.masks import masks
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.model.position import rope_tables, xpos_scales
from telechat_twins.core.parity.locate.case import Arrays, Case, Settings
from telechat_twins.core.parity.locate.walk import BACKWARD, FORWARD, UPDATE, Suspect, readers
from telechat_twins.core.parity.record.format import Record, quantity_key
from telechat_twins.core.parity.record.read import read_full
from telechat_twins.core.parity.record.sites import Site, sites
from telechat_twins.core.train.recipe import class_decay, class_rate, clip_factor

Read = Callable[[str], np.ndarray]
NEEDS_BATCH = ("embedding", "cross_entropy")


@dataclass(frozen=True)
class Wanted:
    """A quantity without its step: ``shape`` replaces that of the record, ``rows`` keeps the first so many rows."""

    kind: str
    name: str
    shape: tuple[int, ...] | None = None
    rows: int | None = None
    previous: bool = False  # of the step before


@dataclass(frozen=True)
class Recipe:
    """``arrays``: inputs that the config gives. ``why_not``: why the operator cannot be replayed from a record."""

    suspect: Suspect
    operator: str
    inputs: dict[str, Wanted]
    arrays: Arrays
    grads: dict[str, Wanted]
    results: dict[str, Wanted]
    settings: Settings = field(default_factory=dict)
    constants: Arrays = field(default_factory=dict)  # gradients of outputs that the config gives
    why_not: str = ""


@dataclass(frozen=True)
class Setting:
    """What a recipe depends on besides the suspect: the run, its batch where it is known, the step and what the trace
    says of it. ``weight``: reader of the weights that the run does not train."""

    config: RunConfig
    batch: Batch | None
    rows: int
    seq_len: int
    step: int = 1
    lr: float = 0.0
    grad_norm: float = 0.0
    weight: Read | None = None

    @property
    def sites(self) -> list[Site]:
        return sites(self.config.model, self.config.lora)


def recipe(suspect: Suspect, setting: Setting) -> Recipe:
    """How ``suspect`` is replayed."""
    made = _update(suspect, setting) if suspect.direction == UPDATE else _operator(suspect, setting)
    if not made.why_not and made.operator in NEEDS_BATCH and setting.batch is None:
        return _impossible(suspect, "needs the batch, which a record does not hold: give --rerun")
    return made


def wanted_keys(made: Recipe, step: int) -> list[str]:
    """Keys of the whole tensors that a recipe is filled with."""
    return list(dict.fromkeys(_key(one, step) for one in _all(made)))


def missing(made: Recipe, record: Record, step: int) -> list[str]:
    """Keys of the tensors that ``record`` has only sketches of."""
    return [key for key in wanted_keys(made, step) if key in record.quantities and key not in record.full]


def unknown(made: Recipe, record: Record, step: int) -> list[str]:
    """Keys of inputs that ``record`` does not have at all, without the weights that the run does not train."""
    wanted = [one for one in (*made.inputs.values(), *made.grads.values()) if one.kind != "weight_before"]
    return [key for key in dict.fromkeys(_key(one, step) for one in wanted) if key not in record.quantities]


def frozen(made: Recipe, record: Record, step: int) -> list[str]:
    """Names of the weights of a recipe that the run does not train, and so does not record."""
    weights = (one for one in made.inputs.values() if one.kind == "weight_before")
    return [one.name for one in weights if _key(one, step) not in record.quantities]


def whole_tensors(record: Record) -> Read:
    """A reader of a record's whole tensors, by key."""
    return partial(read_full, record)


def fill(
    made: Recipe, record: Record, step: int, precision: str, read: Read, weight: Read | None = None
) -> tuple[Case, Arrays]:
    """The case with ``record``'s tensors, and what that record has as its results, by the names of a replay's.

    ``read``: of ``whole_tensors``. ``weight``: weights that the run does not train, by name.
    """

    def of(wanted: Wanted) -> np.ndarray:
        key = _key(wanted, step)
        if wanted.kind == "weight_before" and key not in record.quantities and weight is not None:
            array = weight(wanted.name)
        else:
            array = read(key)
        array = array if wanted.rows is None else array[: wanted.rows]
        array = array if wanted.shape is None else array.reshape(wanted.shape)
        return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)

    inputs = {name: of(wanted) for name, wanted in made.inputs.items()} | made.arrays
    grads = {name: of(wanted) for name, wanted in made.grads.items()} | made.constants
    case = Case(made.operator, inputs, grads, precision, made.settings, made.suspect.site)
    known = {name: wanted for name, wanted in made.results.items() if _key(wanted, step) in record.quantities}
    return case, {name: of(wanted) for name, wanted in known.items()}


def _all(made: Recipe) -> tuple[Wanted, ...]:
    return (*made.inputs.values(), *made.grads.values(), *made.results.values())


def _key(wanted: Wanted, step: int) -> str:
    return quantity_key(wanted.kind, wanted.name, step - 1 if wanted.previous else step)


def _impossible(suspect: Suspect, why: str) -> Recipe:
    return Recipe(suspect, suspect.operator, {}, {}, {}, {}, why_not=why)


def _operator(suspect: Suspect, setting: Setting) -> Recipe:
    """The recipe of an operator of the model, forward or backward."""
    places = {site.name: site for site in setting.sites}
    site = places.get(suspect.site)
    if site is None or site.operator not in _RECIPES:
        return _impossible(suspect, f"{suspect.operator} is not an operator of the model")
    builder = _RECIPES[site.operator]
    if site.operator in ("rms_norm", "add") and _is_fused(site, setting):
        builder = _add_rms_norm
    made = builder(suspect, site, setting)
    if suspect.direction == FORWARD and not made.why_not:
        return Recipe(suspect, made.operator, made.inputs, made.arrays, {}, _forward_only(made), made.settings)
    return made


def _forward_only(made: Recipe) -> dict[str, Wanted]:
    return {name: wanted for name, wanted in made.results.items() if not name.startswith("d ")}


def _built(
    suspect: Suspect,
    site: Site,
    setting: Setting,
    operator: str,
    inputs: dict[str, Wanted],
    *,
    outputs: dict[str, Wanted] | None = None,
    arrays: Arrays | None = None,
    grads: dict[str, Wanted] | None = None,
    settings: Settings | None = None,
) -> Recipe:
    """A recipe with the results that follow from its inputs: gradients of weights, and of activations that one
    operator alone reads."""
    outputs = outputs or {"out": Wanted("activation", site.name)}
    if grads is None:
        grads = {name: Wanted("activation_grad", w.name, w.shape, w.rows) for name, w in outputs.items()}
    by_input, results = readers(setting.sites), dict(outputs)
    for name, wanted in inputs.items():
        one_reader = len(by_input.get(wanted.name, ())) == 1
        if wanted.kind == "activation" and one_reader:
            results[f"d {name}"] = Wanted("activation_grad", wanted.name, wanted.shape)
        elif wanted.kind == "weight_before" and one_reader and _trained(wanted.name, setting):
            results[f"d {name}"] = Wanted("gradient", wanted.name, None, wanted.rows)
    return Recipe(suspect, operator, inputs, arrays or {}, grads, results, settings or {})


def _trained(name: str, setting: Setting) -> bool:
    """Whether the gradient of a weight is recorded: with adapters only theirs are."""
    return setting.config.lora is None or name.endswith((".lora_a", ".lora_b"))


def _embedding(suspect: Suspect, site: Site, setting: Setting) -> Recipe:
    ids = {} if setting.batch is None else {"ids": setting.batch.input_ids}
    inputs = {"weight": Wanted("weight_before", site.inputs[0])}
    settings: Settings = {"multiplier": setting.config.model.input_mult}
    return _built(suspect, site, setting, "embedding", inputs, arrays=ids, settings=settings)


def _mask(setting: Setting, which: int) -> Arrays:
    """The growth mask over channels (0), heads (1) or neurons (2), where there is one."""
    model = setting.config.model
    if model.growth is None:
        return {}
    found = masks(model, model.growth.mask, (slice(None), slice(None)))[which]
    return {} if found is None else {"mask": found.astype(np.float32)}


def _norm(suspect: Suspect, site: Site, setting: Setting) -> Recipe:
    model = setting.config.model
    inputs = {"x": Wanted("activation", site.inputs[0])}
    inputs |= {w.rpartition(".")[2]: Wanted("weight_before", w) for w in site.inputs[1:]}
    settings: Settings = {"eps": model.norm_eps}
    settings |= {"share": model.norm_share} if site.operator == "rms_norm" else {"counted": model.norm_channels}
    return _built(suspect, site, setting, site.operator, inputs, arrays=_mask(setting, 0), settings=settings)


def _is_fused(site: Site, setting: Setting) -> bool:
    """Whether a site is half of the operator that adds to the stream and norms the sum."""
    return setting.config.model.norm == "rmsnorm" and site.name.rpartition(".")[2] in ("attn_sum", "ffn_norm")


def _add_rms_norm(suspect: Suspect, site: Site, setting: Setting) -> Recipe:
    """The gradient of the stream is what comes back through the block's second sum."""
    model, at = setting.config.model, f"layers.{site.layer}"
    stream = "embed" if site.layer == 0 else f"layers.{(site.layer or 0) - 1}"
    inputs = {
        "x": Wanted("activation", f"{at}.attn.o"),
        "residual": Wanted("activation", stream),
        "weight": Wanted("weight_before", f"{at}.ffn_norm.weight"),
    }
    outputs = {"out": Wanted("activation", f"{at}.ffn_norm"), "stream": Wanted("activation", f"{at}.attn_sum")}
    grads = {"out": Wanted("activation_grad", f"{at}.ffn_norm"), "stream": Wanted("activation_grad", at)}
    made = _built(
        suspect,
        site,
        setting,
        "add_rms_norm",
        inputs,
        outputs=outputs,
        arrays=_mask(setting, 0),
        grads=grads,
        settings={"eps": model.norm_eps, "share": model.norm_share},
    )
    if model.growth is not None and site.layer in model.growth.new_layers and suspect.direction == BACKWARD:
        return _impossible(suspect, "the sum of a new block masks the gradient that comes back")
    return made


def _linear(suspect: Suspect, site: Site, setting: Setting) -> Recipe:
    model, lora = setting.config.model, setting.config.lora
    inputs = {"x": Wanted("activation", site.inputs[0])}
    head = site.name == "logits"
    rows = model.num_tokens if head else None
    inputs |= {w.rpartition(".")[2]: Wanted("weight_before", w, None, rows) for w in site.inputs[1:]}
    if "lora_a" not in inputs:
        settings: Settings = {"multiplier": model.logit_mult if head else 1.0}
        return _built(suspect, site, setting, "linear", inputs, settings=settings)
    assert lora is not None
    if lora.dropout:
        return _impossible(suspect, "the dropout of its adapter is drawn anew at every step")
    layer = site.inputs[1].rpartition(".")[0]
    return _built(suspect, site, setting, "adapted_linear", inputs, settings={"scale": lora_scale(lora, layer)})


def _heads(kind: str, name: str, setting: Setting, groups: int) -> Wanted:
    return Wanted(kind, name, (setting.rows, setting.seq_len, groups, setting.config.model.head_dim))


def _rope(suspect: Suspect, site: Site, setting: Setting) -> Recipe:
    model, at = setting.config.model, f"layers.{site.layer}.attn"
    heads = {"q": model.num_heads, "k": model.num_kv_heads}
    positions = np.arange(setting.seq_len)[None] if setting.batch is None else setting.batch.positions
    wide = np.float64 if setting.config.train.precision == "fp64" else np.float32
    tables = dict(zip(("cos", "sin"), rope_tables(model, positions, setting.seq_len, wide), strict=True))
    tables |= dict(zip(("scale_q", "scale_k"), xpos_scales(model, positions, wide) or (), strict=False))
    return _built(
        suspect,
        site,
        setting,
        "rope",
        {x: _heads("activation", f"{at}.{x}", setting, n) for x, n in heads.items()},
        outputs={x: _heads("activation", f"{at}.rope_{x}", setting, n) for x, n in heads.items()},
        arrays={name: np.ascontiguousarray(table[:, :, None]) for name, table in tables.items()},
    )


def _attention(suspect: Suspect, site: Site, setting: Setting) -> Recipe:
    model, at = setting.config.model, f"layers.{site.layer}.attn"
    heads = {"rope_q": model.num_heads, "rope_k": model.num_kv_heads, "v": model.num_kv_heads}
    arrays = {n: mask.reshape(model.num_heads, model.head_dim) for n, mask in _mask(setting, 1).items()}
    if setting.batch is not None and setting.batch.doc_ids is not None:
        arrays["doc_ids"] = setting.batch.doc_ids
    return _built(
        suspect,
        site,
        setting,
        "attention",
        {x[-1]: _heads("activation", f"{at}.{x}", setting, n) for x, n in heads.items()},
        outputs={"out": _heads("activation", site.name, setting, model.num_heads)},
        arrays=arrays,
    )


def _activation(suspect: Suspect, site: Site, setting: Setting) -> Recipe:
    names = ("gate", "up") if site.operator == "swiglu" else ("x",)
    inputs = {name: Wanted("activation", read) for name, read in zip(names, site.inputs, strict=True)}
    return _built(suspect, site, setting, site.operator, inputs, arrays=_mask(setting, 2))


def _add(suspect: Suspect, site: Site, setting: Setting) -> Recipe:
    names = ("stream", "branch", "before")
    inputs = {name: Wanted("activation", read) for name, read in zip(names, site.inputs, strict=False)}
    growth = setting.config.model.growth
    settings: Settings = {"grown": None if growth is None else growth.mask}
    return _built(suspect, site, setting, "add", inputs, settings=settings)


def _cross_entropy(suspect: Suspect, site: Site, setting: Setting) -> Recipe:
    batch = setting.batch
    if batch is None:
        return _impossible(suspect, "needs the batch, which a record does not hold: give --rerun")
    if batch.reference is not None:
        return _impossible(suspect, "is the loss of preference pairs, which is one number a row")
    arrays = {"targets": batch.targets} | ({} if batch.weights is None else {"weights": batch.weights})
    made = _built(
        suspect,
        site,
        setting,
        "cross_entropy",
        {"logits": Wanted("activation", "logits")},
        outputs={"loss": Wanted("activation", "loss")},
        arrays=arrays,
        grads={},
        settings={"terms": float(batch.num_terms)},
    )
    one = {"loss": np.ones((), np.float32)}
    return Recipe(suspect, made.operator, made.inputs, arrays, {}, made.results, made.settings, one)


def _update(suspect: Suspect, setting: Setting) -> Recipe:
    """AdamW of one parameter: decoupled decay, clipping by the recorded gradient norm."""
    config, name = setting.config, suspect.site
    adapters = {} if config.lora is None else lora_table(config.model, config.lora)
    spec = (parameter_table(config.model) | adapters).get(name)
    optim, flat = config.optim, (-1,)
    inputs = {"master": Wanted("weight_before", name, flat), "grad": Wanted("gradient", name, flat)}
    arrays: Arrays = {}
    if setting.step > 1:
        inputs |= {letter: Wanted(f"moment{n}", name, flat, previous=True) for n, letter in ((1, "m"), (2, "v"))}
    if spec is None:
        return _impossible(suspect, "is not a parameter of the model")
    if setting.step == 1:
        arrays = {letter: np.zeros(spec.size, np.float32) for letter in "mv"}
    settings: Settings = {
        "step": setting.step,
        "lr": class_rate(optim, setting.lr, spec.mup_class),
        "beta1": optim.beta1,
        "beta2": optim.beta2,
        "eps": optim.eps,
        "weight_decay": class_decay(optim, spec.decays, spec.mup_class),
        "grad_scale": clip_factor(setting.grad_norm, optim.clip_grad),
    }
    results = {
        "master": Wanted("weight_after", name, flat),
        "m": Wanted("moment1", name, flat),
        "v": Wanted("moment2", name, flat),
    }
    return Recipe(suspect, "adamw", inputs, arrays, {}, results, settings)


_RECIPES = {
    "embedding": _embedding,
    "rms_norm": _norm,
    "layer_norm": _norm,
    "linear": _linear,
    "rope": _rope,
    "attention": _attention,
    "swiglu": _activation,
    "gelu": _activation,
    "add": _add,
    "cross_entropy": _cross_entropy,
}


def patterns(keys: Iterable[str]) -> list[str]:
    """The keys as patterns of `tele parity record --full`, without their steps."""
    return list(dict.fromkeys(key.rpartition("@")[0] + "@*" for key in keys))
