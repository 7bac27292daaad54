"""Rank process of ``tele generate`` over several processes.

The launcher starts convert/generation_rank.py, which passes in the function that opens weights.

Rank 0 has the engine and the tokenizer. It appends the generated text to the file ``text`` beside the job file, from
which the command shows it, and finally writes its events to ``samples.json``. The other ranks execute the steps that it
broadcasts (core.inference.followers).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from telechat_twins.core import backends
from telechat_twins.core.checkpoint.adapter import Adapter
from telechat_twins.core.checkpoint.source import OpenReader
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.adapters import pair_reader
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.followers import Leader, follow, shard_reader
from telechat_twins.core.inference.generation import answer
from telechat_twins.core.inference.requests import Event, PromptScores, Request, Usage
from telechat_twins.core.inference.sampling import SamplingConfig, TokenChoice
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.parallel.layout import Layout, parse_layout
from telechat_twins.core.parallel.sharding import chunk_table
from telechat_twins.core.schema import from_mapping
from telechat_twins.core.types import JsonObject


@dataclasses.dataclass(frozen=True)
class GenerationJob:
    """Job description for the ranks: model, layout and precision, one request, and the path of the tokenizer."""

    backend: str
    checkpoint: str
    config: ModelConfig
    layout: str
    precision: str
    quantize: str
    rescale: str
    pages: int
    request: Request
    tokenizer: str | None
    control: str
    adapter: str | None = None


def inference_layout(text: str) -> Layout:
    """The layout for generation from its text; without sequence parallelism, since a step has few tokens.

    UserError for the axes dp, ulysses and virtual, which generation does not have.
    """
    layout = parse_layout(text)
    for axis, size in (("dp", layout.dp), ("ulysses", layout.ulysses), ("virtual", layout.virtual)):
        if size > 1:
            raise UserError(
                f"--layout: generation has the axes tp, pp and ring only, found {axis} {size} in '{text}'; leave it out"
            )
    return dataclasses.replace(layout, sequence_parallel=False)


def write_job(path: Path, job: GenerationJob) -> None:
    """Write a job file for the ranks."""
    request = dataclasses.asdict(job.request)
    request["stop_ids"] = sorted(job.request.stop_ids)
    values = {**dataclasses.asdict(job), "config": job.config.to_dict(), "request": request}
    path.write_text(json.dumps(values), encoding="utf-8")


def read_job(path: Path) -> GenerationJob:
    """The job from ``write_job``'s file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    request = values["request"]
    request |= {
        "prompt_ids": tuple(request["prompt_ids"]),
        "stop_ids": frozenset(request["stop_ids"]),
        "stop_texts": tuple(request["stop_texts"]),
        "next_ids": tuple(request["next_ids"]),
        "logit_bias": {int(token): value for token, value in request["logit_bias"].items()},
        "sampling": SamplingConfig(**request["sampling"]),
    }
    values |= {"config": from_mapping(ModelConfig, values["config"], "config"), "request": Request(**request)}
    return GenerationJob(**values)


def write_events(path: Path, events: Sequence[Event], seconds: float) -> None:
    """Write all events of a request and the seconds that it took."""
    made = {"seconds": seconds, "events": [_plain(event) for event in events]}
    path.write_text(json.dumps(made), encoding="utf-8")


def read_events(path: Path) -> tuple[list[Event], float]:
    """The events and the seconds from ``write_events``'s file."""
    found, made = [], json.loads(path.read_text(encoding="utf-8"))
    for values in made["events"]:
        if values["choice"] is not None:
            values["choice"] = _choice(values["choice"])
        if values["scores"] is not None:
            tokens, following, top = values["scores"]
            scores = PromptScores(tuple(map(_choice, tokens)), tuple(following), tuple((i, p) for i, p in top))
            values["scores"] = scores
        if values["usage"] is not None:
            values["usage"] = Usage(**values["usage"])
        found.append(Event(**values))
    return found, made["seconds"]


def _choice(values: tuple[int, float | None, float | None, list[tuple[int, float]]]) -> TokenChoice:
    token, margin, logprob, top = values
    return TokenChoice(token, margin, logprob, tuple((i, p) for i, p in top))


def _plain(event: Event) -> JsonObject:
    values = dataclasses.asdict(event)
    return values | {
        "choice": None if event.choice is None else list(event.choice),
        "scores": None if event.scores is None else list(event.scores),
    }


OpenAdapter = Callable[[str, str], Adapter]  # (folder of the model, folder of the adapter)


def serve_rank(path: Path, open_reader: OpenReader, open_adapter: OpenAdapter) -> int:
    """Run this rank's part of the job at ``path``; the two functions open the weights and the adapter."""
    from telechat_twins.core.data.tokenizer import load_tokenizer

    job = read_job(path)
    layout = inference_layout(job.layout)
    mesh = backends.load(job.backend, "parallelize").open_mesh(job.config, layout)
    table = chunk_table(job.config, layout, mesh.coord)
    get = shard_reader(job.config, table, open_reader(job.checkpoint), job.quantize)
    make = backends.load(job.backend, "generate").Runner
    boxes = {name: shard.index for name, shard in table.items()}
    adapters = [] if job.adapter is None else [pair_reader(open_adapter(job.checkpoint, job.adapter), boxes)]
    runner = make(job.config, get, job.pages, job.precision, mesh=mesh, adapters=adapters)
    if mesh.rank:
        follow(runner)
    else:
        tokenizer = job.tokenizer and load_tokenizer(job.tokenizer, control=job.control, in_vocabulary=True)
        leader = Leader(runner)
        engine = Engine(leader, tokenizer or None, rescale=job.rescale, adapters=len(adapters))
        events, started = [], time.perf_counter()
        with open(path.parent / "text", "a", encoding="utf-8") as text:
            for event in answer(engine, job.request):
                events.append(event)
                if event.sample == 0:
                    text.write(event.text)
                    text.flush()
        seconds = time.perf_counter() - started
        leader.close()
        write_events(path.parent / "samples.json", events, seconds)
    backends.load(job.backend, "mesh").leave()
    return 0
