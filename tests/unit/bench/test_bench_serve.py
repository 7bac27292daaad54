"""The arithmetic and the words of ``tele bench serve``; and one turn of clients on a server of this process."""

from __future__ import annotations

import argparse
import json

import pytest

from telechat_twins.convert.source import open_model
from telechat_twins.core import cli
from telechat_twins.core.bench import serve as bench_serve
from telechat_twins.core.bench.serve import (
    answer_times,
    cache_share,
    measure_serving,
    serving_to_markdown,
    summarise,
    write_model,
)
from telechat_twins.core.commands import bench
from telechat_twins.core.data.tokenizer import load_tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import load_model_config
from tests.support.serve_support import NAME, running

OPTIONS = {
    "model": "telechat2-tiny",
    "seq_len": 12,
    "micro_batch": 1,
    "micro_batches": 1,
    "precision": "fp32",
    "quantize": "none",
}
HF_NOTE = "Hugging Face generate: not measured (transformers is not installed here)."


def test_turns_are_summed_up():
    turns = [
        {"seconds": 2.0, "processor": 1.5, "tokens": 30, "first": [0.1, 0.3], "next": [0.01], "cache": 0.5},
        {"seconds": 1.0, "processor": 0.9, "tokens": 30, "first": [0.2], "next": [0.03, 0.02], "cache": 0.75},
    ]
    found = summarise(turns)
    assert found["tokens_per_s"] == 20.0 and found["cache"] == 0.75 and found["processor_s"] == pytest.approx(0.04)
    assert found["first"] == {"p50": pytest.approx(0.2), "p99": pytest.approx(0.298)}
    assert found["next"]["p50"] == pytest.approx(0.02)
    assert summarise([{"seconds": 2.0, "tokens": 6}]) == {"tokens_per_s": 3.0}


def test_requests_are_unequal_and_the_same_for_all_contestants():
    found = bench_serve.requests_of(32, 64, 32, 7)
    assert found == bench_serve.requests_of(32, 64, 32, 7) != bench_serve.requests_of(32, 64, 32, 8)
    assert [len(mine) for mine in found] == [2] * 32
    for lengths, longest in zip(zip(*(one for mine in found for one in mine), strict=True), (64, 32), strict=True):
        assert longest // 4 <= min(lengths) < longest / 2 < max(lengths) <= longest
    assert bench_serve.requests_of(1, 1, 1, 0) == [[(1, 1)] * bench_serve.REQUESTS]


class Made:
    """Stand for the server processes: PyTorch's takes twice as long."""

    turns: list[tuple[str, int, int]] = []

    def __init__(self, *words):
        self.name = words[words.index("--backend") + 1]
        assert words[words.index("--max-running") + 1] == "4"
        assert int(words[words.index("--cache-tokens") + 1]) >= 4 * 12

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def turn(self, clients, prompt, new, vocab_size, seed):
        self.turns.append((self.name, clients, seed))
        seconds = 2.0 if self.name == "pt" else 1.0
        return {
            "seconds": seconds,
            "processor": 0.03 * clients,
            "tokens": 10 * clients,
            "first": [0.1],
            "next": [0.02],
            "cache": 0.25,
        }


def measured(monkeypatch):
    monkeypatch.setattr(bench_serve, "ServerProcess", Made)
    monkeypatch.setattr(bench_serve, "contestants", lambda names: (names, [HF_NOTE]))
    monkeypatch.setattr(Made, "turns", [])
    config = load_model_config({"preset": "telechat2-tiny"})
    return measure_serving(OPTIONS, ["ms", "pt"], [1, 4], 8, 4, "model", config)


def test_servers_take_turns_and_no_prompt_comes_twice(monkeypatch):
    rows = measured(monkeypatch)["rows"]
    assert [(row["contestant"], row["clients"], row["tokens_per_s"]) for row in rows] == [
        ("ms", 1, 10.0),
        ("ms", 4, 40.0),
        ("pt", 1, 5.0),
        ("pt", 4, 20.0),
    ]
    order = [(name, clients) for name, clients, _ in Made.turns]
    assert order[:4] == order[8:] == [("ms", 1), ("ms", 4), ("pt", 1), ("pt", 4)]
    assert order[4:8] == [("pt", 1), ("pt", 4), ("ms", 1), ("ms", 4)]
    seeds = [(name, seed) for name, _, seed in Made.turns]
    assert len(set(seeds)) == len(seeds), "its prompts are in the cache"


def test_the_table(monkeypatch):
    text = serving_to_markdown(measured(monkeypatch))
    assert "| MindSpore | 4 | 40.0 | 3.00 ms | 100.0 ms | 100.0 ms | 20.0 ms | 20.0 ms | 25 % |" in text
    assert text.endswith(HF_NOTE) and "for 4 sequences" in text


def test_what_a_client_sees(monkeypatch):
    monkeypatch.setattr(bench_serve, "MODEL", NAME)
    with running(pause=0.005) as server:
        times, made = answer_times(server.port, [40, 41, 42], 6)
        assert made == 6 and times == sorted(times) and 2 <= len(times) <= 8
        assert cache_share(server.port) == 0.0
        monkeypatch.setattr(server.runner, "failing", [RuntimeError("planted")])
        with pytest.raises(RuntimeError, match="the server answered: internal engine error"):
            answer_times(server.port, [40, 41, 42], 6)


def test_a_random_model_has_a_tokenizer_of_its_size(tmp_path):
    config = load_model_config({"preset": "telechat2-tiny"})
    checkpoint = write_model(tmp_path, config)
    assert load_tokenizer(open_model(checkpoint).tokenizer_path).vocab_size == config.vocab_size


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["serve", "--clients", "0"], "--clients: must be at least 1, found 0"),
        (["serve", "--new", "0"], "--new: must be at least 1, found 0"),
        (["serve", "--rows", "2"], "--rows: is an option of `tele bench decode`, not of `tele bench serve`"),
        (["decode", "--clients", "2"], "--clients: is an option of `tele bench serve`, not of `tele bench decode`"),
        (["step", "--checkpoint", "x"], "--checkpoint: is an option of `tele bench serve`"),
        (["serve", "--backends", "eager"], "--backends eager: is available for `tele bench step` only"),
    ],
)
def test_mistakes(words, says):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    with pytest.raises(UserError, match=says):
        bench.run(parser.parse_args(words))


def test_a_small_measurement_with_a_real_server(tmp_path, capfd):
    pytest.importorskip("torch")
    out = tmp_path / "serve.json"
    sizes = ["--clients", "1", "3", "--prompt", "6", "--new", "4"]
    assert cli.main(["bench", "serve", "--backends", "pt", *sizes, "--out", str(out)]) == 0
    rows = [row for row in json.loads(out.read_text())["rows"] if row["contestant"] == "pt"]
    assert [row["clients"] for row in rows] == [1, 3]
    assert all(row["tokens_per_s"] > 0 and row["first"]["p99"] >= row["first"]["p50"] > 0 for row in rows)
    assert "| PyTorch | 3 |" in capfd.readouterr().out
