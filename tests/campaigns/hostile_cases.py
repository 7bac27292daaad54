"""The cases of the hostile files' campaign: for each kind of input a valid one, and the verb that reads it hostile."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from telechat_twins.core import cli
from telechat_twins.core.data.prepare import pack_dialogues, pack_text
from telechat_twins.core.data.tokenizer import load_tokenizer
from tests.campaigns import hostile_inputs as inputs
from tests.campaigns.hostile_inputs import Case
from tests.house import ROOT
from tests.support.data_support import tiny_tokenizer_path

RUN = {
    "model": {"preset": "telechat2-tiny", "vocab_size": 600},
    "data": {"sources": [{"path": "packed"}], "seq_len": 16},
    "train": {"steps": 4, "global_batch": 2, "micro_batch": 1},
    "optim": {"lr": 1e-3},
}


class Bench:
    """Valid files of every kind in a folder, made once; ``make`` turns them into one hostile case."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        golden = ROOT / "tests" / "goldens" / "telechat2_gqa"
        self.release = folder / "release"
        self.release.mkdir()
        shutil.copyfile(golden / "config.json", self.release / "config.json")
        shutil.copyfile(golden / "weights.safetensors", self.release / "model.safetensors")
        self.canonical, self.sharded = folder / "canonical", folder / "sharded"
        self.mindformers = folder / "mindformers"
        quiet("convert", "--from", "hf", "--to", "canonical", self.release, self.canonical)
        quiet("convert", "--from", "canonical", "--to", "hf", "--max-shard-size", "100KB", self.canonical, self.sharded)
        quiet("convert", "--from", "canonical", "--to", "mindformers", "--mp", 2, self.canonical, self.mindformers)
        (self.canonical / "trainer.json").write_text('{"step": 4}')
        inputs.replace_listed(self.canonical, "trainer.json", b'{"step": 4}')
        self.tokenizer = folder / "tokenizer.model"
        shutil.copyfile(tiny_tokenizer_path(), self.tokenizer)
        tokenizer = load_tokenizer(self.tokenizer)
        (folder / "a.txt").write_text("word sound letter fox\n" * 50)
        pack_text([folder / "a.txt"], folder / "packed", tokenizer, quiet=True)
        row = {"messages": [{"role": "user", "content": "word"}, {"role": "assistant", "content": "sound"}]}
        (folder / "d.jsonl").write_bytes(inputs.dumps(row) + b"\n")
        pack_dialogues([folder / "d.jsonl"], folder / "sft", tokenizer, seq_len=64, variant="plain", quiet=True)
        self.run = yaml.safe_dump(RUN)
        stages = {
            "stages": [{"name": "a", "steps": 2}, {"name": "b", "steps": 2, "model": {**RUN["model"], "num_layers": 4}}]
        }
        self.growth = yaml.safe_dump(stages)
        self.search = yaml.safe_dump({"config": str(folder / "run.yaml"), "grid": {"lr": [1e-3, 2e-3]}, "window": 2})
        self.table = "parameters: [1, 2, 4, 8, 16, 32]\nloss: [4, 3.8, 3.7, 3.6, 3.55, 3.5]\n"
        (folder / "run.yaml").write_text(self.run)

    def make(self, rng: random.Random, here: Path) -> Case:
        """One hostile case in the empty folder ``here``."""
        return rng.choice(MAKERS)(self, rng, here)


def quiet(*words: object) -> None:
    """Run a verb that must succeed."""
    with open(os.devnull, "w") as nowhere:
        out, sys.stdout = sys.stdout, nowhere
        try:
            code = cli.main([str(word) for word in words])
        finally:
            sys.stdout = out
    if code:
        raise RuntimeError(f"tele {' '.join(map(str, words))}: exit code {code}")


# One function a kind of input; each gives the command that reads it.


