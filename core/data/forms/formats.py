"""File forms of training data: which suffix holds what, and which files are not read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import load_json
from telechat_twins.core.types import JsonObject

TEXT, LINES, JSON = "text", "lines", "json"  # one text; a JSON object a line; a JSON list, or objects
CSV, TSV, PARQUET, DATASET = "csv", "tsv", "parquet", "dataset"  # tables; the last is a folder of save_to_disk
TOKENS = "tokens"  # Megatron's .idx beside its .bin: ids, not text

SUFFIXES = {
    **dict.fromkeys((".txt", ".text", ".md", ".rst", ".py"), TEXT),
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines"), LINES),
    ".json": JSON,
    ".csv": CSV,
    ".tsv": TSV,
    ".parquet": PARQUET,
    ".idx": TOKENS,
}
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
_PACKED_AGAIN = (TEXT, LINES, JSON, CSV, TSV)  # forms that are read through a decompressor

_ARCHIVE = "an archive; unpack it first"
_TABLE = "a table in a form that is not read; convert it to .csv, .parquet or .jsonl"
_DOCUMENT = "a document and not plain text; save it as .txt or .md"
_UNREAD = {
    **dict.fromkeys((".docx", ".doc", ".pdf", ".pptx", ".odt", ".rtf", ".epub"), _DOCUMENT),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4"), _ARCHIVE),
    **dict.fromkeys((".xlsx", ".xls", ".sqlite", ".db", ".feather", ".orc"), _TABLE),
    ".arrow": "one file of a save_to_disk folder; name the folder, whose state.json says which files count",
    ".bin": "neither text nor rows, and without the .idx file that would make it Megatron's",
}
STATE, SPLITS = "state.json", "dataset_dict.json"  # what save_to_disk writes into a folder


@dataclass(frozen=True)
class Form:
    """How an input is read: one of the names above, and the suffix of its compression ("" without)."""

    name: str
    compression: str = ""

    @property
    def holds_rows(self) -> bool:
        return self.name in (LINES, JSON, CSV, TSV, PARQUET, DATASET)


def known_form(path: Path) -> Form | None:
    """The form that the suffixes (of any case) of a file, or the contents of a folder, say; None where they do not."""
    if path.is_dir():
        return Form(DATASET) if is_dataset(path) else None
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        name = SUFFIXES.get(suffixes[0]) if len(suffixes) == 2 else None
        return Form(name, suffixes[-1]) if name in _PACKED_AGAIN else None
    if suffixes and suffixes[-1] == ".bin" and path.with_suffix(".idx").is_file():
        return Form(TOKENS)
    name = SUFFIXES.get(suffixes[-1]) if suffixes else None
    return Form(name) if name else None


def form_of(path: Path) -> Form:
    """The form of an input that was named; a file whose suffix says nothing is one text."""
    return known_form(path) or Form(TEXT)


def why_unread(path: Path) -> str:
    """Why a file is not read as any form; "" for one that is only unknown and may be a text."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS and known_form(path) is None:
        return f"compressed, and its name does not say what it holds; name it as .jsonl{suffix} or .txt{suffix}"
    return "" if known_form(path) else _UNREAD.get(suffix, "")


def is_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` of Hugging Face datasets wrote this folder."""
    return (folder / STATE).is_file() or (folder / SPLITS).is_file()


def dataset_split(folder: Path) -> Path:
    """The folder of the one split of a saved dataset; UserError where it holds several, which are not to be mixed."""
    if not (folder / SPLITS).is_file():
        return folder
    facts: JsonObject = load_json(folder / SPLITS, "the splits of a saved dataset")
    splits = facts.get("splits")
    if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
        raise UserError(f"{folder / SPLITS}: names no splits; save the dataset again with save_to_disk")
    if len(splits) > 1:
        raise UserError(
            f"{folder}: holds the splits {', '.join(splits)}; name the folder of one, e.g. {folder / splits[0]}"
        )
    return folder / Path(splits[0]).name
