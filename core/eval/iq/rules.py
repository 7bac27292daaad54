"""Rule understanding (section 5.2): counting without examples, and two replacements with four."""

from __future__ import annotations

from telechat_twins.core.eval.iq.items import WORDS, Draw, IQOptions, Item, Suite, examples, scores

SHOTS = 4
COUNT = {"en": "Let's count from {first} to {last}:", "zh": "让我们从{first}数到{last}："}
LOWER = {
    "en": "For the following text, please modify all uppercase letters to lowercase.",
    "zh": "请把下面文本中的所有大写字母改为小写字母。",
}
WORD = {
    "en": "In the following sentence, replace the specified word with the target word. "
    "word to replace: **{old}** target word: **{new}**",
    "zh": "在下面的句子中，把指定的词替换为目标词。 要替换的词: **{old}** 目标词: **{new}**",
}
MARKS = {"en": ("text: ", "answer: "), "zh": ("文本: ", "答案: ")}
CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def counting(draw: Draw, options: IQOptions, language: str) -> Item:
    """Count on to the given end; the first three terms are there."""
    first = draw.between(options.count_from)
    numbers = [str(first + n) for n in range(max(4, draw.between(options.count_terms)))]
    head = COUNT[language].format(first=numbers[0], last=numbers[-1])
    return Item(f"{head} {', '.join(numbers[:3])},", " " + ", ".join(numbers[3:]))


def replace_lowercase(draw: Draw, options: IQOptions, language: str) -> Item:
    """Small letters in place of capital ones."""

    def text() -> str:
        words = [draw.text(options.letters + options.letters.upper(), options.length) for _ in range(3)]
        return " ".join([words[0] + draw.one(CAPITALS), *words[1:]])  # at least one capital

    pairs = [(found, found.lower()) for found in (text() for _ in range(SHOTS + 1))]
    return Item(f"{LOWER[language]}\n\n{examples(pairs, MARKS[language])}", " " + pairs[-1][1])


def replace_word(draw: Draw, options: IQOptions, language: str) -> Item:
    """A random word in a sentence, everywhere it stands, becomes another."""
    pairs = []
    for _ in range(SHOTS + 1):
        old, new = draw.text(CAPITALS, (4, 4)), draw.text(CAPITALS, (4, 4))
        while new == old:
            new = draw.text(CAPITALS, (4, 4))
        words = [draw.one(WORDS[language]) for _ in range(draw.between(options.text_words))]
        for _ in range(1 + draw.below(2)):
            words.insert(draw.below(len(words) + 1), old)
        told = WORD[language].format(old=old, new=new)
        pairs.append((f"{told}\n{' '.join(words)}", " ".join(new if word == old else word for word in words)))
    return Item(examples(pairs, ("", MARKS[language][1])), " " + pairs[-1][1])


SUITES = (
    Suite("counting", counting, 300, 0, scores(82.43, 60.81, 69.59)),
    Suite("replace_lowercase", replace_lowercase, 300, SHOTS, scores(80.67, 69.67, 64.00)),
    Suite("replace_word", replace_word, 300, SHOTS, scores(95.00, 84.00, 95.67)),
)
