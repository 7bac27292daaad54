"""Rejection sampling on a made-up model with several replies, and on given answers; scorers of both sorts."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.core import cli
from telechat_twins.core.data.chat_layout import BuiltInLayout
from telechat_twins.core.data.chat_template import render
from telechat_twins.core.data.dialogues import parse_dialogue
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.kinds.preference import parse_preference
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference import scorers
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.prompts import Prompt, answered_row, prompt_encoder, read_prompts, survey
from telechat_twins.core.inference.rejection import (
    Answer,
    Journal,
    Selection,
    draw,
    request_of,
    sample_prompts,
    summary,
)
from telechat_twins.core.inference.requests import Request, turn_stops
from telechat_twins.core.inference.sampling import sampling_config
from telechat_twins.core.inference.scorers import open_scorer
from tests.support.data_support import encode_dialogue
from tests.support.engine_support import Replier

ROWS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "old"}]},
    {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 2},
    {"instruction": "c", "input": "d", "output": "e"},
]
JUDGE = "def score(messages, answer, row):\n    messages.clear(), row.clear()\n    return len(answer)\n"
COMMAND = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    assert set(asked) == {"messages", "answer", "row"}
    print("seen", asked["answer"], file=sys.stderr)
    print(len(asked["answer"]), flush=True)
"""


class Voices(Replier):
    """Says one of several replies, each as likely as the others while they differ."""

    def __init__(self, *replies: str) -> None:
        super().__init__(lambda question: "")
        self.said = [[*self.tokenizer.encode(reply), self.tokenizer.control["<_end>"]] for reply in replies]

    def answer(self, prefix: list[int], lengths: np.ndarray) -> np.ndarray:
        made = prefix[len(prefix) - prefix[::-1].index(self.tokenizer.control["<_bot>"]) :]
        logits = np.full(self.config.vocab_size, -30.0, np.float32)
        logits[[said[len(made)] for said in self.said if said[: len(made)] == made]] = 9.0
        return logits


def notes() -> tuple[list[str], object]:
    found: list[str] = []
    return found, found.append


def prompts_of(tmp_path: Path, rows=ROWS) -> list[Prompt]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(read_prompts([file], Reading()))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Given:
    """Scores written down by answer; a failure for text, an exception for one."""

    identity: dict = {}

    def __init__(self, **scores) -> None:
        self.scores, self.asked = scores, []

    def score(self, prompt, answers):
        self.asked.append(prompt.where)
        return [self.scores[answer] for answer in answers]


def run(tmp_path, prompts, answers, scorer, **settings) -> tuple[Selection, Journal]:
    selection = Selection(tmp_path / "best.jsonl", tmp_path / "pairs.jsonl", **settings)
    journal = Journal(selection, {"samples": 2})
    sample_prompts(prompts, len(prompts), lambda index, prompt: answers[index], scorer, selection, journal)
    return selection, journal


def test_rows_of_every_kind_and_lines_give_prompts(tmp_path):
    made = prompts_of(tmp_path)
    assert [[(m["role"], m["content"]) for m in one.messages] for one in made] == [
        [("user", "a")],
        [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "a")],
        [("user", "c\nd")],
    ]
    assert [one.row for one in made] == ROWS and made[1].where.endswith("rows.jsonl:2")
    (tmp_path / "plain.txt").write_text("one\n\ntwo \n", encoding="utf-8")
    plain = list(read_prompts([tmp_path / "plain.txt"], Reading()))
    assert [(one.where.rpartition(":")[2], one.messages[0]["content"]) for one in plain] == [
        ("1", "one"),
        ("3", "two "),
    ]
    with pytest.raises(UserError, match=r"rows.jsonl:1: must have a user's message"):
        prompts_of(tmp_path, [{"messages": [{"role": "assistant", "content": "x"}]}])
    with pytest.raises(UserError, match="found none"):
        survey(iter(()), lambda prompt: [])


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"prompt": "a"}, "a"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": ""}, "a"),
        ({"question": "a", "id": 7}, "a"),
        ({"instruction": "a", "input": "b", "output": ""}, "a\nb"),
        ({"query": "a", "system": "s"}, "a"),
    ],
)
def test_a_row_without_an_answer_is_a_prompt(tmp_path, row, asked):
    (one,) = prompts_of(tmp_path, [row])
    assert one.messages[-1] == {"role": "user", "content": asked} and one.row == row
    assert len(one.messages) == 1 + ("system" in row)


