"""``tele convert``: a model or an adapter between Hugging Face's, the canonical, and MindFormers' formats."""

from __future__ import annotations

import argparse
import dataclasses
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core.checkpoint.target import check_target
from telechat_twins.core.data.encoders.special import find_tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import show_bytes, standing
from telechat_twins.core.files.progress import Progress
from telechat_twins.core.launch.run_lock import hold_place
from telechat_twins.core.shown import message_line, printable

if TYPE_CHECKING:
    from telechat_twins.convert.source import ModelSource
    from telechat_twins.core.checkpoint.adapter import Adapter

FORMATS = ("hf", "canonical", "mindformers", "peft")
LORA_NAMES = ("mindpet", "lora_A", "lora_a")
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

DESCRIPTION = (
    "Turn a model as released on Hugging Face (config.json and safetensors) into a canonical checkpoint or a "
    "MindFormers checkpoint, or any of these into another. Tensors pass one at a time, so memory does not grow "
    "with the model (a .ckpt file is in memory as a whole). There and back gives the same bits. DST appears when "
    "it is complete, or not at all. Low-rank adapters (LoRA) likewise: PEFT's, MindFormers', and those trained here."
)
EXAMPLES = (
    "examples:\n"
    "  tele convert --from hf --to canonical TeleChat2-7B checkpoints/7b\n"
    "  tele convert --from canonical --to hf runs/first exported --dtype bfloat16\n"
    "  tele convert --from hf --to hf TeleChat2-7B 7b-llama --llama\n"
    "  tele convert --from hf --to mindformers TeleChat2-7B 7b-ms --file-format ckpt\n"
    "  tele convert --from hf --to mindformers TeleChat2-115B 115b-mp8 --qkv-concat --mp 8\n"
    "  tele convert --from mindformers --to canonical 115b-mp8 checkpoints/115b\n"
    "  tele convert --from mindformers --to hf telechat_7b.ckpt TeleChat2-7B-new --model telechat2-7b\n"
    "  tele convert --from mindformers --to canonical finetune_telechat_7b.yaml 7b.yaml\n"
    "  tele convert --from peft --to canonical peft-adapter adapters/7b --base TeleChat2-7B\n"
    "  tele convert --from canonical --to peft runs/lora peft-adapter"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele convert``."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("--from", dest="source_format", required=True, choices=FORMATS, help="what SRC is")
    parser.add_argument("--to", dest="target_format", required=True, choices=FORMATS, help="what DST becomes")
    parser.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="released folder, checkpoint, run (its latest), MindFormers file or folder, or a run's .yaml, ours or its",
    )
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="store weights in this dtype (default: as they are)"
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="largest file, e.g. 5GB or 500MB (default: as in the release the model came from, else 5GB; "
        "canonical 4GiB)",
    )
    parser.add_argument(
        "--tokenizer", metavar="F", type=Path, help="tokenizer.model or tokenizer.json to put into a released folder"
    )
    parser.add_argument(
        "--sums", action="store_true", help="put SHA256SUMS into a released folder; it is checked wherever it is read"
    )
    parser.add_argument(
        "--llama",
        action="store_true",
        help="DST, a released folder: the Llama that computes the same, for readers without a class for the model",
    )
    parser.add_argument("--force", action="store_true", help="replace the model in DST, if it holds one")
    _add_mindformers_arguments(parser)
    _add_adapter_arguments(parser)


def _add_mindformers_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "MindFormers",
        "Its checkpoints say neither which model they are nor for how many ranks; those written here say both, in "
        "model.json. The number of heads cannot be read from weights, so it comes from --model or --config.",
    )
    forms = group.add_mutually_exclusive_group()
    forms.add_argument(
        "--qkv-concat",
        action="store_true",
        help="DST: fused w_qkv and w_gate_hidden, as qkv_concat: True wants them (TeleChat-52B has no other form)",
    )
    forms.add_argument(
        "--mcore",
        action="store_true",
        help="DST: the names of MindFormers' newer networks (mindformers.models.telechat2)",
    )
    forms.add_argument(
        "--mcore-train",
        action="store_true",
        help="DST: those of its training networks, with linear_qkv and linear_fc1 (TeleChat3)",
    )
    group.add_argument(
        "--mp",
        metavar="N",
        type=int,
        help="DST: a file for each of N model-parallel ranks (rank_0/, rank_1/, ...). Without --to mindformers: the "
        "ranks that a whole qkv_concat SRC is ordered for",
    )
    group.add_argument(
        "--whole",
        action="store_true",
        help="DST: with --mp one checkpoint whose rows an equal cut gives to the N ranks",
    )
    group.add_argument("--src-mp", metavar="N", type=int, help="--mp of SRC, where both sides are MindFormers'")
    group.add_argument(
        "--file-format", choices=("safetensors", "ckpt"), help="DST: default safetensors; ckpt needs MindSpore"
    )
    group.add_argument("--model", metavar="PRESET", help="SRC: the model that the checkpoint belongs to")
    group.add_argument(
        "--config", metavar="F", type=Path, help="SRC: the same, from a release's config.json or MindFormers' .yaml"
    )


