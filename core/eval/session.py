"""An evaluation by the harness from its options: model, journal, tasks one after another, results, two backends."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from telechat_twins.core.backends import load
from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.compare import SETTLED, compare_items, is_close, lines
from telechat_twins.core.eval.harness import RunOptions, run_task
from telechat_twins.core.eval.identity import identity_of
from telechat_twins.core.eval.journal import Journal
from telechat_twins.core.eval.presets import TaskPlan
from telechat_twins.core.eval.results import OPTIONS, items, read_items, replaced, summarised, table, write_results
from telechat_twins.core.eval.task_index import open_tasks, spelt_out
from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.inference.generation import note_length
from telechat_twins.core.inference.load import Loaded
from telechat_twins.core.inference.pages import PAGE_SIZE
from telechat_twins.core.inference.worker import inference_layout
from telechat_twins.core.launch.run_lock import hold_folder
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

LoadModel = Callable[[argparse.Namespace, str | None, Mapping[str, str]], Loaded]
LaunchRanks = Callable[[argparse.Namespace, Sequence[TaskPlan], Sequence[Path]], int]
STEP_TOKENS = 1024  # of prompts in a step: a product packs its weights once for all of them

MakeEngine = Callable[[Loaded, EngineLimits], Engine]


def check_options(args: argparse.Namespace) -> list[str]:
    """The backends; UserError for options that do not go together."""
    names = args.backends or ([args.backend] if args.backend else [])
    if not names or (args.backends and args.backend) or len(set(names)) < len(names):
        raise UserError("--backend: give ms or pt, or --backends ms pt for both and their differences")
    for name in ("limit", "max_len", "max_running", "cache_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, found {value}")
    if (args.system or args.multiturn) and not args.chat:
        raise UserError("--system, --multiturn: belong to the chat template; add --chat")
    return list(names)


def choose_precision(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Where ``args`` has no precision: fp32, or fp64 where several backends are compared on CPUs, said in a note.

    What two implementations differ by in fp32 is rounding, which reaches 3e-5 in a log-likelihood; accelerators compute
    float64 slowly or not at all.
    """
    if args.precision is not None:
        return
    compared = len(names) > 1 and args.quantize == "none"
    args.precision = "fp64" if compared and all(load(name, "generate").on_cpu() for name in names) else "fp32"
    if args.precision == "fp64":
        print(
            "note: compared in fp64, beyond rounding, in which MindSpore takes some 20 times as long; --precision fp32 "
            "is faster",
            file=sys.stderr,
        )


def require_out(args: argparse.Namespace) -> None:
    """UserError without --out. It is asked for after the tasks are known: a task's misspelt name is told at once."""
    if args.out is None:
        raise UserError("--out: is missing; give the folder of the results")


def evaluate(
    args: argparse.Namespace,
    names: Sequence[str],
    plans: Sequence[TaskPlan],
    include: Sequence[Path],
    load_model: LoadModel,
    launch: LaunchRanks,
) -> int:
    """Run the tasks with each backend, in processes where a layout is given, and compare two; the exit code.

    ``load_model``: core.commands.options's; ``launch``: runs the ranks of a job file.
    """
    manager = open_tasks(plans, include)
    plans = spelt_out(plans, manager)
    found: dict[str, list[JsonObject]] = {}
    require_out(args)
    choose_precision(args, names)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with hold_folder(out, f"--out {out}"):
        for name in names:
            one = copy.copy(args)
            one.backend, one.out = name, str(out / name if len(names) > 1 else out)
            if args.layout is not None and inference_layout(args.layout).world > 1:
                code = launch(one, plans, include)
                if code:
                    return code
                found[name] = read_items(Path(one.out))
            else:
                model = load_model(one, "a text of a task", {} if args.adapter is None else {"": args.adapter})
                found[name] = evaluate_one(one, plans, manager, Path(one.out), model, _engine_of(one))
        if len(names) > 1:
            _compare(out, (names[0], names[1]), found, args.precision)
    return 0


def _engine_of(args: argparse.Namespace) -> MakeEngine:
    def made(model: Loaded, limits: EngineLimits) -> Engine:
        size = model.short_page
        return model.engine_with(cache_pages(model, args, size), limits, page_size=size)

    return made


