"""``tele chat``: a conversation in the terminal, or over a pipe."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from telechat_twins.core.commands.options import (
    add_adapter_argument,
    add_model_arguments,
    add_sampling_arguments,
    given_sampling,
    load_model,
    sampling_from,
)
from telechat_twins.core.data.chat_template import DEFAULT_SYSTEM
from telechat_twins.core.data.control import THINK, THINK_END
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import parse_value, read_file
from telechat_twins.core.inference.text_stream import Thought
from telechat_twins.core.shown import controls_shown, printable
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from telechat_twins.core.inference.chat import Chat
    from telechat_twins.core.inference.tool_calls import AnswerPart

HELP = """\
/system [TEXT]  set the system prompt and clear the history; without TEXT, show it
/tools [FILE]   offer the tools in FILE, a JSON list in the OpenAI API's form, and clear the history ("off": offer
                none); without FILE, show them
/result TEXT    give the result of a tool call of the model; for several calls, one after the other
/reset          clear the history
/save FILE      append the conversation to FILE as one JSON line, in a form that `tele data` reads
/help           show this list
/exit           leave (also Ctrl-D); Ctrl-C stops an answer"""


EPILOG = f"""\
examples:
  tele chat --backend pt --checkpoint model
  echo "What is RoPE?" | tele chat --backend ms --checkpoint model --system "Answer in one sentence."

commands in a conversation:
{HELP}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele chat``."""
    parser.epilog = EPILOG
    add_model_arguments(parser)
    add_adapter_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: the template's own)")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="tokens of an answer (default: as --generation-config, or a quarter of max_seqlen, at most 1024)",
    )
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run a conversation until /exit or the end of input. Answers go to stdout, everything else to stderr."""
    from telechat_twins.core.inference.chat import Chat, default_answer_length

    given_sampling(args)  # before the weights are verified
    model = load_model(args, "chat", {} if args.adapter is None else {"": args.adapter})
    sampling = sampling_from(args, model.settings)
    if args.max_new_tokens is None:
        args.max_new_tokens = default_answer_length(model.config, model.settings)
    chat = Chat(
        model.engine(model.config.max_seqlen),
        system=args.system,
        sampling=sampling,
        max_new_tokens=args.max_new_tokens,
        stops=model.settings.stops,
        min_new_tokens=model.settings.min_new_tokens,
        add_bos=args.add_bos,
        layout=model.layout,
        adapter=len(model.adapters),
    )
    terminal = sys.stdin.isatty()
    if terminal:
        print("/help lists the commands, /exit leaves", file=sys.stderr)
    failed = repl(chat, terminal_lines() if terminal else piped_lines())
    return 0 if terminal else failed


def repl(chat: Chat, lines: Iterator[str]) -> int:
    """Answer each line and run each /command. An error is one line on stderr, and the conversation goes on.

    Returns 2 if there was one, else 0: who pipes questions in sees no errors pass by.
    """
    results: list[str] = []  # given so far for the tool calls of the last answer
    code = 0
    for line in lines:
        text = line.strip()
        if not text:
            continue
        try:
            if text.startswith("/"):
                if _command(chat, text, results):
                    break
            else:
                results.clear()
                _answer(chat, chat.ask(text, stream=True))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
    return code


