"""What is trained of a row of any kind is what ``tele chat`` shows; what is not read is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from telechat_twins.core.data import dialogues
from telechat_twins.core.data.chat_template import encode_chat
from telechat_twins.core.data.dialogues import parse_dialogue
from telechat_twins.core.data.kinds import messages as messages_module
from telechat_twins.core.data.kinds import transcripts
from telechat_twins.core.data.kinds.columns import NO_COLUMNS, Columns
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.kinds.table import KINDS, USES
from telechat_twins.core.data.packed import PackedDataset
from telechat_twins.core.data.prepare import pack_dialogues
from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject
from tests.support.data_support import tiny_tokenizer, write_rows
from tests.support.row_spellings import SPELLINGS, Conversation, words

END = 2
ROWS = 200


def expected(meant: Conversation) -> tuple[list[int], list[int]]:
    """(ids, targets) as ``tele chat`` would have them: an answer is what follows the generation prompt, to <_end>."""
    tokenizer, shown = tiny_tokenizer(), meant.shown
    ids = encode_chat(tokenizer, shown, meant.tools, add_generation_prompt=False)
    mask = [0] * len(ids)
    for n, message in enumerate(shown):
        if message["role"] == "assistant" and message.get("weight", 1):
            begin = len(encode_chat(tokenizer, shown[:n], meant.tools))
            end = len(encode_chat(tokenizer, shown[: n + 1], meant.tools, add_generation_prompt=False))
            while ids[end - 1] != END:  # the newline behind it
                end -= 1
            mask[begin:end] = [1] * (end - begin)
    return ids, mask


def renamed(made: list[tuple[Conversation, JsonObject]], kind: str) -> tuple[list[JsonObject], Columns]:
    """The rows with every key under a name of its own, and the columns that say so."""
    keys = sorted({key for _, row in made for key in row if key in KINDS[kind].keys - KINDS[kind].flags})
    own = {key: f"{key} {n}" for n, key in enumerate(keys)}
    return [{own.get(key, key): value for key, value in row.items()} for _, row in made], Columns(tuple(own.items()))


def reasoned(made: list[tuple[Conversation, JsonObject]], draw: random.Random) -> None:
    """Reasoning beside answers: in the last message, or in the row beside its answer."""
    for meant, row in made:
        last = meant.messages[-1]
        inside = (row[key][-1] for key in ("messages", "dialog", "completion") if isinstance(row.get(key), list))
        holder = next(inside, row)
        if last.get("tool_calls") or draw.random() < 0.3 or not isinstance(holder, dict):
            continue
        thought = words(draw).strip("\n") or "hm"
        names = ("reasoning_content", "reasoning") if holder is not row else ("reasoning_content", "think", "cot")
        holder[draw.choice(names)] = thought
        last["content"] = f"<think>\n{thought}\n</think>\n\n{last['content']}"


def check_kind(kind: str, folder: Path, seed: int = 0, form: str = "") -> None:
    """Pack ROWS random rows of a kind and hold each document against ``expected``; ``form``: of the row."""
    draw = random.Random(f"{kind} {seed}")
    made = [SPELLINGS[kind](draw) for _ in range(ROWS)]
    rows, columns, reasoning = [row for _, row in made], NO_COLUMNS, "refuse"
    if form == "renamed":
        rows, columns = renamed(made, kind)
    elif form == "reasoned":
        reasoned(made, draw)
        reasoning = "think"
    source = write_rows(folder / f"{kind}.jsonl", rows)
    reading = Reading(columns=columns, reasoning=reasoning)
    pack_dialogues([source], folder / "out", tiny_tokenizer(), seq_len=4096, reading=reading, force=True, quiet=True)
    assert reading.kinds == {kind: ROWS}
    data = PackedDataset(folder / "out")
    assert data.mask is not None and data.meta["documents"] == ROWS
    for n, (meant, row) in enumerate(made):
        begin, end = int(data.documents[n]), int(data.documents[n + 1])
        ids, mask = expected(meant)
        assert data.tokens[begin:end].tolist() == ids, row
        assert data.mask[begin:end].tolist() == mask, row


@pytest.mark.parametrize("kind", SPELLINGS)
def test_what_is_trained_is_what_chat_shows(kind: str, tmp_path: Path) -> None:
    check_kind(kind, tmp_path)


@pytest.mark.parametrize("kind", SPELLINGS)
def test_rows_under_names_of_their_own_are_trained_alike(kind: str, tmp_path: Path) -> None:
    check_kind(kind, tmp_path, seed=1, form="renamed")


@pytest.mark.parametrize("kind", ["messages", "dialog", "alpaca", "query", "completion"])
def test_reasoning_is_trained_in_front_of_its_answer(kind: str, tmp_path: Path) -> None:
    check_kind(kind, tmp_path, seed=2, form="reasoned")


def test_every_kind_of_dialogue_is_held() -> None:
    assert set(SPELLINGS) == {kind.name for kind in USES["dialogue"]}


def _nothing(*_: object) -> None:
    return None


FAULTS: dict[str, tuple[str, object, str, Any]] = {
    "system dropped": ("alpaca", dialogues, "system_of", _nothing),
    "history dropped": ("query", dialogues, "history_of", lambda *_: []),
    "input dropped": ("alpaca", dialogues, "instructed", lambda slots, *_: slots.value("instruction")),
    "tools dropped": ("sharegpt", dialogues, "tools_of", _nothing),
    "weight dropped": ("messages", messages_module, "_weight", lambda *_: True),
    "arguments dropped": ("messages", messages_module, "tool_arguments", lambda value: {}),
    "parts joined by a space": ("messages", messages_module, "_content", lambda value, *_: _spaced(value)),
    "calls lost": ("query", dialogues, "read_calls", lambda *_: [{"name": "f", "arguments": {}}]),
    "questions of lines kept as they stand": ("alpaca", dialogues, "asked_in_turns", _nothing),
    "results written otherwise": ("messages", messages_module, "json_text", repr),
    "spaces of turns kept": ("transcript", transcripts, "_said", lambda said, style, role: said),
    "answers of a prompt learnt": ("completion", dialogues, "ANSWERS", ()),
}


def _spaced(value: object) -> object:
    return " ".join(part["text"] for part in value) if isinstance(value, list) else value


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, module, name, value = FAULTS[fault]
    monkeypatch.setattr(module, name, value)
    with pytest.raises((AssertionError, UserError)):
        check_kind(kind, tmp_path)


# ---- roles, weights, parts, reasoning


ASKED, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def read(row: JsonObject, **options: Any) -> list[JsonObject]:
    return parse_dialogue(row, "rows:1", reading=Reading(**options)).messages


def test_names_of_roles_in_use() -> None:
    for name, role in messages_module.ROLES.items():
        if role in ("user", "assistant", "bot", "tool"):
            row = {"conversations": [{"from": "human", "value": "q"}, {"from": name, "value": "x"}]}
            assert read(row)[1] == {"role": role, "content": "x"}
    turns = {"conversation": [{"human": "q", "assistant": "a"}, {"human": "p", "assistant": "b"}]}
    assert [m["content"] for m in read(turns)] == ["q", "a", "p", "b"]
    legacy = [ASKED, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}]
    answered = read({"messages": [*legacy, {"role": "function", "name": "f", "content": "3"}, SAID]})
    assert answered[1]["tool_calls"] == [{"name": "f", "arguments": {"a": 1}}]
    assert answered[2] == {"role": "tool", "content": "3"}


def test_answers_under_the_names_of_other_kinds_and_tools_as_texts() -> None:
    for asked, said in (("instruction", "answer"), ("question", "output"), ("prompt", "answer"), ("prompt", "output")):
        assert [m["content"] for m in read({asked: "q", said: "a"})] == ["q", "a"]
    made = parse_dialogue({"messages": [ASKED, SAID], "tools": ['{"name": "f"}', {"name": "g"}]}, "rows:1")
    assert made.tools == [{"name": "f"}, {"name": "g"}]


def test_reasoning_is_refused_trained_or_left_out() -> None:
    row = {"messages": [ASKED, {**SAID, "reasoning_content": "\nhm\n"}]}
    with pytest.raises(UserError, match=r"rows:1: 'messages\[1\].reasoning_content' has no place .* --reasoning think"):
        read(row)
    assert read(row, reasoning="think")[1]["content"] == "<think>\nhm\n</think>\n\na"
    assert read(row, reasoning="leave-out")[1]["content"] == "a"
    assert read({"messages": [ASKED, {**SAID, "reasoning_content": ""}]})[1] == SAID


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [ASKED, {**SAID, "weight": 0.5}]}, "'messages[1].weight' must be 0 (context) or 1 (learnt)"),
        ({"messages": [ASKED, {**SAID, "weight": 1, "loss": False}]}, "weight and loss contradict each other"),
        ({"messages": [{**ASKED, "weight": 1}, SAID]}, "'messages[0].weight' is 1, but only messages of the assistant"),
        ({"messages": [{**ASKED, "content": [{"type": "image_url", "image_url": "u"}]}, SAID]}, "[0]' is 'image_url'"),
        ({"messages": [{**ASKED, "content": [{"type": ["text"], "text": "q"}]}, SAID]}, "[0]' is ['text']; only parts"),
        ({"messages": [{**ASKED, "content": [{"type": "text"}]}, SAID]}, "[0].text' must be text, found nothing"),
        ({"messages": [{**ASKED, "value": "p"}, SAID]}, "key 'messages[0].value' is not read"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f(1)"}]}, "as JSON"),
        (
            {"conversations": [{"from": "narrator", "value": "q"}]},
            "'conversations[0].from' is 'narrator'; legal: system",
        ),
        (
            {"query": "q", "response": "a", "system": "s", "history": [{"role": "system", "content": "t"}]},
            "'history[0]' is a second system message",
        ),
        ({"query": "q", "answers": [{"name": 'f"', "arguments": {}}]}, "name' is 'f\"', which no call can say"),
        ({"query": "q", "answers": [{"name": "", "arguments": {}}]}, "name' is '', which no call can say"),
        ({"conversations": ["q"]}, "'conversations' holds one text"),
        ({"conversations": "not json"}, "'conversations' is text but not a JSON list"),
        ({"messages": [ASKED, SAID, {"role": "developer", "content": "rhyme"}, ASKED, SAID]}, "system message behind"),
        ({"system": "s", "conversations": [{"from": "system", "value": "t"}]}, "'conversations[0]' is a second system"),
        ({"messages": [ASKED, SAID], "tools": ["f"]}, "'tools[0]' must be an object that describes a tool, found 'f'"),
        ({"query": "q", "response": ["a"]}, "'response' must be text, found list"),
        ({"prompt": "p", "completion": [ASKED, SAID], "suffix": "s"}, "key 'suffix' is not read"),
        ({"instruction": "a", "output": "b", "messages": [ASKED, SAID]}, "several kinds (messages, alpaca)"),
        ({"instruction": "a", "output": "b", "response": "c"}, "'output' and 'response' both hold the answer"),
    ],
)
def test_what_cannot_be_meant_is_refused(row: JsonObject, says: str) -> None:
    with pytest.raises(UserError) as error:
        read(row)
    assert str(error.value).startswith("rows:1: ") and says in str(error.value)


def test_the_way_out_of_an_ambiguous_row() -> None:
    row = {"instruction": "a", "output": "b", "messages": [ASKED, SAID]}
    assert read(row, kind="messages", ignore=frozenset({"instruction", "output"})) == [ASKED, SAID]
    assert read(row, ignore=frozenset({"messages"}))[1]["content"] == "b"
    assert (
        read({"instruction": "a", "output": "b", "response": "c"}, ignore=frozenset({"response"}))[1]["content"] == "b"
    )
    with pytest.raises(
        UserError, match=r"rows:1: not a row of kind sharegpt \(conversations/conversation/.*\); keys found"
    ):
        read(row, kind="sharegpt")


def test_answers_that_are_context_are_shown_and_not_learnt() -> None:
    reading = Reading()
    row = {"messages": [ASKED, {**SAID, "weight": 0}, ASKED, {**SAID, "train": True}], "id": 7, "source": "web"}
    parse_dialogue(row, "rows:1", reading=reading)
    assert (reading.context, reading.without_system, reading.left_out) == (1, 1, {"id", "source"})
    unlearnt = Reading()
    parse_dialogue({"messages": [ASKED, {**SAID, "loss": False}]}, "rows:1", reading=unlearnt)
    assert unlearnt.unanswered == 1


def test_the_table_names_no_key_twice_in_a_kind() -> None:
    for kind in KINDS.values():
        named = [key for keys in kind.slots.values() for key in keys]
        # An answer of a multiple choice may be called label; no other key fills two slots.
        assert len(named) == len(set(named)), (kind.name, json.dumps(named))