def release_config(bench: Bench, rng: random.Random, here: Path) -> Case:
    folder = inputs.copy_tree(bench.release, here / "model")
    config = json.loads((folder / "config.json").read_text())
    if rng.random() < 0.1:
        what, data = "note", inputs.dumps({**config, "hidden_dropout": rng.choice(inputs.ESCAPES)})
    elif rng.random() < 0.5:
        what, data = inputs.hostile_json(rng, config)
    else:
        what = rng.choice(["vocab_size", "hidden_size", "n_layer", "n_head", "num_key_value_heads", "ffn_hidden_size"])
        data = inputs.dumps({**config, what: rng.choice([bad for bad in inputs.BAD_SIZES if bad != config[what]])})
    (folder / "config.json").write_bytes(data)
    words = ("convert", "--from", "hf", "--to", "canonical", str(folder), str(here / "out"))
    return Case(f"config.json, {what}", words, may_pass=what == "note")


def release_weights(bench: Bench, rng: random.Random, here: Path) -> Case:
    folder = inputs.copy_tree(bench.release, here / "model")
    weights = folder / "model.safetensors"
    what = inputs.hostile_place(rng, weights) if rng.random() < 0.3 else inputs.hostile_safetensors(rng, weights)
    return Case(
        f"safetensors, {what}", ("convert", "--from", "hf", "--to", "canonical", str(folder), str(here / "out"))
    )


def release_index(bench: Bench, rng: random.Random, here: Path) -> Case:
    folder = inputs.copy_tree(bench.sharded, here / "model")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = list(index["weight_map"])
    bad = [
        "../release/model.safetensors",
        str(bench.release / "model.safetensors"),
        "",
        ".",
        "..",
        "a/b",
        "a\0b",
        "x" * 300,
        rng.choice(inputs.ESCAPES),
        "\\\\host\\share",
        "none.safetensors",
        3,
        None,
        [],
        {},
    ]
    roll = rng.random()
    if roll < 0.4:
        what, data = inputs.hostile_json(rng, index)
        path.write_bytes(data)
    elif roll < 0.8:
        what = "file name"
        index["weight_map"][rng.choice(names)] = rng.choice(bad)
        path.write_bytes(inputs.dumps(index))
    else:
        what = "many names"
        extra = {
            f"{rng.choice(inputs.ESCAPES)}{n}": index["weight_map"][names[0]] for n in range(rng.randint(1, 200_000))
        }
        path.write_bytes(inputs.dumps({**index, "weight_map": {**index["weight_map"], **extra}}))
    return Case(f"index, {what}", ("convert", "--from", "hf", "--to", "canonical", str(folder), str(here / "out")))


def canonical(bench: Bench, rng: random.Random, here: Path) -> Case:
    folder = inputs.copy_tree(bench.canonical, here / "model")
    what = inputs.hostile_manifest(rng, folder)
    verb = ("convert", "--from", "canonical", "--to", "hf", str(folder), str(here / "out"))
    return Case(f"checkpoint, {what}", verb, may_pass=what in ("pieces", "sizes", "version"))


def run_pointer(bench: Bench, rng: random.Random, here: Path) -> Case:
    run = here / "run"
    run.mkdir()
    what = rng.choice(["text", "place"])
    if what == "text":
        bad = ["../canonical", "step-" + "9" * rng.randint(1, 5_000), "", "x" * 10_000, "\udcff", *inputs.ESCAPES]
        (run / "latest").write_bytes(rng.choice(bad).encode("utf-8", "surrogateescape"))
    else:
        what = inputs.hostile_place(rng, run / "latest")
    return Case(f"latest, {what}", ("grow", str(run), str(here / "out"), "--set", "num_layers=4", "--plan"))


def mindformers(bench: Bench, rng: random.Random, here: Path) -> Case:
    folder = inputs.copy_tree(bench.mindformers, here / "model")
    what = rng.choice(["model.json", "rank", "weights", "yaml"])
    more: tuple[str, ...] = ()
    if what == "model.json":
        how, data = inputs.hostile_json(rng, json.loads((folder / "model.json").read_text()))
        (folder / "model.json").write_bytes(data)
        what += f", {how}"
    elif what == "rank":
        (folder / f"rank_{rng.choice([10**9, 10**30, 10**200, 7])}").mkdir()
    elif what == "weights":
        how = inputs.hostile_safetensors(rng, folder / "rank_1" / "checkpoint_1.safetensors")
        what += f", {how}"
    else:
        (folder / "model.json").unlink()
        section = {"model": {"model_config": {"hidden_size": 48, "num_layers": 3}}}
        how, data = inputs.hostile_yaml(rng, yaml.safe_dump(section))
        (here / "m.yaml").write_bytes(data)
        more, what = ("--config", str(here / "m.yaml")), f"yaml, {how}"
    words = ("convert", "--from", "mindformers", "--to", "canonical", *more, str(folder), str(here / "out"))
    return Case(f"MindFormers, {what}", words)


