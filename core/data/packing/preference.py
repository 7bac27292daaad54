"""Packing of preference rows: both sides of a pair in the chat layout, with the loss on their answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from telechat_twins.core.data.chat_layout import ChatLayout
from telechat_twins.core.data.dialogues import Dialogue
from telechat_twins.core.data.forms.streams import UTF8
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.kinds.preference import parse_preference
from telechat_twins.core.data.packing.samples import Sample
from telechat_twins.core.data.preference import PreferenceWriter
from telechat_twins.core.data.prepare import noticed, progress_bar
from telechat_twins.core.data.rows import Unchanged, read_rows, row_files, total_bytes
from telechat_twins.core.data.sft import dialogue_samples
from telechat_twins.core.data.tokenizer import Tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject


def pack_preference(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    drop_long: bool = False,
    layout: ChatLayout | None = None,
    reading: Reading | None = None,
    encoding: str = UTF8,
    force: bool = False,
    quiet: bool = False,
) -> JsonObject:
    """Rows of a chosen and a rejected answer -> packed folder ``out`` of kind "preference"; returns its meta.

    ``layout``: of the model's chats (None: TeleChat2's). UserError with file and line for a side of more than
    ``seq_len`` tokens; ``drop_long`` leaves such pairs out and counts them.
    """
    files = row_files(inputs, "preferences")
    reading = reading if reading is not None else Reading()
    sources, dropped = Unchanged(files), 0
    with (
        PreferenceWriter(out, tokenizer, seq_len, force) as writer,
        progress_bar("packing", total_bytes(files), quiet) as bar,
    ):
        for file in files:
            for where, row in read_rows(file, bar.update, encoding):
                pair = parse_preference(row, where, reading)
                chosen = _encoded(tokenizer, pair.chosen, layout, "chosen")
                rejected = _encoded(tokenizer, pair.rejected, layout, "rejected")
                if drop_long and max(len(chosen[0]), len(rejected[0])) > seq_len:
                    dropped += 1
                    continue
                writer.add_pair(*chosen, *rejected, where)
        sources.check()
        return writer.finish({"inputs": len(files), "dropped_long": dropped, **noticed(reading)})


def _encoded(tokenizer: Tokenizer, side: Dialogue, layout: ChatLayout | None, name: str) -> Sample:
    """One side of a pair. UserError where its answers are not one sequence, since their log-probabilities are summed
    in one."""
    sample, *more = dialogue_samples(tokenizer, side, layout)
    if more:
        raise UserError(
            f"{side.where}: '{name}' has {1 + len(more)} answers, of which chats with this model show the earlier ones "
            "otherwise (without their reasoning); write those into the prompt, so that the last ones are compared"
        )
    return sample
