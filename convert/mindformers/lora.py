"""Adapters in MindFormers' checkpoints, under its three naming conventions and in its three forms of the model.

A network has one lora_rank and one lora_alpha for all layers, and the checkpoint records no alpha. So an adapter is
written with the largest rank everywhere, the others filled up with zeros, and alpha raised with it: alpha / rank and
every product stay as they were. Rows and columns of zeros are taken off again on the way back.

Names: mindspore-lab/mindformers, mindformers/tools/lora_merge_utils.py (parallel_core, mindpet, pynative); [rank, in]
and [out, rank] in all three.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from telechat_twins.convert.adapter_packing import PackedLinear, Pair, Unpacked, packed_linears, packed_pairs
from telechat_twins.convert.mindformers.files import (
    Home,
    TensorFile,
    open_ranks,
    shared_axis,
    slice_shape,
    write_ranks,
    write_whole,
)
from telechat_twins.convert.mindformers.source import check_mp
from telechat_twins.convert.names import Binding, Same, bind, mindformers_rules
from telechat_twins.convert.places import require_place
from telechat_twins.core.checkpoint.adapter import Adapter
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import new_folder
from telechat_twins.core.files.safetensors import load_json
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.lora import AdapterBase
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

NAMES: dict[str, tuple[str, str]] = {
    "lora_A": (".lora_A.weight", ".lora_B.weight"),
    "mindpet": (".mindpet_delta_lora_a", ".mindpet_delta_lora_b"),
    "lora_a": (".lora_a", ".lora_b"),
}
# Some versions of mindpet give the parameter this name of its own.
_ENDINGS = (*NAMES.values(), (".mindpet_delta_lora_A", ".mindpet_delta_lora_B"))
CONFIGS = ("mindformers_adapter_config.json", "adapter_config.json")
_MOMENTS = ("adam_m.", "adam_v.", "moment1.", "moment2.", "accu_grads.")
_CODES = ("F32", "F16", "BF16")


def open_lora(
    path: str | Path, config: ModelConfig, alpha: float | None, mp: int | None = None, option: str = "--mp"
) -> Adapter:
    """The adapter in a file, a folder or the folders of all ranks, checked against the model it is for.

    ``alpha``: lora_alpha of the run; None takes it from a JSON file beside the weights. ``mp``: the ranks for which
    the rows of w_qkv are ordered, where the files do not tell. UserError names the file, tensor or option.
    """
    path = Path(path)
    homes = open_ranks(path)
    notes: list[str] = []
    found = [_halves(home, path) for home in homes]
    form = _form(found[0])
    require_place(config, form)
    beside, where = _config_beside(path)
    ranks = _mp(len(homes), mp, option, form, config, path)
    linears = packed_linears(bind(config, mindformers_rules(config, form, ranks)), config)
    alpha = _alpha(alpha, beside, where, path)
    pairs = {}
    for name, linear in linears.items():
        if any(name in halves for halves in found):
            pairs[name] = _pair(name, linear, found, alpha, path)
    if left := next((name for halves in found for name in halves if name not in linears), None):
        raise UserError(f"{path}: has an adapter for '{left}', which is not a linear layer of this model")
    others = sum(len(home) for home in homes) - sum(len(pair) for halves in found for pair in halves.values())
    if others:
        notes.append(f"{others} tensors that are no adapter's (the base, or the optimizer's) are not read")
    unpacked = Unpacked(pairs, linears, config)
    dropout = beside.get("lora_dropout", 0.0)
    return Adapter(
        path=path,
        config=config,
        modules=unpacked.modules,
        dropout=float(dropout) if isinstance(dropout, (int, float)) and 0 <= dropout <= 0.99 else 0.0,
        base=AdapterBase(path="", fingerprint=""),
        read=unpacked.read,
        notes=tuple(notes),
    )


def write_lora(
    adapter: Adapter, target: Path, form: str, names: str, mp: int = 1, *, file_format: str = "safetensors"
) -> None:
    """Write ``target``: adapter tensors in a form of ``MINDFORMERS_FORMS`` and under a convention of ``NAMES``, whole
    or a file for each of ``mp`` ranks, and an adapter_config.json with rank and alpha.

    UserError for a model the form cannot hold and for adapters of different scales.
    """
    config = adapter.config
    require_place(config, form)
    check_mp(config, mp)
    linears = packed_linears(bind(config, mindformers_rules(config, form, mp)), config)
    pairs = [(name, pair) for name, _, pair in packed_pairs(adapter, linears)]
    scales = {name: pair.alpha / pair.rank for name, pair in pairs}
    if max(scales.values()) - min(scales.values()) > 1e-12 * max(scales.values()):
        first, last = min(scales, key=scales.__getitem__), max(scales, key=scales.__getitem__)
        raise UserError(
            f"{adapter.path}: MindFormers has one lora_alpha for all layers, and the scales alpha / rank differ "
            f"({first} {scales[first]:g}, {last} {scales[last]:g}); merge the adapter into the model instead"
        )
    rank = max(pair.rank for _, pair in pairs)
    alpha = next(pair.alpha for _, pair in pairs if pair.rank == rank)
    tensors: dict[str, tuple[Pair, str]] = {}
    bindings: dict[str, Binding] = {}
    for name, pair in pairs:
        linear = linears[name]
        for half, ending in zip("ab", NAMES[names], strict=True):
            shape = (rank, linear.columns) if half == "a" else (linear.rows, rank)
            axis = _axis(linear, half)
            bindings[name + ending] = Binding(name + ending, (), Same(), shape, axis)
            tensors[name + ending] = pair, half
    specs = {name: ("F32", binding.shape) for name, binding in bindings.items()}

    def read(name: str) -> np.ndarray:
        pair, half = tensors[name]
        array = (pair.a() if half == "a" else pair.b()).astype(np.float32)
        grown = np.zeros(bindings[name].shape, np.float32)
        grown[tuple(slice(0, n) for n in array.shape)] = array
        return grown

    with new_folder(target) as building:
        if mp == 1:
            write_whole(building, specs, read, file_format)
        else:
            write_ranks(building, bindings, specs, mp, read, file_format)
        described = _described(adapter, rank, alpha, [name.rpartition(".")[2] for name, _ in pairs])
        (building / CONFIGS[1]).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _described(adapter: Adapter, rank: int, alpha: float, endings: list[str]) -> JsonObject:
    """What MindFormers' pet_config wants to know; its merging tool reads lora_alpha from a file of this name."""
    return {
        "base_model_name_or_path": adapter.base.path or None,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": adapter.dropout,
        "lora_rank": rank,
        "pet_type": "lora",
        "r": rank,
        "target_modules": "|".join(f".*{ending}" for ending in dict.fromkeys(endings)),
    }


