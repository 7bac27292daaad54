"""The kinds of training that the kill campaign interrupts, each a small run's config with the data that it needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from telechat_twins.core.checkpoint.read import Contents, save_checkpoint
from telechat_twins.core.config import load_run_config
from telechat_twins.core.model.init import init_weights
from tests.support.data_support import VOCAB_SIZE, tiny_tokenizer
from tests.support.packed import write_packed, write_pairs

STEPS, EVERY, KEEP, SEQ_LEN, VOCAB = 24, 2, 2, 16, 512
MODEL = f"{{preset: telechat2-tiny, num_layers: 2, vocab_size: {VOCAB}}}"
_PLAIN = (
    f"model: {MODEL}\n"
    f"data: {{sources: [{{path: packed}}], seq_len: {SEQ_LEN}}}\n"
    f"train: {{steps: {STEPS}, global_batch: 4, micro_batch: 2}}\n"
    "optim: {lr: 1e-3, warmup_steps: 2}\n"
    f"checkpoint: {{every: {EVERY}, keep_last: {KEEP}}}\n"
)
_LORA = "lora: {rank: 4, alpha: 8, dropout: 0.1, targets: [q, v, gate]}\n"


def _plain(folder: Path) -> str:
    write_packed(folder / "packed", VOCAB, SEQ_LEN)
    return _PLAIN


def _lora(folder: Path) -> str:
    return _from_base(_plain(folder), folder) + _LORA


def _preference(folder: Path) -> str:
    write_pairs(folder / "pairs", VOCAB, SEQ_LEN)
    return _PLAIN.replace("path: packed", "path: pairs") + "preference: {beta: 0.1, reference: once}\n"


def _lora_preference(folder: Path) -> str:
    """The reference is the base itself, computed again at every step."""
    return _from_base(_preference(folder).replace("once", "live"), folder) + _LORA


def _stages(folder: Path) -> str:
    """Three lengths of row, of which the second has other data and the last another batch."""
    write_packed(folder / "packed", VOCAB, SEQ_LEN)
    write_packed(folder / "longer", VOCAB, 2 * SEQ_LEN, seed=1)
    stages = (
        f"[{{steps: 9}}, {{steps: 8, seq_len: {2 * SEQ_LEN}, sources: [{{path: longer}}]}}, "
        f"{{steps: 7, seq_len: {3 * SEQ_LEN}, global_batch: 2, micro_batch: 1}}]"
    )
    return _PLAIN.replace(f"steps: {STEPS}, global", f"stages: {stages}, global")


def _held_out(folder: Path) -> str:
    """Keeps the best checkpoint by a loss on other rows."""
    for name, sequences in (("packed", 400), ("held", 8)):
        write_packed(folder / name, VOCAB_SIZE, SEQ_LEN, sequences, seed=sequences, tokenizer=tiny_tokenizer())
    sized = _PLAIN.replace(f"vocab_size: {VOCAB}", f"vocab_size: {VOCAB_SIZE}")
    return sized + "eval: {every: 3, keep_best: true, sources: [{path: held}]}\n"


def _from_base(text: str, folder: Path) -> str:
    """``text`` with ``train.init``: a model of its shape beside it."""
    file = folder / "base.yaml"
    file.write_text(_PLAIN)
    config = load_run_config(file).model
    save_checkpoint(
        folder / "base",
        0,
        Contents(model={"config": config.to_dict()}, weights=init_weights(config, 0).items(), trainer={}),
        keep_last=1,
    )
    return text.replace("train: {", "train: {init: base, ")


RECIPES: dict[str, Callable[[Path], str]] = {
    "plain": _plain,
    "lora": _lora,
    "preference": _preference,
    "lora-preference": _lora_preference,
    "stages": _stages,
    "held-out": _held_out,
}
