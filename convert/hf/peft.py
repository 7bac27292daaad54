"""Adapter folders of Hugging Face's PEFT (adapter_config.json, adapter_model.safetensors): reading and writing.

PEFT loads what fits and passes over the rest: a tensor under an unexpected name, a layer without tensors, half of an
adapter. Here a folder is read only if every tensor of it acts and every layer it names has both halves.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from telechat_twins.convert.adapter_packing import PackedLinear, Pair, Unpacked, packed_linears, packed_pairs
from telechat_twins.convert.hf.peft_config import ALL_LINEAR, CONFIG, PeftConfig, idle_patterns, read_peft_config
from telechat_twins.convert.names import bind, hf_prefix
from telechat_twins.convert.places import require_place
from telechat_twins.core.checkpoint.adapter import Adapter
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import new_folder, standing
from telechat_twins.core.files.safetensors import (
    DTYPES,
    SafetensorsFile,
    SafetensorsWriter,
    dtype_code,
    header_room,
    load_json,
)
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.lora import AdapterBase
from telechat_twins.core.near import near_path
from telechat_twins.core.types import JsonObject

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
HALVES = ("lora_A", "lora_B")
_ADAPTERS = (CONFIG, "manifest.json", "latest")  # by one of which a folder is an adapter's, or a run's
_KEY = re.compile(r"(?P<module>.+)\.(?P<half>lora_[AB])(\.default)?\.weight")
_METADATA = {"format": "pt"}
# Parts of names of tensors that are no A or B of a linear layer, and what they are.
_OTHERS = {
    "lora_embedding_": "an adapter of an embedding",
    ".base_layer.": "a parameter of the base, trained or saved beside the adapter",
    "lora_magnitude_vector": "a magnitude of DoRA",
    ".modules_to_save.": "a module that was trained whole",
    "token_adapter": "trained rows of an embedding",
    ".bias": "a bias",
}
_CODES = ("F32", "F16", "BF16")


def is_peft(path: Path) -> bool:
    """Whether a folder is an adapter of PEFT's."""
    return (path / CONFIG).is_file()


def open_peft(path: str | Path, config: ModelConfig) -> Adapter:
    """An adapter folder, checked against the model it is for; the tensors are read when asked for.

    UserError names the file, the key or tensor, and what PEFT would make of it.
    """
    folder = standing(Path(path))
    where = str(folder / CONFIG)
    if not is_peft(folder):
        raise _no_adapter(folder)
    values = load_json(folder / CONFIG, "PEFT's description of an adapter")
    settings = read_peft_config(values, where)
    file = SafetensorsFile(_weights(folder))
    outer, unprefixed = _outer(file)
    bare = not any(name.startswith(outer + hf_prefix(config)) for name in file.tensors)
    prefix = "" if bare else hf_prefix(config)
    linears = packed_linears(bind(config, prefix=prefix), config)
    keys = _keys(file, linears, outer)
    _check_targets(settings, keys, linears, config, prefix, folder)
    pairs = {name: _pair(file, name, keys[name], linears[name], settings, folder) for name in linears if name in keys}
    unpacked = Unpacked(pairs, linears, config)
    base = values.get("base_model_name_or_path")
    record = {
        "prefix": prefix,
        "metadata": file.metadata,
        "tensors": {name: info.code for name, info in file.tensors.items()},
    }
    return Adapter(
        path=folder,
        config=config,
        modules=unpacked.modules,
        dropout=settings.dropout,
        base=AdapterBase(path=base if isinstance(base, str) else "", fingerprint=""),
        read=unpacked.read,
        notes=(
            *settings.notes,
            *unprefixed,
            *idle_patterns(settings, pairs, where),
            *_layout_note(values, config, where),
        ),
        record=record,
        assets=[folder / CONFIG],
    )


