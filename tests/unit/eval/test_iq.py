"""The IQ generators, each item checked by a solver that reads its prompt alone and shares no code with them."""

from __future__ import annotations

import hashlib
import json
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from telechat_twins.core.cli import main
from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.iq import patterns
from telechat_twins.core.eval.iq.items import LANGUAGES, Draw, IQOptions, Item, Suite
from telechat_twins.core.eval.iq.rivals import answers
from telechat_twins.core.eval.iq.symbolic import SOURCES, symbolic_items
from telechat_twins.core.eval.iq.tasks import SUITES, generate, plans, write_tasks

COUNT = 250  # items of each in `make test`; ITEMS=10000 was run when the generators were written
BY_NAME = {suite.name: suite for suite in SUITES}
CUTS: list[Callable[[str], str]] = [lambda text: text]
CUTS += [lambda text, n=n: text[:n] for n in range(1, 9)] + [lambda text, n=n: text[-n:] for n in range(1, 9)]


def blocks(prompt: str) -> tuple[list[tuple[str, str]], str]:
    """Examples and the question of a pattern's prompt, by the lines' marks."""
    pairs = re.findall(r"(?:Input|输入): (.*)\n(?:Output|输出):(?: (.*))?(?:\n|$)", prompt)
    *shown, (question, nothing) = pairs
    assert nothing == ""
    return shown, question


def solve_counting(prompt: str) -> set[str]:
    first, last = map(int, re.search(r"(\d+)(?: to |数到)(\d+)", prompt).groups())
    given = [int(number) for number in re.split(r"[:：]", prompt)[1].rstrip(",").split(",")]
    assert given == [first, first + 1, first + 2]
    return {", ".join(str(number) for number in range(given[-1] + 1, last + 1))}


def solve_lowercase(prompt: str) -> set[str]:
    return {re.findall(r"(?:text|文本): (.*)", prompt)[-1].swapcase().casefold()}


def solve_word(prompt: str) -> set[str]:
    old, new = re.findall(r"\*\*(.*?)\*\*", prompt.split("\n\n")[-1])
    return {re.sub(rf"(?<!\S){old}(?!\S)", new, prompt.split("\n")[-2])}


def solve_head_tail(prompt: str) -> set[str]:
    shown, question = blocks(prompt)
    found = set()
    for cut in CUTS:  # a head and a tail around the input, or around its beginning or its end
        inner, out = cut(shown[0][0]), shown[0][1]
        # Every way to cut the first output, kept where it explains the other examples.
        around = [(out[:n], out[n + len(inner) :]) for n in range(len(out)) if out[n : n + len(inner)] == inner]
        found |= {a + cut(question) + b for a, b in around if all(a + cut(i) + b == o for i, o in shown)}
    return found


