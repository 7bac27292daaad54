"""`tele data`: texts, dialogues, preferences or a teacher's propositions to a packed folder that `tele train` maps."""

from __future__ import annotations

import argparse
import os
import sys

from telechat_twins.core.commands.options import add_column_arguments, columns_from, columns_unmet
from telechat_twins.core.data.chat_layout import AUTO, BUILT_IN, ChatLayout, open_training_layout
from telechat_twins.core.data.control import CONTROL_CHOICES, END, START
from telechat_twins.core.data.forms.streams import UTF8, check_encoding
from telechat_twins.core.data.kinds.messages import REASONING, Reading
from telechat_twins.core.data.kinds.table import DIALOGUE, KINDS, OPTION, PREFERENCE, TEACHER, TEXT
from telechat_twins.core.data.packed import PackedDataset, bytes_to_verify, verify
from telechat_twins.core.data.packing.show import BRIEF, own_tokenizer, samples
from telechat_twins.core.data.packing.teacher import FALSE_PIECE, TRUE_PIECE, class_tokens, pack_teacher
from telechat_twins.core.data.prepare import pack_dialogues, pack_text, progress_bar
from telechat_twins.core.data.rows import input_notes
from telechat_twins.core.data.sft import MINDFORMERS_SEED, VARIANTS
from telechat_twins.core.data.tokenizer import Tokenizer, assumed, load_tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.launch.run_lock import hold_place
from telechat_twins.core.shown import message_line, printable
from telechat_twins.core.types import JsonObject

_kept: list[Tokenizer] = []  # the last one: to free its pieces one by one takes as long as to load them
TEMPLATE_HELP = (
    "builtin: TeleChat2's layout although the tokenizer's folder has a chat template that differs; thinking: the same "
    "for models that reason in <think> tags first"
)
EPILOG = """\
examples:
  tele data corpus/ 'more/*.jsonl.gz' --tokenizer tokenizer.model --out data/pretrain
  tele data dialogues.json --tokenizer tokenizer.model --out data/sft --sft plain --seq-len 4096
  tele data old.csv --encoding gb18030 --tokenizer tokenizer.model --out data/old
  tele data faq.csv --column question=Q --column answer=A --tokenizer t.model --out data/faq --sft plain --seq-len 1024
  tele data pairs.jsonl --tokenizer tokenizer.model --out data/pairs --preference --seq-len 2048
  tele data --verify data/pretrain data/sft
  tele data --show 3 data/sft
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele data``."""
    parser.epilog = EPILOG
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="files, folders or quoted patterns: texts; .jsonl .json .csv .tsv .parquet by row; also .gz .zst .xz "
        ".bz2; folders of save_to_disk; Megatron's .idx with .bin",
    )
    parser.add_argument("--verify", action="store_true", help="hash every file of the packed folders INPUT; makes none")
    parser.add_argument(
        "--show",
        type=int,
        metavar="N",
        help="print the first N samples decoded, with trained tokens marked; without --out of the packed folders INPUT",
    )
    parser.add_argument("--out", help="the packed folder to make")
    parser.add_argument("--tokenizer", help="tokenizer.model, tokenizer.json, vocab.json, or a folder")
    parser.add_argument(
        "--control", choices=CONTROL_CHOICES, help="control token table (default: auto; mindformers for that variant)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing packed folder")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="processes that tokenize texts, and dialogues for --sft plain (default: one for each core)",
    )
    _add_row_options(parser)


