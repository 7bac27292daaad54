"""``tele convert``: a released folder to a canonical checkpoint and back."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from core.atomic import show_bytes
from core.errors import UserError

FORMATS = ("hf", "canonical")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele convert``."""
    parser.description = (
        "Turn a model as released on Hugging Face (config.json and safetensors) into a canonical checkpoint, or back. "
        "Tensors pass one at a time, so memory does not grow with the model. There and back gives the same files. "
        "DST appears when it is complete, or not at all."
    )
    parser.epilog = (
        "examples:\n"
        "  tele convert --from hf --to canonical TeleChat2-7B checkpoints/7b\n"
        "  tele convert --from canonical --to hf runs/first exported --dtype bfloat16"
    )
    parser.add_argument("--from", dest="source_format", required=True, choices=FORMATS, help="what SRC is")
    parser.add_argument("--to", dest="target_format", required=True, choices=FORMATS, help="what DST becomes")
    parser.add_argument("source", metavar="SRC", type=Path, help="released folder, checkpoint, or run (its latest)")
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
    parser.add_argument("--tokenizer", metavar="F", type=Path, help="tokenizer.model to put into a released folder")
    parser.add_argument("--force", action="store_true", help="replace the model in DST, if it holds one")


def run(args: argparse.Namespace) -> int:
    """Convert; prints one line per fact on stdout, progress on stderr. UserError for anything the user can mend."""
    from convert.copy import canonical_to_hf, hf_to_canonical, weight_bytes
    from convert.hf import HfFolder
    from convert.source import CanonicalSource, open_model

    if args.source_format == args.target_format:
        raise UserError(f"--to {args.target_format}: is what SRC is already; choose hf and canonical")
    if args.tokenizer and args.target_format != "hf":
        raise UserError("--tokenizer: goes with --to hf; a canonical checkpoint keeps the release's own")
    if args.tokenizer and not args.tokenizer.is_file():
        raise UserError(f"--tokenizer: {args.tokenizer}: no such file")
    limit = parse_size(args.max_shard_size) if args.max_shard_size else None
    _check_target(args.source, args.target, args.force)
    started = time.monotonic()
    if args.source_format == "hf":
        folder = HfFolder(args.source)
        for note in folder.notes:
            print(f"note: {note}")
        total = folder.nbytes
        with _Progress("converting", total) as bar:
            options = {"max_file_bytes": limit} if limit else {}
            hf_to_canonical(folder, args.target, args.dtype, on_bytes=bar.update, **options)
    else:
        source = open_model(args.source, verify=False)
        if not isinstance(source, CanonicalSource):
            raise UserError(f"--from canonical: {args.source} is a released folder (it has config.json); use --from hf")
        with _Progress("verifying", source.checkpoint.nbytes) as bar:
            source.checkpoint.verify(bar.update)
        total = weight_bytes(source, args.dtype)
        with _Progress("converting", total) as bar:
            canonical_to_hf(source, args.target, args.dtype, limit, args.tokenizer, bar.update)
        if not (args.target / "tokenizer.model").exists():
            print("note: the checkpoint carries no tokenizer; give --tokenizer to put one into the folder")
    seconds = time.monotonic() - started
    rate = show_bytes(int(total / seconds))
    print(f"wrote {args.target}: {show_bytes(total)} of tensors in {seconds:.1f} s ({rate}/s)")
    return 0


def parse_size(text: str) -> int:
    """``5GB`` or ``1.5GiB`` or ``1000000`` in bytes; UserError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise UserError(f"--max-shard-size: {text!r} is no size; write e.g. 5GB, 500MB or 4GiB")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))


def _check_target(source: Path, target: Path, force: bool) -> None:
    """Nothing may be lost: DST must be new or empty, or, with --force, a folder that is a model and nothing else."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target}: exists and is no folder; choose another DST")
    inner, outer = source.resolve(), target.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(f"{target}: SRC and DST lie in one another; choose a DST outside {source}")
    if not target.exists() or not any(target.iterdir()):
        return
    if not force:
        raise UserError(f"{target}: exists and is not empty; choose another DST, or --force to replace the model in it")
    described = any((target / name).is_file() for name in ("manifest.json", "config.json"))
    weights = any(target.glob("*.safetensors"))
    folders = [p.name for p in target.iterdir() if p.is_dir() and p.name != "assets"]
    if folders or not described or not weights:
        found = f"it also holds '{folders[0]}'" if folders else "this folder holds none"
        raise UserError(f"{target}: --force replaces a model and nothing else, {found}; choose another DST")


class _Progress:
    """A tqdm bar over bytes with rate and time left, on a terminal only: a log keeps its lines whole."""

    def __init__(self, title: str, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total, desc=title, unit="B", unit_scale=True, file=sys.stderr, disable=None, dynamic_ncols=True
        )

    def update(self, count: int) -> None:
        self._bar.update(count)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
