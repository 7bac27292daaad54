"""Anti-interference (section 5.4): keys in filler text, and bAbI's supporting facts (qa1, qa2) as generation."""

from __future__ import annotations

from telechat_twins.core.eval.iq.items import WORDS, Draw, IQOptions, Item, Suite, examples, scores

SHOTS = 3
MAX_KEYS = 3
MARKS = {"en": ("", "Answer: "), "zh": ("", "答案: ")}
PEOPLE = {"en": ("Mary", "John", "Sandra", "Daniel"), "zh": ("小明", "小红", "小刚", "小丽")}
PLACES = {
    "en": ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom"),
    "zh": ("厨房", "花园", "办公室", "浴室", "走廊", "卧室"),
}
THINGS = {"en": ("apple", "football", "milk", "book"), "zh": ("苹果", "足球", "牛奶", "书")}
SAID = {
    "en": {
        "move": "{person} went to the {place}.",
        "take": "{person} picked up the {thing}.",
        "where": "Where is {person}?",
        "where_thing": "Where is the {thing}?",
        "key": "The key of {name} is {key}. Remember it.",
        "filler": "The {a} is near the {b}.",
        "told": "Some keys are hidden in the following text. Find them and remember them.",
        "asked": "What is the key of {name}?",
    },
    "zh": {
        "move": "{person}去了{place}。",
        "take": "{person}拿起了{thing}。",
        "where": "{person}在哪里？",
        "where_thing": "{thing}在哪里？",
        "key": "{name}的钥匙是{key}。请记住它。",
        "filler": "{a}在{b}的旁边。",
        "told": "下面的文本中藏着一些钥匙。请找到并记住它们。",
        "asked": "{name}的钥匙是什么？",
    },
}


def key_retrieval(draw: Draw, options: IQOptions, language: str) -> Item:
    """One to three keys with names, at random places in filler; one of them is asked for."""
    said, words = SAID[language], WORDS[language]
    names = draw.some(words, 1 + draw.below(MAX_KEYS))
    keys = draw.some(range(10_000, 100_000), len(names))
    others = [word for word in words if word not in names]
    sentences = []
    for _ in range(draw.between(options.filler)):
        a, b = draw.some(others, 2)
        sentences.append(said["filler"].format(a=a, b=b))
    for name, key in zip(names, keys, strict=True):
        sentences.insert(draw.below(len(sentences) + 1), said["key"].format(name=name, key=key))
    place = draw.below(len(names))
    gap = " " if language == "en" else ""
    asked = said["asked"].format(name=names[place])
    prompt = f"{said['told']}\n{gap.join(sentences)}\n{asked}\n{MARKS[language][1]}".rstrip(" ")
    return Item(prompt, f" {keys[place]}")


def one_fact(draw: Draw, options: IQOptions, language: str) -> Item:
    """Where a person is: the last of their moves counts (qa1)."""
    return _stories([_moves(draw, options, language) for _ in range(SHOTS + 1)], language)


def two_facts(draw: Draw, options: IQOptions, language: str) -> Item:
    """Where a thing is: who took it, and where they went (qa2)."""
    return _stories([_carried(draw, options, language) for _ in range(SHOTS + 1)], language)


def _stories(stories: list[tuple[str, str]], language: str) -> Item:
    return Item(examples(stories, MARKS[language]), " " + stories[-1][1])


def _moves(draw: Draw, options: IQOptions, language: str) -> tuple[str, str]:
    said = SAID[language]
    where: dict[str, str] = {}
    lines: list[str] = []
    for _ in range(draw.between(options.story)):
        person, place = draw.one(PEOPLE[language]), draw.one(PLACES[language])
        where[person] = place
        lines.append(said["move"].format(person=person, place=place))
    asked = draw.one(sorted(where))
    return "\n".join([*lines, said["where"].format(person=asked)]), where[asked]


def _carried(draw: Draw, options: IQOptions, language: str) -> tuple[str, str]:
    """A story in which every thing is taken at most once and stays with its taker, who has been somewhere."""
    said = SAID[language]
    where: dict[str, str] = {}
    owner: dict[str, str] = {}
    lines: list[str] = []
    left = draw.between(options.story)
    while left > 0 or not any(person in where for person in owner.values()):
        left -= 1
        person = draw.one(PEOPLE[language])
        free = [thing for thing in THINGS[language] if thing not in owner]
        if free and draw.below(3) == 0:
            thing = draw.one(free)
            owner[thing] = person
            lines.append(said["take"].format(person=person, thing=thing))
        else:
            where[person] = draw.one(PLACES[language])
            lines.append(said["move"].format(person=person, place=where[person]))
    asked = draw.one(sorted(thing for thing, person in owner.items() if person in where))
    return "\n".join([*lines, said["where_thing"].format(thing=asked)]), where[owner[asked]]


SUITES = (
    Suite("key_retrieval", key_retrieval, 300, 0, scores(92.67, 77.67, 89.00)),
    Suite("babi_qa1", one_fact, 300, SHOTS, scores(78.33, 56.33, 59.00)),
    Suite("babi_qa2", two_facts, 300, SHOTS, scores(39.33, 26.67, 32.33)),
)