def _add_row_options(parser: argparse.ArgumentParser) -> None:
    """The options of rows, and those of each use of them."""
    rows = parser.add_argument_group("rows")
    rows.add_argument("--kind", choices=KINDS, help="what every row is (default: judged by the keys of each row)")
    add_column_arguments(rows)
    rows.add_argument("--encoding", default=UTF8, metavar="NAME", help="of text files, e.g. gb18030 (default: utf-8)")
    rows.add_argument(
        "--ignore-key", action="append", default=[], metavar="NAME", help="leave this key of rows out (repeatable)"
    )
    rows.add_argument(
        "--reasoning",
        choices=REASONING,
        default=REASONING[0],
        help="reasoning_content of answers: refuse it, train on it in <think> tags before the answer, or leave it out",
    )
    rows.add_argument("--chat-template", default=AUTO, metavar="auto|builtin|thinking|FILE", help=TEMPLATE_HELP)
    rows.add_argument("--seq-len", type=int, metavar="S", help="tokens a training sequence (needed for all but texts)")
    text = parser.add_argument_group("texts")
    text.add_argument("--bos", action="store_true", help="begin documents with <_start>; they always end with <_end>")
    text.add_argument("--bos-token", metavar="NAME", help="what --bos writes, for a tokenizer without <_start>")
    text.add_argument("--eos-token", metavar="NAME", help="what ends documents, for a tokenizer without <_end>")
    text.add_argument("--text-key", default="text", metavar="NAME", help="the field of a row that holds the text")
    _add_sample_arguments(parser)


def _add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of dialogues, preference pairs and propositions."""
    sft = parser.add_argument_group("dialogues")
    sft.add_argument("--sft", choices=VARIANTS, help="pack dialogues with this loss mask and packing")
    sft.add_argument("--no-template", action="store_true", help="deepspeed: build multi-turn rows without template")
    sft.add_argument("--in-order", action="store_true", help="mindformers: keep the order of the rows")
    sft.add_argument(
        "--shuffle-seed", type=int, metavar="N", help=f"mindformers: seed of the shuffle (released: {MINDFORMERS_SEED})"
    )
    sft.add_argument("--no-start", action="store_true", help="mindformers: no <_start> in front of the packs")
    others = parser.add_argument_group("preferences and a teacher's propositions")
    others.add_argument("--preference", action="store_true", help="pack pairs of a chosen and a rejected answer")
    others.add_argument(
        "--teacher", action="store_true", help="pack propositions, true or false, with the loss on their class token"
    )
    others.add_argument("--true-token", metavar="PIECE", help=f"class token of what is true (default {TRUE_PIECE})")
    others.add_argument("--false-token", metavar="PIECE", help=f"class token of what is false (default {FALSE_PIECE})")
    others.add_argument(
        "--drop-long", action="store_true", help="leave rows out that are longer than --seq-len (default: an error)"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0; UserError for options and inputs that do not go together."""
    if args.verify:
        return _verify(args)
    if args.show is not None and args.show < 0:
        raise UserError(f"--show: must be at least 0, found {args.show}")
    if args.show is not None and args.out is None and args.tokenizer is None:
        return _show_packed(args)
    _check(args)
    for note in input_notes(args.inputs, _use(args) != TEXT, args.encoding):
        print(f"note: {note}", file=sys.stderr)
    control = args.control or ("mindformers" if args.sft == "mindformers" else "auto")
    # Packed ids feed an embedding, so a control token beyond the vocabulary must not be made here.
    special = {"bos": args.bos_token, "eos": args.eos_token}
    many = _use(args) == TEXT
    tokenizer = load_tokenizer(args.tokenizer, control, in_vocabulary=True, special=special, many=many)
    _check_special(args, tokenizer)
    args.layout, notes = _layout(args, tokenizer)
    for note in notes:
        print(f"note: {message_line(note)}", file=sys.stderr)
    columns = columns_from(args, args.inputs, _use(args))
    reading = Reading(frozenset(args.ignore_key), args.reasoning, args.kind, columns)
    with hold_place(args.out, f"--out {args.out}"):
        _pack(args, tokenizer, reading)
        _print_reading(args, reading)
        _print_samples(args, tokenizer)
    _kept[:] = [tokenizer]
    return 0


