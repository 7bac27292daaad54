"""The reference pages, written from the program: keys of a run's YAML from the schema, options from the parsers.

`python docs/reference.py` writes docs/reference/config.md, cli.md and their Chinese editions. What the program says in
English of keys and options, docs/reference/words.zh.json says in Chinese; a test compares the pages with this, and
names what has no translation, or no use for one, any more.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from telechat_twins.core import cli  # noqa: E402
from telechat_twins.core.config import RunConfig  # noqa: E402
from telechat_twins.core.model.config import preset_names  # noqa: E402
from telechat_twins.core.mup.search import SearchConfig  # noqa: E402

FOLDER = ROOT / "docs" / "reference"

WORDS = {
    "en": {
        "config": "Configuration reference",
        "config_intro": "Every key of the YAML file that `tele train --config` reads, written by `docs/reference.py` "
        "from the schema (`core/config.py`: `RunConfig`). An unknown key is refused, and so is a value outside the "
        "column *legal*. `--set section.key=value` overrides one key. *required* in the column *default* means that "
        "the key has none. [Training](../training.md) explains how the sections work together.",
        "cli": "Command reference",
        "cli_intro": "Every option of every verb, written by `docs/reference.py` from the parsers; `tele VERB --help` "
        "prints the same. Exit codes: 0 success, 1 an unexpected error or a broken bound, 2 an error in the input.",
        "keys": ("key", "type", "default", "legal", "meaning"),
        "options": ("option", "default", "meaning"),
        "search": "A search",
        "search_intro": "The YAML file of `tele mup search`:",
        "required": "required",
        "item": "each of",
        "end": ".",
    },
    "zh": {
        "config": "配置参考",
        "config_intro": "`tele train --config` 所读 YAML 文件的全部键，由 `docs/reference.py` 根据配置模式"
        "（`core/config.py`: `RunConfig`）生成。不认识的键会被拒绝，超出“合法值”一列的值也会被拒绝。"
        "`--set section.key=value` 覆盖一个键。“默认值”一列的“必填”表示必须给出。"
        "各节怎样配合，见[训练](../training.zh.md)。",
        "cli": "命令参考",
        "cli_intro": "每个子命令的全部选项，由 `docs/reference.py` 根据解析器生成，"
        "与 `tele VERB --help` 的输出相同；方框里是程序打印的英文说明，表格里的说明译自程序。"
        "退出码：0 成功；1 意外的错误或超限；2 输入有误。",
        "keys": ("键", "类型", "默认值", "合法值", "说明"),
        "options": ("选项", "默认值", "说明"),
        "search": "超参数搜索",
        "search_intro": "`tele mup search` 的 YAML 文件：",
        "required": "必填",
        "item": "其中每一项",
        "end": "。",
        **{"text": "文本", "whole number": "整数", "number": "数", "true or false": "true 或 false", "mapping": "映射"},
        **{"list of {}": "列表，每项为{}", " or ": " 或 ", "see below": "见下", "empty": "空"},
        **{"above": "大于", "at least": "至少", "at most": "至多", "below": "小于"},
    },
}
Words = dict[str, typing.Any]
SAID: dict[str, str] = json.loads((FOLDER / "words.zh.json").read_text(encoding="utf-8"))
met: dict[str, None] = {}  # what the pages have said, in English


def said(text: str, words: Words) -> str:
    """What the program says of a key or an option, in the page's language."""
    presets = ", ".join(preset_names())
    plain = text.replace(presets, "{presets}")
    met[plain] = None
    return SAID.get(plain, plain).replace("{presets}", presets) if words is WORDS["zh"] else text


def untranslated() -> list[str]:
    """What words.zh.json has to gain or to lose."""
    pages()
    lost = [text for text in met if text and text not in SAID]
    return [f"translate: {text}" for text in lost] + [f"take out: {text}" for text in SAID if text not in met]


def cell(text: str) -> str:
    """Text that stays within one cell of a table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]


# Configuration


def config_page(words: Words) -> str:
    """The page of the configuration, section by section."""
    lines = [f"# {words['config']}", "", words["config_intro"], ""]
    hints = typing.get_type_hints(RunConfig)
    for field in dataclasses.fields(RunConfig):
        kind = _dataclass_in(hints[field.name])
        lines += [f"## {field.name}", "", cell(said(field.metadata["help"], words)) + words["end"], ""]
        if kind is not None:
            lines += _keys(kind, field.name, words)
            continue
        row = (f"`{field.name}`", *_facts(hints[field.name], field, words))
        lines += table(words["keys"], [(*row, cell(said(field.metadata["help"], words)))])
    lines += [f"## {words['search']}", "", words["search_intro"], "", *_keys(SearchConfig, "", words)]
    return "\n".join(lines).rstrip() + "\n"


def _keys(kind: type, prefix: str, words: Words) -> list[str]:
    """The table of a section's keys, then those of the sections inside it."""
    rows, inner = [], []
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        name = f"{prefix}.{field.name.removesuffix('_')}" if prefix else field.name
        help_text = field.metadata.get("help", "")
        rows.append((f"`{name}`", *_facts(hints[field.name], field, words), cell(said(help_text, words))))
        below = _dataclass_in(hints[field.name])
        if below is not None and any("help" in f.metadata for f in dataclasses.fields(below)):
            several = typing.get_origin(_without_none(hints[field.name])) is list
            inner.append((name + ("[]" if several else ""), below))
    lines = table(words["keys"], rows)
    for name, below in inner:
        lines += [f"{words['item']} `{name}`:" if name.endswith("[]") else f"`{name}`:", "", *_keys(below, name, words)]
    return lines


