"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685): configuration, parameters and initial values.

A linear layer W x + b with an adapter computes W x + b + (alpha / rank) B A dropout(x), with A [rank, in] and
B [out, rank]. W, b and everything without an adapter are the base, which is frozen. The logical names of A and B are
those of the layer with ``lora_a`` and ``lora_b`` in place of ``weight``: layers.3.attn.q.lora_a.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import MAX_WIDTH, ModelConfig
from telechat_twins.core.model.params import ParamSpec, block_table
from telechat_twins.core.near import nearest
from telechat_twins.core.schema import from_mapping, option
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:  # every command reads a run's config; what draws weights is imported when they are drawn
    import numpy as np

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # in the order of the model's parameters
ROW_PARALLEL = ("o", "down")  # their inputs are split over tensor ranks, those of the others whole

# The names of the same linears elsewhere: Hugging Face's Llama, the TeleChat2 and FLM releases, MindFormers' plain,
# fused and mcore forms. A name of a packed linear stands for each of its parts.
ALIASES = {
    **{f"{name}_proj": (name,) for name in TARGETS},
    **{f"w{name}": (name,) for name in "qkvo"},
    **{f"linear_{name}": (name,) for name in "qkv"},
    "query": ("q",),
    "key": ("k",),
    "value": ("v",),
    "key_value": ("k", "v"),
    "wk_v": ("k", "v"),
    "w_qkv": ("q", "k", "v"),
    "c_attn": ("q", "k", "v"),
    "dense": ("o",),
    "linear_proj": ("o",),
    "w1": ("gate",),
    "w3": ("up",),
    "w_gate_hidden": ("gate", "up"),
    "gating": ("gate",),
    "hidden": ("up",),
    "w2": ("down",),
    "linear_fc2": ("down",),
    "all-linear": TARGETS,
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The section ``lora`` of a run. Defaults are MindFormers' rank and alpha and the targets of TeleChat2's YAML."""

    rank: int = option(8, help="r, rows of A and columns of B", min=1, max=MAX_WIDTH)
    alpha: float = option(16.0, help="the product B A x is multiplied by alpha / rank", above=0.0)
    dropout: float = option(0.0, help="share of the adapters' inputs that is zeroed in training", min=0.0, max=0.99)
    targets: list[str] = option(
        ["q", "k", "v", "o"],
        help="linears with an adapter: q k v o gate up down, or their names in a release (q_proj, key_value, wo, "
        "all-linear, .*wq|.*wo)",
    )
    rank_pattern: dict = option(
        {}, help="other ranks by layer: a name as in targets, or a pattern of logical names (layers.[0-3].*) -> rank"
    )
    alpha_pattern: dict = option({}, help="other alphas by layer, as rank_pattern")
    use_rslora: bool = option(False, help="multiply B A x by alpha / sqrt(rank) instead (arXiv 2312.03732)")

    def __post_init__(self) -> None:
        named = {name for target in self.targets for name in _resolved(target)}
        if not named:
            raise UserError(f"lora.targets: names no linear; give some of {', '.join(TARGETS)}")
        # Frozen: the list is replaced once, by the short names in the model's order, whatever was written.
        object.__setattr__(self, "targets", [name for name in TARGETS if name in named])
        for kind, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if other := [key for key in patterns if not isinstance(key, str)]:
                raise UserError(f"lora.{kind}: {shown(other[0])} is no name of a layer; quote it if it is")
        for pattern, rank in self.rank_pattern.items():
            if type(rank) is not int or not 1 <= rank <= MAX_WIDTH:
                raise UserError(f"lora.rank_pattern: {shown(pattern)}: needs a whole number, found {shown(rank)}")
        for pattern, alpha in self.alpha_pattern.items():
            if type(alpha) not in (int, float) or not 0 < alpha < 1e30:
                raise UserError(f"lora.alpha_pattern: {shown(pattern)}: needs a number above 0, found {shown(alpha)}")
        object.__setattr__(self, "alpha_pattern", {name: float(alpha) for name, alpha in self.alpha_pattern.items()})

    def rank_of(self, layer: str) -> int:
        """The rank of the adapter of a linear layer by its logical name, layers.3.attn.q."""
        return next((rank for name, rank in self.rank_pattern.items() if _matches(name, layer)), self.rank)

    def alpha_of(self, layer: str) -> float:
        """Rank times what B A x is multiplied by: alpha, and with ``use_rslora`` alpha sqrt(rank)."""
        alpha = next((alpha for name, alpha in self.alpha_pattern.items() if _matches(name, layer)), self.alpha)
        return alpha * math.sqrt(self.rank_of(layer)) if self.use_rslora else alpha

    def to_dict(self) -> JsonObject:
        return dataclasses.asdict(self)


def _resolved(target: str) -> Iterable[str]:
    """The short names that one entry of ``targets`` stands for; MindFormers writes several as a regular expression."""
    for word in target.split("|"):
        name = word.strip().removeprefix(".*").removesuffix(".*").lstrip(".")
        if name in TARGETS:
            yield name
        elif name in ALIASES:
            yield from ALIASES[name]
        else:
            near = nearest(name, [*TARGETS, *ALIASES], cutoff=0.5)
            hint = f"did you mean '{near}'?" if near else f"there are: {', '.join(TARGETS)}"
            raise UserError(f"lora.targets: '{word.strip()}' is not a linear layer that takes an adapter; {hint}")


def _matches(pattern: str, layer: str) -> bool:
    """Whether an entry of ``rank_pattern`` or ``alpha_pattern`` is for a layer: the name of a linear in every block, or
    a glob pattern on its logical name."""
    short = layer.rpartition(".")[2]
    return short == pattern or short in ALIASES.get(pattern, ()) or fnmatchcase(layer, pattern)


def lora_scale(lora: LoraConfig, layer: str) -> float:
    """What B A x of a linear layer, by its logical name, is multiplied by."""
    return lora.alpha_of(layer) / lora.rank_of(layer)


def ranks_in(table: Mapping[str, ParamSpec]) -> list[int]:
    """The rank of every adapter in a table of parameters."""
    return [spec.shape[0] for name, spec in table.items() if name.endswith(".lora_a")]


def described_ranks(lora: LoraConfig | AdapterRecord, ranks: Iterable[int]) -> str:
    """rank 8 on q v; with several ``ranks`` in use rank 4 to 16 on q v."""
    least, most = min(ranks := list(ranks), default=lora.rank), max(ranks, default=lora.rank)
    return f"rank {least}{'' if least == most else f' to {most}'} on {' '.join(lora.targets)}"


def check_lora(config: ModelConfig, lora: LoraConfig) -> None:
    """UserError where a model cannot take these adapters."""
    if config.growth is not None:
        raise UserError(
            "lora: a model between two sizes (model.growth) takes no adapter: its masks change while it trains; train "
            "it until its masks are 1, then fine-tune that checkpoint"
        )
    if config.activation != "swiglu" and "gate" in lora.targets:
        there = [name for name in TARGETS if name != "gate"]
        raise UserError(f"lora.targets: 'gate', but this model's {config.activation} has none; give {', '.join(there)}")
    _check_patterns(config, lora)


def _check_patterns(config: ModelConfig, lora: LoraConfig) -> None:
    """UserError for a pattern that acts on no adapter, and for two that give one adapter different values: no result
    may hang on the order of keys, which files do not keep."""
    layers = [name for name in _linears(config) if name.rpartition(".")[2] in lora.targets]
    for kind, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        given: dict[str, str] = {}
        for pattern, value in patterns.items():
            found = [layer for layer in layers if _matches(pattern, layer)]
            if not found:
                near = nearest(pattern, [*lora.targets, *layers])
                hint = f"did you mean '{near}'?" if near else f"there are: {layers[0]}, ..., {layers[-1]}"
                raise UserError(f"lora.{kind}: {shown(pattern)} names no layer with an adapter; {hint}")
            for layer in found:
                other = given.setdefault(layer, pattern)
                if patterns[other] != value:
                    raise UserError(
                        f"lora.{kind}: '{other}' gives {layer} {patterns[other]:g} and '{pattern}' {value:g}; let one "
                        "of them leave it out"
                    )


def _linears(config: ModelConfig) -> list[str]:
    """Logical names of the linears of every block that can have an adapter."""
    names = [n.removesuffix(".weight") for n, spec in block_table(config).items() if spec.kind == "matrix"]
    return [f"layers.{i}.{name}" for i in range(config.num_layers) for name in names]


def lora_table(config: ModelConfig, lora: LoraConfig, layers: Iterable[int] | None = None) -> dict[str, ParamSpec]:
    """Logical name -> shape of the adapters' parameters, block by block, A before B; ``layers`` as in parameter_table.

    UserError where the model cannot take these adapters.
    """
    check_lora(config, lora)
    block = {
        name.removesuffix(".weight"): spec.shape
        for name, spec in block_table(config).items()
        if name.endswith(".weight") and name.split(".")[-2] in lora.targets
    }
    table = {}
    for i in range(config.num_layers) if layers is None else sorted(layers):
        for name, (rows, columns) in block.items():
            layer = f"layers.{i}.{name}"
            table[f"{layer}.lora_a"] = ParamSpec((lora.rank_of(layer), columns), "adapter")
            table[f"{layer}.lora_b"] = ParamSpec((rows, lora.rank_of(layer)), "adapter")
    return table


def is_adapter(name: str) -> bool:
    """Whether a logical name is that of an adapter's A or B."""
    return name.endswith((".lora_a", ".lora_b"))


def sharded_axis(name: str) -> int | None:
    """The axis of an adapter's parameter that tensor parallelism splits; None: every tensor rank holds all of it.

    A column-parallel layer splits its rows, and B's with them; a row-parallel one its columns, and A's. The other of
    the two is whole on every rank, and each rank computes a part of its gradient: dA of a column-parallel layer sums
    over the outputs, dB of a row-parallel one over the inputs, of which a rank has its own only.
    """
    *_, module, kind = name.split(".")
    if module in ROW_PARALLEL:
        return 1 if kind == "lora_a" else None
    return 0 if kind == "lora_b" else None


def init_adapter(
    name: str,
    config: ModelConfig,
    lora: LoraConfig,
    seed: int,
    index: tuple[slice, ...] | None = None,
    scheme: str = "normal",
) -> np.ndarray:
    """float32 initial value of an adapter's parameter, or of the slice ``index`` of it (core.model.init).

    ``normal``: A ~ N(0, 1 / (3 in)), the variance of PEFT's uniform initialisation, and B = 0: training starts at the
    base model. ``strong``, for tests: a B as large as A would be, without which A has no gradient.
    """
    from telechat_twins.core.model.init import draw_normal

    spec = lora_table(config, lora, [int(name.split(".")[1])])[name]
    std = 1.0 / math.sqrt(3.0 * spec.shape[1])
    if name.endswith(".lora_b") and scheme == "normal":
        std = 0.0
    return draw_normal(name, spec.shape, seed, 0.0, std, index)


@dataclass(frozen=True, kw_only=True)
class AdapterBase:
    """The model that an adapter was trained on: where it was, and core.checkpoint.fingerprint's digest of it."""

    path: str = option(help="folder of the base model")
    fingerprint: str = option(help="digest of its weights")


@dataclass(frozen=True, kw_only=True)
class AdapterModule:
    """The adapter of one linear layer, ``layers.3.attn.q``: ``scale`` B A is added to its weight."""

    name: str = option(help="the layer's logical name")
    rank: int = option(help="r", min=1, max=MAX_WIDTH)
    alpha: float = option(help="scale times rank", above=0.0)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """The key ``adapter`` of an adapter checkpoint's model.json. ``modules`` is there where layers differ: an adapter
    that was trained elsewhere may have other ranks, or none, in some of them."""

    rank: int = option(help="r", min=1, max=MAX_WIDTH)
    alpha: float = option(help="scale times rank", above=0.0)
    dropout: float = option(0.0, help="in training", min=0.0, max=0.99)
    targets: list[str] = option(help="linears with an adapter")
    base: AdapterBase = option(help="the model it belongs to")
    modules: list[AdapterModule] | None = option(None, help="every adapter, where rank and alpha differ among them")

    def adapters(self, config: ModelConfig) -> dict[str, AdapterModule]:
        """Every adapter by its layer's logical name, in the model's order where ``modules`` does not list them."""
        if self.modules is not None:
            return {module.name: module for module in self.modules}
        names = [name for name in _linears(config) if name.rpartition(".")[2] in self.targets]
        return {name: AdapterModule(name=name, rank=self.rank, alpha=self.alpha) for name in names}

    def to_dict(self) -> JsonObject:
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value is not None}


def adapter_record(config: ModelConfig, lora: LoraConfig, base: AdapterBase) -> AdapterRecord:
    """The record of a run's adapters: alphas with ``use_rslora`` in them."""
    layers = [name.removesuffix(".lora_a") for name in lora_table(config, lora) if name.endswith(".lora_a")]
    modules = [AdapterModule(name=name, rank=lora.rank_of(name), alpha=lora.alpha_of(name)) for name in layers]
    alike = len({(module.rank, module.alpha) for module in modules}) == 1
    return AdapterRecord(
        rank=modules[0].rank if alike else lora.rank,
        alpha=modules[0].alpha if alike else lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        base=base,
        modules=None if alike else modules,
    )


def read_adapter(model: JsonObject, where: str) -> AdapterRecord | None:
    """The adapter that a model.json describes; None for a checkpoint of a whole model. UserError names what is wrong;
    ``where`` is the file."""
    values = model.get("adapter")
    return None if values is None else from_mapping(AdapterRecord, values, f"{where}: adapter")
