"""Held-out sources of a run: a fixed subset of rows of each, and the bytes of text that their tokens stand for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from telechat_twins.core.config import DataSourceConfig, RunConfig
from telechat_twins.core.data.blend import Blend, open_blend
from telechat_twins.core.data.tokenizer import Tokenizer, load_tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.batch import IGNORE, Batch

SEED = 0  # of the subset: the same rows in every run, whatever train.seed is


@dataclass(frozen=True)
class HeldOutSource:
    """Rows 0 .. ``rows`` - 1 of ``blend``'s order; ``lengths`` int64 [V]: bytes of text of each token."""

    name: str
    blend: Blend
    rows: int
    lengths: np.ndarray

    def batch(self, first: int, count: int) -> Batch:
        """Rows first .. first + count - 1; those past the end have no targets, so that every rank has equally many."""
        batch = self.blend.batch(first, count)
        past = np.arange(first, first + count) >= self.rows
        return dataclasses.replace(batch, targets=np.where(past[:, None], np.int32(IGNORE), batch.targets))

    def num_bytes(self, batch: Batch) -> int:
        """Bytes of text of the targets of ``batch``."""
        return int(self.lengths[batch.targets[batch.targets != IGNORE]].sum())


def open_held_out(config: RunConfig, trained: Blend) -> list[HeldOutSource]:
    """The sources of ``eval``, none without that section. UserError as open_blend, and for preference pairs or another
    tokenizer than that of the data ``trained``."""
    if config.eval is None:
        return []
    found = []
    for number, source in enumerate(config.eval.sources):
        where = f"eval.sources[{number}]"
        data = dataclasses.replace(config.data, sources=[DataSourceConfig(path=source.path)])
        try:
            blend = open_blend(data, SEED, config.model.num_tokens, config.model.filler_id)
        except UserError as error:
            raise UserError(str(error).replace("data.sources[0]", where)) from None
        if blend.pairs:
            raise UserError(f"{where}: {source.path} holds preference pairs, which have no held-out loss; give text")
        if blend.tokenizer() != trained.tokenizer():
            raise UserError(
                f"{where}: {source.path} was made by another tokenizer than the data; pack it with that one"
            )
        tokenizer = load_tokenizer(Path(source.path) / blend.tokenizer_name, control="none")
        rows = min(blend.num_rows, config.eval.batches * config.train.global_batch)
        found.append(HeldOutSource(source.label, blend, rows, byte_lengths(tokenizer)))
    return found


def trained_on(config: RunConfig) -> list[str]:
    """Warnings for sources of ``eval`` that the run trains on, too: their loss says nothing of other text."""
    if config.eval is None:
        return []
    stages = [stage.sources or [] for stage in config.train.stages or []]
    trained = {Path(source.path).resolve() for sources in (config.data.sources, *stages) for source in sources}
    return [
        f"warning: eval.sources[{number}]: {source.path} is trained on, too; its loss says nothing of other text"
        for number, source in enumerate(config.eval.sources)
        if Path(source.path).resolve() in trained
    ]


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each token adds, int64 [V]; 0 for control tokens."""
    sizes = (
        0 if tokenizer.is_silent(token) else len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)
    )
    return np.fromiter(sizes, np.int64, tokenizer.vocab_size)
