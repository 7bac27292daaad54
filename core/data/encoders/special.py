"""Beginning, end and padding of a tokenizer that is not TeleChat2's, and where each was found.

By name or id, in this order: an option, tokenizer_config.json or special_tokens_map.json beside the tokenizer, the
model's config.json, the tokenizer's own file. What had to be assumed is in ``notes``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import load_json
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

KINDS = ("bos", "eos", "pad")
_DIGITS = 10  # of a token's id
# In the order in which a folder is looked through; each is a tokenizer by itself, but for merges.txt beside vocab.json.
FILES = ("tokenizer.model", "tokenizer.json", "vocab.json")
TOKENIZER_CONFIG, SPECIAL_MAP, ADDED, CONFIG = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)


@dataclass(frozen=True)
class SpecialTokens:
    """``given``: "bos", "eos" or "pad" -> (the token's name or id, where that was found). ``added``: name -> id of
    further tokens that the files beside the tokenizer describe (id None: behind the last one). ``names``: what the
    files call a token, such as "unk_token" -> its name. ``written``: as ``added``, of tokens that are text (special
    false). ``begins``: the file by which texts begin with the bos token (add_bos_token), or None."""

    given: Mapping[str, tuple[str | int, str]] = field(default_factory=dict)
    added: Mapping[str, int | None] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    written: Mapping[str, int] = field(default_factory=dict)
    begins: str | None = None

    def begins_note(self, option: str) -> list[str]:
        """A note for a command that begins texts with the bos token by ``option`` alone, which is not given."""
        way = f"{option} does what add_bos_token says, and without it texts begin without the bos token"
        return [] if self.begins is None else [f"{self.begins}: {way}"]

    @property
    def described(self) -> dict[str, int | None]:
        """Every token that the files beside the tokenizer add, special or not."""
        return {**self.written, **self.added}

    def id_of(self, kind: str, token_id: Callable[[str], int | None], size: int, path: Path) -> int | None:
        """The id of a kind of token, None where nothing names it; UserError for a token that does not exist."""
        if kind not in self.given:
            return None
        token, source = self.given[kind]
        index = token_id(token) if isinstance(token, str) else token
        if index is None or not 0 <= index < size:
            raise UserError(f"{source}: {kind} token {shown(token)} is not one of the {size} tokens of {path}")
        return index

    def source(self, kind: str, default: Path) -> str:
        """Where a kind of token was found; ``default``: the tokenizer's own file."""
        return self.given[kind][1] if kind in self.given else str(default)


def read_special(folder: Path, options: Mapping[str, str | None] | None = None) -> SpecialTokens:
    """What ``options`` (kind -> name) and the files in ``folder`` say of the special tokens.

    A file that is not there says nothing; UserError for one that is damaged.
    """
    given: dict[str, tuple[str | int, str]] = {}
    added: dict[str, int | None] = {}
    names: dict[str, str] = {}
    written: dict[str, int] = {}
    for kind, name in (options or {}).items():
        if name is not None:
            given[kind] = (name, f"--{kind}-token")
    described = _beside(folder, TOKENIZER_CONFIG)
    for source, found in ((TOKENIZER_CONFIG, described), (SPECIAL_MAP, _beside(folder, SPECIAL_MAP))):
        _check(found, folder / source)
        for key, value in found.items():
            name = _name(value)
            if name is None or not key.endswith("_token"):
                continue
            names.setdefault(key, name)
            kind = key.removesuffix("_token")
            if kind in KINDS:
                given.setdefault(kind, (name, str(folder / source)))
            added.setdefault(name, None)
        for key in ("additional_special_tokens", "extra_special_tokens"):  # the second is transformers 5's name
            listed = found.get(key)
            listed = list(listed.values()) if isinstance(listed, dict) else listed
            for name in map(_name, listed if isinstance(listed, list) else ()):
                if name is not None:
                    added.setdefault(name, None)
    for index, value in (described.get("added_tokens_decoder") or {}).items():
        (added if _is_special(value) else written)[value["content"]] = int(index)
    for name, index in _beside(folder, ADDED).items():
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise UserError(f"{folder / ADDED}: {shown(name)} must have an id, found {shown(index)}")
        added[name] = index
    model: JsonObject = {}
    with contextlib.suppress(UserError):  # any program's config.json may lie here
        model = _beside(folder, CONFIG)
    for key, value in model.items():
        kind = key.removesuffix("_token_id")
        first = value[0] if isinstance(value, list) and value else value
        if key != kind and kind in KINDS and isinstance(first, int) and not isinstance(first, bool):
            given.setdefault(kind, (first, str(folder / CONFIG)))
    begins = str(folder / TOKENIZER_CONFIG) if described.get("add_bos_token") is True else None
    return SpecialTokens(given, added, names, written, begins)


def _check(found: JsonObject, where: Path) -> None:
    """UserError for a description of special tokens that has another shape than transformers writes."""
    for kind in (*KINDS, "unk", "sep", "cls", "mask"):
        value = found.get(f"{kind}_token")
        if value is not None and value != "" and _name(value) is None:
            raise UserError(f"{where}: {kind}_token must be a token's name, or an object with it, found {shown(value)}")
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = found.get(key)
        listed = list(value.values()) if isinstance(value, dict) else value
        if listed is not None and (not isinstance(listed, list) or None in map(_name, listed)):
            raise UserError(f"{where}: {key} must be names of tokens, found {shown(value)}")
    entries = found.get("added_tokens_decoder")
    if entries is not None and not isinstance(entries, dict):
        raise UserError(f"{where}: added_tokens_decoder must map ids to tokens, found {shown(entries)}")
    for index, entry in (entries or {}).items():
        if not (index.isascii() and index.isdecimal() and len(index) <= _DIGITS and isinstance(entry, dict)):
            raise UserError(
                f"{where}: added_tokens_decoder has {shown(index)}: {shown(entry)}, expected an id: a token"
            )
        if _name(entry) is None:
            raise UserError(f"{where}: added_tokens_decoder.{index} has no content, the token's name")
    if not isinstance(found.get("add_bos_token"), bool | None):
        raise UserError(f"{where}: add_bos_token must be true or false, found {shown(found['add_bos_token'])}")


def find_tokenizer(folder: Path, among: Iterable[Path] | None = None) -> Path | None:
    """The tokenizer that lies in a folder (or ``among`` files), the authoritative one where there are several."""
    files = {path.name: path for path in (folder / name for name in FILES) if path.is_file()}
    if among is not None:
        files = {path.name: path for path in among}
    return next((files[name] for name in FILES if name in files), None)


def encodable(text: str) -> None:
    """UserError for text that has no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        bad = text[error.start]
        raise UserError(f"text has an unpaired surrogate U+{ord(bad):04X} at character {error.start}") from None


def missing_control(path: Path, name: str, variant: str) -> UserError:
    """The error for a control token that the tokenizer does not have."""
    if variant != "none":
        return UserError(f"{path}: no control token {name} with control '{variant}'; load with 'chat'")
    return UserError(
        f"{path}: no control token {name}: this tokenizer has no dialogue pieces of TeleChat2 (a base model's, or "
        "read with control 'none'), so it cannot hold a dialogue; continue plain text, or use a chat model's tokenizer"
    )


def missing_special(path: Path, kind: str) -> UserError:
    """The error for a kind of token that neither the tokenizer nor a file beside it names."""
    return UserError(
        f"{path}: no {kind} token is named in it, or in {TOKENIZER_CONFIG}, {SPECIAL_MAP} or {CONFIG} beside it; "
        f"name it with --{kind}-token"
    )


def _beside(folder: Path, name: str) -> JsonObject:
    path = folder / name
    return load_json(path, "a description of tokens") if path.is_file() else {}


def _name(value: object) -> str | None:
    """The text of a token, which is written alone or with its flags."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and content else None


def _is_special(value: object) -> bool:
    return isinstance(value, dict) and value.get("special") is True
