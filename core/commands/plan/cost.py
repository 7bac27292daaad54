"""`tele plan --cost` and `--budget`: what a training costs as papers state it, and what a budget buys."""

from __future__ import annotations

import argparse
import math

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.types import JsonObject


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options about cost."""
    parser.add_argument(
        "--cost", action="store_true", help="zettaFLOPs of --tokens by the method of FLM-101B's report, and by language"
    )
    parser.add_argument(
        "--languages", nargs="+", metavar="L=SHARE", help="with --cost: shares of the data, e.g. en=53.5 zh=46.5"
    )
    parser.add_argument(
        "--budget", type=float, metavar="FLOPS", help="tokens that so many FLOPs buy, and compute-optimal sizes"
    )


def check(args: argparse.Namespace) -> None:
    """UserError for options that need another, and for values out of range."""
    if args.languages is not None and not args.cost:
        raise UserError("--languages: belongs to --cost; add it, or leave --languages out")
    if args.cost and args.tokens is None:
        raise UserError("--cost: needs --tokens; give the tokens of the training, e.g. --tokens 3e11")
    if args.budget is not None and not 0.0 < args.budget < 1e40:
        raise UserError(f"--budget: must be above 0 and below 1e40, found {args.budget:g}")


def report(args: argparse.Namespace, model: ModelConfig, seq_len: int, parameters: int) -> tuple[list[str], JsonObject]:
    """The cost of ``args.tokens``, the budget's tokens, or both, as text and JSON."""
    lines: list[str] = []
    found: JsonObject = {}
    if args.cost:
        found["cost"] = _cost(model, seq_len, parameters, args.tokens, _shares(args.languages or []))
        lines += _cost_lines(found["cost"])
    if args.budget is not None:
        from telechat_twins.core.planner.cost.laws import budget

        bought = args.budget / (6.0 * parameters)
        found["budget"] = {"flops": args.budget, "tokens": bought, "tokens_per_parameter": bought / parameters}
        found["budget"]["optimal"] = budget(args.budget)
        lines += _budget_lines(found["budget"])
    return lines, found


def _cost(model: ModelConfig, seq_len: int, parameters: int, tokens: float, shares: dict[str, float]) -> JsonObject:
    from telechat_twins.core.model.flops import flops_per_token
    from telechat_twins.core.planner.cost.accounting import Trained, by_language, cost

    paper = cost(Trained(model.num_layers, model.hidden_size, tokens, seq_len, model.vocab_size))
    counted = flops_per_token(model, seq_len, causal=True) * tokens
    found: JsonObject = {
        "tokens": tokens,
        "paper": {"middle": paper.middle, "half_width": paper.half_width, "low": paper.low, "high": paper.high},
        "six_n_d": 6.0 * parameters * tokens,
        "counted": counted,
    }
    if shares:
        found["languages"] = by_language(found["six_n_d"], shares)
    return found


def _cost_lines(found: JsonObject) -> list[str]:
    paper = found["paper"]
    lines = [
        "",
        f"cost of {found['tokens']:.4g} tokens in zettaFLOPs",
        f"  {paper['middle'] / 1e21:>10.2f} (+-{paper['half_width'] / 1e21:.2f}) by FLM-101B's formula, between no "
        "and full recomputation",
        f"  {found['six_n_d'] / 1e21:>10.2f} as 6 x parameters x tokens",
        f"  {found['counted'] / 1e21:>10.2f} counted: products of this model and causal attention, "
        "without recomputation",
    ]
    for language, flops in found.get("languages", {}).items():
        lines.append(f"  {flops / 1e21:>10.2f} of 6 x parameters x tokens in {language}")
    return lines


def _budget_lines(found: JsonObject) -> list[str]:
    lines = [
        "",
        f"a budget of {found['flops']:.4g} FLOPs buys this model {found['tokens']:.4g} tokens, "
        f"{found['tokens_per_parameter']:.1f} a parameter",
        "  compute-optimal            parameters      tokens    loss",
    ]
    for row in found["optimal"]:
        loss = "" if row["loss"] is None else f"{row['loss']:>8.3f}"
        lines.append(f"  {row['law']:<24}{row['parameters']:>12.4g}{row['tokens']:>12.4g}{loss:<8}  {row['source']}")
    return lines


def _shares(words: list[str]) -> dict[str, float]:
    """Language -> share, from words such as en=53.5."""
    shares: dict[str, float] = {}
    for word in words:
        language, _, text = word.partition("=")
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not language or language in shares or not 0.0 < share < 1e9:
            raise UserError(
                f"--languages: expected a language and its share above 0, once, e.g. en=53.5; found {word!r}"
            )
        shares[language] = share
    return shares
