"""The formats of the corruption campaign: how a small folder of each is made, and how all of it is read.

What is read is told apart by a digest over every number and text that a command would use: the same digest means that
the damage did not matter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from telechat_twins.convert.copy import to_hf, to_mindformers
from telechat_twins.convert.growth.files import grow_checkpoint, plan_checkpoint
from telechat_twins.convert.growth.plan import Options
from telechat_twins.convert.mindformers.source import Known, MindFormersSource
from telechat_twins.convert.source import CanonicalSource, ModelSource, open_model
from telechat_twins.core.checkpoint.read import write_checkpoint
from telechat_twins.core.data.packed import PackedDataset, PackedWriter, verify
from telechat_twins.core.data.tokenizer import load_tokenizer
from telechat_twins.core.data.tokenizer_training import train_tokenizer
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.growth import read_history
from telechat_twins.core.model.init import init_weights
from tests.support.data_support import SENTENCES, VOCAB_SIZE, tiny_tokenizer, tiny_tokenizer_path

CONFIG = ModelConfig(
    vocab_size=VOCAB_SIZE, hidden_size=16, ffn_hidden_size=24, num_layers=2, num_heads=2, num_kv_heads=1, norm_eps=1e-5,
    training_seqlen=64, base_seqlen=64, max_seqlen=64,
)  # fmt: skip


@dataclass(frozen=True)
class Format:
    """``make(folder, seed)`` writes an intact folder, whose content follows from the seed; ``read(folder)`` reads all
    of it and returns its digest. ``hashed(folder, file)``: whether an intact folder has a hash of the file, so that no
    damage to it may be silent. ``inside``: the hash lies in the file itself, and another whole file has its own."""

    make: Callable[[Path, int], Any]
    read: Callable[[Path], str]
    hashed: Callable[[Path, str], bool] = lambda folder, file: False
    inside: bool = False


def digest(parts: Iterable[Any]) -> str:
    """SHA-256 over arrays (with dtype and shape), bytes and whatever has a repr."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype}{part.shape}".encode())
            part = part.tobytes()
        found.update(part if isinstance(part, bytes) else repr(part).encode())
    return found.hexdigest()


def _checkpoint(folder: Path, seed: int) -> None:
    weights = init_weights(CONFIG, seed)
    moments = {f"{kind}.{name}": array * np.float32(0.5) for kind in "mv" for name, array in weights.items()}
    trainer = {"step": 5, "optimizer_steps": 5, "samples": 20, "tokens": 640, "config": {"model": CONFIG.to_dict()}}
    write_checkpoint(
        folder,
        5,
        model={"config": CONFIG.to_dict()},
        weights=weights.items(),
        optimizer=moments.items(),
        trainer={**trainer, "seed": seed},
        assets=[tiny_tokenizer_path()],
        max_file_bytes=200_000,
    )


def _grown(folder: Path, seed: int) -> None:
    before = folder.with_name(f"{folder.name}-before")
    _checkpoint(before, seed)
    source = open_model(before)
    assert isinstance(source, CanonicalSource)
    target = dataclasses.replace(CONFIG, hidden_size=32, num_heads=4, num_kv_heads=2, num_layers=3)
    plan = plan_checkpoint(source.checkpoint, target, Options(seed=seed))
    grow_checkpoint(source.checkpoint, folder, plan)
    shutil.rmtree(before)


def _read_model(source: ModelSource) -> Iterable[Any]:
    yield source.config
    for name in source.names():
        yield name
        yield source.tensor(name)
    if source.tokenizer_path is not None:
        yield load_tokenizer(source.tokenizer_path).encode(SENTENCES[0])


def _read_checkpoint(folder: Path) -> str:
    source = open_model(folder)
    assert isinstance(source, CanonicalSource)
    checkpoint = source.checkpoint
    state = [checkpoint.step, checkpoint.model, checkpoint.trainer, read_history(checkpoint.model, str(folder))]
    moments = [checkpoint.read("optimizer", name) for name in checkpoint.names("optimizer")]
    return digest([*_read_model(source), *state, *moments, *(asset.read_bytes() for asset in checkpoint.assets)])