def _axis(linear: PackedLinear, half: str) -> int | None:
    """The dimension of A or B that ranks share: B's rows of a layer that shares its rows, A's columns of the others."""
    axis = linear.binding.axis
    return axis if axis is not None and (axis == 0) == (half == "b") else None


def _halves(home: Home, path: Path) -> dict[str, dict[str, tuple[str, TensorFile]]]:
    """Linear -> "a" or "b" -> tensor's name and file; UserError for two conventions of one layer."""
    found: dict[str, dict[str, tuple[str, TensorFile]]] = {}
    for name, file in home.items():
        if name.startswith(_MOMENTS):
            continue
        for endings in _ENDINGS:
            for half, ending in zip("ab", endings, strict=True):
                if name.endswith(ending):
                    held = found.setdefault(name.removesuffix(ending), {})
                    if half in held:
                        raise UserError(f"{file.path}: '{name}' and '{held[half][0]}' are one half of one adapter")
                    held[half] = name, file
                    break
            else:
                continue
            break
        else:
            if "lora" in name:
                raise UserError(f"{file.path}: '{name}' is no A or B of a linear layer under a name known here")
    if not found:
        raise UserError(f"{path}: holds no adapter; its names end in {', '.join(a for a, _ in NAMES.values())}")
    return found


def _form(halves: Mapping[str, object]) -> str:
    if any(name.startswith("decoder.layers.") for name in halves):
        return "mcore"
    return "qkv_concat" if any(re.search(r"\.(w_qkv|w_gate_hidden)$", name) for name in halves) else "plain"


