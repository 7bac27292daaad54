"""`tele eval teacher` in both backends against P(true) by its definition, in numpy and float64.

Bound on the odds: float32 logits of this model lie within 1e-5 of float64's; the planted faults move them by 0.1 or
more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.convert.adapter import open_any_adapter
from telechat_twins.convert.source import open_model
from telechat_twins.core import cli
from telechat_twins.core.commands.eval import teacher as command
from telechat_twins.core.data.packing.teacher import ClassTokens
from telechat_twins.core.inference import teacher
from telechat_twins.core.types import JsonObject
from tests.house import ROOT
from tests.support.adapters import deltas
from tests.support.data_support import tiny_tokenizer
from tests.support.docs_workspace import add_release
from tests.support.numpy_decoder import logits

BOUND, FAULT = 2e-5, 0.1
TEXTS = [
    "Copper conducts electricity.",
    "\u9cb8\u9c7c\u662f\u4e00\u79cd\u9c7c\u3002",
    *(
        f"\u4e00\u5e74\u4e2d\u767d\u5929\u6700\u957f\u7684\u662f\u54ea\u4e00\u5929\uff1f\n{choice}"
        for choice in ("\u6625\u5206", "\u590f\u81f3", "\u79cb\u5206", "\u51ac\u81f3")
    ),
    *(f"Which of these is a prime number?\n{choice}" for choice in ("21", "29", "33")),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    add_release(folder)
    return folder


@pytest.fixture(scope="module")
def expected(place: Path) -> Callable[[bool], np.ndarray]:
    """P(true) of TEXTS by definition, without or with the adapter, whose B A is added to the weights in float64."""
    source = open_model(place / "TeleChat2-7B")
    added = deltas(open_any_adapter(str(place / "law-peft"), source))

    def weights(name: str) -> np.ndarray:
        return source.tensor(name).astype(np.float64) + added.get(name, 0.0)

    def p_true(adapter: bool) -> np.ndarray:
        found = []
        for text in TEXTS:
            ids = np.array([tiny_tokenizer().encode(text)])
            last = logits(source.config, weights if adapter else source.tensor, ids)[0, -1]
            true, false = np.exp(last[[16, 17]])  # <_control8>, <_control9>
            found.append(true / (true + false))
        return np.array(found)

    return p_true


def evaluate(place: Path, backend: str, *options: str) -> JsonObject:
    """The results of examples/teacher.jsonl."""
    out = place / "results" / f"{backend}.json"
    words = ["eval", "teacher", "--backend", backend, "--checkpoint", str(place / "TeleChat2-7B"), "--out", str(out)]
    assert cli.main([*words, str(ROOT / "examples" / "teacher.jsonl"), "--quiet", *options]) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def log_odds(p_true: np.ndarray) -> np.ndarray:
    return np.log(p_true) - np.log1p(-p_true)


def distance(results: JsonObject, expected: np.ndarray) -> float:
    found = np.concatenate([np.atleast_1d(row["p_true"]) for row in results["rows"]])
    return float(np.abs(log_odds(found) - log_odds(expected)).max())


@pytest.mark.parametrize("backend", ["pt", "ms"])
def test_p_true_is_its_definition(
    backend: str, place: Path, expected: Callable[[bool], np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    for adapter in (False, True):
        words = ["--adapter", str(place / "law-peft")] if adapter else []
        results, meant = evaluate(place, backend, *words), expected(adapter)
        assert distance(results, meant) < BOUND < FAULT < distance(results, expected(not adapter))
        single, choices, every = results["propositions"], results["choices"], results["all"]
        assert single["accuracy"] == np.mean([meant[0] > 0.5, meant[1] <= 0.5])
        right = [np.argmax(meant[2:6]) == 1, np.argmax(meant[6:]) == 1]
        assert choices["accuracy"] == np.mean(right) and [row["right"] for row in results["rows"][2:]] == right
        true = np.array([1, 0, 0, 1, 0, 0, 0, 1, 0], bool)
        assert every["log_loss"] == pytest.approx(-np.log(np.where(true, meant, 1 - meant)).mean(), abs=1e-5)
        assert (single["rows"], choices["rows"], every["rows"]) == (2, 2, 9)
    assert "class tokens: true <_control8> = 16, false <_control9> = 17" in capsys.readouterr().out
    assert results["class_tokens"] == {"true": 16, "false": 17, "pieces": ["<_control8>", "<_control9>"]}


def test_planted_faults_are_seen(
    place: Path, expected: Callable[[bool], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    meant, right = expected(False), teacher._step
    with monkeypatch.context() as fault:
        fault.setattr(command, "class_tokens", lambda *_: ClassTokens(17, 16, "<_control9>", "<_control8>"))
        assert distance(evaluate(place, "pt"), meant) > FAULT
    with monkeypatch.context() as fault:  # logits before the last token of each text

        def early(*args):  # type: ignore[no-untyped-def]
            step = right(*args)
            return replace(step, wanted=step.wanted - 1)

        fault.setattr(teacher, "_step", early)
        assert distance(evaluate(place, "pt"), meant) > FAULT


def test_a_piece_or_a_row_that_is_not_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    words = ["eval", "teacher", "--backend", "pt", "--checkpoint", str(place / "TeleChat2-7B")]
    examples = str(ROOT / "examples" / "teacher.jsonl")
    assert cli.main([*words, examples, "--true-token", "<yes>"]) == 2
    assert "--true-token: <yes> is not one piece of" in capsys.readouterr().err
    assert cli.main([*words, str(ROOT / "examples" / "preference.jsonl")]) == 2
    assert "preference" in capsys.readouterr().err
    assert cli.main([*words, examples, "--kind", "choice"]) == 2
    assert cli.main(["eval"]) == 2 and cli.main(["eval", "teecher"]) == 2