def _release(folder: Path, seed: int, sums: bool) -> None:
    before = folder.with_name(f"{folder.name}-before")
    _checkpoint(before, seed)
    to_hf(open_model(before), folder, max_shard_bytes=40_000, sums=sums)
    shutil.rmtree(before)


def _read_release(folder: Path) -> str:
    return digest(_read_model(open_model(folder)))


def _mindformers(folder: Path, seed: int, file_format: str, mp: int) -> None:
    before = folder.with_name(f"{folder.name}-before")
    _checkpoint(before, seed)
    to_mindformers(open_model(before), folder, "plain", mp, file_format=file_format)
    shutil.rmtree(before)


def _read_mindformers(folder: Path) -> str:
    return digest(_read_model(MindFormersSource(folder, Known(folder))))


def _has_crc(folder: Path, file: str) -> bool:
    """Whether MindSpore's checksum ends the file; the small files beside it have none."""
    return file.endswith(".ckpt") and b"crc_num" in (folder / file).read_bytes()[-64:]


def _packed(folder: Path, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    tokenizer = tiny_tokenizer()
    with PackedWriter(folder, tokenizer, kind) as writer:
        for _ in range(40):
            ids = rng.integers(4, VOCAB_SIZE, int(rng.integers(20, 90)))
            if kind == "sft":
                writer.add_sequence(ids[:33], np.arange(len(ids[:33])) > 5, [0, 10])
            else:
                writer.start_document()
                writer.add_tokens(ids)
        writer.finish({"max_length": 32} if kind == "sft" else None)


def _read_packed(folder: Path) -> str:
    dataset = PackedDataset(folder)
    dataset.check_seq_len(32)
    verify(folder)
    samples = [array for n in range(dataset.num_samples(32)) for array in dataset.sample(n, 32, 3, isolate=True)]
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    return digest([*samples, dataset.vocab_size, dataset.kind, tokenizer.model_bytes])


def _tokenizer(folder: Path, seed: int) -> None:
    folder.mkdir()
    if seed % 2:
        train_tokenizer([*SENTENCES[::-1] * 20, " ".join(f"w{n}" for n in range(300))], folder / "tokenizer.model", 560)
    else:
        shutil.copy(tiny_tokenizer_path(), folder / "tokenizer.model")


def _read_tokenizer(folder: Path) -> str:
    tokenizer = load_tokenizer(folder, in_vocabulary=True)
    ids = [tokenizer.encode(text, allow_control=True) for text in (*SENTENCES, "<_user>a<_bot>b", "①½\U0001f600")]
    texts = [tokenizer.decode(row) for row in ids]
    stream = tokenizer.stream()
    pieces = [stream.push(index) for row in ids for index in row]
    return digest([tokenizer.vocab_size, tokenizer.control, ids, texts, pieces, stream.flush()])


def _always(folder: Path, file: str) -> bool:
    return True


FORMATS: dict[str, Format] = {
    "canonical checkpoint": Format(_checkpoint, _read_checkpoint, _always),
    "grown checkpoint": Format(_grown, _read_checkpoint, _always),
    "release with sums": Format(partial(_release, sums=True), _read_release, _always),
    "release": Format(partial(_release, sums=False), _read_release),
    "packed text": Format(partial(_packed, kind="text"), _read_packed, _always),
    "packed dialogues": Format(partial(_packed, kind="sft"), _read_packed, _always),
    "tokenizer": Format(_tokenizer, _read_tokenizer),
    "MindFormers safetensors": Format(partial(_mindformers, file_format="safetensors", mp=1), _read_mindformers),
    "MindFormers .ckpt": Format(partial(_mindformers, file_format="ckpt", mp=1), _read_mindformers, _has_crc, True),
}
