"""An evaluation whose model spans processes: rank 0 evaluates, the others execute the steps that it broadcasts."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from telechat_twins.core import backends
from telechat_twins.core.checkpoint.adapter import Adapter
from telechat_twins.core.checkpoint.source import OpenReader
from telechat_twins.core.eval.harness import require_harness
from telechat_twins.core.eval.presets import TaskPlan
from telechat_twins.core.eval.session import LoadModel, cache_pages, evaluate_one
from telechat_twins.core.eval.task_index import open_tasks
from telechat_twins.core.inference.adapters import pair_reader
from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.inference.followers import Leader, follow, shard_reader
from telechat_twins.core.inference.load import Loaded
from telechat_twins.core.inference.worker import inference_layout
from telechat_twins.core.parallel.sharding import chunk_table

OpenAdapter = Callable[[str, str], Adapter]  # (folder of the model, folder of the adapter)


def write_job(path: Path, args: argparse.Namespace, plans: Sequence[TaskPlan], include: Sequence[Path]) -> None:
    """Write a job file for the ranks; ``args`` name one backend and its folder of results."""
    values = {
        "args": vars(args),
        "plans": [{**dataclasses.asdict(plan), "published": dict(plan.published)} for plan in plans],
        "include": [str(folder.resolve()) for folder in include],
    }
    path.write_text(json.dumps(values), encoding="utf-8")


def serve_rank(path: Path, load_model: LoadModel, open_reader: OpenReader, open_adapter: OpenAdapter) -> int:
    """Run this rank's part of the job at ``path``."""
    job = json.loads(path.read_text(encoding="utf-8"))
    args = argparse.Namespace(**job["args"])
    plans = [TaskPlan(**plan) for plan in job["plans"]]
    layout = inference_layout(args.layout)
    model = load_model(args, "a text of a task", {} if args.adapter is None else {"": args.adapter})
    config = model.config
    mesh = backends.load(args.backend, "parallelize").open_mesh(config, layout)
    table = chunk_table(config, layout, mesh.coord)
    get = shard_reader(config, table, open_reader(args.checkpoint), args.quantize)
    boxes = {name: shard.index for name, shard in table.items()}
    adapters = [] if args.adapter is None else [pair_reader(open_adapter(args.checkpoint, args.adapter), boxes)]
    make = backends.load(args.backend, "generate").Runner
    runner = make(config, get, cache_pages(model, args), args.precision, mesh=mesh, adapters=adapters)
    if mesh.rank:
        follow(runner)
    else:
        require_harness()
        leader = Leader(runner)

        def engine(model: Loaded, limits: EngineLimits) -> Engine:
            return Engine(leader, model.tokenizer, rescale=args.rescale, limits=limits, adapters=len(adapters))

        manager = open_tasks(plans, [Path(folder) for folder in job["include"]])
        evaluate_one(args, plans, manager, Path(args.out), model, engine)
        leader.close()
    backends.load(args.backend, "mesh").leave()
    return 0