def _facts(kind: typing.Any, field: dataclasses.Field[typing.Any], words: Words) -> tuple[str, str, str]:
    return _type(kind, words), _default(field, words), _legal(field.metadata, words)


def _without_none(kind: typing.Any) -> typing.Any:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _dataclass_in(kind: typing.Any) -> type | None:
    kind = _without_none(kind)
    if typing.get_origin(kind) in (list, tuple):
        kind = typing.get_args(kind)[0]
    return kind if dataclasses.is_dataclass(kind) and isinstance(kind, type) else None


def _type(kind: typing.Any, words: Words) -> str:
    """A type as a user of YAML would call it."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return words.get(" or ", " or ").join(dict.fromkeys(_type(part, words) for part in typing.get_args(kind)))
    if typing.get_origin(kind) in (list, tuple):
        return words.get("list of {}", "list of {}").format(_type(typing.get_args(kind)[0], words))
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
    name = names.get(kind, "mapping")
    return words.get(name, name)


def _default(field: dataclasses.Field[typing.Any], words: Words) -> str:
    value = field.default
    if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return words["required"]
    if dataclasses.is_dataclass(value):
        return words.get("see below", "see below")
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return (
        f"`{cell(str(list(value) if isinstance(value, tuple) else value))}`"
        if value != ""
        else words.get("empty", "empty")
    )


def _legal(limits: typing.Mapping[str, typing.Any], words: Words) -> str:
    if "choices" in limits:
        return ", ".join(f"`{choice}`" for choice in limits["choices"])
    kinds = (("above", "above"), ("min", "at least"), ("max", "at most"), ("below", "below"))
    return ", ".join(f"{words.get(says, says)} {limits[key]:,}" for key, says in kinds if key in limits)


# Commands


def cli_page(words: Words) -> str:
    """The page of the command line, group by group as `tele --help` has them."""
    lines = [f"# {words['cli']}", "", words["cli_intro"], ""]
    for verbs in cli.GROUPS.values():
        for verb in verbs:
            command = cli.command_module(verb)
            parser = cli.Parser(prog=f"tele {verb}", description=command.__doc__ or verbs[verb])
            command.add_arguments(parser)
            for level, inner, summary in _parsers(parser):
                lines += _verb(inner, level, summary, words)
    return "\n".join(lines).rstrip() + "\n"


def _parsers(
    parser: argparse.ArgumentParser, level: int = 2, summary: str = ""
) -> Iterator[tuple[int, argparse.ArgumentParser, str]]:
    """A parser, then those of its actions, with the level of their heading and what the action's list says of them."""
    yield level, parser, summary
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            said = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, inner in action.choices.items():
                yield from _parsers(inner, level + 1, said.get(name, ""))


def _verb(parser: argparse.ArgumentParser, level: int, summary: str, words: Words) -> list[str]:
    text = inspect.cleandoc(parser.description or summary).replace("``", "`")
    lines = [f"{'#' * level} {parser.prog}", ""]
    if text:
        lines += ["```text", *text.splitlines(), "```", ""]
    rows = []
    for action in parser._actions:
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)) or action.help == argparse.SUPPRESS:
            continue
        help_text = said((action.help or "") % _values(action, parser), words)
        rows.append((_option(action), _shown(action, words), cell(help_text)))
    return lines + (table(words["options"], rows) if rows else [])


def _option(action: argparse.Action) -> str:
    value = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper().replace("-", "_")
    )
    if isinstance(value, tuple):
        value = " ".join(value)
    value = f"{value} ..." if action.nargs in ("+", "*") else value
    if not action.option_strings:
        return f"`{value}`"
    names = ", ".join(action.option_strings)
    return f"`{names}`" if action.nargs == 0 else f"`{names} {value}`"


def _shown(action: argparse.Action, words: Words) -> str:
    value = action.default
    if action.required or (not action.option_strings and action.nargs not in ("?", "*")):
        return words["required"]
    if value is None or value is False or value == argparse.SUPPRESS or value == [] or value == ():
        return ""
    return f"`{' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}`"


def _values(action: argparse.Action, parser: argparse.ArgumentParser) -> dict[str, typing.Any]:
    return {**vars(action), "prog": parser.prog}


def pages() -> dict[Path, str]:
    """Path -> content of every page."""
    made = {}
    for language, ending in (("en", ""), ("zh", ".zh")):
        made[FOLDER / f"config{ending}.md"] = config_page(WORDS[language])
        made[FOLDER / f"cli{ending}.md"] = cli_page(WORDS[language])
    return made


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