def _add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that only adapters have."""
    group = parser.add_argument_group(
        "adapters",
        "SRC is an adapter with --from peft, with --from mindformers and --base, and where a canonical SRC holds one.",
    )
    group.add_argument(
        "--base", metavar="DIR", type=Path, help="SRC: the model that the adapter belongs to, released or canonical"
    )
    group.add_argument("--alpha", metavar="A", type=float, help="SRC: lora_alpha of MindFormers' run (pet_config)")
    group.add_argument(
        "--lora-names", choices=LORA_NAMES, help="DST: MindFormers' names of A and B (default mindpet; --mcore: lora_A)"
    )


def run(args: argparse.Namespace) -> int:
    """Convert; prints one line per fact on stdout, progress on stderr. UserError for anything the user can mend."""
    if args.source.suffix in (".yaml", ".yml"):
        return _convert_run(args)
    check_options(args)
    limit = parse_size(args.max_shard_size) if args.max_shard_size else None
    check_target(args.source, args.target, args.force)  # before a folder is made for the lock
    with hold_place(args.target):
        check_target(args.source, args.target, args.force)
        adapter = _is_adapter(args)
        _check_adapter_options(args, adapter)
        return _convert_adapter(args) if adapter else _convert(args, limit)


def _convert_run(args: argparse.Namespace) -> int:
    """Convert a run's YAML, MindFormers' or ours, into the other's; prints what became of every key."""
    from telechat_twins.convert.mindformers.carried import dump_yaml
    from telechat_twins.convert.mindformers.config import lines_of
    from telechat_twins.convert.mindformers.run_config import from_mindformers, to_mindformers_yaml, trains
    from telechat_twins.core.config import load_run_config, run_config_from_dict
    from telechat_twins.core.files.atomic import write_text
    from telechat_twins.core.schema import load_yaml

    ways = {("mindformers", "canonical"), ("canonical", "mindformers")}
    if (args.source_format, args.target_format) not in ways or args.target.suffix not in (".yaml", ".yml"):
        raise UserError(
            "SRC is a run's .yaml: give a .yaml as DST, with --from mindformers --to canonical or the other way round"
        )
    if args.target.exists() and not args.force:
        raise UserError(f"{args.target}: exists already; give --force to replace it")
    if args.source_format == "mindformers":
        with lines_of(args.source):
            tree = load_yaml(args.source)
            found = from_mindformers(tree, str(args.source))
        if trains(tree):
            run_config_from_dict(found.values)  # what would be refused by a run is refused here
    else:
        found = to_mindformers_yaml(load_run_config(args.source))
    for line in found.report().splitlines():
        print(printable(line, longest=None))
    write_text(args.target, dump_yaml(found, f"Converted from {printable(args.source.name)}."))
    print(f"wrote {args.target}: {len(found.carried)} keys carried, {len(found.left)} not")
    return 0


def _convert(args: argparse.Namespace, limit: int | None) -> int:
    from telechat_twins.convert.copy import to_canonical, to_hf, to_mindformers, weight_bytes
    from telechat_twins.convert.llama import LlamaSource
    from telechat_twins.convert.source import PlainSource

    started = time.monotonic()
    source = _open(args)
    if args.target_format != "canonical":
        source = PlainSource(source)
    if args.llama:
        source = LlamaSource(source)
    for note in source.notes:
        print(f"note: {message_line(note)}")
    total = weight_bytes(source, args.dtype)
    with Progress("converting", total) as bar:
        if args.target_format == "canonical":
            files = {"max_file_bytes": limit} if limit else {}
            to_canonical(source, args.target, args.dtype, on_bytes=bar.update, **files)
        elif args.target_format == "hf":
            to_hf(source, args.target, args.dtype, limit, args.tokenizer, bar.update, args.sums)
        else:
            fused = args.qkv_concat or source.config.family == "flm"
            to_mindformers(
                source,
                args.target,
                "mcore_train" if args.mcore_train else "mcore" if args.mcore else "qkv_concat" if fused else "plain",
                args.mp or 1,
                whole=args.whole,
                file_format=args.file_format or "safetensors",
                dtype=args.dtype,
                on_bytes=bar.update,
                **({"max_shard_bytes": limit} if limit else {}),
            )
    if args.target_format == "hf" and find_tokenizer(args.target) is None:
        print("note: the checkpoint carries no tokenizer; give --tokenizer to put one into the folder")
    seconds = time.monotonic() - started
    rate = show_bytes(int(total / seconds))
    print(f"wrote {args.target}: {show_bytes(total)} of tensors in {seconds:.1f} s ({rate}/s)")
    return 0


