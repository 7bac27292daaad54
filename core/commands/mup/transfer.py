"""`tele mup transfer`: transfers a narrow model's hyper-parameters to another width."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from telechat_twins.core.config import OptimConfig, RunConfig, load_run_config
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import writable_file, write_text
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.mup.transfer import RULES, at_width, transfer, value_of, warnings
from telechat_twins.core.types import JsonObject

DESCRIPTION = """\
Transfer the hyper-parameters of a narrow model to another width by the rules of muP; r is the ratio of the widths:

  vector-like   embedding, norms, biases    learning rate and standard deviation unchanged
  matrix-like   q, k, v, o, gate, up, down  learning rate / r, standard deviation / sqrt(r), weight decay x r
                                            (decoupled decay acts through their product)
  output        the head                    as vector-like; the logits' multiplier / r

Heads keep their size and grow in number, so the attention scale is unchanged. Depth, data, batch and schedule must be
those of the narrow model, since muP has no rules for them; differences cause warnings. AdamW's eps is the same for all
parameters; Megatron-LM divides it by r for matrix-like weights, which matters where gradients are as small as eps.

--config is the run of the narrow model. The target is a width (with heads, kv heads and ffn in proportion) or the shape
of a preset, whose own hyper-parameters are ignored. --out writes the YAML of a run for `tele train`: that of the narrow
run with the target's model and rates. Adapt its `parallel:` and micro-batch to the larger model.
"""
EXAMPLES = """\
examples:
  tele mup transfer --config teleflm-mup --width 256 512
  tele mup transfer --config teleflm-mup --target teleflm-52b --out teleflm-52b.yaml
  tele mup transfer --config flm-mup --set optim.lr=6e-4 --width 10240
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele mup transfer``."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("--config", required=True, metavar="F", help="run of the narrow model, as for `tele train`")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override, e.g. optim.lr=1e-3"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--width", nargs="+", type=int, metavar="W", help="hidden sizes to transfer to")
    where.add_argument("--target", metavar="PRESET", help="preset with the shape to transfer to")
    parser.add_argument("--ffn", type=int, metavar="W", help="the target's ffn width (default: in proportion)")
    parser.add_argument("--out", metavar="F", help="write the target's run here (one target)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def run(args: argparse.Namespace) -> int:
    """Print the table and the warnings; with ``--out`` write the run."""
    config = load_run_config(args.config, args.set)
    targets = _targets(args, config.model)
    if args.force and not args.out:
        raise UserError("--force: replaces the file of --out, which is not given; leave it out")
    if args.out:
        if len(targets) != 1:
            raise UserError(f"--out: a run has one width, found {len(targets)}; give one --width")
        writable_file(args.out, "--out")
        if Path(args.out).exists() and not args.force:  # it may have been adapted by hand since
            raise UserError(f"{args.out}: exists already; choose another --out, or replace it with --force")
    found = [transfer(config.model, config.optim, target) for target in targets]
    print(table(Path(args.config).name, (config.model, config.optim), found))
    for target in targets:
        for line in warnings(config.model, target):
            print(f"warning: width {target.hidden_size}: {line}")
    if args.out:
        write_text(Path(args.out), run_yaml(args.config, config, found[0], Path(args.out)))
        print(f"wrote {args.out}; set its layout and micro-batch, then: tele train --backend pt --config {args.out}")
    return 0


def _targets(args: argparse.Namespace, model: ModelConfig) -> list[ModelConfig]:
    if args.ffn is not None and args.ffn < 1:
        raise UserError(f"--ffn: must be at least 1, found {args.ffn}")
    if args.target:
        if args.ffn:
            raise UserError("--ffn: cannot be combined with --target, whose preset has its own; give --width with it")
        return [load_model_config(args.target, "--target")]
    if args.ffn and len(args.width) > 1:
        raise UserError(f"--ffn: is the width of one target's ffn, found {len(args.width)} widths; give one --width")
    try:
        return [at_width(model, width, args.ffn) for width in args.width]
    except UserError as error:
        raise UserError(f"--{error}") from None


Numbers = tuple[ModelConfig, OptimConfig]


def table(name: str, narrow: Numbers, wide: Sequence[Numbers]) -> str:
    """Table of all rules, with the values of the narrow model and of the targets."""
    columns = [narrow, *wide]
    base = narrow[0].hidden_size
    rows = [("", "option", "rule", f"width {base}", *(f"width {model.hidden_size}" for model, _ in wide))]
    rows.append(("r", "", "", "1", *(f"{model.hidden_size / base:g}" for model, _ in wide)))
    for rule in RULES:
        numbers = (number(value_of(rule, model, optim)) for model, optim in columns)
        rows.append((rule.what, rule.option, rule.text, *numbers))
    rows.append(("AdamW's eps", "optim.eps", "same", *(number(optim.eps) for _, optim in columns)))
    for what, option in (("layers", "num_layers"), ("heads", "num_heads"), ("ffn", "ffn_hidden_size")):
        rows.append((what, f"model.{option}", "", *(str(getattr(model, option)) for model, _ in columns)))
    sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(n) if i < 3 else cell.rjust(n) for i, (cell, n) in enumerate(zip(row, sizes, strict=True)))
        for row in rows
    ]
    return "\n".join([f"from {name}", *(line.rstrip() for line in lines)])


def number(value: float) -> str:
    """Four digits, as papers write them: 1.5e-4, 0.01697, 0.5."""
    if value == 0.0 or abs(value) >= 0.01:
        return f"{value:.4g}"
    digits, _, exponent = f"{value:.3e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def run_yaml(source: str, config: RunConfig, target: Numbers, out: Path) -> str:
    """The YAML of ``config`` with the target's model and rates, and data paths relative to ``out``."""
    model, optim = target
    tree: JsonObject = {**config.to_dict(), "model": model.to_dict()}
    for name, value in vars(optim).items():
        tree["optim"][name] = value
    # Unset options keep their defaults; the choice of kernels depends on the machine.
    tree = {
        section: {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values
        for section, values in tree.items()
        if values is not None
    }
    del tree["kernels"]
    for one in tree["data"]["sources"]:
        one["path"] = os.path.relpath(one["path"], out.resolve().parent)
    ratio = model.hidden_size / config.model.hidden_size
    lines = [
        f"# Transferred by muP from {Path(source).name}, width {config.model.hidden_size} to {model.hidden_size} "
        f"(r = {ratio:g}).",
        "# `parallel:` and micro-batch are those of the narrow model: adapt them. Depth must be the same.",
    ]
    lines += [f"# warning: {line}" for line in warnings(config.model, model)]
    return "\n".join(lines) + "\n" + yaml.safe_dump(tree, sort_keys=False)
