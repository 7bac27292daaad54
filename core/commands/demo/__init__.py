"""``tele demo``: all stages on real text in both frameworks, from tokenizer to generation, compared at each stage."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from telechat_twins.core import backends
from telechat_twins.core.commands.demo.tuning import tune
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.data.blend import open_blend
from telechat_twins.core.data.demo_text import write_demo_text
from telechat_twins.core.data.packed import PackedDataset
from telechat_twins.core.data.prepare import pack_dialogues, pack_text, read_texts
from telechat_twins.core.data.rows import detect_kind, find_inputs, input_notes
from telechat_twins.core.data.tokenizer import Tokenizer, assumed, load_tokenizer, special_ids
from telechat_twins.core.data.tokenizer_training import train_tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import remove_folder, writable_file, write_text
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.generation import generate
from telechat_twins.core.inference.pages import pool_size
from telechat_twins.core.inference.sampling import sampling_config
from telechat_twins.core.launch.launcher import launch
from telechat_twins.core.launch.run_lock import NAME, hold_folder
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.parity.bounds import Bound, TraceReport, compare_traces
from telechat_twins.core.parity.document.model import Section
from telechat_twins.core.parity.report import ParityReport, summary, write_report
from telechat_twins.core.parity.runs import compare_batch
from telechat_twins.core.shown import from_here
from telechat_twins.core.train.metrics import Row, plot_losses, read_metrics
from telechat_twins.core.types import JsonObject

SHARES = {"english": 0.5, "code": 0.4, "chinese": 0.1}
TOKENIZER_BYTES = 2_000_000  # of text for training the tokenizer; SentencePiece keeps it in memory
ANSWER_TOKENS = 40
HEAD_STD = 0.08  # of embedding and head at the start, about 1 / sqrt(128)
NEAR_TIE = 1e-3  # difference of the two largest logits below which rounding may decide


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele demo``."""
    parser.description = (
        "Train a tokenizer and telechat2-tiny on real text, with MindSpore under msrun and with PyTorch under\n"
        "torchrun, from the same weights and on the same data order. Compare every gradient and every step, continue\n"
        "training in PyTorch from the MindSpore checkpoint, export to the released format, and generate the same\n"
        "continuation with both."
    )
    parser.add_argument("--data", nargs="+", metavar="PATH", help="your text or dialogue jsonl (default: Python's own)")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer, e.g. a released one (default: trained)")
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder for all results (demo)")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="training steps of each backend (300)")
    parser.add_argument("--seed", type=int, default=1234, help="initial weights and data order (1234)")


def run(args: argparse.Namespace) -> int:
    """0 when every comparison holds, 1 when one is broken."""
    if args.steps < 10:
        raise UserError(f"--steps: must be at least 10, found {args.steps}")
    began, out = time.monotonic(), Path(args.out)
    writable_file(out / "demo.json", "--out")
    with hold_folder(out, f"--out {out}"):
        if not (out / "demo.json").is_file() and any(entry.name != NAME for entry in out.iterdir()):
            raise UserError(
                f"--out {out}: must be empty, new or an earlier demo's folder, found other files; give another folder"
            )
        return _run(args, out, began)


