"""The `tele` command: its help, its mistakes and its exit codes."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from telechat_twins.core import cli
from telechat_twins.core.errors import UserError
from telechat_twins.core.near import OPTIONS, near_path, nearest, nearest_name
from telechat_twins.core.shown import from_here
from telechat_twins.core.train.progress import Console
from tests.house import ROOT


def test_help_lists_every_verb_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(words) == 0
        text = capsys.readouterr().out
        for verb, summary in cli.VERBS.items():
            assert f"  {verb:<10}{summary}" in text
    assert max(map(len, text.splitlines())) <= 120


def test_each_verb_has_its_module() -> None:
    for verb in cli.VERBS:
        files = [ROOT / "core" / "commands" / f"{verb}{ending}" for ending in (".py", "/__init__.py")]
        assert any(file.is_file() for file in files), f"{verb} is offered but does not exist"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_verb_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: tele {verb} ")
    assert cli.main(["help", verb]) == 0
    assert capsys.readouterr().out == text


def test_help_is_instant_because_nothing_heavy_is_imported() -> None:
    code = "import sys; from telechat_twins.core import cli; cli.main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert not loaded & {"numpy", "yaml", "torch", "mindspore", "matplotlib", "safetensors", "psutil"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tele {cli.version()}\n"


def test_messages_name_paths_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs keep whole paths, which every message would quote; a longer name that begins alike stays as it is."""
    monkeypatch.chdir(tmp_path)
    here, there = tmp_path / "runs" / "一", Path(f"{tmp_path}-2") / "a"
    assert (
        str(UserError(f"{here}: damaged; see {there}, --out={here}")) == f"runs/一: damaged; see {there}, --out=runs/一"
    )
    assert from_here(f"{tmp_path}: empty; file://{here}") == f"{tmp_path}: empty; file://{here}"
    stream = io.StringIO()
    Console(1, stream=stream).note(f"checkpoint {here}")
    assert stream.getvalue() == "checkpoint runs/一\n"
    monkeypatch.chdir("/")
    assert from_here(str(here)) == str(here)