def test_a_row_without_an_answer_in_two_kinds_is_read_as_the_one_that_is_named(tmp_path):
    row = {"prompt": "a", "question": "b"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    reading = Reading(ignore=frozenset({"prompt"}), kind="query")
    (one,) = read_prompts([tmp_path / "rows.jsonl"], reading)
    assert one.messages == [{"role": "user", "content": "b"}]


@pytest.mark.parametrize("row", [{"prompt": ""}, {"prompt": "a", "question": "b"}, {"prompt": "a", "premise": "x"}, {}])
def test_a_row_without_an_answer_loses_nothing(tmp_path, row):
    with pytest.raises(UserError, match="rows.jsonl:1"):
        prompts_of(tmp_path, [row])


def test_answers_with_tool_calls_become_rows_again(tmp_path):
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "old"}]
    offered, tagged = prompts_of(
        tmp_path,
        [
            {"messages": turn, "tools": [{"type": "function", "function": {"name": "f"}}]},
            {"system": "s\n", "dialog": [{**turn[0]}, {"role": "bot", "content": call}], "tool": True},
        ],
    )
    assert offered.calls_tools and tagged.calls_tools and tagged.messages[0]["content"] == "s"
    scorer = Given(**{f"so {call}": 1.0, "no": 0.0})
    answers = [[Answer(f"so {call}"), Answer("no")]] * 2
    selection, journal = run(tmp_path, [offered, tagged], answers, scorer)
    first, second = (parse_dialogue(row, "row", reading=Reading()) for row in lines(selection.out))
    assert first.messages[-1]["tool_calls"] == [{"name": "f", "arguments": {"x": 1}}] and first.tools == offered.tools
    assert second.messages[-1]["content"] == f"so {call}" and second.tags
    (pair,) = (parse_preference(row, "pair", Reading()) for row in lines(selection.pairs))
    assert pair.chosen.messages[-1]["tool_calls"] and pair.rejected.messages[-1]["content"] == "no"
    assert summary(selection, journal.records, 0)[-1] == (
        "without a pair: 1 with tool tags in their texts, which preference rows cannot hold"
    )


