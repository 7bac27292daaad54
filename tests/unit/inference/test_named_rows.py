"""Rows under names of their own, in every command that reads rows: the same result as the rows with usual names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from telechat_twins.core import cli
from tests.support.data_support import write_rows
from tests.support.docs_workspace import add_release

JUDGE = "def score(messages, answer, row):\n    return float(len(messages))\n"
NAMED = ["--column", "messages=talk", "--column", "role=who", "--column", "content=what", "--role", "kunde=user"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    add_release(folder)
    (folder / "judge.py").write_text(JUDGE)
    return folder


def run(place: Path, *words: object) -> int:
    return cli.main([str(word) for word in (*words[:2], "--backend", "pt", "--checkpoint", place / "run", *words[2:])])


def sampled(place: Path, rows: Path, out: Path, *words: object) -> object:
    assert (
        cli.main(
            [
                *("generate", "--backend", "pt", "--checkpoint", str(place / "run"), "--prompts", str(rows)),
                *("--score", f"python:{place / 'judge.py'}:score", "--out", str(out), "--max-new-tokens", "3"),
                *("--keep-cut", *map(str, words)),
            ]
        )
        == 0
    )
    return [{k: v for k, v in json.loads(line).items() if k != "source"} for line in out.read_text().splitlines()]


def test_prompts_of_rejection_sampling(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = [{"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "x"}]}]
    own = [{"talk": [{"who": "kunde", "what": "why"}, {"who": "assistant", "what": "x"}]}]
    wanted = sampled(place, write_rows(tmp_path / "usual.jsonl", usual), tmp_path / "a.jsonl")
    rows = write_rows(tmp_path / "own.jsonl", own)
    assert sampled(place, rows, tmp_path / "b.jsonl", *NAMED, "--column", "system=S") == wanted
    assert "note: no row has the key S of --column system=S\n" in (shown := capsys.readouterr().err)
    assert shown.count("no row has the key") == 1
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "kunde", "assistant_tag": "assistant"}
    entry = {"file_name": "own.jsonl", "formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": tags}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    assert sampled(place, rows, tmp_path / "c.jsonl", "--dataset-info", tmp_path / "dataset_info.json") == wanted


def test_propositions(place: Path, tmp_path: Path) -> None:
    usual = [{"statement": "snow is white", "label": 1}, {"statement": "snow is black", "label": 0}]
    own = [{"Aussage": row["statement"], "wahr": row["label"]} for row in usual]
    reports = []
    for name, rows, words in (("usual", usual, []), ("own", own, ["text=Aussage", "label=wahr"])):
        options = [word for one in words for word in ("--column", one)]
        source, out = write_rows(tmp_path / f"{name}.jsonl", rows), tmp_path / f"{name}.json"
        assert run(place, "eval", "teacher", source, "--out", out, "--quiet", *options) == 0
        reports.append([row["p_true"] for row in json.loads(out.read_text())["rows"]])
    assert reports[0] == reports[1]


def test_columns_belong_to_rows(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--backend", "pt", "--checkpoint", "nowhere", "--prompt", "a"]
    for given in (["--column", "question=Q"], ["--role", "a=user"], ["--dataset-info", "x.json"]):
        assert cli.main([*words, *given]) == 2
        assert f"{given[0]}: belongs to rejection sampling" in capsys.readouterr().err


def test_a_tokenizer_that_begins_texts_is_said_where_they_begin_otherwise(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Releases of Llama's form have add_bos_token, which transformers honours; here an option does."""
    shutil.copytree(place / "TeleChat2-7B", tmp_path / "m")
    path = tmp_path / "m" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True}))
    generate = ["generate", "--backend", "pt", "--checkpoint", str(tmp_path / "m"), "--prompt", "a"]
    text = write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    pack = ["data", str(text), "--tokenizer", str(tmp_path / "m"), "--quiet", "--force", "--out", str(tmp_path / "o")]
    for words, option in (([*generate, "--max-new-tokens", "1"], "--add-bos"), (pack, "--bos")):
        said = []
        for more in ([], [option]):
            assert cli.main([*words, *more]) == 0
            said.append(f"note: {path}: {option} does what add_bos_token says" in capsys.readouterr().err)
        assert said == [True, False]
