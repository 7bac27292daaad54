"""Preference rows and a teacher's propositions, from every spelling to the packed folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.cli import main
from telechat_twins.core.config import DataConfig, DataSourceConfig
from telechat_twins.core.data.blend import open_blend
from telechat_twins.core.data.chat_layout import BuiltInLayout, ChatLayout, TemplateLayout
from telechat_twins.core.data.kinds import preference as preference_module
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.kinds.preference import parse_preference
from telechat_twins.core.data.kinds.teacher import parse_propositions
from telechat_twins.core.data.packed import PackedDataset
from telechat_twins.core.data.packing.preference import pack_preference
from telechat_twins.core.data.packing.teacher import class_tokens, pack_teacher
from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject
from tests.support.data_support import tiny_tokenizer, tiny_tokenizer_path, write_rows
from tests.support.row_spellings import words
from tests.unit.data.test_data_commands import tele_data

PAIRS = 200
ASKED, GOOD, BAD = "q", "good", "bad"
USER, CHOSEN, REJECTED = (
    {"role": role, "content": text} for role, text in (("user", ASKED), ("assistant", GOOD), ("assistant", BAD))
)


# ---- pairs


def pair(draw: random.Random) -> tuple[list[JsonObject], str, str, JsonObject]:
    """(messages of the prompt, chosen, rejected, a row that says so in one of the spellings)."""
    turns = draw.choice((1, 1, 2))
    asked = [{"role": role, "content": words(draw)} for _ in range(turns) for role in ("user", "assistant")][:-1]
    chosen, rejected = words(draw), words(draw) + "."
    system = words(draw) if draw.random() < 0.4 else None
    shared = [{"role": "system", "content": system}, *asked] if system is not None else asked
    sides = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    names = draw.choice((("chosen", "rejected"), ("chosen_response", "rejected_response")))
    own = {"system": system} if system is not None else {}
    inside: JsonObject = dict(zip(names, ([*shared, *side] for side in sides), strict=True))
    spellings: list[JsonObject] = [
        inside,
        {"prompt": asked[-1]["content"], **inside},
        {"prompt": shared, **dict(zip(names, sides, strict=True))},
        {"messages": shared, **dict(zip(names, (side[0] for side in sides), strict=True))},
        {"messages": [*shared, *sides[0]], "rejected_response": rejected},
        {"conversations": json.dumps(asked), **own, "chosen": chosen, "rejected": rejected},
        {"input": {"messages": shared}, "preferred_output": sides[0], "non_preferred_output": sides[1]},
    ]
    if turns == 1:
        texts = dict(zip(names, (chosen, rejected), strict=True))
        spellings += [
            {draw.choice(("prompt", "question", "query", "instruction")): asked[0]["content"], **own, **texts}
        ]
    else:
        history = [[asked[0]["content"], asked[1]["content"]]]
        spellings += [
            {"query": asked[2]["content"], "history": history, **own, "response": chosen, "rejected": rejected}
        ]
    return shared, chosen, rejected, draw.choice(spellings)


OWN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<_bot>{{ m.content }}<_end>{% else %}"
    "<_user>{{ m.role }}: {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<_bot>{% endif %}"
)


def check_pairs(folder: Path, layout: ChatLayout | None = None) -> None:
    """Pack random pairs, and hold each side against what ``tele chat`` shows in ``layout``."""
    draw, tokenizer = random.Random(1), tiny_tokenizer()
    encode = (layout or BuiltInLayout(tokenizer)).encode
    made = [pair(draw) for _ in range(PAIRS)]
    source = write_rows(folder / "pairs.jsonl", [row for *_, row in made])
    meta = pack_preference([source], folder / "out", tokenizer, seq_len=2048, layout=layout, force=True, quiet=True)
    data = PackedDataset(folder / "out")
    assert meta["pairs"] == PAIRS and data.sequences is not None and data.mask is not None
    for n, (shared, chosen, rejected, row) in enumerate(made):
        prompt = encode(shared)
        for side, text in enumerate((chosen, rejected)):
            begin, end = (int(data.sequences[2 * n + side + k]) for k in (0, 1))
            answer = {"role": "assistant", "content": text}
            ids = encode([*shared, answer], add_generation_prompt=False)
            last = len(ids) - ids[::-1].index(2)
            assert data.tokens[begin:end].tolist() == ids, row
            assert np.flatnonzero(data.mask[begin:end]).tolist() == list(range(len(prompt), last)), row


@pytest.mark.parametrize("own", [False, True])
def test_pairs_are_trained_as_chat_shows_them(own: bool, tmp_path: Path) -> None:
    check_pairs(tmp_path, TemplateLayout(tiny_tokenizer(), OWN, "t") if own else None)


def test_pairs_of_models_that_reason_have_one_sequence_a_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def thinks(text: str) -> JsonObject:
        return {**CHOSEN, "content": text, "reasoning_content": "why"}

    earlier = [USER, thinks("first"), USER]
    rows = [{"prompt": earlier, "chosen": [thinks(GOOD)], "rejected": [thinks(BAD)]}]
    words = ["--tokenizer", tiny_tokenizer_path(), "--out", tmp_path / "out", "--preference", "--seq-len", 512]
    words += ["--chat-template", "thinking", "--reasoning", "think", "--quiet"]
    assert main(["data", str(write_rows(tmp_path / "one.jsonl", rows)), *map(str, words)]) == 0
    data = PackedDataset(tmp_path / "out")
    assert data.sequences is not None
    for side, text in enumerate((GOOD, BAD)):
        begin, end = (int(data.sequences[side + k]) for k in (0, 1))
        shown = tiny_tokenizer().decode(data.tokens[begin:end].tolist())
        assert shown.count("why") == 1 and text in shown.rpartition("why")[2]  # the earlier reasoning is left out
    # Two answers a side would be two sequences, of which only the sum of one is compared.
    call = [{**thinks(""), "tool_calls": [{"name": "f", "arguments": {}}]}, {"role": "tool", "content": "1"}]
    rows = [{"prompt": [USER], "chosen": [*call, thinks(GOOD)], "rejected": [*call, thinks(BAD)]}]
    assert main(["data", str(write_rows(tmp_path / "two.jsonl", rows)), *map(str, words), "--force"]) == 2
    assert "two.jsonl:1: 'chosen' has 2 answers, of which chats with this model show" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_as_context", lambda messages: messages),
        ("history_of", lambda *_: []),
        ("_side", lambda slots, slot, reading: [CHOSEN if slot == "rejected" else REJECTED]),
        ("system_of", lambda slots: None),
    ],
)
def test_a_planted_fault_of_pairs_is_found(
    name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preference_module, name, value)
    with pytest.raises((AssertionError, UserError)):
        check_pairs(tmp_path)


def test_transcripts_are_taken_apart() -> None:
    said = "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant: "
    for row in (
        {"chosen": said + "good", "rejected": said + "bad"},
        {"prompt": said, "chosen": "good", "rejected": "bad"},
    ):
        found = parse_preference(row, "rows:1", Reading())
        texts = [[(m["content"], m.get("weight", 1)) for m in side.messages] for side in (found.chosen, found.rejected)]
        assert texts == [[("a", 1), ("b", 0), ("q", 1), (answer, 1)] for answer in ("good", "bad")]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"chosen": GOOD, "rejected": BAD}, "no prompt; give it as prompt, question"),
        ({"chosen": [USER, CHOSEN], "rejected": [{**USER, "content": "p"}, REJECTED]}, "answer different prompts"),
        ({"prompt": "p", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}, "'prompt' is not the prompt that"),
        ({"prompt": ASKED, "chosen": [USER], "rejected": [USER]}, "'chosen' must end with the assistant's answer"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "note": "x"}, "key 'note' is not read"),
        ({"prompt": ASKED, "question": "p", "chosen": GOOD, "rejected": BAD}, "both hold the prompt"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": 3}, "'rejected' must be text, found int"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": GOOD}, "same"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": "bad " * 200}, "at most 400 fit"),
        ({"query": ASKED, "response": GOOD}, "a dialogue; pack dialogues with --sft"),
        ({"instruction": ASKED, "output": GOOD, "rejected": BAD}, "'output' is not read, and the row has no chosen"),
        ({"input": {"messages": [USER], "n": 1}, "chosen": GOOD, "rejected": BAD}, "key 'input.n' is not read"),
    ],
)
def test_pairs_that_are_none_are_refused(row: JsonObject, says: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": ASKED, "chosen": GOOD, "rejected": BAD}, row])
    with pytest.raises(UserError) as error:
        tele_data(source, "--out", tmp_path / "out", "--preference", "--seq-len", 400)
    assert "rows.jsonl:2: " in str(error.value) and says in str(error.value)


def test_long_rows_are_dropped_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": ASKED, "chosen": GOOD, "rejected": text, "id": 1} for text in (BAD, "bad " * 300)]
    words = [write_rows(tmp_path / "rows.jsonl", rows), "--out", tmp_path / "out", "--preference", "--seq-len", 400]
    assert tele_data(*words, "--drop-long") == 0
    shown = capsys.readouterr().out
    assert "1 pairs" in shown and "left out: 1 pairs longer than 400 tokens" in shown
    assert "pair 1, chosen" in shown and "\u27e6good<_end>\u27e7" in shown


# ---- propositions


def test_propositions_end_with_their_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[JsonObject] = [
        {"proposition": "Two and two is four.", "label": True, "source": "x"},
        {"statement": "\u5929\u662f\u7eff\u7684\u3002", "label": "\u9519"},
        {"question": "Which is a fox?", "choices": ["dog", "fox", "over"], "answer": 1},
        {"context": "lazy", "question": "q", "A": "x", "B": "y", "C": "", "answer": "B"},
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        {"ctx": "q", "endings": ["x", "y"], "label": "0"},
        {"question": "q", "options": {"A": "x", "B": "y"}, "answer": "y"},
    ]
    meant = [("Two and two is four.", 1), ("\u5929\u662f\u7eff\u7684\u3002", 0)]
    meant += [(f"Which is a fox?\n{choice}", choice == "fox") for choice in ("dog", "fox", "over")]
    meant += [("lazy\nq\nx", 0), ("lazy\nq\ny", 1), ("q\nx", 0), ("q\ny", 1), ("q\nx", 1), ("q\ny", 0)]
    meant += [("q\nx", 0), ("q\ny", 1)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    assert tele_data(source, "--out", tmp_path / "out", "--teacher", "--seq-len", 64, "--show", 2) == 0
    shown = capsys.readouterr().out
    assert (
        "13 propositions, 6 of them true" in shown and "true <_control8> = 16, false <_control9> = 17 (by de" in shown
    )
    assert "Two and two is four.\u27e6<_control8>\u27e7" in shown and "1 trained" in shown
    tokenizer, data = tiny_tokenizer(), PackedDataset(tmp_path / "out")
    assert data.mask is not None and data.meta["class_tokens"]["true"] == 16
    found = []
    for begin, end in zip(data.documents[:-1].tolist(), data.documents[1:].tolist(), strict=True):
        assert data.mask[begin:end].tolist() == [0] * (end - begin - 1) + [1]
        found.append(data.tokens[begin:end].tolist())
    assert found == [[*tokenizer.encode(text), 16 if true else 17] for text, true in meant]
    # In training: the class alone is a target, at the place of the last token of its own proposition.
    with pytest.raises(UserError, match="data.isolate_documents: must be true"):
        open_blend(DataConfig(seq_len=64, sources=[DataSourceConfig(path=str(tmp_path / "out"))]), 0, 600, 3)
    ids, targets, positions, numbers = data.sample(0, 64, 3, isolate=True)
    learnt = np.flatnonzero(targets >= 0)
    assert set(targets[learnt].tolist()) == {16, 17} and len(learnt) == len(set(numbers[learnt].tolist()))
    for place in learnt:
        begin = place - positions[place]
        assert ids[begin : place + 1].tolist() in [tokenizer.encode(text) for text, _ in meant]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a", "label": "maybe"}, "'label' must be true or false (also 1 or 0, yes or no), found 'maybe'"),
        ({"text": "", "label": 1}, "'text' is empty; a proposition needs a text"),
        ({"text": "a", "label": 1, "weight": 2}, "key 'weight' is not read"),
        ({"text": "a"}, "a text; pack texts without --sft"),
        ({"question": "q", "choices": ["x", "y"], "answer": 2}, "which names none of the choices; legal: 0 to 1, A, B"),
        ({"question": "q", "choices": ["x", "x"], "answer": "x"}, "which names several of the choices"),
        ({"question": "q", "choices": ["x"], "answer": 0}, "must hold two choices or more, found 1"),
        ({"question": "q", "choices": ["x", "y"], "A": "z", "answer": 0}, "'choices' and 'A' both hold choices"),
        ({"question": "q", "choices": ["x", 3], "answer": 0}, "'choices[1]' must be text, found int"),
        ({"statement": "fox " * 200, "label": 1}, "above --seq-len 64; it cannot be cut"),
    ],
)
def test_propositions_that_are_none_are_refused(row: JsonObject, says: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as error:
        tele_data(source, "--out", tmp_path / "out", "--teacher", "--seq-len", 64)
    assert "rows.jsonl:1: " in str(error.value) and says in str(error.value)


def test_class_tokens_are_pieces_by_name(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokens = class_tokens(tokenizer, "<_sep>", "<_observation>")
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "fox", "label": 1}, {"text": "fox " * 99, "label": 1}])
    meta = pack_teacher([source], tmp_path / "out", tokenizer, tokens, seq_len=64, drop_long=True, quiet=True)
    assert (meta["propositions"], meta["dropped_long"]) == (1, 1)
    assert PackedDataset(tmp_path / "out").tokens[-1] == 8
    for names, says in ((("<_sep>", "<_sep>"), "both are <_sep>"), (("\U0001f608", "<_sep>"), "is not one piece of")):
        with pytest.raises(UserError, match=says):
            class_tokens(tokenizer, *names)


def test_a_choice_has_one_true_proposition() -> None:
    draw = random.Random(0)
    for _ in range(200):
        choices = [f"{n} {words(draw)}" for n in range(draw.randint(2, 6))]
        right = draw.randrange(len(choices))
        answer = draw.choice((right, "ABCDEF"[right], choices[right]))
        row = {"question": "q", draw.choice(("choices", "options")): choices, "answer": answer}
        found = parse_propositions(row, "rows:1", Reading())
        assert [one.true for one in found] == [n == right for n in range(len(choices))]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--preference", "--teacher", "--seq-len", "9"], "--teacher: not with --preference"),
        (["--preference"], "--seq-len: missing; --preference packs"),
        (["--sft", "plain", "--seq-len", "9", "--drop-long"], "--drop-long: only with --preference, --teacher"),
        (["--true-token", "x"], "--true-token: only with --teacher"),
        (["--kind", "alpaca"], "--kind alpaca: such rows are packed with --sft"),
        (["--teacher", "--seq-len", "9", "--bos"], "--bos: only with texts, without --sft"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], says: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=says):
        tele_data(source, "--out", tmp_path / "out", *options)