@pytest.mark.parametrize("kind", ["python", "command"])
def test_the_best_and_the_worst_of_a_shared_batch(tmp_path, kind):
    """From the engine to rows that `tele data` reads, with both kinds of scorer."""
    runner = Voices("a", "model answers", "model")
    engine, prompts = Engine(runner, runner.tokenizer), prompts_of(tmp_path)
    encode = prompt_encoder(BuiltInLayout(runner.tokenizer), None)
    ends = turn_stops(runner.tokenizer, runner.config)
    template = Request(
        prompt_ids=(1,), max_new_tokens=20, samples=12, stop_ids=ends, sampling=sampling_config(temperature=1.0)
    )
    (tmp_path / "judge.py").write_text(JUDGE if kind == "python" else COMMAND, encoding="utf-8")
    spec = f"python:{tmp_path}/judge.py:score" if kind == "python" else f"command:{sys.executable} {tmp_path}/judge.py"
    selection = Selection(tmp_path / "best.jsonl", tmp_path / "pairs.jsonl")
    told, note = notes()
    journal = Journal(selection, {})
    with open_scorer(spec, note) as scorer:
        sample_prompts(
            prompts,
            3,
            lambda index, prompt: draw(engine, request_of(template, prompt, index, encode(prompt))),
            scorer,
            selection,
            journal,
        )
    computed = sum(size for step in runner.sizes for size in step if size > 1)
    assert computed < 2 * sum(len(encode(prompt)) for prompt in prompts)  # not twelve times
    assert (len(told) == 36 and told[0].startswith(f"scorer, {prompts[0].where}: seen")) == (kind == "command")
    best, pairs = lines(selection.out), lines(selection.pairs)
    for row, pair, prompt in zip(best, pairs, prompts, strict=True):
        learnt, judged = parse_dialogue(row, "row", reading=Reading()), parse_preference(pair, "pair", Reading())
        assert learnt.messages[-1]["content"] == "model answers" and row["score"] == 13
        assert [judged.chosen.messages[-1]["content"], judged.rejected.messages[-1]["content"]] == [
            "model answers",
            "a",
        ]
        ids, mask = encode_dialogue(runner.tokenizer, learnt)
        assert ids[: len(encode(prompt))] == encode(prompt)  # the answer follows what it was drawn after
        assert not any(mask[: len(encode(prompt))]) and sum(mask) == len(runner.tokenizer.encode("model answers")) + 1
        assert encode_dialogue(runner.tokenizer, judged.chosen) == (ids, mask)


def test_ties_failures_and_low_scores_are_counted(tmp_path, capsys):
    prompts = prompts_of(tmp_path, ROWS[:1] * 6)
    scorer = Given(a=1.0, b=3.0, c=3.0, low=0.5, bad="ValueError: x", nan=math.nan, inf=math.inf)
    drawn = [
        ["a", "b", "c"],
        ["b", "b", "bad"],
        ["low", "nan", "inf"],
        ["bad", "bad", "bad"],
        ["b", "a", "cut"],
        ["cut"],
    ]
    answers = [[Answer(text, text == "cut") for text in texts] for texts in drawn]
    selection, journal = run(tmp_path, prompts, answers, scorer, min_score=1.0)
    assert [row["messages"][-1]["content"] for row in lines(selection.out)] == ["b", "b", "b"]
    assert [row["index"] for row in lines(selection.out)] == [0, 1, 4]
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in lines(selection.pairs)] == [
        ("b", "a"),
        ("b", "a"),
    ]
    told = "\n".join(summary(selection, journal.records, 0))
    for text in (
        "3 rows kept and 3 dropped of 6 prompts with 16 answers",
        "mean of best 2.375, mean of all 2.1875, 8 scored",
        "1 prompts whose best score is below --min-score 1",
        "2 prompts without any scored answer",
        "4 answers at which the scorer failed",
        "2 answers whose score is not a finite number",
        "2 answers reached --max-new-tokens",
        "ties: 1 prompts",
        "pairs.jsonl: 2 pairs",
        "without a pair: 3 of dropped prompts",
        "without a pair: 1 with equal scores only",
    ):
        assert text in told
    assert capsys.readouterr().err.count("note: no score at") == 4
    (tmp_path / "anew").mkdir()
    with pytest.raises(UserError, match="failed for every answer at .*: ValueError: x"):
        run(tmp_path / "anew", prompts, answers[3:4], scorer)


