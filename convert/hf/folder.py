"""Reading and writing a model folder as released on Hugging Face: config.json and safetensors, in one file or many.

Tensors are read one at a time, when asked for; nothing here ever holds a model in memory, and nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from telechat_twins.convert.hf.config import dump_config, read_config, token_keys, write_config
from telechat_twins.convert.hf.config_keys import end_ids
from telechat_twins.convert.hf.shards import INDEX, open_shards, plain_name
from telechat_twins.convert.hf.sums import check_sums, write_sums
from telechat_twins.convert.hf.tokenizer import load_pieces, write_library_config, write_tokenizer_files
from telechat_twins.convert.names import bind, hf_prefix, released_table
from telechat_twins.core.checkpoint.read import check_shapes
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import new_folder, standing
from telechat_twins.core.files.safetensors import DTYPES, Index, SafetensorsWriter, header_room, load_json
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.types import JsonObject

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
GENERATION = "generation_config.json"
_HEAD = "lm_head.weight"
MAX_SHARD_BYTES = 5 * 10**9  # what transformers writes by default

# transformers and vLLM do not know these model types: they load the class that auto_map names, from a file beside it.
_CODE = {"telechat2": "configuration_telechat2.Telechat2Config", "teleflm": "configuration_teleflm.TeleFLMConfig"}

# Small files that belong to a release and travel with the weights; the code files are what auto_map points to.
_ASSETS = (
    "config.json",
    INDEX,
    GENERATION,
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    "generation_utils.py",
)


class HfFolder:
    """A released folder, opened: everything is checked against its config.json before a tensor is read.

    ``config``, ``released`` (the mapping of config.json), ``notes`` (assumptions made), ``bindings`` (released name ->
    logical names), ``prefix``, ``files`` (file name -> SafetensorsFile).
    """

    def __init__(self, path: str | Path, verify: bool = True, on_bytes: Callable[[int], object] | None = None) -> None:
        """``verify``: hash the files, where the folder has SHA256SUMS; ``on_bytes`` is called with the bytes read.

        UserError names the file and what is wrong: missing config or shard, damage, names or shapes that differ.
        """
        self.path = standing(Path(path))
        if verify:
            check_sums(self.path, [*self.assets, *sorted(self.path.glob("*.safetensors"))], on_bytes)
        self.released = load_json(self.path / "config.json", "a model's config")
        config, notes = read_config(self.released, str(self.path / "config.json"))
        ends, said = _generation_ends(self.path / GENERATION, config)
        self.config = replace(config, end_token_ids=(*config.end_token_ids, *ends))
        shards = open_shards(self.path, (_HEAD,) if self.config.tied_embeddings else ())
        self.notes = [*notes, *said, *shards.notes]
        self.indexed, self.files, self._home, self._placed = shards.indexed, shards.files, shards.home, shards.tensors
        prefix = hf_prefix(self.config)
        self.prefix = prefix if any(name.startswith(prefix) for name in self._home) else ""
        self.bindings = bind(self.config, prefix=self.prefix)
        self._drop_tied_head()
        shapes = {name: self.files[file].tensors[name].shape for name, file in self._home.items()}
        only = next(iter(self.files.values())).path if len(self.files) == 1 else self.path
        self._check_rows(shapes)
        check_shapes(released_table(self.bindings, self.config), shapes, str(only))
        for name in self._home:
            if self.code(name) not in DTYPE_NAMES:
                raise UserError(
                    f"{self.path / self._home[name]}: tensor '{name}' is {self.code(name)}; "
                    f"expected one of {', '.join(DTYPE_NAMES)}"
                )

    def _check_rows(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """UserError for an embedding of another number of rows than the config's, which may not count the padding."""
        table = next(name for name, binding in self.bindings.items() if binding.logical == ("embed.weight",))
        found = shapes.get(table, ())
        if len(found) == 2 and found[0] != self.config.vocab_size and found[1] == self.config.hidden_size:
            raise UserError(
                f"{self.path / 'config.json'}: vocab_size is {self.config.vocab_size}, but {table} has {found[0]} "
                f"rows; write {found[0]}: rows behind the tokenizer's pieces are taken for padding"
            )

    def _drop_tied_head(self) -> None:
        """Pass over a head that is stored although it is the embedding, or read that from it where it alone is stored;
        UserError if they are two matrices."""
        if not self.config.tied_embeddings or _HEAD not in self._home:
            return
        table = next(name for name, binding in self.bindings.items() if binding.logical == ("embed.weight",))
        if table not in self._home:
            named = (replace(b, released=_HEAD) if b.released == table else b for b in self.bindings.values())
            self.bindings = {binding.released: binding for binding in named}
            self.notes.append(f"{table} is missing: {_HEAD} is read for it, by tie_word_embeddings")
            return
        if self.read(_HEAD).tobytes() != self.read(table).tobytes():
            raise UserError(
                f"{self.path / 'config.json'}: tie_word_embeddings is true (its default where it is missing), but "
                f"{_HEAD} is not {table}; set tie_word_embeddings to false"
            )
        del self._home[_HEAD]
        self.notes.append(f"{_HEAD} is not read: it is the embedding, by tie_word_embeddings")

    def code(self, name: str) -> str:
        """Safetensors name of a released tensor's dtype."""
        return self.files[self._home[name]].tensors[name].code

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A released tensor, or the box ``index`` of it, in its stored dtype."""
        return self.files[self._home[name]].read(name, index)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are read."""
        return sum(self.files[file].tensors[name].nbytes for name, file in self._home.items())

    @property
    def dtype(self) -> str:
        """float32, bfloat16...; "mixed" if the tensors differ."""
        codes = {self.code(name) for name in self._home}
        return DTYPE_NAMES[codes.pop()] if len(codes) == 1 else "mixed"

    @property
    def assets(self) -> list[Path]:
        """The small files that belong to the release."""
        return sorted(path for pattern in _ASSETS for path in self.path.glob(pattern) if path.is_file())

    def source_record(self) -> JsonObject:
        """What a canonical checkpoint keeps under "hf", so that writing the release back gives the same files."""
        return {
            "config": self.released,
            "prefix": self.prefix,
            "dtype": self.dtype,
            "indexed": self.indexed,
            "shards": [
                {"file": name, "metadata": file.metadata, "tensors": self._placed(name)}
                for name, file in self.files.items()
                if self._placed(name)
            ],
        }

    def logical(self) -> Iterator[tuple[str, np.ndarray]]:
        """(logical name, tensor) of the whole model in forward order; each released tensor is read once."""
        for name, binding in self.bindings.items():
            yield from binding.split(self.read(name), self.config).items()