def _check_special(args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """UserError for a beginning or an end of documents that a tokenizer with TeleChat2's pieces would not write."""
    for option, given, own in (("--bos-token", args.bos_token, START), ("--eos-token", args.eos_token, END)):
        if given not in (None, own) and tokenizer.control:
            what = "begin" if own == START else "end"
            raise UserError(
                f"{option} {given}: documents of a tokenizer with TeleChat2's pieces {what} with {own}; leave the "
                "option out, or add --control none"
            )


def _layout(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[ChatLayout | None, list[str]]:
    """The layout of dialogues, where rows are dialogues, and notes on the tokenizer."""
    if _use(args) not in (DIALOGUE, PREFERENCE):
        begins = tokenizer.special.begins_note("--bos") if _use(args) == TEXT and not args.bos else []
        return None, [*assumed(tokenizer), *begins]
    layout, notes = open_training_layout(tokenizer, args.chat_template, own=args.sft in (None, "plain"))
    if args.chat_template not in (AUTO, BUILT_IN):
        notes.append(f"chats with a model that learns these rows need --chat-template {args.chat_template}, too")
    return layout, notes


def _use(args: argparse.Namespace) -> str:
    """What rows are packed as."""
    return PREFERENCE if args.preference else TEACHER if args.teacher else DIALOGUE if args.sft else TEXT


def _pack(args: argparse.Namespace, tokenizer: Tokenizer, reading: Reading) -> None:
    pack = {TEXT: _pack_text, DIALOGUE: _pack_sft, PREFERENCE: _pack_preference, TEACHER: _pack_teacher}[_use(args)]
    pack(args, tokenizer, reading)


def _pack_preference(args: argparse.Namespace, tokenizer: Tokenizer, reading: Reading) -> None:
    from telechat_twins.core.data.packing.preference import pack_preference  # with all that configs need

    meta = pack_preference(
        args.inputs,
        args.out,
        tokenizer,
        seq_len=args.seq_len,
        drop_long=args.drop_long,
        layout=args.layout,
        reading=reading,
        encoding=args.encoding,
        force=args.force,
        quiet=args.quiet,
    )
    print(f"{args.out}: {meta['pairs']} pairs, {meta['tokens']} tokens, {meta['targets']} targets")
    _print_dropped(args, meta, "pairs")


def _pack_teacher(args: argparse.Namespace, tokenizer: Tokenizer, reading: Reading) -> None:
    tokens = class_tokens(tokenizer, args.true_token or TRUE_PIECE, args.false_token or FALSE_PIECE)
    meta = pack_teacher(
        args.inputs,
        args.out,
        tokenizer,
        tokens,
        seq_len=args.seq_len,
        drop_long=args.drop_long,
        reading=reading,
        encoding=args.encoding,
        force=args.force,
        quiet=args.quiet,
    )
    print(
        f"{args.out}: {meta['propositions']} propositions, {meta['true']} of them true, in {meta['sequences']} "
        f"sequences, {meta['tokens']} tokens; train with data.isolate_documents=true"
    )
    ids = f"true {tokens.true_piece} = {tokens.true}, false {tokens.false_piece} = {tokens.false}"
    print(f"class tokens: {ids}{'' if args.true_token and args.false_token else ' (by default)'}")
    _print_dropped(args, meta, "propositions")


def _print_dropped(args: argparse.Namespace, meta: JsonObject, what: str) -> None:
    if meta["dropped_long"]:
        print(f"left out: {meta['dropped_long']} {what} longer than {args.seq_len} tokens, as --drop-long says")


def _pack_text(args: argparse.Namespace, tokenizer: Tokenizer, reading: Reading) -> None:
    meta = pack_text(
        args.inputs,
        args.out,
        tokenizer,
        add_bos=args.bos,
        text_key=args.text_key,
        threads=_threads(args),
        reading=reading,
        encoding=args.encoding,
        force=args.force,
        quiet=args.quiet,
    )
    print(f"{args.out}: {meta['documents']} documents, {meta['tokens']} tokens, vocabulary {meta['vocab_size']}")
    if "documents_without_end" in meta:
        print(
            "taken as they are: the ids of token files, which name no tokenizer; make sure that --tokenizer is theirs "
            f"({meta['documents_without_end']} of their documents do not end with <_end>)"
        )


def _pack_sft(args: argparse.Namespace, tokenizer: Tokenizer, reading: Reading) -> None:
    seed = None if args.in_order else MINDFORMERS_SEED if args.shuffle_seed is None else args.shuffle_seed
    meta = pack_dialogues(
        args.inputs,
        args.out,
        tokenizer,
        seq_len=args.seq_len,
        variant=args.sft,
        template=not args.no_template,
        shuffle_seed=seed,
        start_token="" if args.no_start else START,
        layout=args.layout,
        threads=_threads(args),
        reading=reading,
        encoding=args.encoding,
        force=args.force,
        quiet=args.quiet,
    )
    _print_dialogues(args, meta)


def _threads(args: argparse.Namespace) -> int:
    return args.threads or len(os.sched_getaffinity(0))


def _print_dialogues(args: argparse.Namespace, meta: JsonObject) -> None:
    print(
        f"{args.out}: {meta['rows']} rows in {meta['sequences']} sequences, {meta['tokens']} tokens, "
        f"{meta['targets']} targets, vocabulary {meta['vocab_size']}"
    )
    if meta["rows_lost"]:
        print(f"lost: {meta['rows_lost']} of {meta['rows']} rows, as the released {args.sft} packing does; plain: none")
    if meta["rows_cut"]:
        print(f"cut: {meta['rows_cut']} rows are longer than {args.seq_len} tokens and continue in further sequences")
    if meta.get("rows_apart"):
        print(
            f"apart: each answer of {meta['rows_apart']} rows is a document behind its own prompt, since chats with "
            "this model show earlier answers otherwise (without their reasoning)"
        )
    if meta["tokens_truncated"]:
        print(f"truncated: {meta['tokens_truncated']} tokens beyond {args.seq_len}, as the released collator cuts them")
    if meta["systems_left_out"]:
        print(f"left out: the system text of {meta['systems_left_out']} rows, as the released {args.sft} packing does")


def _print_reading(args: argparse.Namespace, reading: Reading) -> None:
    """What was judged, defaulted or left out while rows were read."""
    if reading.kinds:
        judged = "as --kind says" if args.kind else "by their keys"
        print(f"rows: {', '.join(f'{count} {kind}' for kind, count in reading.kinds.items())} ({judged})")
    if reading.without_system and args.sft != "mindformers":
        print(f"defaulted: {reading.without_system} rows name no system text and begin with the chat layout's own")
    if reading.context:
        print(f"context: {reading.context} answers of weight 0 are shown to the model and not learnt")
    if reading.unanswered:
        print(f"nothing to learn: {reading.unanswered} rows have no answer")
    for line in columns_unmet(reading):
        print(f"look at: {line}")
    for what, (count, first) in reading.noticed.items():
        print(f"look at: {count} {what} (first: {printable(first)})")
    if reading.named:
        print(f"left out: the speaker's name of {reading.named} messages, for which the chat layout has no place")
    if reading.left_out:
        names = printable(", ".join(sorted(reading.left_out)), 400)
        print(f"left out: keys that hold nothing to learn: {names}")


def _print_samples(args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """The samples that were asked for, in full; else the first in brief."""
    count, longest = (1, BRIEF) if args.show is None else (args.show, None)
    for sample in samples(PackedDataset(args.out, fresh=True), tokenizer, count, longest):
        print(sample)


def _show_packed(args: argparse.Namespace) -> int:
    for folder in args.inputs:
        data = PackedDataset(folder)
        print(f"{folder}:")
        for sample in samples(data, own_tokenizer(data), args.show):
            print(sample)
    return 0


def _verify(args: argparse.Namespace) -> int:
    """Exit code 0 where every file is as it was written; UserError for the first folder that is not."""
    options = ("out", "tokenizer", "sft", "control", "kind", "show", "preference", "teacher")
    if given := [name for name in options if getattr(args, name)]:
        raise UserError(f"--{given[0]}: not with --verify, which only reads the packed folders that are named")
    for folder in args.inputs:
        size = bytes_to_verify(folder)
        with progress_bar("verifying", size, args.quiet) as bar:
            verify(folder, bar.update)
        data = PackedDataset(folder)
        for note in data.notes:
            print(f"note: {note}", file=sys.stderr)
        print(f"{folder}: verified, {len(data.meta['files'])} files, {size} bytes, {data.meta['tokens']} tokens")
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("out", "tokenizer"):
        if getattr(args, name) is None:
            raise UserError(
                f"--{name}: missing; packing needs --tokenizer and --out (or --verify, --show for a packed folder)"
            )
    check_encoding(args.encoding)
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads: must be at least 1, found {args.threads}")
    given = [f"--{name}" for name in ("sft", "preference", "teacher") if getattr(args, name)]
    if len(given) > 1:
        raise UserError(f"{given[1]}: not with {given[0]}; a folder holds rows of one use")
    use = _use(args)
    if use != TEXT and args.seq_len is None:
        raise UserError(f"--seq-len: missing; {given[0]} packs rows into sequences of that many tokens")
    if args.seq_len is not None and args.seq_len < 2:
        raise UserError(f"--seq-len: must be at least 2, found {args.seq_len}")
    if args.kind and KINDS[args.kind].use != use:
        raise UserError(f"--kind {args.kind}: such rows are packed {OPTION[KINDS[args.kind].use]}")
    _check_options(args, use)


def _check_options(args: argparse.Namespace, use: str) -> None:
    """UserError for an option that the packing does not use."""
    released = {
        "--no-template": (args.no_template, "deepspeed"),
        "--in-order": (args.in_order, "mindformers"),
        "--shuffle-seed": (args.shuffle_seed is not None, "mindformers"),
        "--no-start": (args.no_start, "mindformers"),
    }
    for name, (given, variant) in released.items():
        if given and args.sft != variant:
            raise UserError(f"{name}: only with --sft {variant}")
    belongs = {
        "--seq-len": (args.seq_len is not None, (DIALOGUE, PREFERENCE, TEACHER)),
        "--chat-template": (args.chat_template != AUTO, (DIALOGUE, PREFERENCE)),
        "--column": (bool(args.column), (DIALOGUE, PREFERENCE, TEACHER)),
        "--role": (bool(args.role), (DIALOGUE, PREFERENCE)),
        "--dataset-info": (args.dataset_info is not None, (DIALOGUE, PREFERENCE)),
        "--reasoning": (args.reasoning != REASONING[0], (DIALOGUE, PREFERENCE)),
        "--drop-long": (args.drop_long, (PREFERENCE, TEACHER)),
        "--true-token": (args.true_token is not None, (TEACHER,)),
        "--false-token": (args.false_token is not None, (TEACHER,)),
        "--bos": (args.bos, (TEXT,)),
        "--bos-token": (args.bos_token is not None, (TEXT,)),
        "--text-key": (args.text_key != "text", (TEXT,)),
    }
    if args.dataset_info is not None and (args.column or args.role):
        raise UserError("--dataset-info: not with --column or --role, which it names itself")
    if args.bos_token is not None and use == TEXT and not args.bos:
        raise UserError("--bos-token: only with --bos, which begins documents with it")
    if use == TEXT and args.text_key in args.ignore_key:
        raise UserError(f"--ignore-key {args.text_key}: is the field of the document itself (--text-key)")
    options = {TEXT: "texts, without --sft", DIALOGUE: "--sft", PREFERENCE: "--preference", TEACHER: "--teacher"}
    for name, (given, uses) in belongs.items():
        if given and use not in uses:
            raise UserError(f"{name}: only with {', '.join(options[one] for one in uses)}")
    if args.threads is not None and args.threads > 1 and use != TEXT and args.sft != "plain":
        rows = f"--sft {args.sft}" if args.sft else options[use]
        print(f"note: --threads {args.threads}: rows of {rows} are packed by one process", file=sys.stderr)
