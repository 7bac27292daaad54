"""Shell completion of `tele`: a script for bash or zsh, made by shtab from the parsers of all verbs."""

from __future__ import annotations

from telechat_twins.core.backends import install_command
from telechat_twins.core.cli import VERBS, Parser, command_module
from telechat_twins.core.errors import UserError
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
    return shtab.complete(whole_parser(), shell)
