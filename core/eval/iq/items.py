"""Items of the IQ suites, and random numbers that are the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
LANGUAGES = ("en", "zh")
_ENGLISH = """\
river stone window garden paper silver morning letter market bridge table winter forest music candle harbor mirror
ladder basket engine pencil button carpet island orange pocket rabbit saddle temple valley"""
_CHINESE = """\
河流 石头 窗户 花园 纸张 早晨 信件 市场 桥梁 桌子 冬天 森林 音乐 蜡烛 港口 镜子 梯子 篮子 铅笔 地毯 海岛
橙子 口袋 兔子 山谷 寺庙 钟表 雨伞 棉花 火车"""
WORDS = {"en": tuple(_ENGLISH.split()), "zh": tuple(_CHINESE.split())}


@dataclass(frozen=True)
class IQOptions:
    """What the paper leaves open, with our defaults: lengths in characters or words, bounds included."""

    seed: int = 0
    letters: str = "abcdefghijklmnopqrstuvwxyz"
    length: tuple[int, int] = (4, 8)  # of an input string
    affix: tuple[int, int] = (1, 3)  # of a head or a tail
    sliced: tuple[int, int] = (2, 4)  # characters that head slicing keeps
    count_from: tuple[int, int] = (1, 99_999)
    count_terms: tuple[int, int] = (10, 30)
    text_words: tuple[int, int] = (4, 9)
    filler: tuple[int, int] = (10, 30)  # sentences around keys
    story: tuple[int, int] = (4, 10)  # statements of a bAbI story
    shots_a_label: int = 2  # of symbolic mapping


@dataclass(frozen=True)
class Item:
    """A prompt and its only right answer. ``choices``: of multiple choice, in place of generation."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """SHA-256 of prompt, answer and choices, by which a manifest names the item."""
        return hashlib.sha256("\x1f".join((self.prompt, self.answer, *self.choices)).encode()).hexdigest()


@dataclass(frozen=True)
class Suite:
    """A generated task. ``size`` and ``shots`` are the paper's; ``scores``: its scores in per cent."""

    name: str
    make: Callable[[Draw, IQOptions, str], Item]
    size: int
    shots: int
    scores: Mapping[str, float] = field(default_factory=dict)


class Draw:
    """Random numbers as a function of a key and a counter: BLAKE2b of both, so equal on every platform and version."""

    def __init__(self, *key: object) -> None:
        self._key, self._count = "\x1f".join(map(str, key)).encode(), 0

    def below(self, bound: int) -> int:
        """A whole number from 0 to ``bound`` - 1; its bias, below ``bound`` / 2^64, is nothing here."""
        self._count += 1
        digest = hashlib.blake2b(self._key + b"\x1f%d" % self._count, digest_size=8).digest()
        return int.from_bytes(digest, "little") % bound

    def between(self, bounds: tuple[int, int]) -> int:
        """A whole number within the bounds, both included."""
        return bounds[0] + self.below(bounds[1] - bounds[0] + 1)

    def one(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def some(self, choices: Sequence[T], count: int) -> list[T]:
        """``count`` different ones, in random order."""
        left = list(choices)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def text(self, letters: str, bounds: tuple[int, int]) -> str:
        return "".join(self.one(letters) for _ in range(self.between(bounds)))


def scores(gpt3: float, glm: float, flm: float) -> dict[str, float]:
    """The paper's three models."""
    return {"GPT-3": gpt3, "GLM-130B": glm, "FLM-101B": flm}


def examples(pairs: Sequence[tuple[str, str]], marks: tuple[str, str]) -> str:
    """Pairs of question and answer in the few-shot layout of these suites; the last answer is left open."""
    *shown, last = pairs
    blocks = [f"{marks[0]}{question}\n{marks[1]}{answer}\n\n" for question, answer in shown]
    return "".join(blocks) + f"{marks[0]}{last[0]}\n{marks[1]}".rstrip(" ")