def test_a_run_that_was_cut_off_resumes_without_a_trace(tmp_path):
    prompts = prompts_of(tmp_path)
    answers = [[Answer(f"{n}"), Answer(f"{n}!")] for n in range(3)]
    scores = {f"{n}{end}": float(len(end)) for n in range(3) for end in ("", "!")}
    selection, journal = run(tmp_path, prompts, answers, Given(**scores))
    files = [selection.out, selection.pairs, journal.path]
    whole = [file.read_bytes() for file in files]
    # Killed after the rows of the second prompt were written, in the middle of its record.
    head, first, second, _ = whole[2].splitlines(keepends=True)
    files[2].write_bytes(head + first + second[:9])
    scorer = Given(**scores)
    _, journal = run(tmp_path, prompts, answers, scorer)
    assert scorer.asked == [prompt.where for prompt in prompts[1:]]
    assert [file.read_bytes() for file in files] == whole
    assert "(1 prompts done before)" in summary(selection, journal.records, 1)[0]
    with pytest.raises(UserError, match=r"other options \(samples\)"):
        Journal(selection, {"samples": 3})
    files[0].write_bytes(b"")
    with pytest.raises(UserError, match="has 0 bytes"):
        Journal(selection, {"samples": 2})
    files[2].write_bytes(b"{}\n")
    with pytest.raises(UserError, match="damaged"):
        Journal(selection, {"samples": 2})
    files[2].unlink()
    with pytest.raises(UserError, match=r"pairs.jsonl: exists, and there is no best.jsonl.journal"):
        Journal(selection, {"samples": 2})


@pytest.mark.parametrize("room", [0, 30, 140])
def test_on_a_full_disk_the_files_end_with_the_prompt_before(tmp_path, room):
    prompts, answers = prompts_of(tmp_path), [[Answer(f"{n}"), Answer(f"{n}!")] for n in range(3)]
    scores = {f"{n}{end}": float(len(end)) for n in range(3) for end in ("", "!")}
    selection, journal = run(tmp_path, prompts, answers, Given(**scores))
    files = [selection.out, selection.pairs, journal.path]
    whole = [file.read_bytes() for file in files]
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    files[2].write_bytes(b"".join(whole[2].splitlines(keepends=True)[:2]))  # as it was after the first prompt
    ends = [len(whole[n].splitlines(keepends=True)[0]) for n in (0, 1)]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(ends) + room, former[1]))
        with pytest.raises(UserError, match=r"cannot be written \(File too large\); free some space"):
            run(tmp_path, prompts, answers, Given(**scores))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert [files[n].read_bytes() for n in (0, 1)] == [whole[n][: ends[n]] for n in (0, 1)]
    run(tmp_path, prompts, answers, Given(**scores))
    assert [file.read_bytes() for file in files] == whole


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("sys.stdin.readline(); print('x', flush=True); sys.stdin.read()", "wrote 'x', not a number"),
        ("sys.stdin.readline(); sys.exit('no model')", "ended with exit code 1 at .*rows.jsonl:1; .*: no model"),
        ("sys.stdin.readline(); print('1\\n2\\n3', flush=True); sys.stdin.read()", "wrote 2 more"),
        # Lines before the first question: read before it is asked, or taken for its answer with two left over.
        ("print('1\\n2\\n3', flush=True); sys.stdin.read()", r"found '1\\n' before|wrote 2 more"),
    ],
)
def test_a_command_that_breaks_the_protocol(tmp_path, code, message):
    (tmp_path / "judge.py").write_text(f"import sys\n{code}\n", encoding="utf-8")
    prompts = prompts_of(tmp_path)
    with (
        pytest.raises(UserError, match=message),
        open_scorer(f"command:{sys.executable} {tmp_path}/judge.py", print) as one,
    ):
        run(tmp_path, prompts[:1], [[Answer("a")]], one)


