"""Evidence that the IQ suites measure something: a small model learns two of them, and its scores rise.

    python -m tests.campaigns.eval_check [--steps N] [--out DIR] [--plot F]

Trains a model of 0.6 million parameters with PyTorch on the outputs in items of full repeating and head slicing (of
other seeds than those that are scored), evaluates checkpoints on 100 items of each in both backends, and prints the
share that is right with its 95 % interval (Wilson). It fails where the last interval does not lie above chance (that of
random letters in an answer of the right length), or where the backends do not get the same items right.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from telechat_twins.convert.source import open_model
from telechat_twins.core import backends
from telechat_twins.core.config import run_config_from_dict
from telechat_twins.core.data.packed import PackedWriter
from telechat_twins.core.data.tokenizer import Tokenizer, load_tokenizer
from telechat_twins.core.data.tokenizer_training import train_tokenizer
from telechat_twins.core.eval.iq.items import IQOptions, Item
from telechat_twins.core.eval.iq.tasks import SUITES, generate
from telechat_twins.core.eval.scorer import Scorer
from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.inference.requests import Request
from telechat_twins.core.train import loop
from telechat_twins.core.types import JsonObject

NAMES = ("full_repeating", "head_slicing")
OPTIONS = dict(letters="abcdefgh", length=(4, 5), sliced=(2, 3))
SEQ_LEN, VOCAB, ITEMS = 224, 320, 100
CHANCE = {"full_repeating": 8.0**-8, "head_slicing": 8.0**-2}  # 8 letters; 8 or 10, and 2 or 3 of them


def items(name: str, seed: int, count: int) -> Iterator[Item]:
    suite = next(suite for suite in SUITES if suite.name == name)
    return generate(suite, "en", IQOptions(seed=seed, **OPTIONS), count)  # type: ignore[arg-type]


def prepare(folder: Path, count: int) -> tuple[Path, Tokenizer]:
    """A packed folder of items that are not scored, and their tokenizer, which has each letter as a token."""
    texts = [item.prompt + item.answer + "\n" for name in NAMES for item in items(name, 1000, count)]
    letters = " ".join("abcdefgh")
    train_tokenizer([*texts[:200], *([letters] * 200)], folder / "tokenizer.model", VOCAB)
    tokenizer = load_tokenizer(folder / "tokenizer.model", in_vocabulary=True)
    random = np.random.default_rng(0)
    with PackedWriter(folder / "packed", tokenizer, "sft") as writer:
        for number in random.permutation(len(texts)):
            ids = np.asarray([*spelt(texts[number], tokenizer), tokenizer.eos_token_id], np.int32)[: SEQ_LEN + 1]
            writer.add_sequence(ids, learnt(texts[number])[: len(ids)], [0])
        writer.finish()
    return folder / "packed", tokenizer


def learnt(text: str) -> np.ndarray:
    """Of each character of a text and of the end, whether it is trained on: outputs, not inputs, which are random."""
    mask = np.zeros(len(text) + 1, bool)
    for found in re.finditer("Output:(.*\n)", text):
        mask[found.start(1) : found.end(1)] = True
    return mask


def spelt(text: str, tokenizer: Tokenizer) -> list[int]:
    """A text as one token a character, so that every rule is one on tokens."""
    return [token for character in text for token in tokenizer.encode(character)[-1:]]


def train(packed: Path, out: Path, steps: int) -> list[Path]:
    """Checkpoints of a run, in order."""
    config = run_config_from_dict(
        {
            "model": {"preset": "telechat2-tiny", "vocab_size": VOCAB, "num_layers": 3},
            "data": {"sources": [{"path": str(packed)}], "seq_len": SEQ_LEN},
            "train": {"steps": steps, "global_batch": 8, "micro_batch": 8},
            "optim": {"lr": 2e-3, "min_lr": 1e-4, "warmup_steps": min(50, steps // 10)},
            "checkpoint": {"every": max(1, steps // 5), "keep_last": 9},
        }
    )
    loop.train(backends.load("pt", "train").Trainer, config, out)
    return sorted(out.glob("step-*"))


def right(folder: Path, backend: str, name: str, tokenizer: Tokenizer) -> list[bool]:
    """Of each item, whether the greedy continuation is its answer and a line end."""
    source = open_model(str(folder))
    runner = backends.load(backend, "generate").Runner(source.config, source.tensor, 2000)
    scorer = Scorer(Engine(runner, tokenizer, limits=EngineLimits(max_len=SEQ_LEN + 32)))
    scored = list(items(name, 0, ITEMS))
    wanted = [spelt(item.answer + "\n", tokenizer) for item in scored]
    requests = [
        Request(prompt_ids=tuple(spelt(item.prompt, tokenizer)), max_new_tokens=len(ids), text="answer")
        for item, ids in zip(scored, wanted, strict=True)
    ]
    texts = scorer.generate(requests)
    return [
        text.strip() == tokenizer.decode(ids, skip_special=True).strip()
        for text, ids in zip(texts, wanted, strict=True)
    ]


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    z, share = 1.96, hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def plot(rows: list[JsonObject], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for number, name in enumerate(NAMES):
        mine = [row for row in rows if row["task"] == name and row["backend"] == "ms"]
        share = np.array([row["share"] for row in mine])
        low, high = (np.array([row["interval"][side] for row in mine]) for side in (0, 1))
        error = np.clip(np.stack([share - low, high - share]), 0, None)
        steps = [row["step"] for row in mine]
        axis.errorbar(steps, share, error, marker="o", capsize=3, label=name, color=f"C{number}")
        axis.axhline(CHANCE[name], color=f"C{number}", linestyle=":", linewidth=0.9)
    axis.set_xlabel("training step")
    axis.set_ylabel("share right, 95 % interval\n(dotted: chance)")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    rows: list[JsonObject] = []
    good = True
    with tempfile.TemporaryDirectory(prefix="tele-eval-check-") as made:
        folder = args.out or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        packed, tokenizer = prepare(folder, 4000)
        for checkpoint in train(packed, folder / "run", args.steps):
            for name in NAMES:
                found = {backend: right(checkpoint, backend, name, tokenizer) for backend in ("ms", "pt")}
                good = good and found["ms"] == found["pt"]
                for backend, hits in found.items():
                    low, high = wilson(sum(hits), len(hits))
                    row = {"step": int(checkpoint.name[5:]), "task": name, "backend": backend}
                    rows.append(row | {"share": sum(hits) / len(hits), "interval": [low, high]})
                    print(f"{checkpoint.name} {name} {backend}: {sum(hits)} of {len(hits)} ({low:.3f} to {high:.3f})")
                print(f"  the same items: {found['ms'] == found['pt']}", flush=True)
        last = rows[-2 * len(NAMES) :]
        good = good and all(row["interval"][0] > CHANCE[row["task"]] for row in last)
        if args.plot:
            plot(rows, args.plot)
        (folder / "eval-check.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("holds" if good else "BROKEN")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
