"""Case of one operator: its inputs, the gradients of its outputs and its settings, in memory and as a file.

The file is a safetensors file: tensors ``in:<name>`` and ``grad:<output>``, and in its metadata under ``case`` a JSON
object {operator, precision, settings, site}. Floats are float32 or float64 (16-bit numbers are exact in float32), ids,
targets and doc_ids int32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.safetensors import SafetensorsFile
from telechat_twins.core.model.config import PRECISIONS, ModelConfig
from telechat_twins.core.parity.locate.operators import OPERATORS, Operator
from telechat_twins.core.shown import shown

INTEGERS = ("ids", "targets", "doc_ids")
Arrays = dict[str, np.ndarray]
Settings = dict[str, float | None]


@dataclass(frozen=True)
class Case:
    """``inputs`` by the names of core.parity.locate.operators; ``grads`` by output, empty for the forward alone.

    ``precision``: a mode of core.model.precision, which decides the dtypes that the operator meets. ``site``: where in
    the model the numbers come from.
    """

    operator: str
    inputs: Arrays
    grads: Arrays
    precision: str
    settings: Settings = field(default_factory=dict)
    site: str = ""

    def tensor(self, name: str) -> np.ndarray | None:
        """An input by name, or the gradient of an output as ``grad:<output>``; None where the case has none."""
        return self.grads.get(name[5:]) if name.startswith("grad:") else self.inputs.get(name)

    def setting(self, name: str) -> float:
        """A number that the operator cannot do without; ValueError where it is missing."""
        value = self.settings.get(name)
        if value is None:
            raise ValueError(f"{self.operator}: setting {name} is missing")
        return value

    @property
    def size(self) -> int:
        """Elements of all tensors."""
        return sum(array.size for array in (*self.inputs.values(), *self.grads.values()))


@dataclass(frozen=True)
class Replayed:
    """What an operator made of a case: outputs, and the gradients of its inputs where the case has gradients."""

    outputs: Arrays
    grads: Arrays

    def all(self) -> Arrays:
        """Both, the gradient of input x as ``d x``."""
        return self.outputs | {f"d {name}": array for name, array in self.grads.items()}


def write_case(path: Path, case: Case) -> None:
    """Write ``case`` to the safetensors file ``path``."""
    from safetensors.numpy import save_file

    arrays = {f"in:{name}": array for name, array in case.inputs.items()}
    arrays |= {f"grad:{name}": array for name, array in case.grads.items()}
    head = {"operator": case.operator, "precision": case.precision, "settings": case.settings, "site": case.site}
    save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, path, {"case": json.dumps(head)})


def read_case(path: str | Path) -> Case:
    """The case that ``write_case`` kept. UserError for a file that is damaged, or not such a case."""
    file = SafetensorsFile(path)
    try:
        head = json.loads(file.metadata.get("case", ""))
    except (ValueError, RecursionError):
        head = None
    if not isinstance(head, dict) or head.get("operator") not in OPERATORS or head.get("precision") not in PRECISIONS:
        raise UserError(f"{path}: expected a case of `tele parity locate`, found metadata {shown(head)}")
    settings = head.get("settings")
    if not isinstance(settings, dict):
        raise UserError(f"{path}: settings: expected a mapping of names to numbers, found {shown(settings)}")
    case = Case(
        head["operator"],
        {name[3:]: file.read(name) for name in file.tensors if name.startswith("in:")},
        {name[5:]: file.read(name) for name in file.tensors if name.startswith("grad:")},
        head["precision"],
        settings,
        str(head.get("site", "")),
    )
    check_case(case, str(path))
    return case


def check_case(case: Case, where: str) -> None:
    """UserError where a case lacks a tensor or a setting, or has tensors of other names, dtypes or shapes."""
    operator = OPERATORS[case.operator]
    _check_names(case, operator, where)
    for name, value in case.settings.items():
        if not (value is None or isinstance(value, (int, float)) and not isinstance(value, bool)):
            raise UserError(f"{where}: settings.{name}: expected a number, found {shown(value)}")
    for name, array in (*case.inputs.items(), *((f"grad:{n}", a) for n, a in case.grads.items())):
        kinds: tuple[type, ...] = (np.int32,) if name in INTEGERS else (np.float32, np.float64)
        if array.dtype not in [np.dtype(kind) for kind in kinds]:
            raise UserError(f"{where}: {name}: expected {' or '.join(k.__name__ for k in kinds)}, found {array.dtype}")
    for axis in operator.axes:
        size = 0
        for place in axis.places:
            cut = case.tensor(place.tensor)
            if cut is None:
                continue
            if cut.ndim <= place.axis:
                raise UserError(f"{where}: {place.tensor}: expected more than {place.axis} axes, found {cut.ndim}")
            length = cut.shape[place.axis]
            size = size or length
            if not length or not (length == size or length == 1 or place.spread != "one" and length % size == 0):
                raise UserError(f"{where}: {place.tensor}: axis {place.axis} has {length} of {size} {axis.name}")
    for axis in operator.axes:
        _check_labels(case, axis.relabel, axis.places[0].tensor, axis.places[0].axis, where)


def _check_names(case: Case, operator: Operator, where: str) -> None:
    for name in operator.inputs:
        if name not in case.inputs:
            raise UserError(f"{where}: {case.operator} needs the tensor {name}, found {shown(sorted(case.inputs))}")
    odd = [n for n in case.inputs if n not in (*operator.inputs, *operator.optional)]
    odd += [n for n in case.grads if n not in operator.outputs]
    odd += [n for n in case.settings if n not in operator.settings]
    if odd:
        raise UserError(f"{where}: {case.operator} has no tensor or setting {shown(odd[0])}")
    for name in operator.settings:
        if name not in case.settings:
            raise UserError(f"{where}: {case.operator} needs settings.{name}")


def _check_labels(case: Case, relabel: str | None, leader: str, axis: int, where: str) -> None:
    """Ids and targets lie inside the vocabulary; a target may be IGNORE, which is negative."""
    if relabel is None:
        return
    labels, array = case.inputs[relabel], case.tensor(leader)
    assert array is not None
    least = 0 if relabel == "ids" else -100
    if labels.size and not (least <= labels.min() and labels.max() < array.shape[axis]):
        raise UserError(f"{where}: {relabel}: expected numbers below {array.shape[axis]}, found {shown(labels.max())}")


def as_floats(arrays: Mapping[str, np.ndarray], dtype: type) -> Arrays:
    """Floats in ``dtype``, integers as they are."""
    return {name: a if a.dtype.kind in "iu" else a.astype(dtype) for name, a in arrays.items()}


def norm_config(case: Case) -> ModelConfig:
    """The smallest model whose norms are that of ``case``, an rms_norm, layer_norm or add_rms_norm."""
    channels = case.inputs["x"].shape[-1]
    share = case.settings.get("share")
    divisor = case.settings.get("counted") if share is None or share == 1.0 else share * channels
    return ModelConfig(
        vocab_size=8,
        hidden_size=channels,
        ffn_hidden_size=1,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        norm="layernorm" if case.operator == "layer_norm" else "rmsnorm",
        norm_eps=case.setting("eps"),
        norm_divisor=divisor,
        training_seqlen=1,
        base_seqlen=1,
        max_seqlen=1,
    )