def run_config(bench: Bench, rng: random.Random, here: Path) -> Case:
    path = here / "run.yaml"
    roll = rng.random()
    if roll < 0.6:
        what, data = inputs.hostile_yaml(rng, bench.run)
        path.write_bytes(data)
    elif roll < 0.75:
        what = inputs.hostile_place(rng, path)
    elif roll < 0.85:
        what = "preset"
        chain = rng.choice([("run.yaml",), ("b.yaml", "run.yaml"), ("\0.yaml",), ("x" * 300 + ".yaml",), ("..",)])
        for file, preset in zip(("run.yaml", "b.yaml"), chain, strict=False):
            (here / file).write_text(json.dumps({**RUN, "model": {"preset": preset}}))
    else:
        group, key = rng.choice(
            [
                ("model", "vocab_size"),
                ("model", "hidden_size"),
                ("model", "num_layers"),
                ("data", "seq_len"),
                ("train", "global_batch"),
                ("train", "micro_batch"),
                ("parallel", "tp"),
                ("parallel", "cp"),
                ("optim", "lr"),
            ]
        )
        tree = json.loads(json.dumps({**RUN, "parallel": {}}))
        tree[group].pop(key, None)
        section = json.dumps(tree[group])[1:-1]
        value = inputs.hostile_value(rng)
        tree.pop(group)
        path.write_text(f"{group}: {{{section}{', ' if section else ''}{key}: {value}}}\n{yaml.safe_dump(tree)}")
        what = f"{group}.{key}"
    return Case(f"run, {what}", ("plan", "--config", str(path)))


def packed(bench: Bench, rng: random.Random, here: Path) -> Case:
    kind = rng.choice(["packed", "sft"])
    folder = inputs.copy_tree(bench.root / kind, here / "packed")
    meta = json.loads((folder / "meta.json").read_text())
    roll = rng.random()
    if roll < 0.5:
        what, data = inputs.hostile_json(rng, meta)
        (folder / "meta.json").write_bytes(data)
    elif roll < 0.7:
        what = inputs.hostile_place(rng, folder / rng.choice(["meta.json", "tokens.bin", "documents.bin"]))
    else:
        what = rng.choice(["kind", "vocab_size", "dtype", "tokens", "largest_id", "files", "format", "version"])
        bad = [None, -1, 2**70, [], {}, "x" * 100_000, rng.choice(inputs.ESCAPES)]
        if what == "tokens":  # a count that nothing is sized by
            bad = [None, [], "x"]
        if what == "largest_id":
            bad = [None, 2**70, [], "x"]
        meta[what] = rng.choice(bad)
        (folder / "meta.json").write_bytes(inputs.dumps(meta))
    (here / "run.yaml").write_text(bench.run.replace("seq_len: 16", "seq_len: 64"))
    words = ("train", "--backend", "pt", "--config", str(here / "run.yaml"), "--out", str(here / "out"))
    return Case(f"packed {kind}, {what}", words)


def rows(bench: Bench, rng: random.Random, here: Path) -> Case:
    dialogue = rng.random() < 0.5
    what, line = inputs.hostile_row(rng, dialogue)
    good = (bench.root / "d.jsonl").read_bytes() if dialogue else b'{"text": "word"}\n'
    (here / "rows.jsonl").write_bytes(good * rng.randrange(3) + line + b"\n")
    more = ("--sft", "plain", "--seq-len", "64") if dialogue else ()
    words = ("data", str(here / "rows.jsonl"), "--tokenizer", str(bench.tokenizer), "--out", str(here / "out"), *more)
    return Case(f"{'dialogue' if dialogue else 'text'} row, {what}", (*words, "--quiet"))