def test_misspelt_verb_is_mended(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian", "--config", "x"]) == 2
    assert capsys.readouterr() == ("", "tele: unknown command 'trian'; did you mean 'tele train'?\n")
    assert cli.main(["zzzzzz"]) == 2
    assert "legal: doctor, demo" in capsys.readouterr().err


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A command `tele try` whose ``run`` each test sets."""
    module = types.ModuleType("telechat_twins.core.commands.try")
    module.__doc__ = "Try it."

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--backend", required=True, choices=("ms", "pt"))
        parser.add_argument("--count", type=int, default=1)

    module.add_arguments = add_arguments  # type: ignore[attr-defined]
    module.run = lambda args: args.count  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.VERBS, "try", "try it")
    return module


def test_the_verb_gets_its_options_and_gives_the_exit_code(verb: types.ModuleType) -> None:
    assert cli.main(["try", "--backend", "ms", "--count", "7"]) == 7


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "the following arguments are required: --backend"),
        (["--bakend", "ms"], "unknown argument '--bakend', did you mean '--backend'?"),
        (["--backend", "ms", "--cont=3"], "unknown argument '--cont=3', did you mean '--count'?"),
        (["--backend", "ms", "more"], "unknown argument 'more'"),
        (["--backend", "tf"], "invalid choice: 'tf'"),
        (["--backend", "ms", "--count", "x"], "invalid int value: 'x'"),
        (["--back", "ms"], "unknown argument '--back'"),
    ],
)
def test_wrong_options_are_one_line(
    words: list[str], says: str, verb: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["try", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err
    assert err.startswith("tele: ") and err.count("\n") == 1 and "`tele try --help`" in err


def raises(error: BaseException) -> object:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("data.path: no such folder; write one"), 2, "tele: data.path: no such folder; write one\n"),
        (KeyboardInterrupt(), 130, ""),
        (OSError(30, "Read-only file system", "out/x"), 2, "tele: out/x: Read-only file system; choose"),
        (NotADirectoryError(20, "Not a directory", "file/x"), 2, "tele: file/x: Not a directory; choose"),
        (OSError(28, "No space left on device"), 2, "tele: output: No space left on device; free some space"),
        (ModuleNotFoundError("no", name="mindspore"), 2, "tele: mindspore is not installed here; `tele doctor` says"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, says: str, verb: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    verb.run = raises(error)  # type: ignore[attr-defined]
    assert cli.main(["try", "--backend", "ms"]) == code
    err = capsys.readouterr().err
    assert err.startswith(says) and "Traceback" not in err


@pytest.mark.parametrize(
    "error", [ValueError("ours"), OSError(5, "Input/output error"), ModuleNotFoundError("ours", name="core.gone")]
)
def test_a_defect_shows_its_traceback(
    error: Exception, verb: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    verb.run = raises(error)  # type: ignore[attr-defined]
    assert cli.main(["try", "--backend", "ms"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error() -> None:
    quiet = (
        "import sys; from telechat_twins.core import cli; cli.overview = lambda: 'x' * 10**6; sys.exit(cli.main([]))"
    )
    tele = subprocess.Popen([sys.executable, "-c", quiet], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert tele.stdout is not None and tele.stderr is not None
    tele.stdout.read(10)
    tele.stdout.close()
    assert tele.stderr.read() == b""
    assert tele.wait() == 1


@pytest.mark.parametrize("closed", [False, True])
def test_a_process_that_ends_at_once_has_written_all(closed: bool, tmp_path: Path) -> None:
    made = (
        "import atexit, sys; from telechat_twins.core import cli; atexit.register(print, 'freed', file=sys.stderr)\n"
        "cli.main = lambda: print('x' * 900) or 3\nsys.argv = ['tele', sys.argv[1]]\ncli.process()"
    )
    for verb, last in (("data", ""), ("train", "freed\n")):
        out = (tmp_path / "out").open("w+b")
        reader, writer = os.pipe()
        os.close(reader)
        words = [sys.executable, "-c", made, verb]
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run(
            words, cwd=ROOT, env=buffered, stdout=writer if closed else out, stderr=subprocess.PIPE, text=True
        )
        os.close(writer)
        out.seek(0)
        if closed:  # as the interpreter ends otherwise
            assert done.returncode == 120 and "BrokenPipeError" in done.stderr
        else:
            assert (done.returncode, done.stderr, out.read()) == (3, last, b"x" * 900 + b"\n")


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "utf-8"])
def test_what_the_terminal_cannot_write_is_escaped(encoding: str) -> None:
    said = "\u4e2d\u27e6\U0001f600\udcff"
    made = (
        f"import sys; from telechat_twins.core import cli; cli.overview = lambda: {ascii(said)}; sys.exit(cli.main([]))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", made], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert json.loads(f'"{done.stdout.decode(encoding).rstrip()}"') == said


def test_a_script_parses_its_own_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from telechat_twins.core.train.script import parser

    monkeypatch.setattr("sys.argv", ["train.py", "--config", "run.yaml"])
    assert parser().parse_args().config == "run.yaml"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--backend", "mindspore"], "did you mean 'ms'?"),
        (["train", "--backend", "PyTorch"], "did you mean 'pt'?"),
        (["plan", "--model", "telechat-7b"], "did you mean 'telechat2-7b'?"),
        (["plan", "--model", "115b"], "did you mean 'telechat2-115b'?"),
        (["plan", "--model", "1T"], "did you mean 'teleflm-1t'?"),
        (["plan", "--model", "telechat3"], "did you mean 'telechat3-36b'?"),
        (["plan", "--config", "7b"], "did you mean 'telechat2-7b'?"),
        (["plan", "--model", "telechat2-7b", "--machine", "h100"], "did you mean 'h100-sxm'?"),
        (["plan", "--model", "telechat2-7b", "--seq-len", "8192", "--seq-len", "4096"], "twice, as 8192 and 4096"),
        (["eval", "iq", "--seed", "1", "--seed=2"], "--seed: was given twice, as 1 and 2; leave one out"),
        (["train", "--backend", "ms", "--config", "telechat2-tny"], "did you mean 'telechat2-tiny'?"),
        (["--print-completion", "bsh"], "did you mean 'bash'?"),
        (["train", "--backend", "ms", "--config", "away/train/telechat2-tiny.yaml"], "name alone: telechat2-tiny"),
        (["--print-completion", "fish"], "give one of bash, zsh"),
        (["--print-completion"], "needs the name of a shell; give one of bash, zsh"),
        (["generate", "--backend", "pt", "--checkpoint", "x", "Who are you?"], "did you mean '--prompt'?"),
        (["train", "--backend", "pt", "--config", "telechat2-tiny.yml"], "goes by its name alone: telechat2-tiny"),
        (["data", "rows.jsonl", "--tokenizer", "t", "--out", "o", "--sft"], "expected one argument, one of plain, "),
        (["train", "--backend"], "expected one argument, one of ms, pt; see"),
        (["train", "--config"], "expected one argument; see"),
    ],
)
def test_near_misses_get_a_hint(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--backend", "pt", "--config", "telechat2-tiny", "--resume", ""], "--resume: is empty"),
        (["train", "--backend", "pt", "--config", "telechat2-tiny", "--out="], "--out: is empty"),
        (["train", "--backend", "pt", "--config", "telechat2-tiny", "--set", "train.steps=1", ""], "--set: is empty"),
        (["train", "--backend", "pt", "--config", ""], "--config: is empty"),
        (["data", "", "--tokenizer", "t", "--out", "o"], "argument INPUT: is empty"),
        (["serve", "--backend", "pt", "--checkpoint", "x", "--api-key", ""], "--api-key: is empty"),
        (["plot", ""], "argument RUN: is empty"),
        (["merge", "a", "", "c"], "argument ADAPTER: is empty"),
        (["eval", "bpb", "--backend", "pt", "--checkpoint", "", "--domain", "a=b"], "--checkpoint: is empty"),
        (["plan", "--model", ""], "--model: is empty"),
    ],
)
def test_an_empty_word_is_no_path(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--resume "$RUN"` with a variable that is not set must not begin a new run."""
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert says + " (a shell variable that is not set?); give a value or leave" in err and err.count("\n") == 1


def test_an_empty_text_is_a_text() -> None:
    generate = cli.Parser(prog="p", description="")
    cli.command_module("generate").add_arguments(generate)
    parsed = generate.parse_args(["--backend", "pt", "--checkpoint", "x", "--prompt", ""])
    assert parsed.prompt in ("", [""])


def test_no_option_replaces_an_earlier_one() -> None:
    """Of all verbs and their actions: an option with one value refuses a second one."""
    parsers, checked = [cli.command_module("completion").whole_parser()], 0
    while parsers:
        for action in parsers.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            elif isinstance(action, argparse._StoreAction) and action.option_strings:
                checked += 1
                assert isinstance(action, cli._Once), action.option_strings
    assert checked > 200
    parser = cli.Parser(prog="p", description="")
    parser.epilog = None
    parser.add_argument("--a", nargs="+")
    assert vars(parser.parse_args(["--a", "1", "2", "--a", "1", "2"])) == {"a": ["1", "2"]}
    with pytest.raises(UserError, match="--a: was given twice, as '1' '2' and '3'; write what is meant .* one --a"):
        parser.parse_args(["--a", "1", "2", "--a", "3"])


def test_names_are_found_by_their_parts() -> None:
    sizes = ["t1-7b", "other-7b", "family-7b", "family-7b-lora", "family-35b"]
    assert nearest_name("7b", sizes) == "family-7b"
    assert nearest_name("lora_7B", sizes) == "family-7b-lora"
    assert nearest_name("famly-35b", sizes) == "family-35b"
    assert nearest_name("", sizes) is nearest_name("9x", sizes) is nearest_name("fa", sizes) is None
    tests = ["family-tiny", "other-tiny", "family-35b", "family2.5-tiny", "family2.5-35b"]
    assert nearest_name("family", tests) == "family-35b" and nearest_name("Family2", tests) == "family2.5-35b"
    assert nearest_name("tiny", tests) == "family-tiny"


def test_completion_knows_every_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser that shtab turns into a script; shtab itself is an extra."""
    parser = cli.command_module("completion").whole_parser()
    (verbs,) = (action.choices for action in parser._actions if action.dest == "verb")
    assert list(verbs) == list(cli.VERBS) and "--layout" in verbs["train"].format_help()
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(UserError, match="needs the package shtab"):
        cli.command_module("completion").script("bash")


def test_paths_and_words_that_are_nearly_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "tiny.yaml").write_text("{}")
    assert near_path("runs/frist") == "; did you mean 'runs/first'?"
    assert near_path("tyni.yaml") == "; did you mean 'tiny.yaml'?"
    assert near_path("runs/other") == near_path("nowhere/first") == near_path("a\0b") == ""
    assert nearest("pd2", ["tp2", "dp2", "pp2"]) == "dp2"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["generate", "--checkpoint", "runs/frist", "--backend", "pt", "--prompt", "a"], "'runs/first'"),
        (["plot", "runs/frist"], "'runs/first'"),
        (["train", "--backend", "pt", "--config", "tyni.yaml", "--out", "x"], "'tiny.yaml'"),
        (
            ["train", "--backend", "pt", "--config", "telechat2-tiny", "--resume", "runs/frist", "--out", "x"],
            "'runs/first'",
        ),
        (["data", "tiny.yaml", "--tokenizer", "tyni.yaml", "--out", "x"], "'tiny.yaml'"),
        (["train", "--backend", "mindsport", "--config", "telechat2-tiny", "--out", "x"], "'ms'"),
        (["convert", "--from", "canonical", "--to", "huggingface", "a", "b"], "'hf'"),
        (
            ["train", "--backend", "pt", "--config", "telechat2-tiny", "--set", "data.sources=[x]", "--out", "y"],
            "{path: x}",
        ),
        (["completion"], "'tele --print-completion bash'"),
        (["finetune"], "'tele train --init DIR'"),
    ],
)
def test_one_line_names_what_was_meant(
    words: list[str],
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "tiny.yaml").write_text("{}")
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert f"did you mean {hint}" in error or f"; write {hint}" in error, error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "train",
            "required: --backend, --config, e.g. `tele train --backend ms --config telechat2-tiny --out runs/first`",
        ),
        ("train --steps 10", "unknown argument '--steps', did you mean `--set train.steps=VALUE`?"),
        ("train --lr=1e-3", "did you mean `--set optim.lr=1e-3`?"),
        ("train --bf16", "did you mean `--set train.precision=bf16`?"),
        ("train --dataset x", "did you mean `--set 'data.sources=[{path: DIR}]'`?"),
        ("train --output_dir x", "did you mean '--out'?"),
        ("train --confg x", "did you mean '--config'?"),
        ("plan --lr 3", "unknown argument '--lr'; see `tele plan --help`"),
        ("plan --nodes 3", "did you mean '--devices'?"),
        ("train --nodes 3", "did you mean '--nnodes'?"),
        ("serve --nodes 3", "unknown argument '--nodes'; see `tele serve --help`"),
        ("serve --gpus 2", "did you mean '--nproc'?"),
        ("generate --sample 3", "did you mean '--samples'?"),
        ("generate --temp 1", "did you mean '--temperature'?"),
        ("generate --max_tokens 1", "did you mean '--max-new-tokens'?"),
        ("generate --num-samples 3", "did you mean '--samples'?"),
        ("data x --sample 3", "unknown argument '--sample'; see `tele data --help`"),
        ("chat --sample", "unknown argument '--sample'; see `tele chat --help`"),
        ("chat --topk 3", "did you mean '--top-k'?"),
        ("eval run --num_fewshot 3", "did you mean '--shots'?"),
        ("serve --dtype bf16", "did you mean '--precision'?"),
        ("parity --confg x", "unknown argument '--confg', did you mean '--config'?"),
        ("parity compare a b --referense x", "did you mean '--reference'?; see `tele parity compare --help`"),
        ("tokenize train x --out y --vocabsize 9", "did you mean '--vocab-size'?; see `tele tokenize train --help`"),
        ("lora", "did you mean 'tele train --config telechat2-tiny-lora --init DIR'?"),
    ],
)
def test_what_other_programs_call_differently_is_named(
    words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words.split()) == 2
    assert says in capsys.readouterr().err


def test_every_option_named_for_another_programs_is_one_of_a_command() -> None:
    known = set()
    for verb in cli.VERBS:
        parser = cli.Parser(prog=verb)
        cli.command_module(verb).add_arguments(parser)
        inner = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        known |= {
            option for one in [parser, *(one for many in inner for one in many.values())] for option in one._known()
        }
    assert {option for options in OPTIONS.values() for option in options} <= known
