"""A packed data folder for tests, without a tokenizer: ids that a small model can learn, with a mask of odd lengths."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from telechat_twins.core.data.packed import PackedWriter


def write_packed(folder: Path, vocab_size: int, seq_len: int, sequences: int = 400, seed: int = 0) -> Path:
    """Write ``folder`` as fine-tuning data: the next id is a few further than the last, with a jump now and then.

    Each sequence counts from another position on, so that micro-batches have different numbers of targets: a mean over
    local tokens is then not the mean over the global batch. Returns ``folder``.
    """
    model = b"no tokenizer was needed"
    stand_in = SimpleNamespace(
        vocab_size=vocab_size,
        model_bytes=model,
        sha256=hashlib.sha256(model).hexdigest(),
        variant="chat",
        piece=lambda index: f"piece {index}",
    )
    random = np.random.default_rng(seed)
    with PackedWriter(folder, stand_in, "sft") as writer:
        for _ in range(sequences):
            length = seq_len + 1
            steps = np.where(
                random.random(length) < 0.1, random.integers(0, vocab_size, length), random.integers(1, 5, length)
            )
            mask = np.arange(length) >= random.integers(1, seq_len - 4)
            writer.add_sequence(4 + np.cumsum(steps) % (vocab_size - 4), mask, [0])
        writer.finish()
    return folder
