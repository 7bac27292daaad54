"""A packed data folder for tests, without a tokenizer: ids that a small model can learn, with a mask of odd lengths."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from telechat_twins.core.data.packed import PackedWriter
from telechat_twins.core.data.preference import PreferenceWriter


def write_packed(
    folder: Path, vocab_size: int, seq_len: int, sequences: int = 400, seed: int = 0, tokenizer: Any = None
) -> Path:
    """Write ``folder`` as fine-tuning data: the next id is a few further than the last, with a jump now and then.

    Each sequence counts from another position on, so that micro-batches have different numbers of targets: a mean over
    local tokens is then not the mean over the global batch. Returns ``folder``.
    """
    random = np.random.default_rng(seed)
    with PackedWriter(folder, tokenizer or stand_in_tokenizer(vocab_size), "sft") as writer:
        for _ in range(sequences):
            length = seq_len + 1
            steps = np.where(
                random.random(length) < 0.1, random.integers(0, vocab_size, length), random.integers(1, 5, length)
            )
            mask = np.arange(length) >= random.integers(1, seq_len - 4)
            writer.add_sequence(4 + np.cumsum(steps) % (vocab_size - 4), mask, [0])
        writer.finish()
    return folder


def write_pairs(folder: Path, vocab_size: int, seq_len: int, pairs: int = 24, seed: int = 0) -> Path:
    """Write ``folder`` as preference pairs: after a prompt, the chosen answer counts up, the rejected down."""
    random = np.random.default_rng(seed)
    with PreferenceWriter(folder, stand_in_tokenizer(vocab_size), seq_len) as writer:
        for number in range(pairs):
            prompt = random.integers(4, vocab_size, random.integers(3, seq_len // 3))
            sides = []
            for step in (1, -1):
                count = random.integers(4, seq_len - len(prompt))
                answer = 4 + (prompt[-1] + step * np.arange(1, count + 1)) % (vocab_size - 4)
                mask = np.arange(len(prompt) + count) >= len(prompt)
                sides += [np.concatenate([prompt, answer]), mask]
            writer.add_pair(*sides, f"pair {number}")
        writer.finish()
    return folder


def stand_in_tokenizer(vocab_size: int) -> Any:
    """What a packed folder keeps of a tokenizer, without one."""
    model = b"no tokenizer was needed"
    return SimpleNamespace(
        vocab_size=vocab_size,
        model_bytes=model,
        sha256=hashlib.sha256(model).hexdigest(),
        file_name="tokenizer.model",
        eos_token_id=2,
        variant="chat",
        piece=lambda index: f"piece {index}",
    )
