"""Operators of the decoder as they are replayed alone: their tensors, and the axes along which an input may shrink.

An axis lists every place where it occurs, so that one choice of indices cuts all tensors of a case alike. B rows of the
batch, S positions, E channels, H query heads, K kv heads, D head dim, V vocabulary. Gradients of outputs are the
tensors ``grad:<output>``.
"""

from __future__ import annotations

from dataclasses import dataclass

ONE, BLOCK, HALVES = "one", "block", "halves"


@dataclass(frozen=True)
class Place:
    """Axis number ``axis`` of the tensor ``tensor``.

    ``spread``: index i of n stands for index i here (one), for the i-th run of equal length (block: query heads that
    share a kv head), or for i, i + n, ... (halves: the two channels that a rotation mixes).
    """

    tensor: str
    axis: int
    spread: str = ONE


@dataclass(frozen=True)
class Axis:
    """``places``: the first one gives the axis's size. ``relabel``: an input that holds indices of this axis."""

    name: str
    places: tuple[Place, ...]
    relabel: str | None = None


@dataclass(frozen=True)
class Operator:
    """``inputs`` are required, ``optional`` ones may be left out; ``derived``: inputs that have a gradient.

    ``settings``: names and kinds (float, int) of the numbers that a case must bring.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    derived: tuple[str, ...]
    axes: tuple[Axis, ...]
    optional: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


def _axis(name: str, *places: str, relabel: str | None = None) -> Axis:
    """Places as ``tensor.axis`` or ``tensor.axis.spread``."""
    parts = [place.split(".") for place in places]
    return Axis(name, tuple(Place(p[0], int(p[1]), p[2] if len(p) > 2 else ONE) for p in parts), relabel)


def _leading(*tensors: str) -> tuple[Axis, Axis]:
    """Rows and positions of tensors [B, S, ...]."""
    return _axis("rows", *(f"{t}.0" for t in tensors)), _axis("positions", *(f"{t}.1" for t in tensors))


def _elementwise(*tensors: str) -> tuple[Axis, ...]:
    return *_leading(*tensors, "grad:out"), _axis("channels", *(f"{t}.2" for t in (*tensors, "grad:out")), "mask.0")


OPERATORS: dict[str, Operator] = {
    "embedding": Operator(
        ("weight", "ids"),
        ("out",),
        ("weight",),
        (
            *_leading("ids", "grad:out"),
            _axis("channels", "weight.1", "grad:out.2"),
            _axis("vocabulary", "weight.0", relabel="ids"),
        ),
        settings=("multiplier",),
    ),
    "rms_norm": Operator(
        ("x", "weight"),
        ("out",),
        ("x", "weight"),
        (*_leading("x", "grad:out"), _axis("channels", "x.2", "weight.0", "mask.0", "grad:out.2")),
        ("mask",),
        ("eps", "share"),
    ),
    "layer_norm": Operator(
        ("x", "weight", "bias"),
        ("out",),
        ("x", "weight", "bias"),
        (*_leading("x", "grad:out"), _axis("channels", "x.2", "weight.0", "bias.0", "mask.0", "grad:out.2")),
        ("mask",),
        ("eps", "counted"),
    ),
    "add_rms_norm": Operator(
        ("x", "residual", "weight"),
        ("out", "stream"),
        ("x", "residual", "weight"),
        (
            *_leading("x", "residual", "grad:out", "grad:stream"),
            _axis("channels", "x.2", "residual.2", "weight.0", "mask.0", "grad:out.2", "grad:stream.2"),
        ),
        ("mask",),
        ("eps", "share"),
    ),
    "linear": Operator(
        ("x", "weight"),
        ("out",),
        ("x", "weight", "bias"),
        (
            *_leading("x", "grad:out"),
            _axis("out channels", "weight.0", "bias.0", "padding.0", "grad:out.2"),
            _axis("in channels", "x.2", "weight.1"),
        ),
        ("bias", "padding"),
        ("multiplier",),
    ),
    "adapted_linear": Operator(
        ("x", "weight", "lora_a", "lora_b"),
        ("out",),
        ("x", "dropped", "lora_a", "lora_b"),
        (
            *_leading("x", "dropped", "grad:out"),
            _axis("out channels", "weight.0", "bias.0", "lora_b.0", "grad:out.2"),
            _axis("in channels", "x.2", "dropped.2", "weight.1", "lora_a.1"),
            _axis("rank", "lora_a.0", "lora_b.1"),
        ),
        ("bias", "dropped"),
        ("scale",),
    ),
    "rope": Operator(
        ("q", "k", "cos", "sin"),
        ("q", "k"),
        ("q", "k"),
        (
            *_leading("q", "k", "cos", "sin", "scale_q", "scale_k", "grad:q", "grad:k"),
            _axis("heads", "q.2", "grad:q.2"),
            _axis("kv heads", "k.2", "grad:k.2"),
            _axis(
                "channels",
                *(f"{table}.3" for table in ("cos", "sin", "scale_q", "scale_k")),
                *(f"{x}.3.{HALVES}" for x in ("q", "k", "grad:q", "grad:k")),
            ),
        ),
        ("scale_q", "scale_k"),
    ),
    "attention": Operator(
        ("q", "k", "v"),
        ("out",),
        ("q", "k", "v"),
        (
            *_leading("q", "k", "v", "doc_ids", "grad:out"),
            _axis("kv heads", "k.2", "v.2", f"q.2.{BLOCK}", f"mask.0.{BLOCK}", f"grad:out.2.{BLOCK}"),
            _axis("channels", "q.3", "k.3", "v.3", "mask.1", "grad:out.3"),
        ),
        ("doc_ids", "mask"),
    ),
    "swiglu": Operator(("gate", "up"), ("out",), ("gate", "up"), _elementwise("gate", "up"), ("mask",)),
    "gelu": Operator(("x",), ("out",), ("x",), _elementwise("x"), ("mask",)),
    "add": Operator(
        ("stream", "branch"),
        ("out",),
        ("stream", "branch", "before"),
        _elementwise("stream", "branch", "before"),
        ("before",),
        ("grown",),
    ),
    "cross_entropy": Operator(
        ("logits", "targets"),
        ("loss",),
        ("logits",),
        (*_leading("logits", "targets", "weights"), _axis("vocabulary", "logits.2", relabel="targets")),
        ("weights",),
        ("terms",),
    ),
    "adamw": Operator(
        ("master", "grad", "m", "v"),
        ("master", "m", "v"),
        (),
        (_axis("elements", "master.0", "grad.0", "m.0", "v.0"),),
        settings=("step", "lr", "beta1", "beta2", "eps", "weight_decay", "grad_scale"),
    ),
}

_ROLES = {
    "weight": ("weight", "bias", "lora_a", "lora_b"),
    "stat": ("mask", "cos", "sin", "scale_q", "scale_k", "padding", "weights"),
    "residual": ("residual", "stream", "before"),
}
_READ_THE_STREAM = ("rms_norm", "layer_norm")


def role(operator: str, tensor: str) -> str:
    """The field of core.model.precision.Precision that is the dtype of an input."""
    if operator == "adamw":
        return "master"
    if operator in _READ_THE_STREAM and tensor == "x":
        return "residual"
    return next((role for role, names in _ROLES.items() if tensor in names), "compute")