def check_adapter_folder(folder: Path) -> None:
    """UserError where an adapter's folder is a file, is not there, or is one of adapters (a trainer's steps)."""
    if folder.is_file():
        raise UserError(f"{folder}: is a file; give the folder of an adapter, e.g. {folder.parent}")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected an adapter{near_path(folder)}")
    below = [] if any((folder / name).is_file() for name in _ADAPTERS) else sorted(folder.glob(f"*/{CONFIG}"))
    if below:
        places = ", ".join(str(file.parent) for file in below[:3])
        raise UserError(f"{folder}: is no adapter; below it are {places}: give one of them")


def _no_adapter(folder: Path) -> UserError:
    """The error for a folder without an adapter of PEFT's."""
    check_adapter_folder(folder)
    ours = any((folder / name).is_file() for name in _ADAPTERS)
    way = "a checkpoint made here is --from canonical" if ours else "give the folder that PEFT saved"
    return UserError(f"{folder}: has no {CONFIG}, so it is no adapter of PEFT's; {way}")


def write_peft(adapter: Adapter, target: Path, dtype: str | None = None) -> None:
    """Write ``target`` as an adapter folder of PEFT's.

    Of an adapter that came from one and is unchanged: its own config and tensors, bit for bit. ``dtype``: a safetensors
    code; None keeps that of the folder it came from, where that holds every value, and else float32.
    """
    config, record = adapter.config, adapter.record
    require_place(config, "hf")
    prefix = str(record["prefix"]) if record else hf_prefix(config)
    linears = packed_linears(bind(config, prefix=prefix), config)
    pairs = list(packed_pairs(adapter, linears))
    original = _original(adapter, pairs)
    tensors: dict[str, np.ndarray] = {}
    for name, _, pair in pairs:
        for half, read in zip(HALVES, (pair.a, pair.b), strict=True):
            tensors[f"{PREFIX}{name}.{half}.weight"] = read()
    codes = {name: str(code) for name, code in record["tensors"].items()} if record and original else {}
    if codes and {_plain(name) for name in codes} == set(tensors):
        tensors = {name: tensors[_plain(name)] for name in codes}
    else:
        original, codes = None, {}
    stored = {name: _as(array, dtype or codes.get(name, "F32"), dtype is not None) for name, array in tensors.items()}
    metadata = {str(k): str(v) for k, v in record["metadata"].items()} if record and original else _METADATA
    specs = {name: (dtype_code(array.dtype), array.shape) for name, array in stored.items()}
    with new_folder(target, lambda: sum(array.nbytes for array in stored.values())) as building:
        if original is not None:
            shutil.copyfile(original, building / CONFIG)
        else:
            values = _fresh(adapter, pairs, linears)
            (building / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
        with SafetensorsWriter(building / WEIGHTS, header_room(specs, metadata), metadata) as writer:
            for name, array in stored.items():
                writer.add(name, array)


def _plain(name: str) -> str:
    """A tensor's name as PEFT saves it: with its prefix, and without the name of its first adapter."""
    return PREFIX + name.replace(".default.weight", ".weight").removeprefix(PREFIX)


def _weights(folder: Path) -> Path:
    """The file of an adapter's tensors; UserError where it is missing or another format."""
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    found = sorted(file.name for file in folder.glob("adapter_model[.-]*"))
    if any(".safetensors" in name for name in found):
        raise UserError(f"{folder / found[0]}: an adapter in several files is not read; save it as one {WEIGHTS}")
    said = "pickled weights are not read (they can run code); save it as safetensors" if found else "missing"
    raise UserError(f"{folder / (found[0] if found else WEIGHTS)}: {said}")


def _outer(file: SafetensorsFile) -> tuple[str, list[str]]:
    """What stands before the model's own names, with a note where that is nothing: transformers' ``save_pretrained``
    saves an adapter so with ``save_peft_format=False``, and reads it. UserError where names differ in it."""
    without = [name for name in file.tensors if not name.startswith(PREFIX)]
    if not without:
        return PREFIX, []
    if len(without) < len(file.tensors):
        raise UserError(
            f"{file.path}: tensor '{without[0]}': does not begin with {PREFIX}, as {len(file.tensors) - len(without)} "
            f"others do, so PEFT would not load it; rename it to {PREFIX}{without[0]}"
        )
    return "", [
        f"{file.path}: names have no {PREFIX} in front, as transformers saves an adapter with save_peft_format=False; "
        "PEFT itself would not load it"
    ]


def _keys(file: SafetensorsFile, linears: Mapping[str, PackedLinear], outer: str) -> dict[str, dict[str, str]]:
    """Linear's name -> half -> tensor's name; UserError for a tensor that is neither."""
    keys: dict[str, dict[str, str]] = {}
    for name in file.tensors:
        start = f"{file.path}: tensor '{name}'"
        match = _KEY.fullmatch(name.removeprefix(outer))
        if match is None:
            what = next((what for part, what in _OTHERS.items() if part in name), "no A or B of a linear layer")
            raise UserError(f"{start}: is {what}, which is not taken over; merge the adapter with PEFT instead")
        if match["module"] not in linears:
            known = ", ".join(sorted({_ending(linear, linears) for linear in linears}))
            raise UserError(
                f"{start}: '{match['module']}' is not a layer that takes an adapter here; these do: {known}"
            )
        held = keys.setdefault(match["module"], {})
        if match["half"] in held:
            raise UserError(f"{start}: is there twice, as '{held[match['half']]}' too; leave one")
        held[match["half"]] = name
    return keys


def _check_targets(
    settings: PeftConfig,
    keys: Mapping[str, dict[str, str]],
    linears: Mapping[str, PackedLinear],
    config: ModelConfig,
    prefix: str,
    folder: Path,
) -> None:
    """UserError where the config names other layers than the tensors do."""
    if settings.target_modules != ALL_LINEAR:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in bind(config, prefix=prefix))
        if other := next((name for name in modules if name not in linears and settings.targets(name)), None):
            raise UserError(
                f"{folder / CONFIG}: target_modules: names '{other}' too, whose adapter cannot be taken over; merge "
                "the adapter with PEFT instead"
            )
    for name in linears:
        there, named = name in keys, settings.targets(name)
        if named and not there:
            raise UserError(
                f"{folder / WEIGHTS}: has no tensors for '{name}', which target_modules names: PEFT would leave this "
                "layer without an adapter; restore the file, or correct target_modules"
            )
        if there and not named:
            raise UserError(
                f"{folder / WEIGHTS}: has tensors for '{name}', which {_naming(settings)} does not name: PEFT would "
                f"pass over them; correct {_naming(settings)} in {CONFIG}"
            )
    if not keys:
        raise UserError(f"{folder / WEIGHTS}: holds no adapter")


