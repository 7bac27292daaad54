"""Command line `tele` with its verbs. Each verb is a module of core/commands, imported when it is called."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import math
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from telechat_twins.core.errors import UserError
from telechat_twins.core.files import ROOT
from telechat_twins.core.launch.signals import name_of, signals_as_interrupt
from telechat_twins.core.near import nearest, number_meant, option_like
from telechat_twins.core.shown import controls_shown, escape_unencodable, message_line, shown
from telechat_twins.core.wrapped import HelpFormatter, help_width, wrapped

DISTRIBUTION = "telechat-twins"
LARGEST = 1 << 63  # bound on whole numbers of options
ENDS_AT_ONCE = ("data",)  # verbs that leave nothing to do when they return
# How PyTorch's allocators and MindSpore's begin the RuntimeError of a refusal.
_ALLOCATORS = re.compile(
    r"can't allocate memory: you tried to allocate \d+ bytes|CUDA out of memory|^Allocate memory failed"
)
# Other names of backends, formats and verbs, for hints.
ALIASES = {"mindspore": "ms", "torch": "pt", "pytorch": "pt", "huggingface": "hf", "transformers": "hf"}
WORDS = {
    "completion": "tele --print-completion bash",
    "version": "tele --version",
    "finetune": "tele train --init DIR",
    "lora": "tele train --config telechat2-tiny-lora --init DIR",
    "dpo": "tele data --preference",
    "sft": "tele train --init DIR",
    "pretrain": "tele train",
    "pack": "tele data",
    "prepare": "tele data",
    "preprocess": "tele data",
    "resume": "tele train --resume DIR",
    "infer": "tele generate",
    "inference": "tele generate",
    "predict": "tele generate",
    "api": "tele serve",
    "web": "tele serve",
    "webui": "tele serve",
    "export": "tele convert",
    "import": "tele convert",
    "compare": "tele parity compare",
    "evaluate": "tele eval",
    "locate": "tele parity locate",
    "record": "tele parity record",
}

GROUPS: dict[str, dict[str, str]] = {
    "Start here": {
        "doctor": "check this machine: versions, compiler, devices, and what to install",
        "demo": "a small tour: train in both frameworks, compare, resume, generate",
    },
    "Data": {
        "tokenize": "convert text to token ids and back; train a small tokenizer",
        "data": "pack text and dialogue files into training folders",
    },
    "Train": {
        "train": "train or resume a model with MindSpore (ms) or PyTorch (pt)",
        "grow": "enlarge a trained model, optimizer included, without changing its function",
        "plan": "estimate parameters, memory and arithmetic of training a model",
        "mup": "transfer hyper-parameters, and predict losses, from small widths to large ones",
        "plot": "lay the metrics of runs side by side: PNG, SVG, one HTML page with zoom",
        "bench": "measure tokens/s and step time of both frameworks, paired",
    },
    "Use": {
        "generate": "continue a prompt",
        "chat": "chat with a model in the terminal",
        "serve": "serve a model over HTTP: the OpenAI API and a chat page",
        "forward": "compute logits, loss and gradients of given inputs",
        "eval": "evaluate a model: tasks of lm-evaluation-harness, P(true) of propositions",
    },
    "Check and exchange": {
        "parity": "compare both frameworks and report all differences; exit 1 on a broken bound",
        "convert": "convert checkpoints and adapters between Hugging Face, MindFormers and the canonical format",
        "merge": "add a low-rank adapter into its model's weights",
        "average": "average the weights of checkpoints",
    },
}
VERBS: dict[str, str] = {verb: summary for group in GROUPS.values() for verb, summary in group.items()}

EXAMPLES = """\
Examples:
  tele doctor
  tele train --backend ms --config telechat2-tiny --out runs/first
  tele train --backend pt --config telechat2-tiny --resume runs/first --set train.steps=400
  tele generate --backend pt --checkpoint runs/first --prompt "Once upon a time"
  tele VERB --help
  tele --version
  eval "$(tele --print-completion bash)"     # or zsh: options and verbs with the Tab key

Exit codes: 0 success; 2 an error in the input (one line says how to fix it); 1 anything else.
The command can also be called as `python -m telechat_twins.core.cli`."""


MAY_BE_EMPTY = ("TEXT", "NAME", "PIECE", "ID")  # placeholders of arguments for which no character is a value

_GIVEN = " given"  # name in a namespace, which no option can have: the values of options that were given


class _Once(argparse._StoreAction):
    """argparse's "store", which keeps the last of several values in silence; here a second, other value is an error."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if option_string is not None:
            given = namespace.__dict__.setdefault(_GIVEN, {})
            if self.dest not in given:
                given[self.dest] = values
            elif given[self.dest] != values:
                way_out = "leave one out" if self.nargs is None else f"write what is meant behind one {option_string}"
                parser.error(
                    f"argument {option_string}: was given twice, as {_words(given[self.dest])} and {_words(values)}; "
                    f"{way_out}"
                )
        super().__call__(parser, namespace, values, option_string)  # type: ignore[arg-type]


