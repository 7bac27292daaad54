"""IQ suites as a folder of lm-evaluation-harness tasks: any model of the harness can be scored by it.

    lm-eval run --include_path DIR --tasks iq --model hf --model_args pretrained=...

The folder holds a task file and a data file for each task, the group ``iq``, and manifest.json: seed, options and
SHA-256 of every item.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.iq import interference, patterns, rules
from telechat_twins.core.eval.iq.items import LANGUAGES, Draw, IQOptions, Item, Suite
from telechat_twins.core.eval.iq.symbolic import SOURCES, symbolic_items
from telechat_twins.core.eval.presets import TaskPlan
from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.types import JsonObject

SUITES: tuple[Suite, ...] = (*rules.SUITES, *patterns.SUITES, *interference.SUITES)
VERSION = 2
SPACE = [r"^\s+", r"\s+$"]  # around an answer does not count


def generate(suite: Suite, language: str, options: IQOptions, size: int | None = None) -> Iterator[Item]:
    """The items of a suite, no two equal: item n is a function of seed, suite, language and n alone."""
    seen: set[str] = set()
    for number in range(size or suite.size):
        item = suite.make(Draw(options.seed, suite.name, language, number), options, language)
        again = 0
        while item.hash in seen:
            again += 1
            if again > 1000:
                raise UserError(f"{suite.name}: has no {size or suite.size} different items with these options")
            item = suite.make(Draw(options.seed, suite.name, language, number, again), options, language)
        seen.add(item.hash)
        yield item


def plans(names: Sequence[str]) -> list[TaskPlan]:
    """The tasks of a written folder with their published scores."""
    published: dict[str, Mapping[str, float]] = {suite.name: suite.scores for suite in SUITES}
    published |= {name: source.scores for name, source in SOURCES.items()}
    metric = {name: "acc" if name.removeprefix("iq_") in SOURCES else "exact_match" for name in names}
    return [TaskPlan(name, None, metric[name], published[_suite_of(name)]) for name in names]


def _suite_of(name: str) -> str:
    bare = name.removeprefix("iq_")
    return bare if bare in SOURCES else bare.rsplit("_", 1)[0]


def write_tasks(
    folder: Path,
    options: IQOptions,
    size: int | None = None,
    languages: Iterable[str] = LANGUAGES,
    rows: Path | None = None,
) -> list[str]:
    """Write the folder, new, empty, or of the very same items; returns the tasks' names. ``rows``: folder with
    <source>.jsonl of SuperGLUE and CLUE, for symbolic mapping of those that are there."""
    made: dict[str, tuple[list[Item], int]] = {}
    for suite in SUITES:
        for language in languages:
            made[f"iq_{suite.name}_{language}"] = list(generate(suite, language, options, size)), suite.shots
    files = {name: rows / f"{name}.jsonl" for name in SOURCES} if rows is not None else {}
    found = {name: file for name, file in files.items() if file.is_file()}
    if rows is not None and not found:
        raise UserError(f"--rows {rows}: has none of {', '.join(f'{name}.jsonl' for name in SOURCES)}")
    for name, file in found.items():
        items = symbolic_items(name, file, options)
        made[f"iq_{name}"] = items[:size] if size else items, options.shots_a_label
    manifest = json.dumps(_manifest(options, made), indent=1) + "\n"
    if folder.exists() and any(folder.iterdir()):
        before = folder / "manifest.json"
        if before.is_file() and before.read_text(encoding="utf-8", errors="replace") == manifest:
            return list(made)
        raise UserError(f"{folder}: holds something else than these tasks; remove it or give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, (items, _) in made.items():
            lines = [{"prompt": item.prompt, "answer": item.answer, "choices": list(item.choices)} for item in items]
            write_text(folder / f"{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            write_text(folder / f"{name}.yaml", json.dumps(_task(name, folder, items), indent=1) + "\n")  # JSON is YAML
        write_text(folder / "iq.yaml", json.dumps({"group": "iq", "task": list(made)}, indent=1) + "\n")
        write_text(folder / "manifest.json", manifest)  # last: it stands for the whole folder
    except BaseException:  # of a full disk or Ctrl-C: a part of the tasks would be refused when they are written again
        for name in [*made, "iq"]:
            for kind in ("jsonl", "yaml"):
                (folder / f"{name}.{kind}").unlink(missing_ok=True)
        raise
    return list(made)


def _task(name: str, folder: Path, items: Sequence[Item]) -> JsonObject:
    longest = max(len(item.answer.encode()) for item in items)
    task: JsonObject = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((folder / f"{name}.jsonl").resolve())}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "num_fewshot": 0,  # the examples are in the prompt
        "metadata": {"version": VERSION},
    }
    if items[0].choices:
        task |= {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{choices.index(answer)}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    else:
        exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "regexes_to_ignore": SPACE}
        task |= {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            # A token is a byte at least, so the longest right answer always fits.
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": longest + 8},
            "metric_list": [exact],
        }
    return task


def _manifest(options: IQOptions, made: Mapping[str, tuple[list[Item], int]]) -> JsonObject:
    return {
        "version": VERSION,
        "options": dataclasses.asdict(options),
        "tasks": {
            name: {"items": len(items), "shots": shots, "sha256": [item.hash for item in items]}
            for name, (items, shots) in made.items()
        },
    }
