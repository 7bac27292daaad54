"""A checkpoint opened for inference: configuration, tokenizer and engine."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core import backends
from telechat_twins.core.checkpoint.adapter import Adapter
from telechat_twins.core.checkpoint.source import WeightSource
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.adapters import pair_reader
from telechat_twins.core.inference.decoding.settings import NONE, Settings, find_settings
from telechat_twins.core.inference.pages import PAGE_SIZE, pool_size
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.quantize import quantizing
from telechat_twins.core.model.xpos_range import check_xpos_range, say_xpos_range
from telechat_twins.core.shown import message_line

if TYPE_CHECKING:
    from telechat_twins.core.data.chat_layout import ChatLayout
    from telechat_twins.core.data.tokenizer import Tokenizer
    from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.model.config import with_table_dtype


@dataclasses.dataclass
class Loaded:
    """An opened checkpoint with its configuration and tokenizer (None without one), from which engines are made.
    ``adapters`` by name: their numbers (Request.adapter) count from 1 in this order."""

    args: argparse.Namespace
    source: WeightSource
    config: ModelConfig
    tokenizer: Tokenizer | None
    layout: ChatLayout | None = None  # of chats; None without a tokenizer, or for one that cannot hold a dialogue
    adapters: dict[str, Adapter] = dataclasses.field(default_factory=dict)
    settings: Settings = dataclasses.field(default_factory=Settings)  # of the release, as --generation-config chooses

    def engine(self, max_len: int, samples: int = 1) -> Engine:
        """An engine on the backend, with the weights loaded and a cache for ``samples`` sequences of ``max_len``."""
        check_xpos_range(self.config, self.args.precision, max_len)
        return self.engine_with(self.pages(max_len, samples))

    def engine_with(
        self, pages: int, limits: EngineLimits | None = None, reuse: bool = True, page_size: int = PAGE_SIZE
    ) -> Engine:
        """An engine on the backend, with the weights loaded and a cache of ``pages`` pages; ``reuse`` as in Engine."""
        from telechat_twins.core.inference.engine import Engine

        if limits is not None and limits.max_len is not None:
            check_xpos_range(self.config, self.args.precision, limits.max_len)
        module = backends.load(self.args.backend, "generate")
        get = quantizing(self.config, self.source.tensor) if self.args.quantize == "int8" else self.source.tensor
        pairs = [pair_reader(adapter) for adapter in self.adapters.values()]
        runner = module.Runner(self.config, get, pages, self.args.precision, page_size, adapters=pairs)
        return Engine(
            runner,
            self.tokenizer,
            rescale=self.args.rescale,
            reuse=reuse,
            limits=limits,
            adapters=len(pairs),
        )

    @staticmethod
    def pages(max_len: int, samples: int = 1, page_size: int = PAGE_SIZE) -> int:
        """Pages of a cache for ``samples`` sequences of ``max_len`` tokens, the blank page included."""
        return samples * (pool_size(max_len, page_size) - 1) + 1

    @property
    def short_page(self) -> int:
        """Tokens of a page, for many sequences with common beginnings: what the backend's device reads well."""
        return int(backends.load(self.args.backend, "generate").short_page())


def load_model(
    args: argparse.Namespace, need_tokenizer: str | None, open_source: Callable[[str], WeightSource]
) -> Loaded:
    """Open the checkpoint with ``open_source``, and its tokenizer. ``need_tokenizer``: the option that requires one.

    UserError, before weights are read, when the backend, the checkpoint or a required tokenizer is missing or when they
    do not fit together.
    """
    from telechat_twins.core.data.chat_layout import open_layout
    from telechat_twins.core.data.tokenizer import check_vocabulary, load_tokenizer

    backends.load(args.backend, "generate")  # reports a missing framework before anything is read
    source = open_source(args.checkpoint)
    for note in source.notes:
        print(f"note: {message_line(note)}", file=sys.stderr)
    config = with_table_dtype(source.config, args.table_dtype)
    say_xpos_range(config, args.precision, config.max_seqlen)
    path = args.tokenizer or source.tokenizer_path
    config = without_padding(config, path, own=args.tokenizer is None)
    if path is None and need_tokenizer:
        raise UserError(
            f"{args.checkpoint}: has no tokenizer, which {need_tokenizer} needs; give --tokenizer PATH, "
            "or token ids to `tele generate --ids`"
        )
    tokenizer, layout = None, None
    # Where no text is needed, a tokenizer beside the checkpoint is not loaded, so that a damaged one is no obstacle.
    if path is not None and (need_tokenizer or args.tokenizer):
        tokenizer = load_tokenizer(path, control=args.control, in_vocabulary=True)
        check_vocabulary(tokenizer, config)
        for note in tokenizer.special.begins_note("--add-bos") if getattr(args, "add_bos", None) is False else ():
            print(f"note: {message_line(note)}", file=sys.stderr)
        if args.chat_template is not None:  # None: no chats, so a template that cannot be used is no obstacle
            layout, notes = open_layout(tokenizer, args.chat_template, [Path(args.checkpoint)])
            for note in notes:
                print(f"note: {message_line(note)}", file=sys.stderr)
    # Evaluations have their own settings and no such option.
    settings = find_settings(getattr(args, "generation_config", NONE), source.assets, config)
    return Loaded(args, source, config, tokenizer, layout, settings=settings)


def without_padding(config: ModelConfig, path: str | Path | None, own: bool) -> ModelConfig:
    """``config`` with its number of real tokens set by the tokenizer at ``path``: the other rows of the vocabulary are
    padding, which is noted on stderr."""
    from telechat_twins.core.data.tokenizer import load_tokenizer
    from telechat_twins.core.data.vocabulary import fit_vocabulary

    if path is None:
        return config
    try:
        tokenizer = load_tokenizer(path, control="none")
    except UserError:
        return config  # where text is needed, load_model refuses this tokenizer; without text it is no obstacle
    config, note = fit_vocabulary(config, tokenizer.vocab_size, own, tokenizer.special.described, path)
    if note is not None:
        print(f"note: {note}", file=sys.stderr)
    return config