def check_options(args: argparse.Namespace) -> None:
    """UserError for options that do not go together."""
    to, fro = args.target_format, args.source_format
    if args.llama and to != "hf":
        raise UserError("--llama: goes with --to hf; the others have no form of a Llama")
    if fro == to and fro != "mindformers" and not args.llama:
        raise UserError(f"--to {to}: is what SRC is already; choose another of {', '.join(FORMATS)}")
    if args.tokenizer and to != "hf":
        raise UserError("--tokenizer: goes with --to hf; the others keep the release's own")
    if args.sums and to != "hf":
        why = "a canonical checkpoint has hashes" if to == "canonical" else "MindFormers has no place for them"
        raise UserError(f"--sums: goes with --to hf; {why}")
    if args.tokenizer and not args.tokenizer.is_file():
        raise UserError(f"--tokenizer: {args.tokenizer}: no such file")
    written = {
        "--qkv-concat": args.qkv_concat,
        "--mcore": args.mcore,
        "--mcore-train": args.mcore_train,
        "--whole": args.whole,
    }
    for option, given in {**written, "--file-format": args.file_format}.items():
        if given and to != "mindformers":
            raise UserError(f"{option}: goes with --to mindformers")
    for option, given in {"--model": args.model, "--config": args.config}.items():
        if given and fro != "mindformers":
            raise UserError(f"{option}: goes with --from mindformers; {fro} says itself which model it is")
    if args.model and args.config:
        raise UserError("--model, --config: both say which model SRC is; give one")
    if args.src_mp is not None and not fro == to == "mindformers":
        raise UserError("--src-mp: is for --from mindformers --to mindformers; --mp is the one there is")
    if args.mp is not None and "mindformers" not in (fro, to):
        raise UserError("--mp: goes with --from mindformers or --to mindformers")
    for option, given in {"--mp": args.mp, "--src-mp": args.src_mp}.items():
        if given is not None and given < 1:
            raise UserError(f"{option} {given}: must be at least 1")
    ranks = to == "mindformers" and args.mp is not None and args.mp > 1
    if (args.mcore or args.mcore_train) and ranks:
        raise UserError("--mp: the loader of --mcore cuts whole tensors for its ranks by itself; leave --mp away")
    if args.whole and not ranks:
        raise UserError("--whole: without --mp 2 or more DST is whole anyway; leave it away, or say for how many ranks")
    if args.max_shard_size and to == "mindformers" and (args.file_format == "ckpt" or (ranks and not args.whole)):
        raise UserError("--max-shard-size: a .ckpt and a rank's part are one file each; leave it away")


def _open(args: argparse.Namespace) -> ModelSource:
    """SRC as a ModelSource, opened and checked; every file that has a recorded hash is hashed."""
    from telechat_twins.convert.hf.folder import HfFolder
    from telechat_twins.convert.hf.sums import sums_bytes
    from telechat_twins.convert.mindformers.source import Known, MindFormersSource
    from telechat_twins.convert.source import CanonicalSource, HfSource, open_model

    if args.source_format == "hf":
        with Progress("verifying", sums_bytes(args.source)) as bar:
            return HfSource(HfFolder(args.source, on_bytes=bar.update))
    args.source = standing(args.source)
    if args.source_format == "mindformers":
        known = Known(args.source, args.model, args.config)
        if args.target_format == "mindformers":
            return MindFormersSource(args.source, known, args.src_mp, "--src-mp")
        return MindFormersSource(args.source, known, args.mp)
    source = open_model(args.source, verify=False)
    if not isinstance(source, CanonicalSource):
        raise UserError(f"--from canonical: {args.source} is a released folder (it has config.json); use --from hf")
    with Progress("verifying", source.checkpoint.nbytes) as bar:
        source.checkpoint.verify(bar.update)
    return source


def _is_adapter(args: argparse.Namespace) -> bool:
    """Whether SRC is an adapter."""
    from telechat_twins.core.checkpoint.adapter import is_adapter_checkpoint

    if "peft" in (args.source_format, args.target_format) or (args.base and args.source_format == "mindformers"):
        return True
    canonical = args.source_format == "canonical" and not (args.source / "config.json").is_file()
    return canonical and is_adapter_checkpoint(standing(args.source))


