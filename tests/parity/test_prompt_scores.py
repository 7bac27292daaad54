"""Log-likelihoods of 500 prompts with shared contexts: both backends and a float64 run, whatever shares a step.

A golden model's random tokens are unlikely: sums of 12 reach -120, where float32 logits leave 3e-5 (measured).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.convert.source import open_model
from telechat_twins.core.backends import load
from telechat_twins.core.cli import main
from telechat_twins.core.eval.scorer import rolling_windows
from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.inference.requests import Request
from telechat_twins.core.model.batch import IGNORE, Batch
from telechat_twins.core.parity.bounds import NUDGED, nudged_weights
from tests.support.data_support import tiny_tokenizer
from tests.support.engine_support import finish
from tests.support.frameworks import BACKENDS, golden_source
from tests.support.harness_support import write_llama

LIMIT = 1e-5
CASE = "telechat2_gqa"
Row = tuple[tuple[int, ...], int]  # ids, and the place from which they are scored


def rows(vocab_size: int) -> list[Row]:
    """125 contexts with four continuations each of 1 to 12 tokens."""
    random = np.random.default_rng(5)
    found = []
    for _ in range(125):
        context = random.integers(0, vocab_size, random.integers(1, 40)).tolist()
        for _ in range(4):
            ids = context + random.integers(0, vocab_size, random.integers(1, 13)).tolist()
            found.append((tuple(ids), len(context)))
    return found


def likelihoods(engine: Engine, scored: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of log-probabilities, and whether every token is the likeliest, by row."""
    numbers = [
        engine.submit(Request(prompt_ids=ids, max_new_tokens=0, prompt_logprobs=1, scored_from=first))
        for ids, first in scored
    ]
    found = finish(engine)
    sums, greedy = [], []
    for number in numbers:
        (event,) = found[number]
        assert event.scores is not None
        sums.append(sum(choice.logprob for choice in event.scores.tokens))
        greedy.append(all(choice.top[0][0] == choice.token for choice in event.scores.tokens))
    return np.array(sums), np.array(greedy)


