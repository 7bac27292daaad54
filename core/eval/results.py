"""Results of an evaluation as files: results.json, results.md, and a line per item in items.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from telechat_twins.core.eval.presets import TaskPlan
from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.shown import printable
from telechat_twins.core.types import JsonObject

FORMAT = 1
OPTIONS = ("chat", "multiturn", "system", "limit")  # on which scores depend, and answers only as they are asked


def summarised(plan: TaskPlan, found: JsonObject) -> JsonObject:
    """The entry of one task in results.json, from the harness's results.

    ``score``: the plan's metric, or else the first, in per cent where it is a share. ``metrics`` has all of them by
    "metric,filter"; ``parts`` those of the tasks of a group.
    """
    results: Mapping[str, JsonObject] = found["results"]
    own = {name: value for name, value in results[plan.name].items() if _is_number(value) and name != "sample_len"}
    key = _score_key(plan.metric, own)
    error = None if key is None else results[plan.name].get(key.replace(",", "_stderr,", 1))
    return {
        "shots": _shots(plan, found),
        "metric": key,
        "score": None if key is None else own[key],
        "stderr": error if _is_number(error) else None,
        "metrics": own,
        "published": dict(plan.published),
        "items": sum(_items(samples) for samples in found.get("samples", {}).values()),
        "parts": {
            name: {key: value for key, value in values.items() if _is_number(value) and key != "sample_len"}
            for name, values in results.items()
            if name != plan.name
        },
    }


def items(found: JsonObject) -> Iterator[JsonObject]:
    """The items of the harness's results: a task's document with the model's answers.

    ``answers`` are [log-likelihood, greedy] of each choice, a log-likelihood, or a text.
    """
    for task, samples in found.get("samples", {}).items():
        for sample in samples:
            yield {
                "task": task,
                "item": sample["doc_id"],
                "filter": sample["filter"],
                "hash": sample["doc_hash"],
                "target": _plain(sample["target"]),
                "answers": [_plain(answer) for answer in sample["filtered_resps"]],
                "metrics": {name: _plain(sample[name]) for name in sample["metrics"]},
            }


def write_results(folder: Path, facts: JsonObject, tasks: Mapping[str, JsonObject], rows: Sequence[JsonObject]) -> None:
    """Write the three files below ``folder``. ``facts``: of the model and the options."""
    whole = {"format": FORMAT, **facts, "tasks": tasks}
    lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_text(folder / "items.jsonl", lines)
    write_text(folder / "results.json", json.dumps(whole, ensure_ascii=False, indent=2, default=str) + "\n")
    write_text(folder / "results.md", markdown(facts, tasks))


def replaced(folder: Path, facts: JsonObject, plans: Sequence[TaskPlan]) -> str:
    """What a run of ``plans`` will no longer find in the results of ``folder``: tasks that it does not have, options
    and shots that it has otherwise; "" for nothing, and for no results."""
    try:
        former = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        tasks, shots = former["tasks"], {plan.name: plan.shots for plan in plans}
        gone = [name for name in tasks if name not in shots]
        other = [f"--{name}" for name in OPTIONS if former.get(name, facts[name]) != facts[name]]
        if any(shots.get(name) not in (None, task["shots"]) for name, task in tasks.items()):
            other.append("--shots")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    parts = ((f"scores of {printable(', '.join(gone), 200)}", gone), (f"other {', '.join(other)}", other))
    return "; ".join(part for part, told in parts if told)


def read_items(folder: Path) -> list[JsonObject]:
    """The items that write_results wrote."""
    with open(folder / "items.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def markdown(facts: JsonObject, tasks: Mapping[str, JsonObject]) -> str:
    """The table of results, beside the published scores."""
    models = list(dict.fromkeys(model for task in tasks.values() for model in task["published"]))
    head = ["task", "shots", "metric", "items", "score", "± stderr", *models]
    lines = [f"# {facts.get('checkpoint', 'model')} ({facts.get('backend', '')}, {facts.get('precision', '')})", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, task in _rows(tasks):
        cells = [name, task["shots"], (task["metric"] or "").partition(",")[0], task["items"], _share(task, "score")]
        cells += [_share(task, "stderr"), *(task["published"].get(model, "") for model in models)]
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    scored = [task["score"] for task in tasks.values() if task["score"] is not None and 0 <= task["score"] <= 1]
    if len(scored) == len(tasks) > 1:
        lines += ["", f"Average: {100 * sum(scored) / len(scored):.2f}"]
    return "\n".join(lines) + "\n"


def table(tasks: Mapping[str, JsonObject]) -> list[str]:
    """The lines of the console."""
    width = max((len(name) for name, _ in _rows(tasks)), default=4) + 2
    lines = [f"{'task':<{width}}{'shots':>6}{'items':>8}{'score':>10}{'stderr':>11}  metric"]
    for name, task in _rows(tasks):
        shots, count = "" if task["shots"] is None else task["shots"], task["items"] or ""
        score, error = _share(task, "score"), _share(task, "stderr") or ""
        metric = (task["metric"] or "").partition(",")[0]
        published = "".join(f"  ({model} {value})" for model, value in task["published"].items())
        lines.append(f"{name:<{width}}{shots:>6}{count:>8}{score or '-':>10}{error:>11}  {metric}{published}")
    return lines


def _rows(tasks: Mapping[str, JsonObject]) -> Iterator[tuple[str, JsonObject]]:
    """The rows of a table: all tasks, and the parts of a group that has no score of its own."""
    for name, task in tasks.items():
        yield name, task
        for part, values in task["parts"].items() if task["score"] is None else ():
            if (key := _score_key(None, values)) is not None:
                error = values.get(key.replace(",", "_stderr,", 1))
                row = {"shots": None, "items": None, "metric": key, "score": values[key], "stderr": error}
                yield f"- {part}", {**row, "published": {}}


def _share(task: JsonObject, key: str) -> str | None:
    """A share in per cent; a number above 1, such as a perplexity, as it is."""
    value = task[key]
    if value is None:
        return None
    share = task["score"] is not None and 0 <= task["score"] <= 1
    return f"{100 * value:.2f}" if share else f"{value:.4g}"


def _score_key(metric: str | None, own: Mapping[str, float]) -> str | None:
    keys = [key for key in own if "_stderr" not in key]
    wanted = [key for key in keys if metric is None or key.partition(",")[0] == metric]
    return next(iter(wanted or keys), None)


def _shots(plan: TaskPlan, found: JsonObject) -> int | None:
    shots = found.get("n-shot", {})
    values = {value for name, value in shots.items() if _is_number(value)}
    return shots.get(plan.name, values.pop() if len(values) == 1 else plan.shots)


def _items(samples: Sequence[JsonObject]) -> int:
    return len({sample["doc_id"] for sample in samples})


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: object) -> object:
    """A value as JSON can hold it."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    item = getattr(value, "item", None)  # a number of numpy
    return _plain(item()) if callable(item) else str(value)
