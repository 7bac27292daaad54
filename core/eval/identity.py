"""Identity of an evaluation: what answers depend on, by which a journal is continued or refused."""

from __future__ import annotations

import argparse

from telechat_twins.core.checkpoint.fingerprint import fingerprint
from telechat_twins.core.inference.adapters import adapters_digest
from telechat_twins.core.inference.load import Loaded
from telechat_twins.core.types import JsonObject

DECIDING = ("precision", "quantize", "table_dtype", "rescale", "add_bos", "chat_template", "max_len")


def identity_of(args: argparse.Namespace, model: Loaded) -> JsonObject:
    """Backend, weights, adapter, tokenizer, and the options of DECIDING."""
    assert model.tokenizer is not None  # load_model refuses a checkpoint without one
    return {
        "backend": args.backend,
        "weights": fingerprint(model.source.config, model.source.read),
        "adapter": adapters_digest(model.adapters.values()),
        "tokenizer": model.tokenizer.sha256,
        **{name: getattr(args, name) for name in DECIDING},
    }