def tokenizer(bench: Bench, rng: random.Random, here: Path) -> Case:
    path = here / "tokenizer.model"
    if rng.random() < 0.6:
        what = inputs.hostile_place(rng, path)
    else:
        what = "no model"
        path.write_bytes(rng.choice([b"", b"text\n" * 1_000, bytes(rng.randint(1, 1 << 20)), b"{}", b"\x80" * 100]))
    return Case(f"tokenizer, {what}", ("tokenize", "encode", "--tokenizer", str(path), "text"))


def table(bench: Bench, rng: random.Random, here: Path) -> Case:
    if rng.random() < 0.5:
        what, data = inputs.hostile_table(rng)
        path = here / "t.csv"
    else:
        what, data = inputs.hostile_yaml(rng, bench.table)
        path = here / "t.yaml"
    path.write_bytes(data)
    if rng.random() < 0.15:
        what = inputs.hostile_place(rng, path)
    return Case(f"loss table, {what}", ("mup", "predict", str(path)))


def growth(bench: Bench, rng: random.Random, here: Path) -> Case:
    path = here / "g.yaml"
    if rng.random() < 0.6:
        what, data = inputs.hostile_yaml(rng, bench.growth)
        path.write_bytes(data)
    else:
        tree = yaml.safe_load(bench.growth)
        what = rng.choice(["name", "steps", "model", "grow", "parallel", "train"])
        bad: dict[str, list[Any]] = {
            "name": [rng.choice(inputs.ESCAPES), "../up", "", 3, "a"],
            "steps": [0, -1, 2**63, "9" * 100, 1.5, True, None, [1]],
            "model": [3, [], {"hidden_size": 2**40}, {"preset": "x" * 100_000}, {**RUN["model"], "num_layers": 10**9}],
            "grow": [3, {"depth": "9" * 10_000}, {"depth": ",".join(["0"] * 50_000)}, {"method": "m" * 50_000}],
            "parallel": [{"tp": 2**40}, {"cp": 2**20, "ulysses": 3}, {"pp": 2, "stage_layers": [2**62, 1]}, []],
            "train": [{"global_batch": 2**62}, {"micro_batch": 2**31}, {"steps": 3}, {rng.choice(inputs.ESCAPES): 1}],
        }
        tree["stages"][1][what] = rng.choice(bad[what])
        path.write_text(yaml.safe_dump(tree))
    return Case(f"growth, {what}", ("plan", "--config", str(bench.root / "run.yaml"), "--growth", str(path)))


def search(bench: Bench, rng: random.Random, here: Path) -> Case:
    path = here / "s.yaml"
    if rng.random() < 0.6:
        what, data = inputs.hostile_yaml(rng, bench.search)
        path.write_bytes(data)
    else:
        tree = yaml.safe_load(bench.search)
        what = rng.choice(["grid", "widths", "set", "window", "config"])
        many = [float(n + 1) for n in range(1_000)]
        bad: dict[str, list[Any]] = {
            "grid": [
                dict.fromkeys(("lr", "matrix_lr", "init_std", "input_mult", "logit_mult"), many),
                {"lr": [float("inf")]},
            ],
            "widths": [[2**62], [0], [-1], list(range(1, 9_000)), ["x"]],
            "set": [
                ["model.hidden_size=" + "9" * 5_000],
                ["x" * 100_000],
                [rng.choice(inputs.ESCAPES)],
                [3],
                ["a.b.c=[[["],
            ],
            "window": [2**63, 10**30, 0, "2", 1.5],
            "config": ["/dev/zero", ".", "x" * 5_000, rng.choice(inputs.ESCAPES), 3],
        }
        tree[what] = rng.choice(bad[what])
        path.write_text(yaml.safe_dump(tree))
    return Case(f"search, {what}", ("mup", "search", str(path), "--backend", "pt", "--out", str(here / "out")))


