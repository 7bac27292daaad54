"""Pattern mining (section 5.3): five examples and no instruction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from telechat_twins.core.eval.iq.items import Draw, IQOptions, Item, Suite, examples, scores

SHOTS = 5
MARKS = {"en": ("Input: ", "Output: "), "zh": ("输入: ", "输出: ")}


def head_tail(draw: Draw, options: IQOptions, language: str) -> Item:
    """A head and a tail, the same in all examples, around the input. Drawn again where the examples fit another pair of
    head and tail, too."""
    while True:
        head, tail = (draw.text(options.letters, options.affix) for _ in range(2))
        inputs = _inputs(draw, options)
        pairs = [(text, head + text + tail) for text in inputs]
        if affixes(pairs[:-1]) == {(head, tail)}:
            return _item(pairs, language)


def affixes(pairs: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
    """All pairs of head and tail that explain every example."""
    found: set[tuple[str, str]] | None = None
    for text, out in pairs:
        starts = [n for n in range(len(out) - len(text) + 1) if out.startswith(text, n)]
        here = {(out[:n], out[n + len(text) :]) for n in starts}
        found = here if found is None else found & here
    return found or set()


def full_repeating(draw: Draw, options: IQOptions, language: str) -> Item:
    """The input twice."""
    return _item([(text, text + text) for text in _inputs(draw, options)], language)


def head_slicing(draw: Draw, options: IQOptions, language: str) -> Item:
    """The first characters of the input, as many in all examples. Drawn again where the examples fit another rule with
    another answer, too: all but as many at the end, or half of the input."""
    while True:
        kept = draw.between(options.sliced)
        longer = (max(options.length[0], kept + 1), max(options.length[1], kept + 2))
        pairs = [(text, text[:kept]) for text in _different(draw, options.letters, longer)]
        if slices(pairs[:-1], pairs[-1][0]) == {pairs[-1][1]}:
            return _item(pairs, language)


def slices(pairs: Sequence[tuple[str, str]], question: str) -> set[str]:
    """The answers to ``question`` of all rules of slicing that explain every example: the first n characters, all but
    the last n, half of them rounded down or up."""
    text, out = pairs[0]
    kept, cut = len(out), len(text) - len(out)
    rules: list[Callable[[int], int]] = [lambda n: kept, lambda n: n - cut, lambda n: n // 2, lambda n: (n + 1) // 2]
    return {
        question[: max(rule(len(question)), 0)]
        for rule in rules
        if all(text[: rule(len(text))] == out for text, out in pairs)
    }


def _inputs(draw: Draw, options: IQOptions) -> list[str]:
    return _different(draw, options.letters, options.length)


def _different(draw: Draw, letters: str, bounds: tuple[int, int]) -> list[str]:
    """Inputs of the examples and of the question, no two equal: the answer cannot be copied."""
    found: dict[str, None] = {}
    while len(found) <= SHOTS:
        found[draw.text(letters, bounds)] = None
    return list(found)


def _item(pairs: Sequence[tuple[str, str]], language: str) -> Item:
    return Item(examples(pairs, MARKS[language]), " " + pairs[-1][1])


SUITES = (
    Suite("head_tail", head_tail, 100, SHOTS, scores(61.00, 38.00, 52.00)),
    Suite("full_repeating", full_repeating, 100, SHOTS, scores(92.00, 70.00, 79.00)),
    Suite("head_slicing", head_slicing, 100, SHOTS, scores(57.00, 51.00, 63.00)),
)
