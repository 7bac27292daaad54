"""Regular expressions of other people's files: the same matches as Python's, at a cost known before."""

from __future__ import annotations

import random
import re

import pytest

from telechat_twins.convert.hf import expression
from telechat_twins.convert.hf.expression import expression_cost, matches, matches_ending

NAMES = [
    "",
    "lm_head",
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.k_proj",
    "transformer.h.3.mlp.down_proj",
    "model.visual.blocks.1.attn.qkv",
    *("".join(random.Random(seed).choices("ab.1", k=seed % 7)) for seed in range(40)),
]
USED = [  # as adapters in use have them
    r".*\.layers\.[0-9]+\.(self_attn|mlp)\.(q_proj|k_proj|down_proj)",
    r"^(?!.*visual).*(q|k)_proj$",
    r"model\.layers\.(0|1\d)\.self_attn\.(?:q|k)_proj",
    r"layers.0.*",
    r"(?P<part>.*\.)?(lm_head|[^.]+_proj)",
    r"^(model)(?=\.layers).*\.(\w+_proj)$",
    r".*?[^\d\s]\.(\D{4}|\W)+",
    r"(?:.*?(?:language|text).*?(?:attn|mlp).*?(?:q_proj|k_proj))|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attn)\.(?:(?:q_proj|k_proj)))",
    r".*\b\d+\b.*",
    r"q_proj",
    r"self_attn\.q_proj",
    r"",
    r"a|q_proj",
]


def drawn(rng: random.Random, depth: int) -> str:
    """An expression with at most ``depth`` repetitions inside one another, each of at most four rounds."""
    parts = []
    for _ in range(rng.randint(1, 3)):
        part = rng.choice(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\d", r"\ba"])
        if depth and rng.random() < 0.5:
            part = f"({drawn(rng, depth - 1)})"
        if depth and rng.random() < 0.5:
            part += rng.choice(["?", "{2}", "{0,3}", "{1,4}?", "{2,3}"])
        parts.append(part)
    return "".join(parts) if rng.random() < 0.7 else "|".join(parts)


@pytest.mark.parametrize("ending", [False, True])
def test_the_same_matches_as_python(ending: bool) -> None:
    rng, seen = random.Random(5), 0
    for text in USED + [drawn(rng, 1) for _ in range(400)]:
        assert expression_cost(text) >= 0
        for name in NAMES:
            right = re.match(rf"(.*\.)?({text})$", name) if ending else re.fullmatch(text, name)
            found = matches_ending(text, name) if ending else matches(text, name)
            assert found == (right is not None), (text, name)
            seen += found
    assert seen > 500


def test_a_repetition_that_ends_too_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matches("(ab?)*", "abaab")
    right = expression._repeat
    monkeypatch.setattr(expression, "_repeat", lambda least, most, *rest: right(least, min(most, 1), *rest))
    assert not matches("(ab?)*", "abaab")


@pytest.mark.parametrize(
    ("text", "cost"), [("q_proj", 0), ("layers.0.q", 0), ("a|b", 1), ("a+b*", 3), ("(a+b){3}", 52), ("(?!.*a)b", 52)]
)
def test_costs(text: str, cost: int) -> None:
    assert expression_cost(text) == cost


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("q(", "is not a regular expression"),
        ("(?i)q", "flags are not read"),
        ("(?i:q)", "holds what is not read here"),
        (r"(q)\1", "a reference"),
        (r"(?<=a)b", "looking behind"),
        (r"\Bq", "holds what is not read here"),
        ("a++", "holds what is not read here"),
        ("(?>a)", "holds what is not read here"),
        ("((a{2}b){2}c){2}", "nests repetition more than 2 times"),
        ("a)|(b", "is not a regular expression"),
        ("(" * 60 + "q" + ")" * 60, "nests more than 50 groups"),
    ],
)
def test_what_is_not_followed_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        expression_cost(text)