def test_a_slow_command_is_noted_and_one_that_stays_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(scorers, "WAIT_NOTE_S", 0.05)
    monkeypatch.setattr(scorers, "EXIT_GRACE_S", 0.2)
    code = "import time\ninput()\ntime.sleep(0.3)\nprint(2, flush=True)\ntime.sleep(60)\n"
    (tmp_path / "judge.py").write_text(code, encoding="utf-8")
    told, note = notes()
    with open_scorer(f"command:{sys.executable} {tmp_path}/judge.py", note) as scorer:
        assert scorer.score(prompts_of(tmp_path)[0], ["a"]) == [2.0]
    assert "must flush every line" in told[0] and "did not end with its input" in told[-1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("judge.py", "must be python:FILE.py:function or 'command:CMD"),
        ("python:judge.py", "name file and function"),
        ("python:/nowhere/judge.py:score", "cannot be read"),
        ("python:{folder}/judge.py:other", "must define a function other"),
        ("python:{folder}/broken.py:score", r"cannot be imported \(ZeroDivisionError.*broken.py:1\)"),
        ("command:", "must name a program"),
        ("command:'", "close its quotes"),
        ("command:/nowhere/judge", "cannot be started"),
    ],
)
def test_scorers_that_cannot_be_opened(tmp_path, spec, message):
    (tmp_path / "judge.py").write_text("score = len\n", encoding="utf-8")
    (tmp_path / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    with pytest.raises(UserError, match=message), open_scorer(spec.format(folder=tmp_path), print):
        pass


def test_what_a_function_raises_or_returns_is_one_failure(tmp_path):
    code = "def score(messages, answer, row):\n    return {'a': 1, 'b': 'high', 'c': None}[answer]\n"
    (tmp_path / "judge.py").write_text(code, encoding="utf-8")
    with open_scorer(f"python:{tmp_path}/judge.py:score", print) as scorer:
        one, text, none, raised = scorer.score(prompts_of(tmp_path)[0], ["a", "b", "c", "d"])
    assert one == 1.0 and text == "returned 'high', not a number"
    assert isinstance(none, str) and none.startswith("TypeError") and "KeyError: 'd' at" in str(raised)


REJECT = ["--prompts", "rows.jsonl", "--score", "python:judge.py:score", "--out", "best.jsonl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a", "--min-score", "0"], "--min-score: belongs to rejection sampling"),
        (REJECT[:4], "--out: missing"),
        ([*REJECT[:2], *REJECT[4:]], "--score: missing"),
        ([*REJECT, "--json"], "--json: cannot be combined with --prompts"),
        ([*REJECT, "--layout", "tp2"], "--layout: cannot be combined with --prompts"),
        ([*REJECT, "--preference-out", "pairs.jsonl"], "needs two answers or more, found --samples 1"),
        ([*REJECT, "--samples", "2", "--greedy"], "--samples: several need --temperature"),
        ([*REJECT, "--samples", "2", "--temperature", "1", "--preference-out", "./best.jsonl"], "not be the file of"),
        ([*REJECT, "--min-score", "nan"], "--min-score: nan is out of range"),
    ],
)
def test_options_that_do_not_go_together(capsys, words, message):
    assert cli.main(["generate", "--backend", "pt", "--checkpoint", "nowhere", *words]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("said", ["a", 'Look.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'])
def test_an_answer_with_reasoning_is_trained_as_it_was_said(tmp_path, said, thinks):
    """A call that is only thought of is none; the row gives the prompt's ids and then the answer's."""
    thought = 'hm, <tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    tool = {"type": "function", "function": {"name": "f"}}
    (prompt,) = prompts_of(tmp_path, [{"messages": [{"role": "user", "content": "q"}], "tools": [tool]}])
    prompt = dataclasses.replace(prompt, thinks=thinks)
    answer = ("" if thinks else "<think>\n") + f"{thought}\n</think>\n\n{said}"
    row = answered_row(prompt, answer)
    assert row["messages"][-1]["reasoning_content"] == thought
    kept = parse_dialogue(row, "r:1", reading=Reading(reasoning="think"))
    asked = render(prompt.messages, prompt.tools, thinking=thinks)
    assert render(kept.messages, kept.tools, add_generation_prompt=False) == asked + answer + "<_end>\n"


def test_words_with_the_marks_elsewhere_are_no_reasoning(tmp_path):
    (prompt,) = prompts_of(tmp_path, [{"messages": [{"role": "user", "content": "q"}]}])
    for text in ("a <think>\nb\n</think>\n\nc", "<think>b</think>c", "<think>\nb"):
        assert answered_row(prompt, text)["messages"][-1] == {"role": "assistant", "content": text}
