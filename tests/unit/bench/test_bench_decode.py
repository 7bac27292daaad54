"""The arithmetic and the words of ``tele bench decode``, with made-up workers; and what a timed step is."""

from __future__ import annotations

import argparse
import json

import pytest

from telechat_twins.core.bench import decode as bench_decode
from telechat_twins.core.bench.decode import HF, least_bytes
from telechat_twins.core.bench.worker import LLAMA_CPP
from telechat_twins.core.commands import bench
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.model.config import load_model_config
from telechat_twins.kernels.bench.decode import Timed, timed_steps
from tests.support.engine_support import PlainRunner

HF_LIBRARY = "transformers"


class Contestants:
    """Stand for the worker processes: a step takes longer with more sequences, and from round to round."""

    seconds = {"ms": 0.010, "pt": 0.020, HF: 0.030, LLAMA_CPP: 0.008}
    modules = {HF: "hf", LLAMA_CPP: "llama_cpp"}
    turns: list[tuple[str, int, int]] = []

    def __init__(self, name, options, module):
        assert module == f"telechat_twins.kernels.bench.{self.modules.get(name, 'decode')}"
        assert options["rows"] == 8
        self.name, self.implementation = name, {"backend": f"{name} 1.0"}
        self.done = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, order):
        self.turns.append((self.name, order["rows"], order["steps"]))
        self.done += 1
        step = self.seconds[self.name] * (2 if order["rows"] == 8 else 1) * (1 + self.done // 2 / 10)
        found = {"seconds": [step] * order["steps"], "prompt": [step * 4], "read": 1e10 if self.name == "pt" else 5e9}
        return found if self.name in self.modules else {**found, "engine": [step / 50] * order["steps"]}


def arguments(*argv):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(["decode", *argv])


@pytest.fixture
def workers(monkeypatch):
    monkeypatch.setattr(bench_decode, "Worker", Contestants)
    monkeypatch.setattr(Contestants, "turns", [])
    return Contestants.turns


@pytest.mark.parametrize("installed", [True, False])
def test_contestants_take_turns_and_ratios_are_of_tokens_a_second(workers, installed, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_decode.importlib.util, "find_spec", lambda name: object() if installed else None)
    out = tmp_path / "decode.json"
    options = ("--steps", "4", "--block", "2", "--prompt", "3", "--model", "telechat2-mini", "--out", str(out))
    assert bench.run(arguments(*options)) == 0
    names = ["ms", "pt", *([HF] if installed else [])]
    once = [(name, rows, 2) for name in names for rows in (1, 8)]
    back = [(name, rows, 2) for name in reversed(names) for rows in (1, 8)]
    assert workers == back + once + back  # a warm-up, and two rounds
    shown = capsys.readouterr().out
    result = json.loads(out.read_text())
    rows = {(row["contestant"], row["rows"]): row for row in result["rows"]}
    assert result["prompt"] == 3 and len(rows) == 2 * len(names)
    assert rows["ms", 8]["ratios"]["one"]["median"] == pytest.approx(8 / 2, rel=0.1)
    assert rows["ms", 1]["engine_share"] == pytest.approx(0.02)
    # The limit is the machine's: the bandwidth of whoever reads fastest.
    assert rows["ms", 1]["share"] == pytest.approx(rows["ms", 1]["bytes"] / 1e10 / rows["ms", 1]["median"])
    if installed:
        assert rows["ms", 1]["ratios"]["hf"]["median"] == pytest.approx(3.0)
        assert "| Hugging Face generate | 8 |" in shown and "3.00 (3.00 to 3.00)" in shown
        assert rows["ms", 1]["ratios"]["prompt hf"]["median"] == pytest.approx(1 / 3)
        assert rows["ms", 1]["prompt"]["median"] == pytest.approx(4 * rows["ms", 1]["median"])
    else:
        assert rows["ms", 1]["ratios"]["hf"] is None
        assert "Hugging Face generate: not measured (transformers is not installed here)." in shown


def test_llama_cpp_takes_part_on_demand_with_one_sequence(workers, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_decode.importlib.util, "find_spec", lambda name: None if name == HF_LIBRARY else object())
    out = tmp_path / "decode.json"
    options = ("--steps", "2", "--block", "2", "--backends", "pt", "--peers", LLAMA_CPP, "--out", str(out))
    assert bench.run(arguments(*options)) == 0
    assert [turn[:2] for turn in workers[:3]] == [(LLAMA_CPP, 1), ("pt", 1), ("pt", 8)]
    rows = {(row["contestant"], row["rows"]): row for row in json.loads(out.read_text())["rows"]}
    assert rows["pt", 1]["ratios"][LLAMA_CPP]["median"] == pytest.approx(0.4, rel=0.1)
    assert rows["pt", 8]["ratios"][LLAMA_CPP] is None and (LLAMA_CPP, 8) not in rows
    assert "times llama.cpp's" in capsys.readouterr().out
    workers.clear()
    for more, message in (
        (["--rows", "8"], "add 1 to --rows"),
        (["--peers", "hf-compile"], "`tele bench decode` has hf and llama.cpp"),
        (["--peers", "hf"], "needs transformers, not installed here"),
    ):
        with pytest.raises(UserError, match=message):
            bench.run(arguments("--peers", LLAMA_CPP, *more))
    monkeypatch.setattr(bench_decode.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs xllamacpp and gguf, not installed here; pip install xllamacpp gguf"):
        bench.run(arguments("--peers", LLAMA_CPP))
    assert workers == []


def test_the_bytes_of_a_step():
    config = load_model_config("telechat2-mini")
    E, F, V, L, KD = 512, 1408, 8192, 8, 128
    block = 2 * E * E + 2 * E * KD + 3 * E * F + 2 * E + E + E  # q o, k v, ffn; two gains, two biases
    assert least_bytes(config, "fp32", 1, 0) == 4 * (L * block + E + V * E)
    matrices = L * (2 * E * E + 2 * E * KD + 3 * E * F) + V * E
    factors = L * (2 * E + 2 * KD + 2 * F + E) + V
    rest = L * 4 * E + E
    assert least_bytes(config, "fp32", 1, 0, "int8") == matrices + 4 * factors + 4 * rest
    assert least_bytes(config, "bf16", 8, 100) == 2 * (L * block + E + V * E) + 8 * 2 * L * KD * 100 * 2


def test_every_step_has_a_token_of_each_sequence():
    runner = PlainRunner()
    timed = Timed(runner)
    engine = Engine(timed, reuse=False)
    found = timed_steps(engine, timed, 2, 5, 3)
    assert runner.sizes == [[5, 5], [1, 1], [1, 1], [1, 1]]
    assert all(0 < engine < step for engine, step in zip(found["engine"], found["seconds"], strict=True))
    assert not engine.busy and engine.pool.available == runner.num_pages - 1


def test_mistakes_are_told_before_anything_starts(workers):
    with pytest.raises(UserError, match="--rows: must be at least 1, found 0"):
        bench.run(arguments("--rows", "8", "0"))
    assert workers == []