def evaluate_one(
    args: argparse.Namespace,
    plans: Sequence[TaskPlan],
    manager: TaskManager,
    out: Path,
    model: Loaded,
    make_engine: MakeEngine,
) -> list[JsonObject]:
    """Run all tasks with one model; the items of all."""
    from telechat_twins.core.eval.adapter import EngineModel, Served
    from telechat_twins.core.eval.scorer import Scorer
    from telechat_twins.core.inference.requests import turn_stops

    assert model.tokenizer is not None  # load_model refuses a checkpoint without one
    config, max_len = model.config, context_of(model, args)
    note_length(config, max_len)
    facts = _facts(args, model)
    out.mkdir(parents=True, exist_ok=True)
    stops = turn_stops(model.tokenizer, config) if args.chat else config.stop_ids
    served = Served(config, model.tokenizer, max_len, stops, model.layout if args.chat else None, args.add_bos)
    tasks: dict[str, JsonObject] = {}
    rows: list[JsonObject] = []
    if former := replaced(out, facts, plans):
        print(
            f"note: {out / 'results.json'} of an earlier run is replaced ({former}); its command gives it again, from "
            "the answers in the journal",
            file=sys.stderr,
        )
    with Journal(out / "journal.jsonl", facts["identity"]) as journal:
        if journal.earlier:
            print(f"note: {journal.earlier} answers of an earlier run are used again", file=sys.stderr)
        engine = make_engine(
            model, EngineLimits(max_len=max_len + 1, max_running=args.max_running, step_tokens=STEP_TOKENS)
        )
        adapter = EngineModel(served, Scorer(engine, len(model.adapters)), journal, _bars(args.quiet))
        for plan in plans:
            adapter.cut = adapter.crossed = 0
            found = run_task(plan, adapter, manager, _options(args))
            answered = list(items(found))
            counts = {"cut": adapter.cut, "crossed": adapter.crossed, "close": _close(answered, args.precision)}
            tasks[plan.name] = {**summarised(plan, found), **counts}
            rows += answered
            for note in _notes(counts, max_len):
                print(f"note: {plan.name}: {note}", file=sys.stderr)
            write_results(out, facts, tasks, rows)  # after each task: nothing is lost
    print(*table(tasks), sep="\n")
    return rows


def _close(answered: Sequence[JsonObject], precision: str) -> int:
    """Items whose choice float32's rounding could turn over, where that is the precision."""
    close = {(row["task"], row["item"]) for row in answered if is_close(row["answers"])}
    return len(close) if precision == "fp32" else 0


def _notes(counts: Mapping[str, int], max_len: int) -> Iterator[str]:
    """What is to be said of a task by its ``cut``, ``crossed`` and ``close``."""
    if counts["cut"]:
        yield f"{counts['cut']} requests were cut from the left to {max_len} tokens (--max-len)"
    if counts["crossed"]:
        yield (
            f"in {counts['crossed']} requests a token lies over the border of context and choice; the harness then "
            "scores a part of the choice"
        )
    if counts["close"]:
        yield f"in {counts['close']} items two choices are closer than fp32 rounds; {SETTLED}"


def _options(args: argparse.Namespace) -> RunOptions:
    return RunOptions(
        data=Path(args.data) if args.data else None,
        limit=args.limit,
        chat=args.chat,
        multiturn=args.multiturn,
        system=args.system,
        unsafe=args.run_unsafe_code,
        quiet=args.quiet,
    )


def context_of(model: Loaded, args: argparse.Namespace) -> int:
    """Tokens of context and answer together."""
    return int(args.max_len or model.config.training_seqlen)


def cache_pages(model: Loaded, args: argparse.Namespace, page_size: int = PAGE_SIZE) -> int:
    """Pages of the cache, at least for one whole context."""
    longest = context_of(model, args) + 1
    return model.pages(max(args.cache_tokens or 16 * longest, longest), page_size=page_size)


def _facts(args: argparse.Namespace, model: Loaded) -> JsonObject:
    """What results.json says of model and options; ``identity`` is all that answers depend on."""
    from importlib.metadata import version

    settings = ("backend", "checkpoint", "adapter", "precision", "quantize", "data", *OPTIONS)
    return {
        **{name: getattr(args, name) for name in settings},
        "versions": {name: version(name) for name in ("lm_eval", "datasets", "numpy")},
        "identity": identity_of(args, model),
    }


def _bars(quiet: bool):  # type: ignore[no-untyped-def]  # adapter.OpenBar, which is not imported here
    @contextmanager
    def bar(what: str, total: int) -> Iterator[tqdm]:
        with tqdm(total=total, desc=what, disable=quiet, delay=1.0) as made:
            yield made

    return bar


def _compare(out: Path, names: tuple[str, str], found: dict[str, list[JsonObject]], precision: str) -> None:
    tasks = compare_items(found[names[0]], found[names[1]])
    print(*lines(names, tasks, precision), sep="\n")
    write_text(out / "differences.json", json.dumps({"backends": names, "tasks": tasks}, indent=2) + "\n")