def _mp(found: int, mp: int | None, option: str, form: str, config: ModelConfig, path: Path) -> int:
    if found > 1 and mp not in (None, found):
        raise UserError(f"{option} {mp}: {path} has {found} rank folders; leave {option} out")
    ranks = found if found > 1 else mp or 1
    if form == "qkv_concat" and found == 1 and mp is None:
        raise UserError(
            f"{path}: the rows of w_qkv are ordered for a number of ranks that the file does not record; give {option}"
        )
    check_mp(config, ranks, option)
    return ranks


def _config_beside(path: Path) -> tuple[JsonObject, Path | None]:
    """The lora_config of a JSON file beside the weights, or nothing."""
    folder = path if path.is_dir() else path.parent
    for name in CONFIGS:
        if (folder / name).is_file():
            values = load_json(folder / name, "an adapter's description")
            inner = values.get("lora_config", values)
            return inner if isinstance(inner, dict) else {}, folder / name
    return {}, None


def _alpha(given: float | None, beside: JsonObject, where: Path | None, path: Path) -> float:
    said = beside.get("lora_alpha")
    if said is not None and (isinstance(said, bool) or not isinstance(said, (int, float)) or not 0 < said < 1e30):
        raise UserError(f"{where}: lora_alpha: must be a number above 0, found {shown(said)}")
    if given is not None and said is not None and given != said:
        raise UserError(f"--alpha {given:g}: {where} says {said:g}; leave --alpha out")
    alpha = said if given is None else given
    if alpha is None:
        raise UserError(
            f"{path}: MindFormers' checkpoints do not record lora_alpha; give --alpha, as pet_config of its run had it "
            "(MindFormers' default is 16)"
        )
    return float(alpha)


def _pair(
    name: str,
    linear: PackedLinear,
    found: list[dict[str, dict[str, tuple[str, TensorFile]]]],
    alpha: float,
    path: Path,
) -> Pair:
    ranks = len(found)
    for number, halves in enumerate(found):
        where = path if ranks == 1 else f"{path}/rank_{number}"
        if len(halves.get(name, {})) < 2:
            missing = "AB" if name not in halves else "B" if "a" in halves[name] else "A"
            raise UserError(f"{where}: '{name}' has no {missing}; an adapter has both halves; restore the file")
    first, file = found[0][name]["a"]
    rank = file.tensors[first].shape[0] if file.tensors[first].shape else 0
    shapes = {"a": (rank, linear.columns), "b": (linear.rows, rank)}
    axes = {half: shared_axis(Binding(name, (), Same(), shapes[half], _axis(linear, half)), ranks) for half in "ab"}
    for halves in found:
        for half in "ab":
            tensor, home = halves[name][half]
            info, wanted = home.tensors[tensor], slice_shape(shapes[half], axes[half] if ranks > 1 else None, ranks)
            if info.shape != wanted or info.code not in _CODES:
                raise UserError(
                    f"{home.path}: tensor '{tensor}': expected {list(wanted)} in one of {', '.join(_CODES)}, found "
                    f"{list(info.shape)} {info.code}"
                )

    def read(half: str) -> np.ndarray:
        parts = [halves[name][half][1].read(halves[name][half][0]) for halves in found]
        axis = axes[half]
        if ranks > 1 and axis is not None:
            return np.concatenate(parts, axis)
        if any(part.tobytes() != parts[0].tobytes() for part in parts[1:]):
            raise UserError(f"{path}: '{name}' has a half that every rank holds whole, and its ranks differ")
        return parts[0]

    a, b = read("a"), read("b")
    used = np.flatnonzero(a.any(axis=1) | b.any(axis=0))
    kept = int(used[-1]) + 1 if used.size else rank
    return Pair(kept, alpha * kept / rank if kept < rank else alpha, lambda: a[:kept], lambda: b[:, :kept])
