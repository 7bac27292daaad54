"""Bits per byte of texts by domain, and their mean weighted over domains.

    bits per byte = -log-likelihood / (bytes * ln 2)

It does not depend on the tokenizer, so models with different vocabularies can be compared: the main metric of the
Tele-FLM report (arXiv 2404.16645).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from telechat_twins.core.data.tokenizer import Tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.scorer import Likelihood, Pair, Scorer, rolling_windows


@dataclass(frozen=True)
class Weights:
    """Shares of domains, which need not sum to 1, and the score that the report gives for Tele-FLM."""

    shares: Mapping[str, float]
    published: float


# F-Prop: the mix that Tele-FLM was trained on; L-Prop: Llama's.
PRESETS: dict[str, Weights] = {
    "f-prop": Weights(
        {"WebText": 75.17, "Github": 13.48, "Wikipedia": 3.56, "Book": 5.26, "ArXiv": 1.46, "StackExchange": 1.07},
        0.516,
    ),
    "l-prop": Weights(
        {"WebText": 82.0, "Github": 4.5, "Wikipedia": 4.5, "Book": 4.5, "ArXiv": 2.5, "StackExchange": 2.0}, 0.550
    ),
    "chinese": Weights(
        {
            "WebText": 76.60,
            "Code": 1.91,
            "Book": 11.61,
            "WorldKnowledge": 1.44,
            "QA": 4.50,
            "Classical": 0.07,
            "Professional": 3.87,
        },
        0.646,
    ),
}


@dataclass(frozen=True)
class DomainBits:
    """Totals of a domain: texts, tokens, bytes of UTF-8, and log-likelihood in nats."""

    texts: int
    tokens: int
    size: int
    logprob: float

    @property
    def bits_per_byte(self) -> float:
        return -self.logprob / self.size / math.log(2)

    @property
    def loss(self) -> float:
        """Nats a token."""
        return -self.logprob / self.tokens


def domain_bits(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    scorer: Scorer,
    prefix: int,
    max_len: int,
    on_done: Callable[[int, Likelihood], object] | None = None,
) -> DomainBits:
    """The totals of some texts, each after the token ``prefix``, in windows of ``max_len`` tokens."""
    windows: list[Pair] = []
    for text in texts:
        windows += rolling_windows(tokenizer.encode(text), prefix, max_len)
    if not windows:
        raise UserError("the texts of a domain have no tokens; give it some text")
    found = scorer.likelihoods(windows, on_done)
    tokens = sum(len(window.continuation) for window in windows)
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    return DomainBits(len(texts), tokens, size, sum(one.logprob for one in found))


def check_domains(names: Collection[str], weights: Mapping[str, float]) -> None:
    """UserError for a weight without a domain, or a domain without a weight."""
    apart = sorted(set(names) ^ weights.keys())
    if apart:
        what = "weight" if apart[0] in names else "texts"
        raise UserError(f"--domain: '{apart[0]}' has no {what}; the weights are those of {', '.join(weights)}")


def weighted_bits(domains: Mapping[str, DomainBits], weights: Mapping[str, float]) -> float:
    """The mean of the domains' bits per byte; ``weights`` by domain."""
    return sum(weights[name] * domains[name].bits_per_byte for name in weights) / sum(weights.values())