def forward_inputs(bench: Bench, rng: random.Random, here: Path) -> Case:
    path = here / "in.safetensors"
    what = inputs.hostile_place(rng, path) if rng.random() < 0.3 else inputs.hostile_safetensors(rng, path)
    words = ("forward", "--backend", "pt", "--checkpoint", str(bench.release), "--inputs", str(path))
    return Case(f"inputs, {what}", (*words, "--out", str(here / "out.safetensors")))


def metrics(bench: Bench, rng: random.Random, here: Path) -> Case:
    out = here / "run"
    out.mkdir()
    what = "row"
    good = b'{"step": 1, "loss": 2.0}\n'
    if rng.random() < 0.3:
        what = inputs.hostile_place(rng, out / "metrics.jsonl", there=True)
    else:
        bad = (
            b'{"step": 1e999}',
            b'{"step": "x"}',
            b'{"step": ' + b"9" * 4_000 + b"}",
            b"[" * 4_000,
            b"\xff",
            b"[]",
            b"3",
            b"",
            b'{"step": NaN}',
            b"x" * rng.randint(5_000, 1 << 24),
            b"\0" * 100,
        )
        (out / "metrics.jsonl").write_bytes(good + rng.choice(bad) + b"\n" + good)
    words = ("train", "--backend", "pt", "--config", str(bench.root / "run.yaml"), "--out", str(out))
    return Case(f"metrics.jsonl, {what}", words)


def assignments(bench: Bench, rng: random.Random, here: Path) -> Case:
    key = rng.choice(
        ["model.vocab_size", "train.global_batch", "data.seq_len", "parallel.cp", "optim.lr", "parallel.stage_layers"]
    )
    bomb = inputs.hostile_yaml(rng, "")[1].decode("utf-8", "replace")
    word = rng.choice(
        [
            f"{key}={inputs.hostile_value(rng)}",
            f"x{rng.choice(inputs.ESCAPES)}={bomb[:100_000]}",
            "." * rng.randint(1, 5_000) + "=1",
            "=",
            "a",
            f"model={bomb[:100_000]}",
            f"{key}.x=1",
            "k" * 100_000 + "=1",
        ]
    )
    words = (
        "train",
        "--backend",
        "pt",
        "--config",
        str(bench.root / "run.yaml"),
        "--out",
        str(here / "out"),
        "--set",
        word,
    )
    return Case("--set", words)


def options(bench: Bench, rng: random.Random, here: Path) -> Case:
    number = rng.choice(list(inputs.numbers()))
    run = ("--config", str(bench.root / "run.yaml"))
    commands: list[tuple[str, ...]] = [
        *(
            ("plan", "--model", "telechat2-tiny", name, number)
            for name in ("--seq-len", "--micro-batch", "--micro-batches")
        ),
        ("plan", "--model", "telechat2-tiny", "--layout", f"tp{number}"),
        ("plan", "--model", "m" * rng.randint(1, 1_000_000)),
        ("train", "--backend", "pt", *run, "--nproc", number),
        ("train", "--backend", "pt", *run, "--timeout", rng.choice(["nan", "inf", "-1", "1e999", "x"])),
        ("train", "--backend", "pt", *run, "--nnodes", number),
        ("convert", "--from", "canonical", "--to", "hf", "--max-shard-size", f"{number}", "a", str(here / "b")),
        ("tokenize", "decode", "--tokenizer", str(bench.tokenizer), number or "x"),
        ("grow", "telechat2-tiny", "out", "--plan", "--anneal-steps", number),
        ("grow", "telechat2-tiny", "out", "--plan", "--depth", f"0,{number}"),
        ("mup", "transfer", *run, "--width", number),
        ("--" + "o" * rng.randint(1, 1_000_000),),
        ("plan", "--" + rng.choice(inputs.ESCAPES), number),
    ]
    words = rng.choice(commands)
    return Case(f"option of {words[0][:10]}", words)


MAKERS: tuple[Callable[[Bench, random.Random, Path], Case], ...] = (
    release_config,
    release_weights,
    release_index,
    canonical,
    run_pointer,
    mindformers,
    run_config,
    packed,
    rows,
    tokenizer,
    table,
    growth,
    search,
    forward_inputs,
    metrics,
    assignments,
    options,
)
