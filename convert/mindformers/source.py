"""A MindFormers checkpoint opened as a model: whole or from all its ranks, in any of its forms.

Everything is checked against the model's config before a tensor is read: names, shapes, that the ranks' parts make up
whole tensors and that what each holds whole is the same on all.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from telechat_twins.convert.hf.folder import DTYPE_NAMES, check_record
from telechat_twins.convert.mindformers.config import read_model_file
from telechat_twins.convert.mindformers.files import Home, open_ranks, shared_axis, slice_shape
from telechat_twins.convert.names import MINDFORMERS_FORMS, Box, bind, is_derived, mindformers_rules, released_table
from telechat_twins.convert.places import require_place
from telechat_twins.convert.source import ModelSource
from telechat_twins.core.checkpoint.read import check_shapes
from telechat_twins.core.data.encoders.special import find_tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.safetensors import DTYPES, load_json
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.model.params import ParamSpec
from telechat_twins.core.schema import from_mapping
from telechat_twins.core.types import JsonObject

# What this converter leaves beside the weights: config, form and ranks, the release it came from; its small files.
MODEL, ASSETS = "model.json", "assets"

_SIGNS = {
    "mcore_train": ".self_attention.linear_qkv.",
    "mcore": "decoder.layers.",
    "qkv_concat": ".attention.w_qkv.",
    "plain": ".attention.wk_v.",
}
_WEIGHTS = ("model.", "lm_head.", "embedding.", "decoder.", "output_layer.")
_CACHES = (".key_cache", ".value_cache")


class Known:
    """What is known of a MindFormers checkpoint without its weights: ``config``, ``notes``, ``record``, ``layout``."""

    def __init__(self, path: Path, preset: str | JsonObject | None = None, file: Path | None = None) -> None:
        """From a preset (name or mapping), a file (config.json or .yaml), or what lies beside the weights.

        UserError names the options where the config is not found, and values that contradict each other.
        """
        folder = path if path.is_dir() else path.parent
        beside = next((folder / name for name in (MODEL, "config.json") if (folder / name).is_file()), None)
        self.notes: list[str] = []
        self.record: JsonObject | None = None
        self.layout: JsonObject = {}  # form and mp, as this converter wrote them
        given = None
        if preset is not None:
            given = load_model_config(preset, "--model")
        elif file is not None:
            given, self.notes = read_model_file(file)
        if beside is not None and beside.name == MODEL:
            model = load_json(beside, "a model's description")
            self.record, self.layout = model.get("hf"), model.get("mindformers") or {}
            _check_layout(self.layout, str(beside))
            if self.record is not None:
                check_record(self.record, str(beside))
            own = from_mapping(ModelConfig, model.get("config"), f"{beside}: config")
            if given is not None:
                _agree(given, own, "--model" if preset is not None else "--config", beside)
            given, self.notes = own, []
        elif given is None and beside is not None:
            given, self.notes = read_model_file(beside)
        if given is None:
            raise UserError(
                f"{path}: MindFormers' checkpoints do not say which model they are; give --model PRESET, or --config "
                "with the release's config.json or the .yaml that MindFormers runs it with"
            )
        self.config = given


def _check_layout(said: object, where: str) -> None:
    """UserError unless model.json describes form and ranks as this converter writes them."""
    kinds = {"form": str, "mp": int, "whole": bool}
    if not isinstance(said, dict) or any(type(said.get(name)) is not kind for name, kind in kinds.items() if said):
        raise UserError(f"{where}: damaged, mindformers must have form, mp and whole, found {said!r}")
    if said and (said["form"] not in MINDFORMERS_FORMS or said["mp"] < 1):
        forms = ", ".join(MINDFORMERS_FORMS)
        raise UserError(f"{where}: damaged, mindformers is {said!r}; form is one of {forms}, mp at least 1")


def _agree(given: ModelConfig, own: ModelConfig, option: str, where: Path) -> None:
    for name, value in dataclasses.asdict(own).items():
        if (theirs := getattr(given, name)) != getattr(own, name):
            raise UserError(f"{option}: has {name} {theirs}, but {where} says {value}; leave {option} out")


class MindFormersSource(ModelSource):
    """A MindFormers checkpoint. ``form``, ``mp``: the form of its names and the ranks its rows are ordered for."""

    def __init__(self, path: str | Path, known: Known, mp: int | None = None, option: str = "--mp") -> None:
        """``mp``: required where the files do not record it; ``option`` is what it is called in messages.

        UserError names the file, tensor or option that is wrong.
        """
        self.path = Path(path)
        self.config, self.record = known.config, known.record
        homes = open_ranks(self.path)
        self.ranks = [{name: file for name, file in home.items() if _is_weight(name)} for home in homes]
        self.form = _form(self.ranks, homes, self.path, self.config.family)
        require_place(self.config, self.form)
        notes = list(known.notes)
        self.mp = _ranks_of(self, known, mp, option, notes)
        check_mp(self.config, self.mp, option)
        if self.form == "mcore_train":
            notes.append(
                "linear_qkv is taken as groups of query, key and value heads, linear_fc1 as rows of gate and up in "
                "turn: use_contiguous_weight_layout_attention False, use_interleaved_weight_layout_mlp True (defaults)"
            )
        others = [name for name in homes[0] if not _is_weight(name)]
        if others:
            notes.append(f"{len(others)} tensors that are not weights are skipped ({others[0]}, ...)")
        self.notes = tuple(notes)
        self.bindings = bind(self.config, mindformers_rules(self.config, self.form, self.mp))
        _check_sizes(self)
        self._axes = _check_ranks(self)
        self._holder = {name: b for b in self.bindings.values() for name in b.logical}
        self._last: tuple[str, np.ndarray] | None = None
        folder = self.path if self.path.is_dir() else self.path.parent
        tokenizer = find_tokenizer(folder)
        kept = sorted((folder / ASSETS).iterdir()) if (folder / ASSETS).is_dir() else []
        self.assets = kept or ([] if tokenizer is None else [tokenizer])
        self.tokenizer_path = find_tokenizer(folder, self.assets)

    def dtype(self, name: str) -> np.dtype:
        return DTYPES[self.code(self._holder[name].released)]

    def code(self, released: str) -> str:
        """Safetensors name of the dtype of a tensor under MindFormers' name."""
        return self.ranks[0][released].tensors[released].code

    def tensor(self, name: str) -> np.ndarray:
        if name not in self._holder:
            raise UserError(f"{self.path}: the model has no tensor '{name}'")
        binding = self._holder[name]
        return binding.split(self.released(binding.released), self.config)[name]

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        """MindFormers' checkpoints hold no hashes."""

    def logical(self) -> Iterator[tuple[str, np.ndarray]]:
        for released, binding in self.bindings.items():
            yield from binding.split(self.released(released), self.config).items()

    def released(self, released: str) -> np.ndarray:
        """A whole tensor under MindFormers' name; UserError if what every rank should hold whole differs.

        The last one is kept: what is packed in it is asked for piece by piece.
        """
        if self._last is None or self._last[0] != released:
            self._last = None  # or it would stay in memory beside the next one
            everything = tuple(slice(0, size) for size in self.bindings[released].shape)
            self._last = (released, self._read(released, everything))
        return self._last[1]

    def read(self, name: str, box: Box) -> np.ndarray:
        if name not in self._holder:
            raise UserError(f"{self.path}: the model has no tensor '{name}'")
        binding = self._holder[name]
        return binding.read(lambda part: self._read(binding.released, part), name, box, self.config)

    def _read(self, released: str, box: Box) -> np.ndarray:
        """A box of the whole tensor, from the parts of the ranks that it meets."""
        axis, shape = self._axes[released], self.bindings[released].shape
        if axis is not None:
            out = np.empty([span.stop - span.start for span in box], DTYPES[self.code(released)])
            size, span = shape[axis] // len(self.ranks), box[axis]
            for rank, home in enumerate(self.ranks):
                low, high = max(span.start, rank * size), min(span.stop, (rank + 1) * size)
                if low < high:
                    local = (*box[:axis], slice(low - rank * size, high - rank * size), *box[axis + 1 :])
                    place = (*(slice(None),) * axis, slice(low - span.start, high - span.start))
                    out[place] = home[released].read(released, local)
            return out
        whole = self.ranks[0][released].read(released, box)
        for rank, home in enumerate(self.ranks[1:], 1):
            if home[released].read(released, box).tobytes() != whole.tobytes():
                raise UserError(
                    f"{home[released].path}: '{released}' of rank {rank} differs from rank 0's; every rank holds it "
                    "whole, so these are not the ranks of one checkpoint"
                )
        return whole

    def export(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        wanted = dict.fromkeys(self._holder[name].released for name in tensors)
        return {name: self.bindings[name].join(tensors, self.config) for name in wanted}

    def files(self) -> list[Path]:
        return [*dict.fromkeys(file.path for home in self.ranks for file in home.values()), *self.assets]


def check_mp(config: ModelConfig, mp: int, option: str = "--mp") -> None:
    """UserError unless every rank gets whole key/value heads (and with them query heads) and rows of the ffn."""
    K, F = config.num_kv_heads, config.ffn_hidden_size
    if K % mp or F % mp:
        legal = ", ".join(str(n) for n in range(1, K + 1) if K % n == 0 and F % n == 0)
        raise UserError(
            f"{option} {mp}: does not divide the model's {K} key/value heads and {F} ffn channels, of which every rank "
            f"holds an equal part; possible: {legal}"
        )


def is_mindformers_name(name: str) -> bool:
    """Whether a tensor's name is one of a block in one of MindFormers' forms, and of no release."""
    return any(sign in name for sign in _SIGNS.values())


def _is_weight(name: str) -> bool:
    """Not moments and counters of training (adam_m.*, epoch_num), caches of inference, tables of the config."""
    return name.startswith(_WEIGHTS) and not name.endswith(_CACHES) and not is_derived(name)


def _form(ranks: list[Home], homes: list[Home], path: Path, family: str) -> str:
    names = [name for home in ranks for name in home]
    for form, sign in _SIGNS.items():
        if any(sign in name for name in names):
            return form
    if any(".attention.wk." in name for name in names):
        if family == "telechat3":
            return "plain"
        raise UserError(f"{path}: has Llama's attention.wk and attention.wv; TeleChat2 packs them in attention.wk_v")
    if any(name.startswith("transformer.") for name in homes[0]):
        raise UserError(f"{path}: has the names of a release; use --from hf")
    found = ", ".join(f"'{name}'" for name in list(homes[0])[:2]) or "nothing"
    raise UserError(f"{path}: holds none of MindFormers' names for TeleChat2 (found {found})")


def _ranks_of(source: MindFormersSource, known: Known, mp: int | None, option: str, notes: list[str]) -> int:
    """The ranks that the rows are ordered for, from the folders, from model.json, or from the option."""
    found, said = len(source.ranks), known.layout.get("mp")
    if said is not None and source.path.is_dir() and found != (1 if known.layout.get("whole") else said):
        raise UserError(f"{source.path}: {MODEL} says {said} ranks, found {found} rank folders; some are missing")
    if found > 1:
        if mp not in (None, found):
            raise UserError(f"{option} {mp}: {source.path} has {found} rank folders; leave {option} out")
        return found
    if source.form != "qkv_concat":
        return 1
    if said is not None and mp not in (None, said):
        raise UserError(f"{option} {mp}: {source.path}'s {MODEL} says {said}; leave {option} out")
    if mp is None and said is None and source.config.family == "flm":
        raise UserError(
            f"{source.path}: the rows of w_qkv are ordered for a number of ranks that the file does not record; give "
            f"{option} as it was given to MindFormers' converter (its default is 4)"
        )
    if mp is None and said is None:
        notes.append(
            f"w_qkv is taken as one rank's, as MindFormers converts one file; if it is merged ranks, say {option}"
        )
    return int(said or mp or 1)


def _check_sizes(source: MindFormersSource) -> None:
    """Sizes that can be read from the weights against the config: a clearer word than the first shape that differs."""
    config, home, ranks = source.config, source.ranks[0], len(source.ranks)
    shapes = {name: file.tensors[name].shape for name, file in home.items()}
    held = {
        name: (shapes[b.released], b) for b in source.bindings.values() for name in b.logical if b.released in shapes
    }
    layers = {int(match[1]) for name in shapes if (match := re.search(r"\.layers\.([0-9]{1,9})\.", name))}
    found = {"num_layers": max(layers) + 1}
    if "embed.weight" in held:
        rows, found["hidden_size"] = held["embed.weight"][0]
        found["vocab_size"] = rows if rows == config.vocab_size else rows * ranks
    if "layers.0.ffn.down.weight" in held:
        found["ffn_hidden_size"] = held["layers.0.ffn.down.weight"][0][1] * ranks
    for name, value in found.items():
        if getattr(config, name) != value:
            raise UserError(
                f"{source.path}: {name}: the weights have {value}, the config says {getattr(config, name)}; give the "
                "config of this model (--model, --config)"
            )


def _check_ranks(source: MindFormersSource) -> dict[str, int | None]:
    """MindFormers' name -> the dimension along which the ranks' parts are put together; None for copies.

    UserError for a missing or unexpected tensor, a shape that is neither a part nor the whole, and dtypes that differ.
    """
    ranks, kinds = len(source.ranks), released_table(source.bindings, source.config)
    axes: dict[str, int | None] = {}
    for rank, home in enumerate(source.ranks):
        where = str(source.path) if ranks == 1 else f"{source.path}/rank_{rank}"
        shapes = {name: file.tensors[name].shape for name, file in home.items()}
        table = {}
        for name, binding in source.bindings.items():
            axis = shared_axis(binding, ranks) if ranks > 1 else None
            if rank == 0:
                axes[name] = None if shapes.get(name) == binding.shape else axis
            table[name] = ParamSpec(slice_shape(binding.shape, axes[name], ranks), kinds[name].kind)
        check_shapes(table, shapes, where)
        for name in source.bindings:
            code, first = home[name].tensors[name].code, source.ranks[0][name].tensors[name].code
            if code not in DTYPE_NAMES:
                raise UserError(f"{where}: tensor '{name}' is {code}; expected one of {', '.join(DTYPE_NAMES)}")
            if code != first:
                raise UserError(f"{where}: tensor '{name}' is {code}, rank 0's is {first}; ranks must agree")
    return axes