def _check_adapter_options(args: argparse.Namespace, adapter: bool) -> None:
    """UserError for options that do not go with an adapter, or only with one."""
    fro, to = args.source_format, args.target_format
    if not adapter:
        for option, given in {"--base": args.base, "--alpha": args.alpha, "--lora-names": args.lora_names}.items():
            if given is not None:
                raise UserError(f"{option}: goes with an adapter, and SRC is a model; leave it out")
        return
    if "hf" in (fro, to):
        option = "--to" if to == "hf" else "--from"
        raise UserError(
            f"{option} hf: a release is a whole model, and the other side is an adapter; `tele merge` makes a release "
            "with the adapter in its weights"
        )
    if fro in ("peft", "mindformers") and args.base is None:
        raise UserError(f"--base: {fro} does not say which model the adapter belongs to; give its folder")
    unfit = {"--max-shard-size": args.max_shard_size, "--whole": args.whole, "--model": args.model,
             "--llama": args.llama, "--mcore-train": args.mcore_train,
             "--config": args.config, "--src-mp": args.src_mp if to != "mindformers" else None}  # fmt: skip
    for option, given in unfit.items():
        if given:
            raise UserError(f"{option}: does not go with an adapter; leave it out")
    if args.dtype and to != "peft":
        raise UserError("--dtype: of an adapter goes with --to peft; elsewhere it is float32")
    if args.alpha is not None and (fro != "mindformers" or not 0 < args.alpha < 1e30):
        raise UserError("--alpha: a number above 0, of --from mindformers; the others record it")
    if args.lora_names and to != "mindformers":
        raise UserError("--lora-names: goes with --to mindformers")


def _convert_adapter(args: argparse.Namespace) -> int:
    """Convert an adapter; one line on stdout for each fact."""
    from telechat_twins.convert.hf.peft import write_peft
    from telechat_twins.convert.mindformers.lora import write_lora
    from telechat_twins.convert.source import open_model
    from telechat_twins.core.checkpoint.adapter import with_base, write_adapter

    source = open_model(standing(args.base)) if args.base else None
    adapter = _open_adapter(args, source)
    if source is not None and not adapter.base.fingerprint:
        path = str(args.base.resolve()) if args.target_format == "canonical" else adapter.base.path or str(args.base)
        adapter = with_base(adapter, source.config, source.read, path)
    for note in adapter.notes:
        print(f"note: {message_line(note)}")
    if args.target_format == "canonical":
        write_adapter(args.target, adapter)
    elif args.target_format == "peft":
        write_peft(adapter, args.target, _CODES[args.dtype] if args.dtype else None)
    else:
        fused = args.qkv_concat or adapter.config.family == "flm"
        form = "mcore" if args.mcore else "qkv_concat" if fused else "plain"
        names = args.lora_names or ("lora_A" if args.mcore else "mindpet")
        write_lora(adapter, args.target, form, names, args.mp or 1, file_format=args.file_format or "safetensors")
    ranks = sorted({module.rank for module in adapter.modules.values()})
    print(f"wrote {args.target}: {len(adapter.modules)} linears with an adapter of rank {', '.join(map(str, ranks))}")
    return 0


def _open_adapter(args: argparse.Namespace, source: ModelSource | None) -> Adapter:
    from telechat_twins.convert.hf.peft import open_peft
    from telechat_twins.convert.mindformers.lora import open_lora
    from telechat_twins.core.checkpoint.adapter import check_base, open_adapter

    if args.source_format == "canonical":
        adapter = open_adapter(standing(args.source))
        if source is None:
            return adapter
        notes = check_base(adapter, source.config, source.read, source.path)
        base = dataclasses.replace(adapter.base, path=str(args.base))
        return dataclasses.replace(adapter, base=base, notes=(*adapter.notes, *notes))
    assert source is not None  # check_adapter_options asks for --base
    if args.source_format == "peft":
        return open_peft(standing(args.source), source.config)
    both = args.target_format == "mindformers"
    mp, option = (args.src_mp, "--src-mp") if both else (args.mp, "--mp")
    return open_lora(standing(args.source), source.config, args.alpha, mp, option)


def parse_size(text: str) -> int:
    """``5GB`` or ``1.5GiB`` or ``1000000`` in bytes; UserError otherwise."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise UserError(f"--max-shard-size: must be a size such as 5GB, 500MB or 4GiB, found {text!r}")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))
