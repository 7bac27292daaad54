"""A small Tele-FLM that transformers opens as a Llama, and tasks of three kinds on local files."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from telechat_twins.convert.copy import to_hf
from telechat_twins.convert.source import open_model
from telechat_twins.core.checkpoint.save import write_checkpoint
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from tests.support.data_support import VOCAB_SIZE, tiny_tokenizer_path

KINDS = ("choices", "rolling", "answers")
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "word",
    "sound",
    "letter",
    "answer",
    "language",
    "model",
    "question",
]


def write_llama(folder: Path, seed: int = 3, gain: float = 1.0, **sizes: object) -> Path:
    """An exported Tele-FLM without multipliers, whose config.json says Llama, which it then is exactly.

    ``gain``: of all matrices.
    """
    model = load_model_config(
        {"preset": "teleflm-tiny", "vocab_size": VOCAB_SIZE, "input_mult": 1.0, "logit_mult": 1.0, **sizes}
    )
    drawn = init_weights(model, seed).items()
    weights = ((name, value * np.float32(gain) if value.ndim > 1 else value) for name, value in drawn)
    canonical = folder.with_name(folder.name + "-canonical")
    write_checkpoint(canonical, 0, model={"config": model.to_dict()}, weights=weights, assets=[tiny_tokenizer_path()])
    to_hf(open_model(canonical), folder)
    return folder


def as_llama(folder: Path, copy: Path) -> Path:
    """The same folder as transformers' own Llama."""
    copy.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (copy / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config.pop("auto_map", None)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def write_tasks(folder: Path, items: int = 25, choices: int = 4, context: int = 30, seed: int = 0) -> Path:
    """Task files and data: multiple choice with examples in the prompt, rolling likelihood, and generation."""
    chance = random.Random(seed)

    def text(count: int) -> str:
        return " ".join(chance.choices(WORDS, k=count))

    rows: Mapping[str, list[dict[str, object]]] = {
        "choices": [
            {"q": text(context), "choices": [text(chance.randint(1, 5)) for _ in range(choices)], "gold": n % choices}
            for n in range(items)
        ],
        "rolling": [{"text": text(chance.choice([3, 40, 200]))} for _ in range(items)],
        "answers": [{"q": text(6), "gold": text(2)} for _ in range(items)],
    }
    extra = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{q}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "num_fewshot": 2,
            "fewshot_split": "test",
            "fewshot_config": {"sampler": "first_n"},
            "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
        },
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
        },
        "answers": {
            "output_type": "generate_until",
            "doc_to_text": "Question: {{q}}\nAnswer:",
            "doc_to_target": "{{gold}}",
            "generation_kwargs": {"until": ["\n", "fox"], "do_sample": False, "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, found in rows.items():
        place = folder / "data" / "made" / name
        place.mkdir(parents=True)
        lines = [json.dumps(row, ensure_ascii=False) for row in found]
        (place / "test.jsonl").write_text("\n".join(lines) + "\n")
        task = {"task": f"made_{name}", "dataset_path": "made", "dataset_name": name, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps(task | extra[name]))  # JSON is YAML
    return folder
