"""A small muP search on packed data for tests: run.yaml, the narrow run, and search.yaml, four trials on it."""

from __future__ import annotations

from pathlib import Path

import yaml

from telechat_twins.core.types import JsonObject
from tests.support.numpy_stepper import SEQ_LEN, VOCAB
from tests.support.packed import write_packed

STEPS = 24
SEARCH: JsonObject = {"config": "run.yaml", "grid": {"lr": [0.05, 0.1], "logit_mult": [1.0, 2.0]}, "window": 4}


def write_run(folder: Path) -> Path:
    """Write both files and the data into an empty folder, which is returned."""
    data = write_packed(folder / "data", VOCAB, SEQ_LEN, sequences=60)
    run = {
        "model": {
            "vocab_size": VOCAB, "hidden_size": 8, "ffn_hidden_size": 16, "num_layers": 1, "num_heads": 2,
            "num_kv_heads": 2, "norm_eps": 1e-5, "training_seqlen": SEQ_LEN, "base_seqlen": SEQ_LEN,
            "max_seqlen": SEQ_LEN, "logit_mult": 2.0,
        },
        "data": {"sources": [{"path": str(data)}], "seq_len": SEQ_LEN},
        "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 2},
        "optim": {"lr": 0.05, "min_lr": 0.005, "warmup_steps": 4},
        "checkpoint": {"every": 8},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    write_search(folder)
    return folder


def write_search(folder: Path, **changes: object) -> Path:
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**SEARCH, **changes}.items() if v is not None}))
    return path