def _run(args: argparse.Namespace, out: Path, began: float) -> int:
    write_text(out / "demo.json", json.dumps({"state": "running"}))

    _title("1  text, tokenizer, packed data")
    tokenizer, sources = prepare(args.data, args.tokenizer, out)
    config = demo_config(tokenizer, sources, args.steps, args.seed)
    blend = open_blend(config.data, args.seed, config.model.num_tokens, config.model.filler_id)
    print(from_here(blend.summary()))

    _title("2  one batch: logits, loss and every gradient against float64")
    batch_report = compare_batch(config, ["ms", "pt"])

    _title(f"3  {args.steps} steps with MindSpore (msrun), then with PyTorch (torchrun)")
    rows = {backends.TITLES[b]: train(b, config, out / b) for b in ("ms", "pt")}
    trace = compare_traces(rows["MindSpore"], rows["PyTorch"])
    if not all(bound.holds for bound in trace.bounds):
        # On some texts every float32 run drifts from exact arithmetic; only a float64 run shows whether these are such.
        trace = compare_traces(rows["MindSpore"], rows["PyTorch"], _exact(config, out / "exact"))
    facts = {
        "model": f"telechat2-tiny, vocabulary {config.model.vocab_size}",
        "data": ", ".join(f"{Path(s.path).name} {s.weight:g}" for s in config.data.sources),
        "training": f"{args.steps} steps of {config.train.global_batch} x {config.data.seq_len} tokens, fp32",
    }
    compared = dict(rows)

    _title("4  PyTorch continues from the MindSpore checkpoint, and for comparison MindSpore does")
    crossed, handover = _hand_over(config, args.steps, out)
    rows["PyTorch, from MindSpore's checkpoint"] = crossed

    _title("5  export to the released format, greedy continuation in both")
    export(out / "ms", out / "hf")
    opening, *_ = PackedDataset(config.data.sources[0].path).sample(0, config.data.seq_len, config.model.filler_id)
    apart = continuations(out / "hf", tokenizer, opening[:16])

    _title("6  fine-tune the export with low-rank adapters: MindSpore, PyTorch from its checkpoint, merged")
    tuned = tune(tokenizer, out, args.steps // 3, args.seed, train)

    _title("result")
    picture = plot_losses(rows, out / "loss.png", "telechat2-tiny, both backends")
    differ = [
        Bound("greedy tokens that differ", float(apart), 0.0, f"same weights; near-ties below {NEAR_TIE:g} aside")
    ]
    further = [Section("after the hand-over", handover.bounds), Section("export", differ)]
    if tuned is not None:
        further.append(Section("merged model", [Bound("answers that differ", float(tuned), 0.0, "same weights")]))
    report = ParityReport(facts, batch_report, trace, further=further)
    page = write_report(report, out / "parity", compared)
    print(summary(report))
    broken = bool(report.broken)
    minutes = (time.monotonic() - began) / 60
    write_text(out / "demo.json", json.dumps({"state": "done", "broken": broken, "minutes": round(minutes, 2)}))
    print(f"\nparity report  {page}\nloss curves    {picture}\nmodel          {out / 'hf'}   ({minutes:.1f} minutes)")
    print(f"go on with     tele chat --backend pt --checkpoint {out / 'hf'}")
    return 1 if broken else 0


def _hand_over(config: RunConfig, steps: int, out: Path) -> tuple[list[Row], TraceReport]:
    """PyTorch goes on from MindSpore's checkpoint of ``steps`` steps, and so does MindSpore: the rows of the former,
    and both compared. They begin with the same bits, so that no drift of the steps before is judged."""
    more = replace(config, train=replace(config.train, steps=steps + steps // 6))
    crossed = after(steps, train("pt", more, out / "crossed", "ms"))
    resumed = after(steps, train("ms", more, out / "resumed", "ms"))
    report = compare_traces(resumed, crossed)
    if not all(bound.holds for bound in report.bounds):
        report = compare_traces(resumed, crossed, after(steps, _exact(more, out / "exact-crossed", "ms")))
    return crossed, report


def _exact(config: RunConfig, out: Path, resume: str | None = None) -> list[Row]:
    """The metrics of PyTorch's run in float64: on some texts every float32 run drifts from exact arithmetic, and only
    this shows whether these are such."""
    print("two runs differ by more than 1e-4; a float64 run checks whether this training amplifies rounding")
    return train("pt", replace(config, train=replace(config.train, precision="fp64")), out, resume)


def prepare(data: Sequence[str] | None, tokenizer_file: str | None, out: Path) -> tuple[Tokenizer, list[JsonObject]]:
    """Tokenizer and packed sources [{path, weight}], from the user's files or from Python's own texts."""
    groups: dict[str, Sequence[Path]]
    if data:
        groups, shares = {"data": find_inputs(data)}, {"data": 1.0}
        for note in input_notes(data):
            print(f"note: {note}")
    else:
        groups, shares = {name: [file] for name, file in write_demo_text(out / "text").items()}, SHARES
    if tokenizer_file is None:
        texts = read_texts([file for files in groups.values() for file in files], TOKENIZER_BYTES)
        vocab_size = load_model_config("telechat2-tiny").vocab_size
        train_tokenizer(texts, out / "tokenizer.model", vocab_size)
        tokenizer_file = str(out / "tokenizer.model")
    tokenizer = load_tokenizer(tokenizer_file, "auto", in_vocabulary=True)
    for note in assumed(tokenizer):
        print(f"note: {note}")
    sources = []
    for name, files in groups.items():
        packed = out / "packed" / name
        if detect_kind(files) == "dialogue":
            pack_dialogues(files, packed, tokenizer, seq_len=128, force=True)
        else:
            pack_text(files, packed, tokenizer, force=True)
        sources.append({"path": str(packed.resolve()), "weight": shares[name]})
    return tokenizer, sources


def demo_config(tokenizer: Tokenizer, sources: list[JsonObject], steps: int, seed: int) -> RunConfig:
    """Run of telechat2-tiny with the tokenizer's vocabulary and 1,024 tokens per step.

    The head begins four times as large as the release's. What it reads has a fixed length, sqrt(E) times the norm's
    gain, so the logit of a piece is at most that times the length of its row. In so short a run the rows of rare pieces
    stay as long as they began: with 0.02 sqrt(128) = 0.23 their logits stay below 3 among 2,048, and adapters, which
    leave the head as it is, could not bring a loss on them below 4.
    """
    model = {"preset": "telechat2-tiny", "init_std": HEAD_STD, "matrix_init_std": 0.02}
    return run_config_from_dict(
        {
            "model": {**model, "vocab_size": tokenizer.vocab_size, **special_ids(tokenizer)},
            "data": {"sources": sources, "seq_len": 128},
            "train": {"steps": steps, "global_batch": 8, "micro_batch": 8, "seed": seed},
            "optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": steps // 10},
            "checkpoint": {"every": 0},
        }
    )


def train(backend: str, config: RunConfig, out: Path, resume: str | None = None) -> list[Row]:
    """Train as `tele train` does. Returns the run's metrics. ``resume``: name of a run beside ``out`` to start from.

    SystemExit with the run's exit code when it fails.
    """
    if out.exists():
        remove_folder(out)  # left by an earlier demo
    out.mkdir(parents=True)
    file = out / "run.yaml"
    write_text(file, json.dumps(config.to_dict(), indent=1))  # JSON is YAML
    arguments = ["--config", str(file), "--out", str(out)]
    code = launch(backend, arguments + (["--resume", str(out.parent / resume)] if resume else []), 1, out / "logs")
    if code:
        raise SystemExit(code)
    return read_metrics(out)


def after(step: int, rows: list[Row]) -> list[Row]:
    """The rows after ``step``."""
    return [row for row in rows if row["step"] > step]


def export(run_folder: Path, target: Path) -> None:
    """Convert the run's latest checkpoint to the released format; an earlier demo's folder is replaced."""
    from telechat_twins.convert.copy import canonical_to_hf
    from telechat_twins.convert.source import CanonicalSource, open_model

    if target.exists():
        remove_folder(target)
    source = open_model(run_folder)
    assert isinstance(source, CanonicalSource)
    canonical_to_hf(source, target)


def continuations(model: Path, tokenizer: Tokenizer, prompt: np.ndarray) -> int:
    """Print each backend's greedy continuation. Returns how many tokens differ; 0 if the first difference is a
    near-tie."""
    from telechat_twins.convert.source import open_model

    source, ids = open_model(model), [int(i) for i in prompt]
    print(f"   prompt  {tokenizer.decode(ids)!r}")
    made = []
    for name in ("ms", "pt"):
        pages = pool_size(len(ids) + ANSWER_TOKENS)
        runner = backends.load(name, "generate").Runner(source.config, source.tensor, pages)
        # With a repetition penalty, since a model this small would otherwise repeat a single token.
        made.append(generate(Engine(runner), ids, sampling_config(repetition_penalty=1.2), ANSWER_TOKENS))
        print(f"{backends.TITLES[name]:>10}  {tokenizer.decode(made[-1].tokens)!r}")
    pairs = list(zip(made[0].tokens, made[1].tokens, strict=True))
    differing = [i for i, (a, b) in enumerate(pairs) if a != b]
    if differing and made[1].top2_margins[differing[0]] < NEAR_TIE:
        print(f"   token {differing[0]} is a near-tie (margin {made[1].top2_margins[differing[0]]:.1e})")
        return 0
    return len(differing)


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)
