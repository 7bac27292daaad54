"""Export of a SentencePiece tokenizer and its chat template for transformers, vLLM and llama.cpp.

tokenizer.model is authoritative. tokenizer.json describes the same tokenizer to the tokenizers library, which
transformers and vLLM use, so that no remote code is needed; it is left out where the description would not be exact.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core.data.chat_layout import CHAT_TEMPLATE
from telechat_twins.core.data.control import ALIASES, BOT, END, USER
from telechat_twins.core.data.tokenizer import load_tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.protobuf import fields
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

Message = dict[int, int | bytes | memoryview]  # a protobuf message by field number
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space
_CALLED = {piece: name for name, piece in ALIASES.items()}
# Of sentencepiece_model.proto: ModelProto, SentencePiece, TrainerSpec, NormalizerSpec.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TYPE, _USER_DEFINED = 3, 4
_MODEL_TYPE, _BPE, _SPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 2, 24, 35
_NAME, _CHARACTER_MAP, _DUMMY_PREFIX, _EXTRA_SPACES, _ESCAPED_SPACES = 1, 2, 3, 4, 5
_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def write_tokenizer_files(folder: Path, config: ModelConfig) -> None:
    """For the tokenizer.model in ``folder``: tokenizer_config.json, and tokenizer.json where it can be said exactly.

    UserError if the file is not a tokenizer or has more pieces than the model's vocabulary.
    """
    pieces = load_pieces(folder / "tokenizer.model", config)
    exact = tokenizer_json(pieces)
    if exact is not None:
        (folder / "tokenizer.json").write_text(json.dumps(exact, ensure_ascii=False) + "\n", encoding="utf-8")
    described = describe_tokenizer(pieces, config, exact is not None)
    text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def write_library_config(folder: Path, config: ModelConfig) -> None:
    """tokenizer_config.json for the tokenizer.json in ``folder``: the class that reads it, and the model's special
    tokens. UserError if the file is not a tokenizer or has more tokens than the model's vocabulary."""
    tokenizer = load_tokenizer(folder / "tokenizer.json", "auto")
    if tokenizer.vocab_size > config.num_tokens:
        raise UserError(
            f"tokenizer.json: has {tokenizer.vocab_size} tokens, the model's vocab_size is {config.num_tokens}; give "
            "the tokenizer the model was trained with"
        )
    ids = {"bos": config.bos_token_id, "eos": config.eos_token_id, "pad": config.pad_token_id}
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{kind}_token": tokenizer.piece(index) for kind, index in ids.items() if index is not None},
        "model_max_length": config.max_seqlen,
        **({"chat_template": CHAT_TEMPLATE} if tokenizer.control else {}),
    }
    text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def describe_tokenizer(pieces: SentencePieceProcessor, config: ModelConfig, exact: bool) -> JsonObject:
    """tokenizer_config.json of a SentencePieceProcessor.

    ``exact``: a tokenizer.json lies beside it. Else transformers' slow LlamaTokenizer, its plain SentencePiece
    tokenizer up to 4.57, is named; a fast form made from tokenizer.model by transformers gives other ids.
    """
    special = {i: token_name(pieces, i) for i in range(pieces.get_piece_size()) if _is_special(pieces, i)}
    how: JsonObject = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if not exact:
        how = {"tokenizer_class": "LlamaTokenizer", "use_fast": False, "legacy": True}
    talks = {USER, BOT, END} <= set(special.values())
    return {
        **how,
        "add_bos_token": False,  # llama.cpp adds it where this is missing
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(i): {"content": name, **_FLAGS} for i, name in special.items()},
        **{
            token: pieces.id_to_piece(getattr(config, f"{token}_id"))
            for token in ("bos_token", "eos_token", "pad_token")
        },
        "unk_token": pieces.id_to_piece(pieces.unk_id()),
        "model_max_length": config.max_seqlen,
        **({"chat_template": CHAT_TEMPLATE} if talks else {}),
    }


def tokenizer_json(pieces: SentencePieceProcessor) -> JsonObject | None:
    """The tokenizers library's form of a SentencePieceProcessor, giving the same ids; None if there is no such form.

    There is one for byte-pair tokenizers that leave the text as it is but for the space in front (TeleChat2's, and
    those that ``tele tokenize train`` makes). Where it differs: a control token written in text becomes that token, and
    the text behind it begins with a space mark once more; a text that is nothing but one placeholder, such as
    TeleChat2's <reserve1>, has no space mark in front.

    There is no pre-tokenizer: SentencePiece applies split_digits and its other splits to training text alone, where
    they decide which pieces exist. A pre-tokenizer would split before numerals inside pieces, such as U+2460.
    """
    trained, normal, defined = _specs(pieces)
    if trained.get(_MODEL_TYPE) != _BPE or trained.get(_SPACE_AS_SUFFIX) or not _leaves_text(normal):
        return None
    if not _ranked_apart(pieces, defined):
        return None
    merges, unmade = _merges(pieces, defined)
    names = [token_name(pieces, i) for i in range(pieces.get_piece_size())]
    added = {i: _FLAGS for i in range(len(names)) if _is_special(pieces, i)}
    # Matched in normalized text, so that the text behind a placeholder is not normalized (prefixed) again.
    added |= {i: {**_FLAGS, "special": False, "normalized": True} for i in unmade}
    space = {"String": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": names[i], **added[i]} for i in sorted(added)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                _prefix([names[i] for i in unmade]),
                {"type": "Replace", "pattern": space, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": names[pieces.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bool(trained.get(_BYTE_FALLBACK)),
            "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": merges,
        },
    }