def _naming(settings: PeftConfig) -> str:
    """The keys by which a config names layers."""
    others = {"layers_to_transform": settings.layers, "exclude_modules": settings.exclude_modules}
    return " with ".join(["target_modules", *(key for key, value in others.items() if value)])


def _pair(
    file: SafetensorsFile,
    name: str,
    halves: Mapping[str, str],
    linear: PackedLinear,
    settings: PeftConfig,
    folder: Path,
) -> Pair:
    for half in HALVES:
        if half not in halves:
            raise UserError(f"{file.path}: '{name}' has no {half}; one half alone does nothing; restore the file")
    rank = settings.rank(name)
    wanted = {"lora_A": (rank, linear.columns), "lora_B": (linear.rows, rank)}
    for half, shape in wanted.items():
        info = file.info(halves[half])
        if info.shape != shape:
            raise UserError(
                f"{file.path}: tensor '{halves[half]}': expected {list(shape)} by the model and rank {rank} of "
                f"{folder / CONFIG}, found {list(info.shape)}"
            )
        if info.code not in _CODES:
            raise UserError(f"{file.path}: tensor '{halves[half]}' is {info.code}; expected one of {', '.join(_CODES)}")
    a, b = halves["lora_A"], halves["lora_B"]
    return Pair(rank, settings.scaled_alpha(name), lambda: file.read(a), lambda: file.read(b))


