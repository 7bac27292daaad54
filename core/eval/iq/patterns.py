"""Pattern mining (section 5.3): five examples and no instruction.

Items are drawn again where another rule (core.eval.iq.rivals) explains the examples and answers the question otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.iq.items import Draw, IQOptions, Item, Suite, examples, scores
from telechat_twins.core.eval.iq.rivals import answers

SHOTS = 5
MAX_DRAWS = 1000
MARKS = {"en": ("Input: ", "Output: "), "zh": ("输入: ", "输出: ")}

Pairs = list[tuple[str, str]]


def head_tail(draw: Draw, options: IQOptions, language: str) -> Item:
    """A head and a tail, the same in all examples, around the input."""

    def pairs() -> Pairs:
        head, tail = (draw.text(options.letters, options.affix) for _ in range(2))
        return [(text, head + text + tail) for text in _different(draw, options.letters, options.length)]

    return _item(pairs, language)


def full_repeating(draw: Draw, options: IQOptions, language: str) -> Item:
    """The input twice."""
    return _item(lambda: [(text, text + text) for text in _different(draw, options.letters, options.length)], language)


def head_slicing(draw: Draw, options: IQOptions, language: str) -> Item:
    """The first characters of the input, as many in all examples.

    The question is no shorter than all examples and no longer: of a rule by which a longer input keeps no fewer
    characters, such as any share of the length, it has the same answer.
    """

    def pairs() -> Pairs:
        kept = draw.between(options.sliced)
        longer = (max(options.length[0], kept + 1), max(options.length[1], kept + 2))
        while True:
            *shown, question = _different(draw, options.letters, longer)
            if min(map(len, shown)) <= len(question) <= max(map(len, shown)):
                return [(text, text[:kept]) for text in (*shown, question)]

    return _item(pairs, language)


def _different(draw: Draw, letters: str, bounds: tuple[int, int]) -> list[str]:
    """Inputs of the examples and of the question, no two equal: the answer cannot be copied."""
    found: dict[str, None] = {}
    while len(found) <= SHOTS:
        found[draw.text(letters, bounds)] = None
    return list(found)


def _item(draw_pairs: Callable[[], Pairs], language: str) -> Item:
    """The first item drawn to whose question no rival rule that explains the examples gives another answer."""
    for _ in range(MAX_DRAWS):
        pairs = draw_pairs()
        if answers(pairs[:-1], pairs[-1][0]) == {pairs[-1][1]}:
            return Item(examples(pairs, MARKS[language]), " " + pairs[-1][1])
    raise UserError(f"no item without a second rule was found in {MAX_DRAWS:,}; take more letters or longer inputs")


SUITES = (
    Suite("head_tail", head_tail, 100, SHOTS, scores(61.00, 38.00, 52.00)),
    Suite("full_repeating", full_repeating, 100, SHOTS, scores(92.00, 70.00, 79.00)),
    Suite("head_slicing", head_slicing, 100, SHOTS, scores(57.00, 51.00, 63.00)),
)