def _prefix(placeholders: list[str]) -> JsonObject:
    """The normalizer that writes a space mark in front of a text.

    The library normalizes the names of placeholders as well, and these must stay what they are to be found anywhere.
    """
    if not placeholders:
        return {"type": "Prepend", "prepend": SPACE}
    alone = f"\\A(?!(?:{'|'.join(map(re.escape, placeholders))})?\\z)"
    return {"type": "Replace", "pattern": {"Regex": alone}, "content": SPACE}


def _leaves_text(normal: Message) -> bool:
    """Whether a NormalizerSpec only marks spaces and adds the one in front."""
    marks = normal.get(_DUMMY_PREFIX, 1) and normal.get(_ESCAPED_SPACES, 1) and not normal.get(_EXTRA_SPACES, 1)
    return bool(marks) and normal.get(_NAME) == b"identity" and not normal.get(_CHARACTER_MAP)


def _ranked_apart(pieces: SentencePieceProcessor, defined: set[int]) -> bool:
    """Whether scores order the merges: none is shared, and no piece is of a kind that merging alone does not explain.

    SentencePiece merges the leftmost of pairs whose scores are equal; a table of merges has to put one pair first.
    """
    scores = set()
    for i in range(pieces.get_piece_size()):
        if pieces.is_unused(i):  # split into its parts again
            return False
        made = not _is_special(pieces, i) and not pieces.is_byte(i) and i not in defined
        if made and len(pieces.id_to_piece(i)) > 1:
            if pieces.get_score(i) in scores:
                return False
            scores.add(pieces.get_score(i))
    return True


def token_name(pieces: SentencePieceProcessor, i: int) -> str:
    """The text of a token. Tool tokens are called as in the later releases, also where the file has other names."""
    piece: str = pieces.id_to_piece(i)
    return _CALLED.get(piece, piece)


def _merges(pieces: SentencePieceProcessor, defined: set[int]) -> tuple[list[list[str]], list[int]]:
    """Pairs of pieces that make a piece, the likeliest piece first; and user-defined ones that no pair makes.

    User-defined pieces are found before all others, and no other piece has one in it. The longest wins, so of those
    that are made of others ("____" of "__") long ones come first, once there is something to make them of.
    """
    count = pieces.get_piece_size()
    ids = {pieces.id_to_piece(i): i for i in range(count) if not _is_special(pieces, i) and not pieces.is_byte(i)}
    ranked: list[tuple[tuple[float, ...], str, str]] = []
    unmade = []
    for piece, i in ids.items():
        pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        pairs = [(left, right) for left, right in pairs if left in ids and right in ids]
        if i in defined:
            rank: tuple[float, ...] = (0.0, -count if len(piece) == 2 else -len(piece))
            unmade += [i] if len(piece) > 1 and not pairs else []
        else:
            rank = (1.0, -pieces.get_score(i))
        ranked += [((*rank, i, ids[left], ids[right]), left, right) for left, right in pairs]
    return [[left, right] for _, left, right in sorted(ranked)], unmade


def _specs(pieces: SentencePieceProcessor) -> tuple[Message, Message, set[int]]:
    """TrainerSpec and NormalizerSpec by field number, and the ids of user-defined pieces."""
    specs: dict[int, Message] = {_TRAINER: {}, _NORMALIZER: {}}
    defined, i = set(), 0
    for number, value in fields(pieces.serialized_model_proto()):
        if number in specs and isinstance(value, bytes):
            specs[number] = dict(fields(value))
        elif number == _PIECES and isinstance(value, bytes):
            if dict(fields(value)).get(_TYPE) == _USER_DEFINED:
                defined.add(i)
            i += 1
    return specs[_TRAINER], specs[_NORMALIZER], defined


def _is_special(pieces: SentencePieceProcessor, i: int) -> bool:
    return bool(pieces.is_control(i) or pieces.is_unknown(i))


def load_pieces(path: Path, config: ModelConfig) -> SentencePieceProcessor:
    """A tokenizer.model as a SentencePieceProcessor; UserError if it is none or larger than the vocabulary."""
    import sentencepiece

    try:
        if not path.stat().st_size:
            raise RuntimeError  # the library takes an empty file for a model without pieces
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        pieces.id_to_piece(list(range(pieces.get_piece_size())))  # a damaged piece is found out here
    except (OSError, RuntimeError, UnicodeDecodeError):
        raise UserError(
            f"{path.name}: is not a SentencePiece model; give the tokenizer.model of the training run"
        ) from None
    if pieces.get_piece_size() > config.num_tokens:
        raise UserError(
            f"{path.name}: has {pieces.get_piece_size()} pieces, the model's vocab_size is {config.num_tokens}; "
            "give the tokenizer the model was trained with"
        )
    return pieces