def _layout_note(values: JsonObject, config: ModelConfig, where: str) -> list[str]:
    """Of fan_in_fan_out, which PEFT corrects by the kind of layer."""
    conv, said = config.family == "flm", values.get("fan_in_fan_out") is True
    if conv == said:
        return []
    kind = "Conv1D" if conv else "Linear"
    return [f"{where}: fan_in_fan_out is {str(said).lower()}, and the model's layers are {kind}; PEFT corrects it too"]


def _original(adapter: Adapter, pairs: Sequence[tuple[str, float, Pair]]) -> Path | None:
    """The adapter_config.json that the adapter came with, if it still describes it."""
    path = next((asset for asset in adapter.assets if asset.name == CONFIG), None)
    if path is None or adapter.record is None:
        return None
    settings = read_peft_config(load_json(path, "PEFT's description of an adapter"), str(path))
    fits = all(
        settings.targets(name)
        and settings.rank(name) == pair.rank
        and math.isclose(settings.scaled_alpha(name), pair.alpha, rel_tol=1e-12)
        for name, _, pair in pairs
    )
    return path if fits and settings.dropout == adapter.dropout else None


def _as(array: np.ndarray, code: str, rounded: bool) -> np.ndarray:
    """``array`` in a dtype: rounded to it where that was asked for, else float32 where it would change a value."""
    with np.errstate(over="ignore"):
        out = array.astype(DTYPES[code])
    if rounded and not np.isfinite(out[np.isfinite(array)]).all():
        raise UserError(f"--dtype: a value of {np.abs(array).max():g} is beyond its range; take bfloat16 or float32")
    if rounded or np.array_equal(out.astype(np.float32), array.astype(np.float32)):
        return out
    return array.astype(np.float32)


def _ending(name: str, linears: Mapping[str, PackedLinear]) -> str:
    """The last part of a layer's name, or the last two where one means several layers (FLM's c_proj)."""
    last = name.rpartition(".")[2]
    owners = {other.split(".")[-2] for other in linears if other.endswith(f".{last}")}
    return last if len(owners) == 1 else ".".join(name.split(".")[-2:])


def _fresh(
    adapter: Adapter, pairs: Sequence[tuple[str, float, Pair]], linears: Mapping[str, PackedLinear]
) -> JsonObject:
    """An adapter_config.json. No two of its patterns match the same layer: PEFT takes the first that matches, and
    saves them sorted."""
    sizes = {name: (pair.rank, pair.alpha) for name, _, pair in pairs}
    rank, alpha = Counter(sizes.values()).most_common(1)[0][0]
    groups: dict[str, list[str]] = {}
    for name in linears:
        groups.setdefault(_ending(name, linears), []).append(name)
    targets: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for ending, names in groups.items():
        there = [name for name in names if name in sizes]
        targets += [ending] if len(there) == len(names) else there
        alike = len({sizes[name] for name in there}) == 1 and len(there) == len(names)
        for pattern, size in (
            {re.escape(ending): sizes[there[0]]} if alike else {re.escape(name): sizes[name] for name in there}
        ).items():
            if size[0] != rank:
                ranks[pattern] = size[0]
            if size[1] != alpha:
                alphas[pattern] = _number(size[1])
    return {
        "alpha_pattern": alphas,
        "base_model_name_or_path": adapter.base.path or None,
        "bias": "none",
        "fan_in_fan_out": adapter.config.family == "flm",
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _number(alpha),
        "lora_dropout": adapter.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": ranks,
        "revision": None,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _number(value: float) -> float:
    """Written as PEFT writes it: without a fraction where there is none."""
    return int(value) if value == int(value) else value
