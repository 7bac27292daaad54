"""Options of ``tele serve``: their checks, and what follows from them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.engine import STEP_TOKENS, EngineLimits
from telechat_twins.core.inference.pages import pool_size
from telechat_twins.core.model.config import ModelConfig

MAX_KEY_FILE_BYTES = 1 << 20


def check_options(args: argparse.Namespace) -> None:
    """UserError for a number out of range."""
    for name in (
        "max_len",
        "max_prompt_tokens",
        "max_new_tokens",
        "cache_tokens",
        "max_running",
        "max_body",
        "max_connections",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, found {value}")
    for name in ("max_queue", "max_seconds", "grace"):
        if not 0 <= getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: must be 0 or more, found {getattr(args, name)}")
    if not 0 <= args.port < 65536:
        raise UserError(f"--port: must be 0 to 65535, found {args.port}")


def read_keys(args: argparse.Namespace) -> list[str]:
    """The API keys, of which a client must send one; none if no key is required."""
    if args.api_key is not None:
        keys, source = [args.api_key], "--api-key"
    elif args.api_key_file is not None:
        source = f"--api-key-file {args.api_key_file}"
        try:
            with open(args.api_key_file, "rb") as file:  # may be a pipe
                raw = file.read(MAX_KEY_FILE_BYTES + 1)
            keys = raw.decode("utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{source}: cannot be read ({getattr(error, 'strerror', 'not UTF-8 text')})") from None
        if len(raw) > MAX_KEY_FILE_BYTES:
            raise UserError(
                f"{source}: must have at most {MAX_KEY_FILE_BYTES} bytes, found more; give one key per line"
            )
    else:
        return []
    if not keys or not all(key.isascii() and key.isprintable() and " " not in key and key for key in keys):
        raise UserError(
            f"{source}: a key must consist of printable ASCII characters without spaces, found none or others"
        )
    return keys


def cache_sizes(args: argparse.Namespace, config: ModelConfig) -> tuple[int, EngineLimits]:
    """Number of cache pages, and the engine's limits. UserError when they do not fit the model or each other."""
    max_len = config.max_seqlen if args.max_len is None else args.max_len
    if max_len < 2:
        raise UserError(f"--max-len: must be at least 2, for a prompt and its answer, found {max_len}")
    cache = 4 * max_len if args.cache_tokens is None else args.cache_tokens
    if cache < max_len:
        raise UserError(
            f"--cache-tokens: must be at least --max-len, {max_len}, found {cache}; give more, or a smaller --max-len"
        )
    step_tokens = max(STEP_TOKENS, 2 * args.max_running)
    return pool_size(cache), EngineLimits(max_len=max_len, step_tokens=step_tokens, max_running=args.max_running)


def adapter_paths(args: argparse.Namespace) -> dict[str, str]:
    """Name -> folder of --adapter. UserError for one without a name, and for a name that is taken."""
    name = model_name(args)
    paths: dict[str, str] = {}
    for given in args.adapter:
        adapter, sign, path = given.partition("=")
        if not sign or not path or not adapter.isprintable() or not adapter.strip():
            raise UserError(f"--adapter: expected NAME=DIR, found {given!r}; give the name that clients ask for")
        if adapter in (name, *paths):
            raise UserError(f"--adapter: the name '{adapter}' is taken; give another")
        paths[adapter] = path
    return paths


def model_name(args: argparse.Namespace) -> str:
    """The model's name for clients. UserError for one with unprintable characters."""
    name = args.name or Path(args.checkpoint).resolve().name
    if not name.isprintable() or not name.strip():
        raise UserError(f"--name: expected a name of printable characters, found {name!r}; give another")
    return name