def solve_repeating(prompt: str) -> set[str]:
    shown, question = blocks(prompt)
    counts = {len(out) / len(text) for text, out in shown if out == text * (len(out) // len(text))}
    rules = [lambda text, n=n: text * int(n) for n in counts] + [lambda text: text + text[::-1]]
    rules += [lambda text, a=a, b=b: a(text) + b(text) for a in CUTS for b in CUTS]
    return {rule(question) for rule in rules if all(out == rule(text) for text, out in shown)}


def solve_slicing(prompt: str) -> set[str]:
    """Any share of the length, rounded down or up, and so many more or less: all rules for which longer inputs keep no
    fewer characters."""
    shown, question = blocks(prompt)
    counts = [
        lambda n, part=part, whole=whole, more=more, up=up: (n * part + (whole - 1) * up) // whole + more
        for whole in range(1, 7)
        for part in range(whole + 1)
        for more in range(-8, 9)
        for up in (0, 1)
    ]
    explaining = [rule for rule in counts if all(out == text[: max(rule(len(text)), 0)] for text, out in shown)]
    return {question[: max(rule(len(question)), 0)] for rule in explaining}


def solve_keys(prompt: str) -> set[str]:
    found = dict(re.findall(r"The key of (\w+) is (\d+)\.|$", prompt)) if "Some keys" in prompt else {}
    found |= dict(re.findall(r"(?:^|。)(\w+)的钥匙是(\d+)。", prompt, re.MULTILINE))
    asked = re.search(r"What is the key of (\w+)\?|^(\w+)的钥匙是什么", prompt, re.MULTILINE)
    return {found[asked[1] or asked[2]]}


def solve_babi(prompt: str) -> set[str]:
    """Read the last story from its end backwards."""
    *facts, question, _ = prompt.split("\n\n")[-1].split("\n")
    asked = re.search(r"Where is (?:the )?(\w+)\?|(\w+)在哪里", question)
    who = asked[1] or asked[2]
    for fact in facts:
        if taken := re.search(rf"(\w+) picked up the {who}\.|(\w+)拿起了{who}。", fact):
            who = taken[1] or taken[2]
            break
    for fact in reversed(facts):
        if moved := re.search(rf"^{who} went to the (\w+)\.|^{who}去了(\w+)。", fact):
            return {moved[1] or moved[2]}
    return set()


SOLVERS: dict[str, Callable[[str], set[str]]] = {
    "counting": solve_counting,
    "replace_lowercase": solve_lowercase,
    "replace_word": solve_word,
    "head_tail": solve_head_tail,
    "full_repeating": solve_repeating,
    "head_slicing": solve_slicing,
    "key_retrieval": solve_keys,
    "babi_qa1": solve_babi,
    "babi_qa2": solve_babi,
}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_item_has_one_answer_which_a_solver_finds(name: str, language: str) -> None:
    items = list(generate(BY_NAME[name], language, IQOptions(), COUNT))
    assert len({item.prompt for item in items}) == COUNT
    for item in items:
        assert SOLVERS[name](item.prompt) == {item.answer.strip()}, item.prompt
        assert not item.prompt.endswith(" ") and item.answer[0] == " " and "\n" not in item.answer


def test_every_suite_has_the_papers_size_and_shots_and_a_solver() -> None:
    assert set(SOLVERS) == set(BY_NAME)
    assert {name: (suite.size, suite.shots) for name, suite in BY_NAME.items()} == {
        **{name: (300, 4) for name in ("replace_lowercase", "replace_word")},
        **{name: (100, 5) for name in ("head_tail", "full_repeating", "head_slicing")},
        **{name: (300, 3) for name in ("babi_qa1", "babi_qa2")},
        "counting": (300, 0),
        "key_retrieval": (300, 0),
    }
    for name, shots in (("head_tail", 5), ("replace_word", 4), ("babi_qa2", 3)):
        item = next(generate(BY_NAME[name], "en", IQOptions(), 1))
        assert len(re.findall(r"(?:Output|answer|Answer): ", item.prompt)) == shots


PAIRS = [("a", "aab"), ("aa", "aaab")]
AMBIGUOUS = {
    "two pairs of head and tail": (PAIRS, "c", {"cab", "acb"}, solve_head_tail),
    "the input, or its first two": ([("ka", "xkay"), ("qb", "xqby")], "tuvw", {"xtuvwy", "xtuy"}, solve_head_tail),
    "the last two, twice": ([("ka", "kaka"), ("qb", "qbqb")], "tuv", {"tuvtuv", "uvuv", "tuuv"}, solve_repeating),
    "backwards": ([("kak", "kakkak"), ("qbbq", "qbbqqbbq")], "tu", {"tutu", "tuut"}, solve_repeating),
    "two, or a third": ([("kabcde", "ka"), ("qbcdefg", "qb")], "tuvwabcde", {"tu", "tuv"}, solve_slicing),
    "two, or all but two": ([("kabc", "ka"), ("qbcd", "qb")], "tuvwx", {"tu", "tuv"}, solve_slicing),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_an_ambiguous_item_is_seen(name: str) -> None:
    """By the generators' check, and by the solver of these tests."""
    pairs, question, wanted, solve = AMBIGUOUS[name]
    prompt = "".join(f"Input: {text}\nOutput: {out}\n\n" for text, out in pairs) + f"Input: {question}\nOutput:"
    assert wanted <= answers(pairs, question) and wanted <= solve(prompt)


@pytest.mark.parametrize("name", ["head_tail", "full_repeating", "head_slicing"])
def test_two_letters_still_have_one_answer(name: str) -> None:
    """Where most items are drawn again."""
    options = IQOptions(letters="ab", length=(3, 5), affix=(1, 2))
    for n in range(150):
        item = BY_NAME[name].make(Draw(n), options, "en")
        assert SOLVERS[name](item.prompt) == {item.answer.strip()}, item.prompt


def test_a_rule_that_is_never_the_only_one_is_refused() -> None:
    """Of inputs of one letter twice, and of two letters in all, nothing tells first from last."""
    pairs = [("aa", "aaaa"), ("aaa", "aaaaaa")]
    with pytest.raises(UserError, match="no item without a second rule was found in 1,000; take more letters"):
        patterns._item(lambda: [*pairs, ("ba", "baba")], "en")


def test_seeds_give_the_same_items_everywhere() -> None:
    assert [Draw(0, "x").below(1000) for _ in range(1)] == [Draw(0, "x").below(1000)]
    digest = hashlib.sha256()
    for name in sorted(BY_NAME):
        for language in LANGUAGES:
            for item in generate(BY_NAME[name], language, IQOptions(), 5):
                digest.update(item.hash.encode())
    # Another digest means other items: then VERSION in core/eval/iq/tasks.py rises, too.
    assert digest.hexdigest() == "39e155d1258824a39a4f1fd08c2ddf486304dd835155c154e906ca20cf0226ad"
    other = next(generate(BY_NAME["counting"], "en", IQOptions(seed=1), 1))
    assert other != next(generate(BY_NAME["counting"], "en", IQOptions(), 1))


ROWS = {
    "boolq": {"passage": "p{n}", "question": "q{n}", "label": [True, False]},
    "wic": {"word": "w", "sentence1": "a{n}", "sentence2": "b{n}", "label": ["true", "false"]},
    "rte": {"premise": "a{n}", "hypothesis": "b{n}", "label": ["entailment", "not_entailment"]},
    "wsc": {"text": "t{n}", "target": {"span1_text": "x", "span2_text": "y"}, "label": [True, False]},
    "afqmc": {"sentence1": "a{n}", "sentence2": "b{n}", "label": ["0", "1"]},
    "csl": {"abst": "a{n}", "keyword": ["k", "l"], "label": ["0", "1"]},
    "ocnli": {"sentence1": "a{n}", "sentence2": "b{n}", "label": ["entailment", "neutral", "contradiction", "-"]},
    "cluewsc2020": {"text": "t{n}", "target": {"span1_text": "x", "span2_text": "y"}, "label": ["true", "false"]},
}


def write_rows(folder: Path, name: str, count: int = 24) -> Path:
    folder.mkdir(exist_ok=True)
    lines = []
    for n in range(count):
        row = {key: value.format(n=n) if isinstance(value, str) else value for key, value in ROWS[name].items()}
        labels = ROWS[name]["label"]
        lines.append(json.dumps(row | {"label": labels[n % len(labels)]}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder / f"{name}.jsonl"


@pytest.mark.parametrize("name", SOURCES)
def test_symbols_stand_for_the_labels(name: str, tmp_path: Path) -> None:
    items = symbolic_items(name, write_rows(tmp_path, name), IQOptions())
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["label"] != "-"]
    assert len(items) == len(kept) and len({item.choices for item in items}) == len(items)
    numbers = []
    for item in items:
        *shown, question = item.prompt.rstrip("\n").split("\n\n")
        number = int(re.search(r"[a-z](\d+)", question)[1])
        numbers.append(number)
        assert len(shown) == 2 * len(item.choices) and item.answer in item.choices
        # Each example's label, by the row it is of, must be the symbol beside it; the question's own is the answer.
        by_number = {number: str(row["label"]) for number, row in enumerate(rows)}
        symbol = {}
        for block in shown:
            place = int(re.search(r"[a-z](\d+)", block)[1])
            assert place != number
            assert symbol.setdefault(by_number[place], block.rsplit("\n", 1)[1]) == block.rsplit("\n", 1)[1]
        assert set(symbol.values()) == set(item.choices) and symbol[by_number[number]] == item.answer
        assert all(re.fullmatch(r"<\S{8}>", text) for text in item.choices)
    assert len(set(numbers)) == len(numbers)


def test_rows_of_another_schema_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rte.jsonl"
    for row, message in (
        ({"premise": "a", "label": "entailment"}, "rte.jsonl:1: lacks the field 'hypothesis'"),
        ({"premise": "a", "hypothesis": "b", "label": "maybe"}, "rte.jsonl:1: has the label 'maybe'"),
        ({"premise": "a", "hypothesis": "b", "label": "entailment"}, "too few rows of label"),
    ):
        file.write_text(json.dumps(row))
        with pytest.raises(UserError, match=message):
            symbolic_items("rte", file, IQOptions())


def test_a_folder_of_tasks_has_a_manifest(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", "rte")
    names = write_tasks(tmp_path / "tasks", IQOptions(), 3, ["en"], tmp_path / "rows")
    manifest = json.loads((tmp_path / "tasks" / "manifest.json").read_text())
    assert list(manifest["tasks"]) == names and "iq_counting_en" in names and "iq_rte" in names
    for name in names:
        lines = (tmp_path / "tasks" / f"{name}.jsonl").read_text().splitlines()
        found = [Item(row["prompt"], row["answer"], tuple(row["choices"])) for row in map(json.loads, lines)]
        assert [item.hash for item in found] == manifest["tasks"][name]["sha256"] and len(found) == 3
    assert {plan.name: plan.metric for plan in plans(names)}["iq_rte"] == "acc"
    assert plans(["iq_head_tail_en"])[0].published["FLM-101B"] == 52.0
    assert write_tasks(tmp_path / "tasks", IQOptions(), 3, ["en"], tmp_path / "rows") == names
    with pytest.raises(UserError, match="holds something else than these tasks"):
        write_tasks(tmp_path / "tasks", IQOptions(seed=1), 3)
    with pytest.raises(UserError, match="has none of boolq.jsonl"):
        write_tasks(tmp_path / "more", IQOptions(), 3, ["en"], tmp_path / "tasks")


def test_a_full_disk_leaves_no_part_of_the_tasks(tmp_path: Path) -> None:
    folder, before = tmp_path / "tasks", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
        with pytest.raises(UserError, match="a file-size limit was exceeded"):
            write_tasks(folder, IQOptions(), 3, ["en"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(folder.iterdir()) == []
    assert write_tasks(folder, IQOptions(), 3, ["en"])


def test_a_suite_with_too_few_items_says_so() -> None:
    one = Suite("one", lambda draw, options, language: Item("p", "a"), 2, 0)
    with pytest.raises(UserError, match="one: has no 2 different items"):
        list(generate(one, "en", IQOptions()))


@pytest.mark.parametrize("letters", ["a", "aab", "a b"])
def test_an_alphabet_has_each_letter_once(letters: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "iq-tasks", "--out", str(tmp_path / "tasks"), "--letters", letters]) == 2
    assert f"--letters: must be two characters or more, each once and none of them a space; found '{letters}'" in (
        capsys.readouterr().err
    )