@dataclass(frozen=True)
class Shard:
    """A file to write: its tensors (released name -> dtype code, shape) in file order."""

    file: str
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(tensor_bytes(*spec) for spec in self.tensors.values())


def tensor_bytes(code: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of this dtype code and shape."""
    return math.prod(shape) * DTYPES[code].itemsize


def plan_shards(tensors: Mapping[str, tuple[str, tuple[int, ...]]], max_bytes: int = MAX_SHARD_BYTES) -> list[Shard]:
    """Cut the tensors, in order, into files of at most ``max_bytes`` (a larger tensor gets a file of its own)."""
    groups: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, spec in tensors.items():
        count = tensor_bytes(*spec)
        if groups[-1] and filled + count > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = spec
        filled += count
    metadata = {"format": "pt"}  # transformers refuses a file that does not say this
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0], metadata)]
    total = len(groups)
    return [Shard(f"model-{i:05d}-of-{total:05d}.safetensors", g, metadata) for i, g in enumerate(groups, 1)]


def check_record(record: object, where: str) -> None:
    """UserError unless ``record`` is what ``HfFolder.source_record`` made and a JSON file kept."""
    kinds = {"config": dict, "prefix": str, "dtype": str, "indexed": bool, "shards": list}
    shards = None
    if isinstance(record, dict) and all(type(record.get(name)) is kind for name, kind in kinds.items()):
        shards = record["shards"]
    shard = {"file": str, "metadata": dict, "tensors": list}
    if shards is None or not all(
        isinstance(entry, dict)
        and all(type(entry.get(name)) is kind for name, kind in shard.items())
        and all(isinstance(text, str) for text in (*entry["metadata"].values(), *entry["tensors"]))
        for entry in shards
    ):
        raise UserError(f"{where}: damaged, hf does not describe the release that the model came from; remove it")


def recorded_shards(record: JsonObject, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[Shard] | None:
    """The files of the release a checkpoint came from, or None if its tensors are no longer those of the release."""
    shards = []
    for shard in record["shards"]:
        held = {name: tensors[name] for name in shard["tensors"] if name in tensors}
        shards.append(Shard(plain_name(shard["file"], "model.json"), held, shard["metadata"]))
    if sum(len(shard.tensors) for shard in shards) != len(tensors):
        return None
    return shards if record["indexed"] else [Shard("model.safetensors", shards[0].tensors, shards[0].metadata)]


def write_folder(
    path: Path,
    config: ModelConfig,
    read: Callable[[str], np.ndarray],
    shards: Sequence[Shard],
    *,
    record: JsonObject | None,
    assets: Mapping[str, Path],
    complete: bool,
    sums: bool = False,
) -> None:
    """Write a release atomically: shards, index, config.json, and the small files.

    ``read`` gives a released tensor by name, in the dtype planned. ``record`` is the checkpoint's "hf" entry, if any.
    ``assets`` (name -> file) are copied; the original config.json and index among them only where they still hold.
    ``complete`` adds the small files that are lacking (generation settings, description of the tokenizer), ``sums`` the
    SHA-256 of every file.
    """
    originals = dict(assets)
    if complete and "tokenizer.model" in assets:
        load_pieces(assets["tokenizer.model"], config)  # a wrong one is not found out after hours of writing
    codes = {code for shard in shards for code, _ in shard.tensors.values()}
    dtype = DTYPE_NAMES[codes.pop()] if len(codes) == 1 else "mixed"
    total = sum(shard.nbytes for shard in shards)
    with new_folder(path, lambda: total) as building:
        for shard in shards:
            room = header_room(shard.tensors, shard.metadata)
            with SafetensorsWriter(building / shard.file, room, shard.metadata) as writer:
                for name in shard.tensors:
                    writer.add(name, read(name))
        same = record is not None and record["dtype"] == dtype
        released = write_config(
            config, record["config"] if record else None, None if same or dtype == "mixed" else dtype
        )
        if record is None and config.family in _CODE:
            released["auto_map"] = {"AutoConfig": _CODE[config.family]}
            code = _CODE[config.family].partition(".")[0] + ".py"
            shutil.copyfile(Path(__file__).parent / "released" / code, building / code)
        _write_json(building / "config.json", released, originals.pop("config.json", None), dump_config)
        original_index = originals.pop(INDEX, None)
        if len(shards) > 1 or shards[0].file != "model.safetensors":
            weight_map = {name: shard.file for shard in shards for name in shard.tensors}
            index: JsonObject = {"metadata": {"total_size": total}, "weight_map": weight_map}
            if same and original_index is not None:
                known = load_json(original_index, "a checkpoint index")
                # Nothing has changed, so the other entries of the index stay too.
                index = known if known.get("weight_map") == weight_map else index
            _write_json(building / INDEX, index, original_index, _dump_index)
        for name, asset in originals.items():
            shutil.copyfile(asset, building / name)
        if complete:
            _write_missing(building, config)
        if sums:
            write_sums(building)


def _generation_ends(path: Path, config: ModelConfig) -> tuple[tuple[int, ...], list[str]]:
    """Tokens that end generation by generation_config.json and not by config.json, and a note on them."""
    if not path.is_file():
        return (), []
    found = load_json(path, "generation settings").get("eos_token_id")
    if found is None:
        return (), []
    more = [token for token in end_ids(found, "eos_token_id", str(path)) if token not in config.stop_ids]
    ends = tuple(token for token in more if token < config.num_tokens)
    notes = [f"{GENERATION}: token {', '.join(map(str, ends))} ends generation as well"] if ends else []
    if len(ends) < len(more):
        outside = next(token for token in more if token not in ends)
        notes.append(f"{GENERATION}: eos_token_id {outside} is outside the vocabulary and is never drawn")
    return ends, notes


def _write_json(path: Path, value: JsonObject, original: Path | None, dump: Callable[[JsonObject], str]) -> None:
    """Write JSON; where the original file holds the same value, its bytes are copied."""
    if original is not None and load_json(original, "JSON") == value:
        shutil.copyfile(original, path)
    else:
        path.write_text(dump(value), encoding="utf-8")


def _dump_index(index: JsonObject) -> str:
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _write_missing(folder: Path, config: ModelConfig) -> None:
    """For a model trained here: generation settings, and a description of the tokenizer for transformers and vLLM."""
    if not (folder / GENERATION).exists():
        text = dump_config({**token_keys(config), "do_sample": False})
        (folder / GENERATION).write_text(text, encoding="utf-8")
    if (folder / "tokenizer_config.json").exists():
        return
    if (folder / "tokenizer.model").exists():
        write_tokenizer_files(folder, config)
    elif (folder / "tokenizer.json").exists():
        write_library_config(folder, config)
