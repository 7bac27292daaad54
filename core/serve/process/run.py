"""The server of one model, from an engine that is still to be made to the last answer."""

from __future__ import annotations

import argparse
import hashlib
import json
import socket
import sys
import time
from collections.abc import Callable, Sequence

from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.inference.generation import generate, note_length
from telechat_twins.core.inference.load import Loaded
from telechat_twins.core.inference.sampling import SamplingConfig
from telechat_twins.core.serve.app import HttpLimits, create_app
from telechat_twins.core.serve.hosts import allowed_hosts, is_local
from telechat_twins.core.serve.job import Served
from telechat_twins.core.serve.process.options import cache_sizes, model_name
from telechat_twins.core.serve.server import address_of, allow_connections, serve
from telechat_twins.core.serve.service import Service
from telechat_twins.core.shown import message_line

SPARE_CONNECTIONS = 128  # beside those being answered: for /health, /metrics, and clients that are idle


def serve_model(
    args: argparse.Namespace,
    opened: socket.socket,
    keys: Sequence[str],
    model: Loaded,
    make_engine: Callable[[int, EngineLimits], Engine],
    idle: Callable[[], None] | None = None,
) -> None:
    """Serve a model on a listening socket until a signal.

    ``keys``: API keys; ``make_engine`` makes the engine for a number of cache pages; ``idle`` as in Service.
    """
    connections = args.max_connections or SPARE_CONNECTIONS + args.max_running + args.max_queue
    allow_connections(connections)
    listening = opened.getsockname()[0]
    hosts = allowed_hosts(listening, args.host, args.allowed_host)
    pages, engine_limits = cache_sizes(args, model.config)
    for note in model.settings.note({}, draws=True):
        print(f"note: {message_line(note)}", file=sys.stderr)
    print(f"loading {args.checkpoint}", file=sys.stderr, flush=True)
    engine = make_engine(pages, engine_limits)
    warm_up(engine)
    try:
        engine.grammars.prepare()
    except UserError as error:
        print(f"note: formats of answers and forced tool calls are refused: {error}", file=sys.stderr)
    served = served_model(args, model, engine)
    service = Service(engine, args.max_queue, idle)
    app = create_app(service, served, HttpLimits(body=args.max_body, seconds=args.max_seconds), keys, hosts)
    cache = engine.pool.capacity
    print(
        f"{served.name}: context {served.context} tokens, cache {cache} tokens "
        f"({cache * bytes_per_token(model) / 2**20:,.0f} MiB), {args.max_running} answers at once",
        file=sys.stderr,
    )
    note_length(model.config, served.context)
    if not keys and not is_local(listening):
        print(
            "note: every client that reaches this address can use the server; --api-key-file requires a key",
            file=sys.stderr,
        )

    def ready() -> None:
        address = address_of(opened)
        print(f"serving {', '.join(served.names)} at {address}", flush=True)
        print(
            f"a browser gets the chat page there; OpenAI clients take base_url {address}/v1; Ctrl-C ends the server",
            file=sys.stderr,
            flush=True,
        )

    serve(app, service, opened, args.grace, ready, connections)


def warm_up(engine: Engine) -> None:
    """Generate two tokens, so that compilation and allocation on first use do not delay the first client and a broken
    model is detected at the start. UserError when its logits are not finite."""
    start = engine.config.bos_token_id
    prompt = [start] * min(4, engine.max_len - 1)
    generate(engine, prompt, SamplingConfig(), min(2, engine.max_len - len(prompt)))


def served_model(args: argparse.Namespace, model: Loaded, engine: Engine) -> Served:
    """Description of the model for clients."""
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


def bytes_per_token(model: Loaded) -> int:
    """Bytes of keys and values per token, in all layers."""
    config = model.config
    width = config.head_dim * config.num_kv_heads * config.num_layers
    return 2 * width * {"fp64": 8, "fp32": 4, "amp": 4}.get(model.args.precision, 2)
