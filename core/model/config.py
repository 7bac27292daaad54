"""Model configuration: fields, validation, presets."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.files import ROOT
from telechat_twins.core.model.growth_mask import GrowthMask, new_heads
from telechat_twins.core.near import nearest_name
from telechat_twins.core.schema import from_mapping, in_file, load_yaml, option
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

CONFIGS = ROOT / "configs"


# Far above every model there is, and low enough that planning with them takes neither long nor much memory. Positions
# and the places in a batch are int32.
MAX_ROWS, MAX_WIDTH, MAX_HEADS, MAX_LAYERS, MAX_LENGTH = 1 << 22, 1 << 20, 1 << 16, 1_000, 2**31 - 1


MAX_PRESETS = 8  # files that refer to one another


_YARN = ("yarn_factor", "yarn_fast", "yarn_slow", "yarn_mscale")
_THETAS = (1e-30, 1e30)  # with room for the growth of NTK scaling up to float32's limit of 3e38
PRECISIONS = ("fp32", "bf16", "amp", "fp16", "fp64")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder. The released key is given in brackets where the name differs (facts: TeleChat2 config.json)."""

    family: str = option(
        "telechat2",
        help="whose released format and names the model has; flm: TeleChat-52B and FLM-101B; telechat3: Llama's",
        choices=("telechat2", "teleflm", "flm", "telechat3"),
    )
    vocab_size: int = option(help="V, rows of the embedding and of the head", min=1, max=MAX_ROWS)
    hidden_size: int = option(help="E, width of the residual stream", min=1, max=MAX_WIDTH)
    ffn_hidden_size: int = option(help="F, width of the gated feed-forward", min=1, max=MAX_WIDTH)
    num_layers: int = option(help="L, decoder blocks [n_layer]", min=1, max=MAX_LAYERS)
    num_heads: int = option(help="H, query heads [n_head]", min=1, max=MAX_HEADS)
    num_kv_heads: int = option(help="K, key/value heads; divides num_heads [num_key_value_heads]", min=1, max=MAX_HEADS)
    head_dim: int = option(
        0,
        help="D, channels of a head, even; 0: hidden_size / num_heads (models may grow in one of them alone)",
        min=0,
        max=MAX_WIDTH,
    )
    norm: str = option(
        "rmsnorm", help="layernorm also takes the mean off and has a bias", choices=("rmsnorm", "layernorm")
    )
    norm_eps: float = option(help="epsilon in the norm's root [layer_norm_epsilon]; 115B 1e-8, 3B/7B 1e-5", above=0.0)
    activation: str = option("swiglu", help="gelu is the tanh form, without a gate", choices=("swiglu", "gelu"))
    biases: str = option(
        "outputs",
        help="linears with a bias; outputs: attention output and ffn output",
        choices=("none", "outputs", "all"),
    )
    position: str = option(
        "ntk",
        help="rotary; ntk, ntk-theta: length scaling of TeleChat2, of TeleChat-52B; xpos: decay with distance; "
        "yarn: stretched slow channels at every length (TeleChat3)",
        choices=("ntk", "ntk-theta", "rope", "xpos", "yarn"),
    )
    rope_theta: float = option(10000.0, help="rotary base before NTK scaling", above=0.0)
    xpos_scale_base: float = option(512.0, help="xpos: distance over which a channel decays by its rate", above=0.0)
    yarn_factor: float = option(1.0, help="yarn: base_seqlen positions stand for so many times as many", min=1.0)
    yarn_fast: float = option(32.0, help="yarn: channels that turn more often within base_seqlen stay", above=0.0)
    yarn_slow: float = option(1.0, help="yarn: channels that turn less often are stretched in full", above=0.0)
    yarn_mscale: float = option(
        0.07, help="yarn: cos and sin are multiplied by this times ln(yarn_factor), plus 1 (others' YaRN: 0.1)", min=0.0
    )
    input_mult: float = option(1.0, help="multiplies the embedding's output (muP)", above=0.0)
    logit_mult: float = option(1.0, help="multiplies the logits [output_mult / mup_scale_factor] (muP)", above=0.0)
    training_seqlen: int = option(help="length beyond which attention scaling acts", min=1, max=MAX_LENGTH)
    base_seqlen: int = option(
        help="length beyond which the rotary base grows; yarn: length before stretching", min=1, max=MAX_LENGTH
    )
    max_seqlen: int = option(help="length the model was trained to handle [seq_length]", min=1, max=MAX_LENGTH)
    init_std: float = option(0.02, help="standard deviation of initial weights [initializer_range]", above=0.0)
    matrix_init_std: float | None = option(
        None, help="that of matrix-like weights (attention and ffn) under muP; default: init_std", above=0.0
    )
    tied_embeddings: bool = option(False, help="the head is the embedding, used twice [tie_word_embeddings]")
    vocab_tokens: int | None = option(
        None, help="rows of the vocabulary that stand for tokens; later ones pad and are never predicted", min=1
    )
    norm_divisor: float | None = option(
        None,
        help="channels that norms count (a model that grew without masks does not count all): RMSNorm divides the sum "
        "of squares by it, LayerNorm takes mean and variance of the first so many",
        above=0.0,
    )
    growth: GrowthMask | None = option(None, help="masks of a model that is growing; written by `tele grow`")
    table_dtype: str = option(
        "float32", help="rotary table precision; float16 reproduces the released code", choices=("float32", "float16")
    )
    bos_token_id: int = option(1, help="<_start>", min=0)
    eos_token_id: int = option(2, help="<_end>", min=0)
    pad_token_id: int | None = option(3, help="<_pad>; null: there is none", min=0)
    end_token_ids: tuple[int, ...] = option((), help="further tokens that end generation, besides eos_token_id", min=0)

    def __post_init__(self) -> None:
        if not self.head_dim:
            if self.hidden_size % self.num_heads:
                raise UserError(
                    f"model.num_heads: {self.num_heads} does not divide hidden_size {self.hidden_size}; "
                    f"nearest that does: {_nearest_divisor(self.hidden_size, self.num_heads)}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_kv_heads: {self.num_kv_heads} does not divide num_heads {self.num_heads}; "
                f"nearest that does: {_nearest_divisor(self.num_heads, self.num_kv_heads)}"
            )
        if self.head_dim % 2:
            raise UserError(
                f"model.num_heads: head size {self.head_dim} (= {self.hidden_size} / {self.num_heads}) is odd; "
                "rotary positions need an even head size"
            )
        if not _THETAS[0] <= self.rope_theta <= _THETAS[1]:
            raise UserError(
                f"model.rope_theta: {self.rope_theta:g} is not between {_THETAS[0]:g} and {_THETAS[1]:g}; beyond them "
                "float32 does not hold the rotary tables"
            )
        if self.position == "yarn" and self.rope_theta <= 1.0:
            raise UserError(f"model.rope_theta: {self.rope_theta:g} must be above 1 for position yarn")
        if self.yarn_slow >= self.yarn_fast:
            raise UserError(f"model.yarn_slow: {self.yarn_slow:g} must be below yarn_fast {self.yarn_fast:g}")
        if self.num_tokens > self.vocab_size:
            raise UserError(f"model.vocab_tokens: {self.vocab_tokens} is above vocab_size {self.vocab_size}")
        ids = {name: (getattr(self, name),) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        for name, found in {**ids, "end_token_ids": self.end_token_ids}.items():
            for token in found:
                if token is not None and token >= self.num_tokens:
                    raise UserError(f"model.{name}: {token} is outside the vocabulary of {self.num_tokens}")
        if self.growth is not None:
            self._check_growth(self.growth)

    def _check_growth(self, growth: GrowthMask) -> None:
        for name in ("hidden_size", "ffn_hidden_size"):
            before, now = getattr(growth, name), getattr(self, name)
            if before > now:
                raise UserError(f"model.growth.{name}: {before} exceeds the current size {now}; give at most {now}")
        for layer in growth.new_layers:
            if layer >= self.num_layers:
                raise UserError(
                    f"model.growth.new_layers: layer {layer} is outside the model's {self.num_layers} layers"
                )
        new_heads(growth, self.num_heads, self.num_kv_heads)

    @property
    def num_tokens(self) -> int:
        """Rows of the vocabulary that stand for tokens."""
        return self.vocab_size if self.vocab_tokens is None else self.vocab_tokens

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end generation."""
        return frozenset((self.eos_token_id, *self.end_token_ids))

    @property
    def filler_id(self) -> int:
        """Id at masked-out positions: the padding token, or the end-of-text token of a model without one."""
        return self.eos_token_id if self.pad_token_id is None else self.pad_token_id

    @property
    def norm_share(self) -> float:
        """norm_divisor / E of an RMSNorm: 1 but for models that grew without masks."""
        return 1.0 if self.norm_divisor is None or self.norm == "layernorm" else self.norm_divisor / self.hidden_size

    @property
    def norm_channels(self) -> int | None:
        """The first so many channels are what a LayerNorm takes its statistics over; None: all."""
        return None if self.norm_divisor is None or self.norm == "rmsnorm" else int(self.norm_divisor)

    def to_dict(self) -> JsonObject:
        """The mapping as JSON gives it back. YaRN's fields are in it only where they are not the defaults of a model
        without YaRN, so that the digests of configs older than these fields stay."""
        values = {**dataclasses.asdict(self), "end_token_ids": list(self.end_token_ids)}
        if self.position != "yarn":
            defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in _YARN}
            values = {name: value for name, value in values.items() if name not in _YARN or value != defaults[name]}
        return values


def preset_names() -> list[str]:
    """Names of the models in configs/models, sorted."""
    return sorted(p.stem for p in (CONFIGS / "models").glob("*.yaml"))


def load_model_config(spec: str | JsonObject, where: str = "model", base: ModelConfig | None = None) -> ModelConfig:
    """A model from a preset's name, from ``{preset: name, ...overrides}``, or from a full mapping.

    ``base``: a model that gives the fields that the spec does not name.

    In place of a preset's name stands a YAML file's as well: a model's mapping, or a run whose ``model`` is taken.
    """
    if isinstance(spec, str):
        spec = {"preset": spec}
    if not isinstance(spec, dict):
        raise UserError(f"{where}: expected a preset's name or a mapping, found {shown(spec)}")
    values = dict(spec)
    for key in ("name", "model", "path", "model_name", "model_type"):
        if key in values and "preset" not in values:
            raise UserError(f"{where}: unknown key '{key}'; did you mean 'preset'?")
    if "preset" in values:
        values = {**_preset(str(values.pop("preset")), where), **values}
    if base is not None:
        values = {**base.to_dict(), **values}
    file = spec.get("preset")
    if not isinstance(file, str) or not _is_file(file):
        return from_mapping(ModelConfig, values, where)
    try:
        return from_mapping(ModelConfig, values, where)
    except UserError as error:
        said = re.sub(rf"^({re.escape(where)}|model)(: |\.)", lambda m: "config: " if m[2] == ": " else "", str(error))
        placed = in_file(said, file, [f"{key}=" for key in spec])
        raise UserError(error if placed == said else placed) from None  # unchanged: the fault is the spec's own


def _preset(name: str, where: str, depth: int = 0) -> JsonObject:
    """The mapping that a preset's name or a YAML file's stands for; ``depth`` files have referred to it."""
    if depth > MAX_PRESETS:
        raise UserError(f"{name}: is the last of {depth} files each of which is the next one's preset; do they circle?")
    if not _is_file(name):
        if name not in preset_names():
            near = nearest_name(name, preset_names())
            hint = f"did you mean '{near}'? There are: " if near else "there are: "
            key = where if where.startswith("--") else f"{where}.preset"  # an option's value is the name itself
            raise UserError(f"{key}: no model preset '{name}'; {hint}{', '.join(preset_names())}")
        values = load_yaml(CONFIGS / "models" / f"{name}.yaml")
    else:
        values = load_yaml(name)
        if isinstance(values, dict) and "model" in values:
            inner = values["model"]
            values = {"preset": inner} if isinstance(inner, str) else inner
        if isinstance(values, dict) and "preset" in values:
            inherited = _preset(_beside(str(values["preset"]), Path(name).parent), where, depth + 1)
            values = {**inherited, **{key: value for key, value in values.items() if key != "preset"}}
    if not isinstance(values, dict):
        raise UserError(f"{name}: expected a model's mapping, found {shown(values)}")
    return values


def _is_file(preset: str) -> bool:
    return preset.endswith((".yaml", ".yml"))


def _beside(preset: str, folder: Path) -> str:
    return str(folder / preset) if _is_file(preset) else preset


def _nearest_divisor(whole: int, wanted: int) -> int:
    """The divisor of ``whole`` closest to ``wanted``, the smaller of two. Divisors come in pairs around the root."""
    small = [d for d in range(1, math.isqrt(whole) + 1) if whole % d == 0]
    return min((*small, *(whole // d for d in small)), key=lambda d: (abs(d - wanted), d))


def with_table_dtype(config: ModelConfig, table_dtype: str | None) -> ModelConfig:
    """``config`` with another rotary table precision, or as it is for None."""
    if table_dtype is None:
        return config
    return dataclasses.replace(config, table_dtype=table_dtype)
