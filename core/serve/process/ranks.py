"""A server whose model spans processes: rank 0 serves, the others execute the steps that it broadcasts."""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from telechat_twins.core import backends
from telechat_twins.core.checkpoint.adapter import Adapter
from telechat_twins.core.checkpoint.source import OpenReader
from telechat_twins.core.inference.adapters import pair_reader
from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.inference.followers import Leader, follow, shard_reader
from telechat_twins.core.inference.load import Loaded
from telechat_twins.core.inference.worker import inference_layout
from telechat_twins.core.parallel.sharding import chunk_table
from telechat_twins.core.serve.process.options import adapter_paths, cache_sizes
from telechat_twins.core.serve.process.run import serve_model
from telechat_twins.core.serve.server import open_socket

# core.commands.options.load_model: options, what needs a tokenizer, adapters by name, whether files are verified
LoadModel = Callable[[argparse.Namespace, str, Mapping[str, str], bool], Loaded]


def write_job(path: Path, args: argparse.Namespace, keys: Sequence[str]) -> None:
    """Write a job file for the ranks, which only this user can read: it has the API keys."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump({"args": vars(args), "keys": list(keys)}, file)


def serve_rank(
    path: Path, load: LoadModel, open_reader: OpenReader, open_adapter: Callable[[str, str], Adapter]
) -> int:
    """This rank's part of the job at ``path``: rank 0 has the engine and the server, the others execute its steps. The
    functions open the model, its weights, and adapters."""
    job = json.loads(path.read_text(encoding="utf-8"))
    args = argparse.Namespace(**job["args"])
    layout, folders = inference_layout(args.layout), adapter_paths(args)
    model = load(args, "tele serve", folders, False)
    config = model.config
    mesh = backends.load(args.backend, "parallelize").open_mesh(config, layout)
    table = chunk_table(config, layout, mesh.coord)
    get = shard_reader(config, table, open_reader(args.checkpoint), args.quantize)
    boxes = {name: shard.index for name, shard in table.items()}
    adapters = [pair_reader(open_adapter(args.checkpoint, folder), boxes) for folder in folders.values()]
    make = backends.load(args.backend, "generate").Runner
    runner = make(config, get, cache_sizes(args, config)[0], args.precision, mesh=mesh, adapters=adapters)
    if mesh.rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 ends when its answers are complete, and then the others
        follow(runner)
    else:
        leader = Leader(runner)

        def make_engine(_: int, limits: EngineLimits) -> Engine:
            reuse = not args.no_prompt_reuse
            return Engine(
                leader, model.tokenizer, rescale=args.rescale, reuse=reuse, limits=limits, adapters=len(adapters)
            )

        with open_socket(args.host, args.port) as opened:
            serve_model(args, opened, job["keys"], model, make_engine, leader.idle)
        leader.close()
    backends.load(args.backend, "mesh").leave()
    return 0
