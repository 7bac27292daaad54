"""A tiny tokenizer and small inputs, made once a test run, so that the data tests need no files of a release."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from telechat_twins.core.data.dialogues import Dialogue
from telechat_twins.core.data.packed_files import sealed, unsealed
from telechat_twins.core.data.packing.samples import Sample
from telechat_twins.core.data.sft import dialogue_samples
from telechat_twins.core.data.tokenizer import Tokenizer, load_tokenizer
from telechat_twins.core.data.tokenizer_training import train_tokenizer

VOCAB_SIZE = 600

SENTENCES = (
    "def add(left, right):\n    return left + right\n",
    "The quick brown fox jumps over the lazy dog.\n",
    "中国电信的语言模型可以回答问题。今天天气怎么样？\n",
    "for index in range(10):\n\tprint(index, 'value', 3.14)\n",
    '{"name": "get_weather", "arguments": {"city": "Paris"}}\n',
)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Made where it is used and not at import: processes that tests spawn import this, too, and end without removing
    what they made."""
    return tempfile.TemporaryDirectory(prefix="tele-data-tests-")


@functools.cache
def tiny_tokenizer_path() -> Path:
    """A tokenizer.model of VOCAB_SIZE pieces, trained on a few sentences."""
    path = Path(_folder().name) / "tokenizer.model"
    words = " ".join(f"word{n % 97} sound{n % 31} letter{n % 13}ing" for n in range(400))
    train_tokenizer([*SENTENCES * 20, words], path, VOCAB_SIZE)
    return path


@functools.cache
def tiny_tokenizer(control: str = "chat", in_vocabulary: bool = False) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer_path(), control, in_vocabulary)


def reseal(folder: Path, **changes: Any) -> None:
    """Change a packed folder's meta.json as its writer would have written it, own hash included; None removes."""
    file = folder / "meta.json"
    meta = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    meta = {name: value for name, value in meta.items() if value is not None}
    if "meta_sha256" in meta:
        meta["meta_sha256"] = unsealed()
    file.write_text(sealed(json.dumps(meta, ensure_ascii=False, indent=1)), encoding="utf-8")


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """A jsonl file of these rows; a row that is text is written as it stands."""
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def dialogue_row(n: int, turns: int = 1, system: str | None = "Be brief.\n", size: int = 3) -> dict[str, Any]:
    """A row in the released shape, with contents that name the row."""
    dialog = []
    for t in range(turns):
        dialog.append({"role": "user", "content": f"word{n} " * size + f"turn {t}?"})
        dialog.append({"role": "bot", "content": f"letter{n} " * size + "fox."})
    row = {"dialog": dialog, "multiturn": turns > 1, "tool": False}
    return row if system is None else {"system": system, **row}


def encode_dialogue(tokenizer: Tokenizer, dialogue: Dialogue) -> Sample:
    """The one sequence of a dialogue in TeleChat2's layout."""
    (sample,) = dialogue_samples(tokenizer, dialogue)
    return sample