def judged(scored: list[Row], nudged: bool = False) -> np.ndarray:
    """The same sums by whole passes in float64; ``nudged``: of weights that are one float32 rounding away.

    Rows are padded on the right, within the trained length of 64, so that padding changes neither what a token sees nor
    its rotary scaling.
    """
    source = golden_source(f"{CASE}/weights.safetensors", f"{CASE}/config.json")
    weights = {name: source.tensor(name) for name in source.names()}
    weights = nudged_weights(weights, "fp32") if nudged else weights
    longest = max(len(ids) for ids, _ in scored)
    sums = []
    for start in range(0, len(scored), 100):
        part = scored[start : start + 100]
        rows = np.array([ids + (0,) * (longest - len(ids)) for ids, _ in part], np.int32)
        places = np.broadcast_to(np.arange(longest, dtype=np.int32), rows.shape)
        batch = Batch(rows, np.full_like(rows, IGNORE), places)
        logits = load("pt", "forward").run(source.config, weights.__getitem__, batch, "fp64", False)["logits"]
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for row, (ids, first) in zip(table, part, strict=True):
            sums.append(sum(row[place - 1, ids[place]] for place in range(first, len(ids))))
    return np.array(sums)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, in units of its limit: 1e-5, or 1e-6 of a log-likelihood below -10."""
    return float((np.abs(found - expected) / np.maximum(LIMIT, 1e-6 * np.abs(expected))).max())


def test_500_log_likelihoods_are_those_of_float64_in_both_backends() -> None:
    for framework in ("mindspore", "torch"):
        pytest.importorskip(framework)
    source = golden_source(f"{CASE}/weights.safetensors", f"{CASE}/config.json")
    scored = rows(source.config.vocab_size)
    expected = judged(scored)
    found = {}
    for backend in BACKENDS:
        runner = load(backend, "generate").Runner(source.config, source.tensor, 400)
        engine = Engine(runner, limits=EngineLimits(step_tokens=256, max_running=32))
        found[backend] = likelihoods(engine, scored)
        assert distance(found[backend][0], expected) < 1
        # Another order, in other company, without reuse, with few rows of logits in a step.
        order = np.random.default_rng(1).permutation(len(scored))[:100]
        other = Engine(runner, reuse=False, limits=EngineLimits(step_tokens=40, max_running=5))
        other.scheduler._rows = 3
        again = likelihoods(other, [scored[n] for n in order])
        assert distance(again[0], found[backend][0][order]) < 1
        assert (again[1] == found[backend][1][order]).all()
        exact = Engine(load(backend, "generate").Runner(source.config, source.tensor, 400, "fp64"))
        assert np.abs(likelihoods(exact, scored[:120])[0] - expected[:120]).max() < 1e-10  # 6e-14 of all 500, measured
    # Each rounds in its own way. Where this model magnifies rounding, they may be as far apart as parity's rule allows.
    magnified = NUDGED * np.abs(judged(scored, nudged=True) - expected)
    apart = np.abs(found["ms"][0] - found["pt"][0])
    assert (apart < np.maximum(np.maximum(LIMIT, 1e-6 * np.abs(expected)), magnified)).all()
    assert np.median(apart) < LIMIT / 2
    assert (found["ms"][1] == found["pt"][1]).all()
    # A score that is one place off is seen.
    shifted = likelihoods(engine, [(ids, first - 1) for ids, first in scored[:20] if first > 1])[0]
    assert np.abs(shifted - expected[:20][[first > 1 for _, first in scored[:20]]]).max() > 0.1


def test_tele_generate_prints_the_scores_of_a_prompt(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    pytest.importorskip("torch")
    golden_source(f"{CASE}/weights.safetensors", f"{CASE}/config.json", str(tmp_path))
    options = ["generate", "--backend", "pt", "--checkpoint", str(tmp_path), "--ignore-eos", "--json"]
    assert main([*options, "--ids", "5,6,7", "--max-new-tokens", "1", "--logprobs", "0"]) == 0
    made = json.loads(capsys.readouterr().out)
    ids = f"5,6,7,{made['ids'][0]}"
    assert main([*options, "--ids", ids, "--prompt-logprobs", "1", "--max-new-tokens", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ids"] == [] and found["prompt_logprobs"][0] is None
    # The token that was chosen is as likely in the prompt as it was then.
    assert found["prompt_logprobs"][3] == pytest.approx(made["logprobs"][0], abs=LIMIT)
    assert found["prompt_top_logprobs"][3] == {str(made["ids"][0]): found["prompt_logprobs"][3]}
    assert main([*options[:-1], "--ids", "5,6,7", "--prompt-logprobs", "1"]) == 2
    assert "--prompt-logprobs requires --json" in capsys.readouterr().err


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_per_byte_are_those_of_the_definition(backend: str, tmp_path: Path, capsys) -> None:
    """Of two domains, one with a text longer than the window, against a pass of PyTorch in float64 a window."""
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    folder = write_llama(tmp_path / "model", num_layers=1)
    texts = {"A": ["The quick brown fox. ", "中国电信的语言模型"], "B": ["word " * 150]}
    for name, some in texts.items():
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in some)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    domains = [f"--domain={name}={tmp_path / name}.jsonl" for name in texts]
    options = ["--checkpoint", str(folder), "--max-len", "64", "--out", str(tmp_path / "out.json")]
    assert main(["eval", "bpb", "--backend", backend, "--quiet", "--weights", "3:1", *options, *domains]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    source, tokenizer = open_model(str(folder)), tiny_tokenizer()
    expected = {}
    for name, some in texts.items():
        total = size = 0.0
        for text in some:
            size += len(text.encode())
            for window in rolling_windows(tokenizer.encode(text), source.config.bos_token_id, 64):
                ids = np.asarray([window.context + window.continuation], np.int32)
                places = np.arange(ids.shape[1], dtype=np.int32)[None]
                batch = Batch(ids, np.full_like(ids, IGNORE), places)
                logits = load("pt", "forward").run(source.config, source.tensor, batch, "fp64", False)["logits"][0]
                table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                first = len(window.context)
                total -= sum(table[place - 1, ids[0, place]] for place in range(first, ids.shape[1]))
        expected[name] = total / size / np.log(2)
        assert found["domains"][name]["bits_per_byte"] == pytest.approx(expected[name], rel=1e-6)
    assert found["weighted"] == pytest.approx((3 * expected["A"] + expected["B"]) / 4, rel=1e-6)
    assert f"weighted{found['weighted']:>20.4f}" in capsys.readouterr().out
    for more, message in (
        (["--weights", "f-prop"], "'A' has no weight; the weights are those of WebText"),
        (["--weights", "1:x"], "or 2 numbers above 0"),
        (["--domain", "A"], "expected NAME=FILES"),
    ):
        assert main(["eval", "bpb", "--backend", backend, *options, *domains, *more]) == 2
        assert message in capsys.readouterr().err


def test_bits_per_byte_of_files_as_people_have_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the reading of a file advises, --encoding and --ignore-key, is there to be followed."""
    pytest.importorskip("torch")
    folder = write_llama(tmp_path / "model", num_layers=1)
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": "中文\r\n fox"}).encode())
    (tmp_path / "b.csv").write_bytes('note,text\r\n1,"中文\r\n fox"\r\n'.encode("gb18030"))

    def bits(name: str, *more: str) -> int:
        domain = ["--domain", f"d={tmp_path / name}", "--quiet", *more]
        return main(["eval", "bpb", "--backend", "pt", "--checkpoint", str(folder), *domain])

    assert bits("a.jsonl") == 0
    plain = capsys.readouterr().out
    assert "12 bytes" in plain
    assert bits("b.csv") == 2 and "--encoding gb18030" in capsys.readouterr().err
    assert bits("b.csv", "--encoding", "gb18030") == 2 and "--ignore-key note" in capsys.readouterr().err
    assert bits("b.csv", "--encoding", "gb18030", "--ignore-key", "note") == 0
    assert capsys.readouterr().out == plain
