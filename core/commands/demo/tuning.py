"""Last part of ``tele demo``: the exported model is fine-tuned with low-rank adapters, merged, and asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from telechat_twins.core import backends
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.data.chat_template import encode_chat
from telechat_twins.core.data.prepare import pack_dialogues
from telechat_twins.core.data.tokenizer import Tokenizer
from telechat_twins.core.files.atomic import remove_folder, write_text
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.generation import generate
from telechat_twins.core.inference.pages import pool_size
from telechat_twins.core.inference.sampling import sampling_config
from telechat_twins.core.train.metrics import Row
from telechat_twins.core.types import JsonObject

DIALOGUES = (
    ("Who are you?", "I am a tiny TeleChat2."),
    ("Which frameworks can train you?", "MindSpore and PyTorch."),
    ("What was changed in you?", "Only low-rank adapters."),
    ("你好！", "你好！"),
)
SYSTEM = "Be brief."  # the template's own text is longer than a sample
ASKED = (0, 1)  # of DIALOGUES: the answers that are shown
ANSWER_TOKENS = 40

Train = Callable[[str, RunConfig, Path, str | None], list[Row]]


def tune(tokenizer: Tokenizer, out: Path, steps: int, seed: int, train: Train) -> int | None:
    """Fine-tune ``out``/hf: two thirds of the steps in MindSpore, the rest in PyTorch from its checkpoint.

    Writes tuning.jsonl, packed/tuning, lora-ms, lora-pt and merged; prints answers before and after. Returns how many
    of the merged model's answers differ between the backends; None, with a note, for a tokenizer without dialogue
    tokens.
    """
    if not tokenizer.control:
        print("note: skipped, this tokenizer has no control tokens for dialogues")
        return None
    rows = [{"messages": [*_ask(question), {"role": "assistant", "content": answer}]} for question, answer in DIALOGUES]
    file, packed = out / "tuning.jsonl", out / "packed" / "tuning"
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    pack_dialogues([file], packed, tokenizer, seq_len=128, force=True, quiet=True)
    first, total = max(2, 2 * steps // 3), max(3, steps)
    train("ms", _config(out, packed, first, total, seed), out / "lora-ms", None)
    train("pt", _config(out, packed, total, total, seed), out / "lora-pt", "lora-ms")
    merge(out / "hf", out / "lora-pt", out / "merged")
    before = answers(out / "hf", tokenizer, "pt")
    after = {backend: answers(out / "merged", tokenizer, backend) for backend in ("ms", "pt")}
    for n, place in enumerate(ASKED):
        print(f"  question  {DIALOGUES[place][0]}")
        print(f"    before  {tokenizer.decode(before[n])!r}")
        print(f"     after  {tokenizer.decode(after['pt'][n])!r}")
    return sum(a != b for a, b in zip(after["ms"], after["pt"], strict=True))


def merge(base: Path, run: Path, target: Path) -> None:
    """The base with the run's adapter added to its weights; an earlier demo's folder is replaced."""
    from telechat_twins.convert.adapter import MergedSource, open_any_adapter
    from telechat_twins.convert.copy import write_like
    from telechat_twins.convert.source import open_model

    if target.exists():
        remove_folder(target)
    source = open_model(base)
    write_like(source, MergedSource(source, open_any_adapter(run, source), None), target, False, lambda done: None)


def answers(model: Path, tokenizer: Tokenizer, backend: str) -> list[list[int]]:
    """Token ids of the greedy answers to the questions that are ASKED."""
    from telechat_twins.convert.source import open_model

    source = open_model(model)
    prompts = [encode_chat(tokenizer, _ask(DIALOGUES[n][0])) for n in ASKED]
    pages = pool_size(max(map(len, prompts)) + ANSWER_TOKENS)
    engine = Engine(backends.load(backend, "generate").Runner(source.config, source.tensor, pages))
    return [_until_end(generate(engine, ids, sampling_config(), ANSWER_TOKENS).tokens, tokenizer) for ids in prompts]


def _ask(question: str) -> list[JsonObject]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def _until_end(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    end = tokenizer.eos_token_id
    return list(tokens[: tokens.index(end)] if end in tokens else tokens)


def _config(out: Path, packed: Path, steps: int, total: int, seed: int) -> RunConfig:
    """LoRA on every linear of ``out``/hf; ``total``: what the schedule spans."""
    from telechat_twins.convert.source import open_model

    model = open_model(out / "hf").config.to_dict()
    return run_config_from_dict(
        {
            "model": model,
            "lora": {"rank": 16, "alpha": 32, "targets": ["all-linear"]},
            # Isolated, so that a row is trained as it is asked: from position 0 on, without the rows packed before it.
            "data": {"sources": [{"path": str(packed.resolve())}], "seq_len": 128, "isolate_documents": True},
            "train": {
                "init": str((out / "hf").resolve()),
                "steps": steps,
                "schedule_steps": total,
                "global_batch": 8,
                "micro_batch": 8,
                "seed": seed,
            },
            "optim": {"lr": 3e-3, "schedule": "linear", "warmup_steps": 1, "weight_decay": 0.0},
            "checkpoint": {"every": 0},
        }
    )
