"""``tele serve``: serves a model over HTTP with the OpenAI API, and a chat page."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core.backends import install_command
from telechat_twins.core.commands.options import add_model_arguments, load_model
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.load import Loaded
from telechat_twins.core.shown import printable

if TYPE_CHECKING:
    from telechat_twins.core.inference.engine import Engine, EngineLimits
    from telechat_twins.core.model.config import ModelConfig
    from telechat_twins.core.serve.job import Served

EPILOG = """\
examples:
  tele serve --backend pt --checkpoint model
  tele serve --backend ms --checkpoint model --host 0.0.0.0 --api-key-file keys.txt --name telechat2-7b
  tele serve --backend pt --checkpoint model --adapter law=runs/law --adapter code=peft/code
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "model", "messages": [{"role": "user", "content": "Hello"}]}'

Routes: /v1/chat/completions, /v1/responses, /v1/completions, /v1/models, /health, /metrics, and / for the chat page.
On SIGTERM or Ctrl-C new requests get 503, and running ones have --grace seconds; a second signal ends them at once."""

MAX_KEY_FILE_BYTES = 1 << 20
SPARE_CONNECTIONS = 128  # beside those being answered: for /health, /metrics, and clients that are idle
MISSING = f"fastapi and uvicorn are not installed; run: {install_command('serve')}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele serve``."""
    parser.epilog = EPILOG
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (8000); 0: any free one")
    parser.add_argument("--name", metavar="NAME", help="the model's name to clients (default: the checkpoint's folder)")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="low-rank adapter (LoRA) of the model that clients get by this name: trained here, or a PEFT folder (may "
        "be given again: answers through different adapters are made in one batch)",
    )
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument(
        "--api-key", metavar="KEY", help="key that clients must send; visible to other users of the machine"
    )
    keys.add_argument("--api-key-file", metavar="F", help="file of such keys, one per line")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name that clients may use, beside local ones (may be given several times; *: any)",
    )
    parser.add_argument(
        "--no-prompt-reuse", action="store_true", help="compute every prompt anew, without the cache of common prefixes"
    )
    parser.add_argument("--max-len", type=int, metavar="N", help="tokens of prompt and answer (the model's max_seqlen)")
    parser.add_argument("--max-prompt-tokens", type=int, metavar="N", help="tokens of a prompt (--max-len - 1)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of an answer (--max-len - 1)")
    parser.add_argument("--cache-tokens", type=int, metavar="N", help="size of the key-value cache (4 x --max-len)")
    parser.add_argument("--max-running", type=int, default=32, metavar="N", help="answers generated at once (32)")
    parser.add_argument("--max-queue", type=int, default=128, metavar="N", help="answers that may wait (128)")
    parser.add_argument(
        "--max-connections", type=int, metavar="N", help="open connections (--max-running + --max-queue + 128)"
    )
    parser.add_argument("--max-seconds", type=float, default=600.0, metavar="S", help="time limit of a request (600)")
    parser.add_argument(
        "--max-body", type=int, default=4 << 20, metavar="BYTES", help="size of a request's body (4 MiB)"
    )
    parser.add_argument(
        "--grace", type=float, default=30.0, metavar="S", help="time for running answers during shutdown (30)"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    try:
        from telechat_twins.core.serve.app import HttpLimits, create_app
        from telechat_twins.core.serve.hosts import allowed_hosts, is_local
        from telechat_twins.core.serve.server import address_of, allow_connections, open_socket, serve
        from telechat_twins.core.serve.service import Service
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise UserError(MISSING) from None

    check_options(args)
    adapters = adapter_paths(args)
    keys = read_keys(args)
    connections = args.max_connections or SPARE_CONNECTIONS + args.max_running + args.max_queue
    allow_connections(connections)
    with open_socket(args.host, args.port) as opened:  # before the weights, which may take minutes
        listening = opened.getsockname()[0]
        hosts = allowed_hosts(listening, args.host, args.allowed_host)
        model = load_model(args, "tele serve", adapters)
        for note in model.settings.note({}, draws=True):
            print(f"note: {printable(note)}", file=sys.stderr)
        pages, engine_limits = cache_sizes(args, model.config)
        print(f"loading {args.checkpoint}", file=sys.stderr, flush=True)
        engine = model.engine_with(pages, engine_limits, reuse=not args.no_prompt_reuse)
        warm_up(engine)
        try:
            engine.grammars.prepare()
        except UserError as error:
            print(f"note: formats of answers and forced tool calls are refused: {error}", file=sys.stderr)
        served = served_model(args, model, engine)
        service = Service(engine, args.max_queue)
        app = create_app(service, served, HttpLimits(body=args.max_body, seconds=args.max_seconds), keys, hosts)
        cache = engine.pool.capacity
        print(
            f"{served.name}: context {served.context} tokens, cache {cache} tokens "
            f"({cache * bytes_per_token(model) / 2**20:,.0f} MiB), {args.max_running} answers at once",
            file=sys.stderr,
        )
        if not keys and not is_local(listening):
            print(
                "note: every client that reaches this address can use the server; --api-key-file requires a key",
                file=sys.stderr,
            )

        def ready() -> None:
            print(f"serving {', '.join(served.names)} at {address_of(opened)}", flush=True)

        serve(app, service, opened, args.grace, ready, connections)
    return 0


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
    from telechat_twins.core.inference.engine import STEP_TOKENS, EngineLimits
    from telechat_twins.core.inference.pages import pool_size

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


def warm_up(engine: Engine) -> None:
    """Generate two tokens, so that compilation and allocation on first use do not delay the first client and a broken
    model is detected at the start. UserError when its logits are not finite."""
    from telechat_twins.core.inference.generation import generate
    from telechat_twins.core.inference.sampling import SamplingConfig

    start = engine.config.bos_token_id
    prompt = [start] * min(4, engine.max_len - 1)
    generate(engine, prompt, SamplingConfig(), min(2, engine.max_len - len(prompt)))


def served_model(args: argparse.Namespace, model: Loaded, engine: Engine) -> Served:
    """Description of the model for clients."""
    from telechat_twins.core.serve.job import Served

    about = json.dumps(
        [args.backend, args.precision, args.rescale, model.config.to_dict()], sort_keys=True, default=str
    )
    context = engine.max_len
    assert model.tokenizer is not None  # load_model requires one of the server
    return Served(
        name=model_name(args),
        config=model.config,
        tokenizer=model.tokenizer,
        context=context,
        max_prompt=min(args.max_prompt_tokens or context, context - 1),
        max_new=min(args.max_new_tokens or context, context - 1),
        created=int(time.time()),
        fingerprint="fp_" + hashlib.sha256(about.encode()).hexdigest()[:12],
        add_bos=args.add_bos,
        layout=model.layout,
        adapters=tuple(model.adapters),
        settings=model.settings,
        grammars=engine.grammars,
    )


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


def bytes_per_token(model: Loaded) -> int:
    """Bytes of keys and values per token, in all layers."""
    config = model.config
    width = config.head_dim * config.num_kv_heads * config.num_layers
    return 2 * width * {"fp64": 8, "fp32": 4, "amp": 4}.get(model.args.precision, 2)
