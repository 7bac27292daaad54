"""``tele serve``: a model over HTTP, in the OpenAI interface, with a page to chat on."""

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

if TYPE_CHECKING:
    from telechat_twins.core.inference.engine import Engine, EngineLimits
    from telechat_twins.core.model.config import ModelConfig
    from telechat_twins.core.serve.job import Served

EPILOG = """\
examples:
  tele serve --backend pt --checkpoint model
  tele serve --backend ms --checkpoint model --host 0.0.0.0 --api-key-file keys.txt --name telechat2-7b
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "model", "messages": [{"role": "user", "content": "Hello"}]}'

paths: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics, and / for a page to chat on.
SIGTERM or Ctrl-C: new requests get 503, running ones have --grace seconds; a second one ends them at once."""

MOST_KEYS = 1 << 20  # bytes of a file of keys
SPARE_CONNECTIONS = 128  # for /health and the like, and for clients that have yet to ask
MISSING = f"fastapi and uvicorn are not installed; run: {install_command('serve')}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele serve``."""
    parser.epilog = EPILOG
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (8000); 0 takes any free one")
    parser.add_argument("--name", metavar="NAME", help="the model's name to clients (default: the checkpoint's folder)")
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument("--api-key", metavar="KEY", help="clients must send it; on a shared machine others may see it")
    keys.add_argument("--api-key-file", metavar="F", help="the same, from a file with a key a line")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that clients may ask for beside this machine's own (may be given again; * allows any)",
    )
    parser.add_argument(
        "--no-prompt-reuse", action="store_true", help="compute every prompt, though one before began alike"
    )
    parser.add_argument("--max-len", type=int, metavar="N", help="tokens of prompt and answer (the model's max_seqlen)")
    parser.add_argument("--max-prompt-tokens", type=int, metavar="N", help="of these, the prompt's (all but one)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of these, an answer's (all but one)")
    parser.add_argument("--cache-tokens", type=int, metavar="N", help="keys and values kept, in tokens (4 x --max-len)")
    parser.add_argument("--max-running", type=int, default=32, metavar="N", help="answers made at once (32)")
    parser.add_argument("--max-queue", type=int, default=128, metavar="N", help="answers that may wait (128)")
    parser.add_argument(
        "--max-connections", type=int, metavar="N", help="open at once (128 more than answers made and waiting)"
    )
    parser.add_argument("--max-seconds", type=float, default=600.0, metavar="S", help="for a request, all told (600)")
    parser.add_argument("--max-body", type=int, default=4 << 20, metavar="BYTES", help="of a request's body (4 MiB)")
    parser.add_argument("--grace", type=float, default=30.0, metavar="S", help="to end running answers at the end (30)")


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
    model_name(args)
    keys = read_keys(args)
    connections = args.max_connections or SPARE_CONNECTIONS + args.max_running + args.max_queue
    allow_connections(connections)
    with open_socket(args.host, args.port) as opened:  # before the weights, which may take minutes
        listening = opened.getsockname()[0]
        hosts = allowed_hosts(listening, args.host, args.allowed_host)
        model = load_model(args, "tele serve")
        pages, engine_limits = cache_sizes(args, model.config)
        print(f"loading {args.checkpoint}", file=sys.stderr, flush=True)
        engine = model.engine_with(pages, engine_limits, reuse=not args.no_prompt_reuse)
        warm_up(engine)
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
            print("note: everybody who reaches this address can use it; --api-key-file asks for a key", file=sys.stderr)

        def ready() -> None:
            print(f"serving {served.name} at {address_of(opened)}", flush=True)

        serve(app, service, opened, args.grace, ready, connections)
    return 0


def check_options(args: argparse.Namespace) -> None:
    """UserError on a number that makes no sense."""
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
    """The keys of which a client must send one; none when everybody may ask."""
    if args.api_key is not None:
        keys, source = [args.api_key], "--api-key"
    elif args.api_key_file is not None:
        source = f"--api-key-file {args.api_key_file}"
        try:
            with open(args.api_key_file, "rb") as file:  # a pipe is as good as a file here
                raw = file.read(MOST_KEYS + 1)
            keys = raw.decode("utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{source}: cannot be read ({getattr(error, 'strerror', 'not UTF-8 text')})") from None
        if len(raw) > MOST_KEYS:
            raise UserError(f"{source}: has more than {MOST_KEYS} bytes; expected a key a line")
    else:
        return []
    if not keys or not all(key.isascii() and key.isprintable() and " " not in key and key for key in keys):
        raise UserError(f"{source}: expected a key of letters, digits and signs, without spaces")
    return keys


def cache_sizes(args: argparse.Namespace, config: ModelConfig) -> tuple[int, EngineLimits]:
    """Pages of the cache, and the engine's limits. UserError when one does not fit the model or another one."""
    from telechat_twins.core.inference.engine import STEP_TOKENS, EngineLimits
    from telechat_twins.core.inference.pages import pool_size

    max_len = config.max_seqlen if args.max_len is None else args.max_len
    if max_len < 2:
        raise UserError(f"--max-len: a prompt and its answer need 2 tokens at least, found {max_len}")
    cache = 4 * max_len if args.cache_tokens is None else args.cache_tokens
    if cache < max_len:
        raise UserError(
            f"--cache-tokens: {cache} cannot hold one sequence of {max_len} tokens; give more, or a smaller --max-len"
        )
    step_tokens = max(STEP_TOKENS, 2 * args.max_running)
    return pool_size(cache), EngineLimits(max_len=max_len, step_tokens=step_tokens, max_running=args.max_running)


def warm_up(engine: Engine) -> None:
    """Make two tokens, so that the first client does not wait for what is compiled or allocated on first use, and a
    broken model is found now. UserError when its logits are not finite."""
    from telechat_twins.core.inference.generation import generate
    from telechat_twins.core.inference.sampling import SamplingConfig

    start = engine.config.bos_token_id
    prompt = [start] * min(4, engine.max_len - 1)
    generate(engine, prompt, SamplingConfig(), min(2, engine.max_len - len(prompt)))


def served_model(args: argparse.Namespace, model: Loaded, engine: Engine) -> Served:
    """What clients are told of the model."""
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
    )


def model_name(args: argparse.Namespace) -> str:
    """The model's name to clients. UserError for one that cannot be printed."""
    name = args.name or Path(args.checkpoint).resolve().name
    if not name.isprintable() or not name.strip():
        raise UserError(f"--name: expected a name of printable characters, found {name!r}; give another")
    return name


def bytes_per_token(model: Loaded) -> int:
    """Of keys and values, in all layers."""
    config = model.config
    width = config.head_dim * config.num_kv_heads * config.num_layers
    return 2 * width * {"fp64": 8, "fp32": 4, "amp": 4}.get(model.args.precision, 2)
