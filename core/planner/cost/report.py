"""What a training costs as papers state it, and what a budget buys, as text and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.flops import flops_per_token
from telechat_twins.core.planner.cost.accounting import ZETTA, Trained, by_language, cost
from telechat_twins.core.planner.cost.laws import budget
from telechat_twins.core.types import JsonObject


@dataclass(frozen=True)
class Asked:
    """What is wanted: the cost of ``tokens`` (None: not), its split by ``languages`` (words such as en=53.5), and what
    ``budget`` FLOPs buy (None: not)."""

    tokens: float | None
    languages: Sequence[str]
    budget: float | None


def report(asked: Asked, model: ModelConfig, seq_len: int, parameters: int) -> tuple[list[str], JsonObject]:
    """The cost of a training, the budget's tokens, or both, as text and JSON."""
    lines: list[str] = []
    found: JsonObject = {}
    if asked.tokens is not None:
        found["cost"] = _cost(model, seq_len, parameters, asked.tokens, _shares(asked.languages))
        lines += _cost_lines(found["cost"])
    if asked.budget is not None:
        bought = asked.budget / (6.0 * parameters)
        found["budget"] = {"flops": asked.budget, "tokens": bought, "tokens_per_parameter": bought / parameters}
        found["budget"]["optimal"] = budget(asked.budget)
        lines += _budget_lines(found["budget"])
    return lines, found


def _cost(model: ModelConfig, seq_len: int, parameters: int, tokens: float, shares: dict[str, float]) -> JsonObject:
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
        f"  {paper['middle'] / ZETTA:>10.2f} (+-{paper['half_width'] / ZETTA:.2f}) by FLM-101B's formula, between no "
        "and full recomputation",
        f"  {found['six_n_d'] / ZETTA:>10.2f} as 6 x parameters x tokens",
        f"  {found['counted'] / ZETTA:>10.2f} counted: products of this model and causal attention, "
        "without recomputation",
    ]
    for language, flops in found.get("languages", {}).items():
        share = flops / found["six_n_d"]
        lines.append(f"  {flops / ZETTA:>10.2f} of 6 x parameters x tokens in {language}, {share:.1%} of the shares")
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


def _shares(words: Sequence[str]) -> dict[str, float]:
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
