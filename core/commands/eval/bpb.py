"""`tele eval bpb`: bits per byte of texts, by domain and weighted over domains."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from tqdm import tqdm

from telechat_twins.core.commands.options import add_adapter_argument, add_checkpoint_arguments, load_model
from telechat_twins.core.data.forms.find import find_inputs
from telechat_twins.core.data.forms.streams import UTF8, check_encoding
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.rows import read_documents
from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.bits import PRESETS, DomainBits, check_domains, domain_bits, weighted_bits
from telechat_twins.core.eval.scorer import Scorer
from telechat_twins.core.files.atomic import writable_file, write_text
from telechat_twins.core.inference.engine import EngineLimits
from telechat_twins.core.inference.generation import note_length
from telechat_twins.core.types import JsonObject

DESCRIPTION = """\
Bits per byte of texts by domain, and their weighted mean: the main metric of the Tele-FLM report, independent of the
tokenizer. Each text follows <_start> and is scored in windows of the trained length.
"""
EXAMPLES = """\
examples:
  tele eval bpb --backend pt --checkpoint runs/first --domain mine=held-out.jsonl
  tele eval bpb --backend ms --checkpoint TeleFLM-52B --weights f-prop --domain WebText=web.jsonl \\
    --domain Github=code --domain Wikipedia=wiki.jsonl --domain Book=books --domain ArXiv=arxiv.jsonl \\
    --domain StackExchange=se.jsonl --out bpb.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele eval bpb``."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    add_checkpoint_arguments(parser)
    add_adapter_argument(parser)
    parser.add_argument(
        "--domain",
        action="append",
        required=True,
        metavar="NAME=FILES",
        help="a file, folder or quoted pattern of texts as for `tele data`; for each domain once",
    )
    parser.add_argument(
        "--weights",
        metavar="PRESET|N:N:...",
        help=f"{', '.join(PRESETS)}, or a weight for each domain (default: equal)",
    )
    parser.add_argument("--text-key", default="text", metavar="NAME", help="key of a row's text (text)")
    parser.add_argument("--encoding", default=UTF8, metavar="NAME", help="of text files, e.g. gb18030 (default: utf-8)")
    parser.add_argument(
        "--ignore-key", action="append", default=[], metavar="NAME", help="leave this key of rows out (repeatable)"
    )
    parser.add_argument("--max-len", type=int, metavar="N", help="tokens of a window (default: the trained length)")
    parser.add_argument("--out", metavar="F", help="write the figures as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(chat_template=None, rescale="request")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; UserError for options, texts and a model that do not go together."""
    if args.out is not None:
        writable_file(args.out, "--out")
    if args.max_len is not None and args.max_len < 1:
        raise UserError(f"--max-len: must be at least 1, found {args.max_len}")
    check_encoding(args.encoding)
    if args.text_key in args.ignore_key:
        raise UserError(f"--ignore-key {args.text_key}: is the field of the text itself (--text-key)")
    domains = _domains(args.domain)
    weights = _weights(args.weights, list(domains))
    check_domains(domains, weights)
    texts = {name: _texts(name, files, args) for name, files in domains.items()}
    model = load_model(args, "a text", {} if args.adapter is None else {"": args.adapter})
    assert model.tokenizer is not None  # load_model refuses a checkpoint without one
    config, max_len = model.config, args.max_len or model.config.training_seqlen
    note_length(config, max_len)
    engine = model.engine_with(model.pages(max_len + 1, 4), EngineLimits(max_len=max_len + 1))
    scorer = Scorer(engine, len(model.adapters))
    found: dict[str, DomainBits] = {}
    for name, some in texts.items():
        with tqdm(desc=name, unit="window", disable=args.quiet, delay=1.0) as bar:
            bits = domain_bits(
                some, model.tokenizer, scorer, config.bos_token_id, max_len, lambda *_, bar=bar: bar.update(1)
            )
        found[name] = bits
        print(
            f"{name:<20}{bits.bits_per_byte:>8.4f} bits per byte  {bits.loss:.4f} nats per token  {bits.size:,} bytes"
        )
    mean = weighted_bits(found, weights)
    preset = PRESETS.get(args.weights or "")
    print(f"{'weighted':<20}{mean:>8.4f}" + (f"  (Tele-FLM {preset.published})" if preset else ""))
    if args.out is not None:
        write_text(Path(args.out), json.dumps(_report(args, found, weights, mean), indent=2) + "\n")
    return 0


def _domains(given: list[str]) -> dict[str, str]:
    domains: dict[str, str] = {}
    for text in given:
        name, sign, files = text.partition("=")
        if not (name and sign and files) or name in domains:
            raise UserError(f"--domain: expected NAME=FILES, each name once; found '{text}'")
        domains[name] = files
    return domains


def _texts(name: str, files: str, args: argparse.Namespace) -> list[str]:
    texts: list[str] = []
    for file in find_inputs([files]):
        parts: list[str] = []
        reading = Reading(frozenset(args.ignore_key))
        for block in read_documents(file, None, args.text_key, reading, args.encoding):
            parts.append(block.text)
            if block.last:
                texts.append("".join(parts))
                parts = []
    if not any(texts):
        raise UserError(f"--domain {name}: {files} has no text")
    return [text for text in texts if text]


def _weights(text: str | None, names: list[str]) -> dict[str, float]:
    if text is None:
        return dict.fromkeys(names, 1.0)
    if text in PRESETS:
        return dict(PRESETS[text].shares)
    try:
        values = [float(word) for word in text.split(":")]
    except ValueError:
        values = []
    if len(values) != len(names) or not all(math.isfinite(value) and value > 0 for value in values):
        presets = ", ".join(PRESETS)
        raise UserError(f"--weights: must be {presets}, or {len(names)} numbers above 0 as in 2:1; found '{text}'")
    return dict(zip(names, values, strict=True))


def _report(
    args: argparse.Namespace, found: dict[str, DomainBits], weights: dict[str, float], mean: float
) -> JsonObject:
    settings = ("backend", "checkpoint", "adapter", "precision", "quantize")
    domains = {
        name: {
            "bits_per_byte": bits.bits_per_byte,
            "loss": bits.loss,
            "texts": bits.texts,
            "tokens": bits.tokens,
            "bytes": bits.size,
            "weight": weights[name],
        }
        for name, bits in found.items()
    }
    return {**{name: getattr(args, name) for name in settings}, "domains": domains, "weighted": mean}
