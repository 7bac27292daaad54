"""Shell completion of `tele`: a script for bash or zsh, made by shtab from the parsers of all verbs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from telechat_twins.core.backends import install_command
from telechat_twins.core.cli import VERBS, Parser, command_module
from telechat_twins.core.config import bundled_names
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import CONFIGS, preset_names
from telechat_twins.core.near import nearest

SHELLS = ("bash", "zsh", "tcsh")


def whole_parser() -> Parser:
    """A parser that holds every verb with its options; `tele` itself makes only that of the verb it runs."""
    parser = Parser(prog="tele", description="TeleChat2 in MindSpore and in PyTorch")
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for verb, summary in VERBS.items():
        command_module(verb).add_arguments(verbs.add_parser(verb, help=summary, description=summary))
    return parser


def script(shell: str) -> str:
    """The completion script of a shell. UserError for an unknown shell, or where shtab is not installed."""
    if shell not in SHELLS:
        near = nearest(shell, SHELLS)
        hint = f"did you mean '{near}'?" if near else f"give one of {', '.join(SHELLS)}"
        found = f"'{shell}' is not a shell that is supported" if shell else "needs the name of a shell"
        raise UserError(f"--print-completion: {found}; {hint}")
    try:
        import shtab
    except ModuleNotFoundError:
        raise UserError(
            f"--print-completion: needs the package shtab, which is not installed; run: {install_command('completion')}"
        ) from None
    parser, names = whole_parser(), _bundled()
    for action in _free(parser):
        # Without a function of its own an argument completes nothing, not even paths, which most of them are.
        known = {"bash": f"_tele_{action.dest}_file"} if action.dest in names else {}
        action.complete = shtab.FILE | known  # type: ignore[attr-defined]
    text = "".join(
        f'_tele_{dest}_file() {{\n  compgen -W "{" ".join(words)}" -- "$1"\n  compgen -f -- "$1"\n}}\n'
        for dest, words in names.items()
    )
    return shtab.complete(parser, shell, preamble=text if shell == "bash" else "")


def _bundled() -> dict[str, list[str]]:
    """Where an argument may name something bundled: its name in a namespace -> the names."""
    machines = sorted(file.stem for file in (CONFIGS / "machines").glob("*.yaml"))
    named = {"config": bundled_names("train"), "growth": bundled_names("growth"), "machine": machines}
    return named | dict.fromkeys(("model", "target"), preset_names())


def _free(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser, and of those inside it, whose values are no numbers and of no fixed list."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _free(inner)
        elif action.nargs != 0 and not action.choices and action.type not in (int, float):
            yield action