def _words(values: object) -> str:
    """The values of an option, as they stand on the command line."""
    return " ".join(map(shown, values if isinstance(values, list) else [values]))


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, a suggestion for a misspelt option, no abbreviations, and no option that silently
    replaces an earlier one."""

    def __init__(self, **settings: object) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **settings)  # type: ignore[arg-type]
        for name in (None, "store"):
            self.register("action", name, _Once)

    def error(self, message: str) -> NoReturn:
        text = re.sub(r"\\\n +", "", f"{self.description}\n{self.epilog}")  # a line that "\" continues is one
        example = re.search(rf"^ +({self.prog} .*)$", text, re.MULTILINE)
        hint = f", e.g. `{example[1]}`" if example and " required" in message else ""
        lone = re.fullmatch(r"argument (--[\w-]+)\S*: expected (one|at least one) argument", message)
        action = self._option_string_actions.get(lone[1]) if lone else None
        if action and action.choices:
            hint = f", one of {', '.join(map(str, action.choices))}"
        raise UserError(f"{message}{hint}; see `{self.prog} --help`")

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        args = sys.argv[1:] if args is None else list(args)
        default = self.get_default("default_action")  # of a verb with actions, that of options without one
        if default and args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
            args = [default, *args]
        inner = self._action(args)
        if inner is not None:
            inner._refuse_unknown(args[1:])
        elif self._subparsers is None or args and args[0].startswith("--"):
            self._refuse_unknown(args if self._subparsers is None else args[:1])
        parsed, unknown = self.parse_known_args(args, namespace)
        parsed.__dict__.pop(_GIVEN, None)
        if unknown:
            (inner or self)._unknown(unknown[0])
        for name, value in vars(parsed).items():
            for number in value if isinstance(value, (list, tuple)) else [value]:
                if type(number) is int and abs(number) >= LARGEST or type(number) is float and math.isnan(number):
                    self.error(f"argument --{name.replace('_', '-')}: {shown(number)} is out of range")
        return parsed

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> object:
        """argparse's own values of an argument. An empty word is refused, unless it can be meant: most often it is a
        shell variable that is not set, and would stand for the working folder or for the default."""
        chosen = action.choices is not None or action.metavar in MAY_BE_EMPTY
        if "" in arg_strings and not chosen:
            way = "leave the option out" if action.option_strings else "leave it out"
            raise argparse.ArgumentError(action, f"is empty (a shell variable that is not set?); give a value or {way}")
        return super()._get_values(action, arg_strings)  # type: ignore[misc]

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """argparse's own check of a value against its choices, with a hint at the nearest legal one."""
        try:
            super()._check_value(action, value)  # type: ignore[misc]
        except argparse.ArgumentError as refused:
            legal = [str(choice) for choice in action.choices or ()]
            word = str(value).lower()
            others = {other: name for other, name in ALIASES.items() if name in legal}
            near = nearest(word, [*legal, *others], cutoff=0.5)
            near = others.get(near, near) if near else None
            hint = f"; did you mean '{near}'?" if near else ""
            raise argparse.ArgumentError(action, refused.message + hint) from None

    def _get_value(self, action: argparse.Action, arg_string: str) -> object:
        """argparse's own conversion of a value, with a hint at how a number is written in digits."""
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except argparse.ArgumentError as refused:
            number = number_meant(arg_string, action.type is int) if action.type in (int, float) else ""
            raise argparse.ArgumentError(action, refused.message + (f"; write {number}" * bool(number))) from None

    def _action(self, args: Sequence[str]) -> Parser | None:
        """The parser of the action that the first word names; None where it names none."""
        lists = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return next((found.choices[args[0]] for found in lists if args and args[0] in found.choices), None)

    def _refuse_unknown(self, args: Sequence[str]) -> None:
        """UserError for an unknown option, before argparse reports a required one as missing that is only misspelt."""
        before_values = args[: args.index("--")] if "--" in args else args
        for argument in before_values:
            if argument.startswith("--") and argument.partition("=")[0] not in self._known():
                self._unknown(argument)

    def _known(self) -> list[str]:
        return list(self._option_string_actions)

    def _unknown(self, argument: str) -> NoReturn:
        near = option_like(argument, self._known())
        quote = "`" if near and near.startswith("--set ") else "'"
        self.error(f"unknown argument '{argument}'" + (f", did you mean {quote}{near}{quote}?" if near else ""))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns its exit code: 2 for a UserError, which becomes one line on stderr, 130 for Ctrl-C, SIGTERM
    and SIGHUP, 1 for a bug."""
    words = list(sys.argv[1:] if argv is None else argv)
    escape_unencodable()
    try:
        return _run(words)
    except UserError as error:
        print(f"tele: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        if (name := name_of(interrupt)) != "SIGINT":  # whoever presses Ctrl-C knows
            with contextlib.suppress(OSError):  # of a terminal that was closed
                print(f"tele: ended by {name}", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        # The reader of our output (`| head`) has closed the pipe. Redirect the interpreter's final flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        if error.name not in ("mindspore", "torch"):
            _defect()
            return 1
        print(f"tele: {error.name} is not installed here; `tele doctor` says how to install it", file=sys.stderr)
        return 2
    except Exception as error:
        line = _refused(error, words)
        if line is None:
            _defect()
            return 1
        print(f"tele: {message_line(line)}", file=sys.stderr)
        return 2


def process() -> NoReturn:
    """``main`` as a process of its own. One of ENDS_AT_ONCE leaves its memory to the system, instead of freeing it
    object by object."""
    code = main()
    if sys.argv[1:2] and sys.argv[1] in ENDS_AT_ONCE:
        with contextlib.suppress(OSError):  # what cannot be written is for the interpreter to report
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


def _defect() -> None:
    """Print the traceback of a bug, with control characters of untrusted names escaped."""
    print(controls_shown(traceback.format_exc()), end="", file=sys.stderr)


def _refused(error: Exception, words: Sequence[str]) -> str | None:
    """Message for a file, a folder or memory that the system refuses; None for any other error.

    A fallback for the commands' own checks, whose messages are more specific. Of a path that one of the ``words`` of
    the command line names, whatever the system says is the caller's: a folder that cannot be made is "not found" in
    some file systems.
    """
    if isinstance(error, MemoryError):
        return f"out of memory ({str(error) or 'allocation failed'}); use smaller sizes, or a larger machine"
    refusal = _ALLOCATORS.search(str(error))
    if isinstance(error, RuntimeError) and refusal is not None:
        return f"out of memory ({refusal[0]}); use smaller sizes, or a larger machine"
    refused = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    if not isinstance(error, OSError) or not (error.errno in refused | full or _is_named(error.filename, words)):
        return None
    what = error.filename if isinstance(error.filename, str) else "output"
    ways = {errno.EACCES: "change its permissions or ", errno.EPERM: "change its permissions or "}
    ways |= dict.fromkeys(full, "free some space or ")
    return f"{what}: {error.strerror}; {ways.get(error.errno or 0, '')}choose another path"


def _is_named(path: object, words: Sequence[str]) -> bool:
    """Whether a word of the command line, or its part behind "=", is this path, lies above it or below it."""
    if not isinstance(path, str) or not path:
        return False
    wholes = [Path(part).absolute() for word in words for part in (word, word.partition("=")[2]) if part]
    found = Path(path).absolute()
    return any(found == one or found in one.parents or one in found.parents for one in wholes)


def version() -> str:
    """The version: from pyproject.toml in a checkout, else from the installed package."""
    source = ROOT / "pyproject.toml"
    if source.is_file():
        import tomllib

        return tomllib.loads(source.read_text(encoding="utf-8"))["project"]["version"]
    from importlib.metadata import version as installed

    return installed(DISTRIBUTION)


def command_module(verb: str) -> ModuleType:
    """The module of core/commands that defines a verb: `add_arguments(parser)` and `run(options)`."""
    return importlib.import_module(f"telechat_twins.core.commands.{verb}")


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        if len(words) > 1 and words[0] == "help":
            return _run([words[1], "--help"])
        print(wrapped(overview(), help_width()))
        return 0
    if words[0] in ("-V", "--version"):
        print(f"tele {version()}")
        return 0
    if words[0] == "--print-completion":
        print(command_module("completion").script(words[1] if len(words) > 1 else ""))
        return 0
    verb, *rest = words
    if verb not in VERBS:
        near = WORDS.get(verb) or (f"tele {found}" if (found := nearest(verb, VERBS, cutoff=0.5)) else None)
        hint = f"did you mean '{near}'?" if near else f"legal: {', '.join(VERBS)}"
        raise UserError(f"unknown command '{verb}'; {hint}")
    command = command_module(verb)
    parser = Parser(prog=f"tele {verb}", description=command.__doc__ or VERBS[verb])
    command.add_arguments(parser)
    try:
        options = parser.parse_args(rest)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    with signals_as_interrupt():
        return command.run(options)


def overview() -> str:
    """Text of `tele --help`."""
    lines = [
        "usage: tele VERB [options]",
        "",
        "TeleChat2 in MindSpore and in PyTorch: one set of configs, data and checkpoints, held equal by tests.",
    ]
    for title, verbs in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {verb:<10}{summary}" for verb, summary in verbs.items()]
    return "\n".join([*lines, "", EXAMPLES])


if __name__ == "__main__":
    process()