def terminal_lines() -> Iterator[str]:
    """Lines typed at a prompt. Ctrl-C discards the current line; Ctrl-D ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (its import gives input() line editing and history)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n/exit leaves", file=sys.stderr)


def piped_lines() -> Iterator[str]:
    """Lines of stdin as they arrive; UserError for a line that is not UTF-8."""
    for number, raw in enumerate(iter(sys.stdin.buffer.readline, b""), 1):
        try:
            yield raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"stdin:{number}: must be UTF-8 text, found another byte at {error.start}") from None


def _answer(chat: Chat, pieces: Iterable[AnswerPart]) -> None:
    terminal = sys.stdout.isatty()
    thinking = False
    with _interrupt_calls(chat.stop):
        for piece in pieces:
            if isinstance(piece, str):
                if thinking != isinstance(piece, Thought):  # reasoning is shown between its marks
                    thinking = not thinking
                    print(f"{THINK}\n" if thinking else f"\n{THINK_END}\n\n", end="")
                print(controls_shown(piece) if terminal else piece, end="", flush=True)
    print(flush=True)
    if chat.finish_reason == "length":
        print(f"(answer ended at --max-new-tokens {chat.max_new_tokens})", file=sys.stderr)
    elif chat.finish_reason == "interrupted":
        print("(answer stopped)", file=sys.stderr)
    for number, call in enumerate(chat.calls, 1):
        shown = printable(f"{call.name} {call.arguments}", longest=None)
        print(f"(tool call {number} of {len(chat.calls)}: {shown})", file=sys.stderr)
    if chat.calls:
        print("(/result TEXT gives its result)", file=sys.stderr)


@contextlib.contextmanager
def _interrupt_calls(stop: Callable[[], None]) -> Iterator[None]:
    """In this context the first Ctrl-C calls ``stop``, so that no framework call is interrupted; a second one raises
    KeyboardInterrupt as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def handler(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _command(chat: Chat, text: str, results: list[str]) -> bool:
    """Run one /command; True when it ends the conversation."""
    word, _, rest = text.partition(" ")
    rest = rest.strip()
    if word in ("/exit", "/quit"):
        return True
    if word == "/help":
        print(HELP, file=sys.stderr)
    elif word == "/tools":
        _tools(chat, rest)
    elif word == "/result":
        _result(chat, rest, results)
    elif word == "/reset":
        chat.reset()
        print("(history cleared)", file=sys.stderr)
    elif word == "/system":
        if rest:
            chat.system = rest
            chat.reset()
            print("(new system prompt; history cleared)", file=sys.stderr)
        else:
            print(_system(chat), file=sys.stderr)
    elif word == "/save":
        save(chat, rest)
        print(f"(saved to {rest})", file=sys.stderr)
    else:
        raise UserError(f"{word}: unknown command; /help lists them")
    return False


def _tools(chat: Chat, name: str) -> None:
    if name:
        chat.tools = None if name == "off" else read_tools(name)
        chat.reset()
        print(f"({len(chat.tools or ())} tools; history cleared)", file=sys.stderr)
    elif chat.tools:
        for tool in chat.tools:
            print(printable(json.dumps(tool, ensure_ascii=False), longest=None), file=sys.stderr)
    else:
        print("(no tools; /tools FILE offers some)", file=sys.stderr)


def _result(chat: Chat, text: str, results: list[str]) -> None:
    if not chat.calls:
        raise UserError("/result: needs a tool call in the last answer, found none; ask a question first")
    results.append(text)
    if len(results) < len(chat.calls):
        print(f"(now give the result of call {len(results) + 1})", file=sys.stderr)
        return
    given = results[:]
    results.clear()
    _answer(chat, chat.report(given, stream=True))


def read_tools(name: str) -> list[JsonObject]:
    """The tools in a JSON file. UserError when it cannot be read or is not a list of objects with a function's name."""
    try:
        tools = parse_value(read_file(Path(name).expanduser()))
    except UserError as error:
        raise UserError(f"/tools {error}") from None
    except (ValueError, RuntimeError) as error:
        raise UserError(f"/tools {name}: cannot be read ({error})") from None
    if not isinstance(tools, list) or not tools:
        raise UserError(f"/tools {name}: expected a JSON list of tools")
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                f"/tools {name}: tool {place} is not of the form "
                '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
            )
    return tools


def save(chat: Chat, name: str) -> None:
    """Append the conversation to a jsonl file as a row of the released dialogue format, ready for ``tele data``.

    UserError without a file name, without a turn, or when the file cannot be written.
    """
    if not name:
        raise UserError("/save: give a file, e.g. /save talk.jsonl")
    if not chat.history:
        raise UserError("/save: needs a conversation, found none; ask a question first")
    roles = {"user": "user", "assistant": "bot", "tool": "tool"}
    dialog = [{**turn, "role": roles[turn["role"]]} for turn in chat.history]
    # Rows of the released datasets include the line end that the template puts after the system text.
    row = {"system": _system(chat) + "\n", "dialog": dialog, "multiturn": len(dialog) > 2}
    if chat.tools:
        row["tools"] = list(chat.tools)
    try:
        with Path(name).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"/save {name}: cannot be written ({error.strerror})") from None


def _system(chat: Chat) -> str:
    return DEFAULT_SYSTEM if chat.system is None else chat.system
