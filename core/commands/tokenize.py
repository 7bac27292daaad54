"""`tele tokenize`: train a tokenizer, and look at ids and text."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from telechat_twins.core.data.chat_layout import open_layout, require_layout
from telechat_twins.core.data.control import CONTROL_CHOICES
from telechat_twins.core.data.dialogues import parse_dialogue
from telechat_twins.core.data.prepare import read_texts
from telechat_twins.core.data.rows import input_notes
from telechat_twins.core.data.tokenizer import check_vocabulary, load_tokenizer
from telechat_twins.core.data.tokenizer_training import train_tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import parse_value
from telechat_twins.core.shown import controls_shown, message_line
from telechat_twins.core.types import JsonObject

EPILOG = """\
examples:
  tele tokenize train corpus/ --vocab-size 4096 --out tokenizer.model
  tele tokenize encode --tokenizer tokenizer.model "hello world"
  tele tokenize encode --tokenizer tokenizer.model --allow-control --ids "<_user>hi<_bot>"
  tele tokenize decode --tokenizer tokenizer.model 4 96343 5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    actions = parser.add_subparsers(dest="action", required=True, metavar="train|encode|decode|info")
    train = actions.add_parser("train", help="train a SentencePiece BPE with TeleChat2's control tokens")
    train.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders or quoted patterns")
    train.add_argument("--out", required=True, help="the tokenizer.model to write")
    train.add_argument("--vocab-size", type=int, required=True, help="pieces, control tokens and bytes included")
    train.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="of the text's characters, frequent ones first, that get pieces (0.9995); lower it for a small vocabulary "
        "of Chinese, e.g. 0.95 at 2048 pieces",
    )
    train.add_argument(
        "--byte-fallback",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write characters without a piece as their bytes, so that every text comes back (on); without, as <_unk>",
    )
    train.add_argument("--max-bytes", type=int, default=1 << 28, help="text to train on at most; it is kept in memory")
    train.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads that train (1); the tokenizer is the same with any"
    )
    train.add_argument(
        "--ignore-key", action="append", default=[], metavar="NAME", help="leave this key of dialogue rows out"
    )
    train.add_argument("--force", action="store_true", help="replace an existing file")
    encode = _with_tokenizer(actions.add_parser("encode", help="text to ids (from stdin when TEXT is absent)"))
    encode.add_argument("text", nargs="*", metavar="TEXT")
    encode.add_argument("--ids", action="store_true", help="print only the ids, one line")
    encode.add_argument("--bos", action="store_true", help="begin with <_start>")
    encode.add_argument("--allow-control", action="store_true", help="control tokens written in the text count")
    encode.add_argument("--chat", action="store_true", help="TEXT is a JSON list of messages to put in the chat layout")
    decode = _with_tokenizer(actions.add_parser("decode", help="ids to text (from stdin when absent)"))
    decode.add_argument("ids", nargs="*", metavar="ID")
    decode.add_argument("--skip-special", action="store_true", help="leave control tokens out")
    info = _with_tokenizer(actions.add_parser("info", help="size, control tokens, hash; checks against a model preset"))
    info.add_argument("--model", help="a model preset whose vocabulary must fit")


def run(args: argparse.Namespace) -> int:
    return {"train": _train, "encode": _encode, "decode": _decode, "info": _info}[args.action](args)


def _with_tokenizer(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--tokenizer", required=True, help="tokenizer.model, tokenizer.json, vocab.json, or a folder")
    parser.add_argument("--control", default="auto", choices=CONTROL_CHOICES, help="control token table")
    return parser


def _train(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if out.is_dir():
        raise UserError(f"{out}: is a folder; --out names the file to write, e.g. {out / 'tokenizer.model'}")
    if out.exists() and not args.force:
        raise UserError(f"{out}: exists already; choose another --out, or replace it with --force")
    for note in input_notes(args.inputs):
        print(f"note: {note}", file=sys.stderr)
    begun = time.monotonic()
    texts = read_texts(args.inputs, args.max_bytes, args.ignore_key)
    tokenizer = train_tokenizer(
        texts,
        out,
        args.vocab_size,
        threads=args.threads,
        character_coverage=args.character_coverage,
        byte_fallback=args.byte_fallback,
    )
    print(f"{out}: {tokenizer.vocab_size} pieces in {time.monotonic() - begun:.1f} s, SHA-256 {tokenizer.sha256[:16]}")
    return 0


def _encode(args: argparse.Namespace) -> int:
    tokenizer = load_tokenizer(args.tokenizer, args.control)
    text = " ".join(args.text) if args.text else sys.stdin.read()
    if args.chat:
        layout, notes = open_layout(tokenizer)
        for note in notes:
            print(f"note: {message_line(note)}", file=sys.stderr)
        ids = require_layout(tokenizer, layout).encode(_messages(text), allow_control=args.allow_control)
        if args.bos:
            ids = [tokenizer.bos_token_id, *ids]
    else:
        ids = tokenizer.encode(text, add_bos=args.bos, allow_control=args.allow_control)
    if args.ids:
        print(*ids)
        return 0
    for i in ids:
        print(f"{i:>8}  {tokenizer.piece(i)!r}")
    print(f"{len(ids)} tokens, {len(text)} characters")
    return 0


def _decode(args: argparse.Namespace) -> int:
    tokenizer = load_tokenizer(args.tokenizer, args.control)
    words = args.ids or sys.stdin.read().replace(",", " ").split()
    ids = [_id(word) for word in words]
    text = tokenizer.decode(ids, skip_special=args.skip_special)
    print(controls_shown(text) if sys.stdout.isatty() else text)
    return 0


def _id(word: str) -> int:
    try:
        if not word.isascii() or "_" in word:  # int() reads other scripts' digits and separators
            raise ValueError
        return int(word)
    except ValueError:
        raise UserError(f"'{word[:40]}': not a token id; ids are whole numbers") from None


def _info(args: argparse.Namespace) -> int:
    tokenizer = load_tokenizer(args.tokenizer, args.control)
    print(f"file      {tokenizer.path}\nSHA-256   {tokenizer.sha256}\npieces    {tokenizer.vocab_size}")
    print(f"control   {_names(tokenizer.control)}\nmatched   {_names(tokenizer.matched)} (if control is allowed)")
    if args.model:
        from telechat_twins.core.model.config import load_model_config

        check_vocabulary(tokenizer, load_model_config(args.model))
        print(f"fits      {args.model}")
    return 0


def _names(table: dict[str, int]) -> str:
    return " ".join(f"{name}={i}" for name, i in table.items()) or "none"


def _messages(text: str) -> list[JsonObject]:
    try:
        messages = parse_value(text.encode("utf-8", "surrogatepass"))
    except json.JSONDecodeError as error:
        raise UserError(f"--chat: TEXT is not valid JSON ({error.msg} at column {error.colno})") from None
    except ValueError as error:
        raise UserError(f"--chat: TEXT is not JSON that can be read ({error})") from None
    if not isinstance(messages, list):
        raise UserError(f"--chat: expected a JSON list of messages, found {type(messages).__name__}")
    dialogue = parse_dialogue({"messages": messages}, "--chat")
    first = [] if dialogue.system is None else [{"role": "system", "content": dialogue.system}]
    return [*first, *dialogue.messages]
