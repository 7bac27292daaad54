"""The commands shown in the documentation: found, checked against the real parsers, and sorted by which test runs them.

Kept apart from the tests, like tests/house.py, so that every rule can be run on a page with a planted mistake.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import importlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from telechat_twins.core import cli
from telechat_twins.core.config import ProfileConfig, RunConfig, load_run_config
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.train.script import parser as script_parser
from tests.house import NAME, PACKAGES, ROOT

FIRST = ("README.md", "README.zh.md", "docs/tour.md")  # what they make, lines of later pages may name
PAGES = (*FIRST, *sorted({str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")} - set(FIRST)))
PAIRS = tuple((page, page.replace(".md", ".zh.md")) for page in PAGES if not page.endswith(".zh.md"))
OTHERS = ("CONTRIBUTING.md", "CHANGELOG.md")  # links are followed, commands checked, nothing is run

PROGRAMS = ("tele", "make", "msrun", "torchrun", "source", "printf", "curl")
SHELL = ("bash", "sh")

# What no test runs as it stands, and why. Options, config keys and files of these are checked all the same.
NOT_RUN = {
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node1:29500 --max-restarts 3 "
    "pt_reference/train.py --config F --out DIR --resume auto": "sixteen devices; "
    "tests/parity/test_docs_commands.py::test_the_launchers_know_their_options reads its options",
    "msrun --worker_num=16 --local_worker_num=8 --master_addr=node1 --master_port=29500 --node_rank=0 --join=True "
    "--log_dir=LOGS telechat_ms/train.py --config F --out DIR --resume auto": "likewise",
    "tele train --backend pt --config F --out runs/first --set train.profile.from=20 train.profile.steps=2": "the file "
    "is the reader's; tests/parity/test_training_parity.py profiles a run",
    "tele train --backend pt --config F --out runs/first --resume auto --restarts 3": "likewise; "
    "tests/multiproc/test_parallel_training.py starts a killed run again",
    "tele plot runs/lr-1e-4 runs/lr-3e-4 --columns loss grad_norm mfu --out compared": "the runs are the reader's; "
    "tests/unit/commands/test_plot.py draws some",
    "tele plot runs/ms runs/pt --difference": "likewise",
    "tele plot runs/grown --against tokens": "likewise",
    "tele bench parallel --calibrate --layouts single,tp2,pp2,pp2.vpp2,ring2,dp2": "minutes; "
    "tests/unit/bench/test_calibrate.py and test_bench_parallel.py run its parts",
    "tele plan --calibrate --backend pt --out cpu-pt.yaml": "a minute of measurements; "
    "tests/unit/bench/test_calibrate.py runs its parts",
    "tele bench parallel --backends pt --machine cpu-pt.yaml --layouts single,tp2,pp2,pp2.vpp2,ring2,dp2": "a "
    "minute, and the machine file is of the line above; tests/unit/bench/test_calibrate.py prints the forecast",
    "tele serve --backend pt --checkpoint demo/hf": "serves until it is ended; tests/serve/test_serving_page.py runs "
    "the lines of its own page",
    "tele serve --backend pt --checkpoint demo/hf --adapter mine=runs/lora": "likewise",
    "tele generate --backend pt --checkpoint TeleChat2-7B --adapter law-peft --chat --prompt Hello": "run by "
    "tests/parity/test_serve_parity.py::test_adapters_by_name_in_one_batch on a model of its own",
    "tele serve --backend ms --checkpoint TeleChat2-7B --adapter law=law-peft --adapter code=runs/code": "likewise",
    "tele train --backend ms --config F --set lora.rank=16 --init TeleChat2-7B --out runs/law": "F is the reader's; "
    "the README's line is run",
    "tele train --backend pt --config F --init TeleChat2-7B --out runs/tuned --resume auto": "likewise",
    "tele train --backend pt --config F --set lora.rank=16 --init TeleChat2-7B --resume runs/law "
    "--out runs/law-on": "likewise; tests/parity/test_lora.py resumes adapters",
    "tele data pairs.jsonl --tokenizer TeleChat2-7B --out data/pairs --preference --seq-len 4096": "the pairs are the "
    "reader's; tests/unit/data/test_examples.py packs some",
    "tele train --backend ms --config configs/train/telechat2-7b-lora.yaml --init TeleChat2-7B --out runs/dpo "
    "--set 'data.sources=[{path: data/pairs}]' preference.beta=0.1 train.micro_batch=2": "likewise; "
    "tests/parity/test_preference_training.py trains on pairs",
    "make demo": "minutes; its parts are in tests/parity, and it is run by hand before a release",
    "make test": "is what runs this",
    "make test-unit": "is what runs this",
    'make campaign-equivalence CAMPAIGN_ARGS="--trials 100 --seed 0 --out equivalence.json"': "ten minutes; "
    "tests/parity/test_equivalence_campaign.py runs six of its cases",
    "make campaign-corruption": "ten minutes; tests/unit/checkpoint/test_corruption_campaign.py runs a sample of it",
    "make campaign-corruption CAMPAIGN_ARGS='--trials 100 --seed 5000'": "likewise",
    "make campaign-memory": "a quarter of an hour; tests/unit/train/test_memory_campaign.py runs a short one",
    "make campaign-kills": "an evening; tests/multiproc/test_kills.py runs a sample of it",
    "tele plan --search --model telechat2-115b --devices 512 --machine atlas-800t-a2 --seq-len 8192 "
    "--global-batch 512": "a quarter of a minute; tests/unit/planner/test_search.py makes smaller ones",
    'make matrix MATRIX_ARGS="--cells mindspore-2.10 transformers-5"': "installs other versions; run by hand",
    "tele convert --from mindformers --to canonical finetune_telechat_7b.yaml 7b.yaml": "the file is the reader's; "
    "tests/unit/convert/test_mindformers_run.py runs one",
    "tele convert --from canonical --to mindformers 7b.yaml finetune_again.yaml": "likewise",
    "tele convert --from mindformers --to canonical rank_folders ckpt --config finetune_telechat_7b.yaml": "likewise; "
    "the conversion itself is run by tests/unit/convert/test_convert_mindformers.py",
    "make install": "installs; continuous integration begins with it",
    "source .venv/bin/activate": "the shell's own; the tests run inside the environment",
    "tele train --backend pt --config configs/train/telechat2-tiny.yaml --out runs/second "
    "--set train.steps=100 optim.lr=1e-3": "the same launch as the README's resume",
    "tele parity --config configs/train/telechat2-tiny.yaml --steps 50 --out parity": "three launches; "
    "tests/parity/test_parity_command.py::test_one_batch_and_three_steps runs a shorter one",
    "tele parity --config configs/train/telechat2-tiny.yaml --steps 0 --set train.precision=bf16": "run by "
    "tests/parity/test_parity_command.py::test_one_batch_in_low_precision",
    "tele parity --config configs/train/telechat2-tiny.yaml --steps 0 --layouts tp2,pp2,ring2,ulysses2,dp2 "
    "--out parity-layouts": "minutes; tests/parity/test_layouts.py runs these layouts and more",
    "tele parity record --backend ms --config F --steps 50 --out records/npu": "F is the reader's",
    "tele parity record --backend pt --config F --steps 50 --out records/gpu": "likewise",
    "tele parity record --backend pt --config F --steps 50 --set train.precision=fp64 --out records/fp64": "likewise",
    "tele parity compare records/npu records/gpu --reference records/fp64 --junit parity.xml": "compares those; "
    "tests/unit/parity/test_compare.py::test_the_command_without_a_framework runs it",
    "tele parity locate records/npu records/gpu --reference records/fp64": "the records are of the reader's; "
    "tests/parity/test_locate.py::test_the_command_names_the_operator_and_says_what_to_record runs it",
    "make locate": "six minutes; tests/parity/test_locate.py runs a sample of it",
    "make mutation": "ten minutes; tests/mutation/test_mutation.py runs a sample of it",
    "make mutation CAMPAIGN_ARGS='--only \"group\" --backends pt'": "likewise",
    "make mutation CAMPAIGN_ARGS='--out mutation.json'": "likewise",
    "make relay": "an hour; tests/parity/test_relay.py runs one schedule",
    "make relay CAMPAIGN_ARGS='--segments 50 --seed 7 --ranks 0'": "likewise",
    "tele parity envelope --config F --backend pt --steps 300 --out envelope.json": "F is the reader's; "
    "tests/parity/test_envelope.py runs a shorter one",
    "tele parity compare A B --envelope envelope.json": "A and B are the reader's; "
    "tests/unit/parity/test_compare.py runs the command",
    "tele eval --backend pt --checkpoint TeleFLM-52B --tasks open-llm --data datasets --out scores": "the data "
    "sets are the reader's; tests/parity/test_harness.py runs tasks of its own",
    "tele eval --backends ms pt --checkpoint model --tasks mmlu arc_challenge --limit 100 --out scores": "likewise",
    "tele eval iq --backends ms pt --checkpoint model --rows superglue-and-clue --out scores-iq": "likewise",
    "tele eval answers --backend pt --checkpoint TeleChat2-7B --format alignbench --questions data_release.jsonl "
    "--out model_answer/TeleChat2-7B.jsonl": "the questions are the benchmark's; tests/parity/test_answers.py runs the "
    "command on questions of ours",
    "tele eval answers --backend ms --checkpoint runs/sft --format mt-bench --questions question.jsonl "
    "--out data/mt_bench/model_answer/sft.jsonl": "likewise",
    "tele eval bpb --backend pt --checkpoint model --domain mine=held-out.jsonl": "the texts are the reader's; the "
    "README's line is run",
    "tele eval bpb --backend ms --checkpoint TeleFLM-52B --weights chinese --domain WebText=web.jsonl "
    "--domain Code=code": "likewise",
    "tele bench parallel --model telechat2-tiny --layouts single,tp2,pp2 --steps 4": "a minute; "
    "tests/unit/bench/test_bench_parallel.py runs its parts",
    "tele train --backend pt --config configs/train/telechat2-tiny.yaml --layout pp2 --out runs/pp2": "the same "
    "launch as the README's with --layout; tests/multiproc/test_parallel_training.py runs more",
    "tele bench parallel --backends pt --layouts tp2,pp2,dp2 --steps 4": "a quarter of a minute on an idle machine; "
    "tests/unit/bench/test_bench_parallel.py runs its parts",
    "tele bench parallel --layouts single,tp2,pp2,pp2.vpp2,ring2,ulysses2,dp2,dp2.nozero,pp2.tp2 --steps 6": "minutes",
    "tele train --backend ms --config F --layout tp8.dp2 --nnodes 2 --node-rank 0 --master 10.0.0.1:29500": "machines "
    "of the reader's; tests/multiproc/test_nodes.py rehearses two nodes",
    "tele train --backend ms --config F --layout tp8.dp2 --nnodes 2 --node-rank 1 --master 10.0.0.1:29500": "likewise",
    "msrun --worker_num=4 --local_worker_num=4 --join=True --log_dir=LOGS telechat_ms/train.py --config F --out DIR "
    "--set parallel.tp=2 parallel.dp=2": "F and DIR are the reader's",
    "torchrun --nproc-per-node=4 pt_reference/train.py --config F --out DIR --set parallel.tp=2 "
    "parallel.dp=2": "likewise",
    "msrun --worker_num=16 --local_worker_num=8 --node_rank=1 --master_addr=10.0.0.1 --master_port=29500 --join=True "
    "--log_dir=LOGS telechat_ms/train.py --config F --out DIR": "likewise",
    "torchrun --nnodes=2 --nproc-per-node=8 --node-rank=1 --master-addr=10.0.0.1 --master-port=29500 "
    "pt_reference/train.py --config F --out DIR": "likewise",
    "tele bench step --model telechat2-mini --seq-len 256 --micro-batch 4 --out bench.json": "a minute; "
    "tests/parity/test_parity_command.py::test_bench_with_real_workers runs a smaller model",
    "tele bench step --model telechat2-tiny --seq-len 32 --micro-batch 1 --steps 2 --block 1 --backends pt eager": "as "
    "there, of ms and pt; tests/parity/test_bench_eager.py has the eager model's steps",
    "tele train --backend ms --config configs/train/telechat2-tiny.yaml --layout tp2.pp2 --out runs/many "
    "--set train.steps=4 optim.warmup_steps=1": "run by tests/multiproc/test_parallel_training.py"
    "::test_resume_in_the_other_backend_at_another_layout on a model of its own",
    "tele train --backend pt --config configs/train/telechat2-tiny.yaml --layout dp2.ring2 --out runs/many-on "
    "--resume runs/many --set train.steps=8 optim.warmup_steps=1": "likewise",
    "msrun --worker_num=1 --local_worker_num=1 --join=True --log_dir=LOGS telechat_ms/train.py "
    "--config F --out DIR": "F and DIR are the reader's; the README's line is run",
    "torchrun --nproc-per-node=1 pt_reference/train.py --config F --out DIR": "F and DIR are the reader's; the "
    "README's line is run",
}
# Pages whose commands another test runs, all of them.
RUN_ELSEWHERE = {
    "docs/generation.md": "tests/parity/test_generation_parity.py::test_the_commands_of_the_page_run",
    "docs/serving.md": "tests/serve/test_serving_page.py::test_the_commands_of_the_page_run",
    "docs/growth.md": "tests/multiproc/test_growth_runs.py::test_the_commands_of_the_page_run",
    "docs/mup.md": "tests/parity/test_mup_commands.py::test_the_commands_of_the_page_run",
}

LIGHT = ("doctor", "plan", "tokenize", "data", "convert", "merge", "average", "mup")  # verbs that need no framework
TRAINED = "runs/"  # a light verb on something that was trained goes with the training
MINDSPORES = ("--file-format", ".ckpt")  # a light verb on MindSpore's own files needs it

# Options in the text that are other programs'.
# vLLM, TensorBoard, Megatron-LM
FOREIGN_OPTIONS = (
    *("--trust-remote-code", "--logdir", "--use-mup", "--dist-ckpt-optim-fully-reshardable"),
    *("--backend-store-uri", "--build-arg", "--shm-size", "--ipc", "--requeue", "--max-restarts"),
)
FOLDERS = "|".join((*PACKAGES, NAME, "configs", "docs", "findings", "tests"))
# A path, and names after it: `core/train/recipe.py`: `learning_rate`, `class_rate`
PLACE = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)`((?:[:,] `\w+`)*)")
FILE_ENDINGS = ("py", "safetensors", "json", "yaml", "md")  # model.safetensors is no config key


@dataclass(frozen=True)
class Command:
    """One shown command: where, as written (without comment), the words of the program that counts, what it is fed."""

    page: str
    line: int
    text: str
    words: tuple[str, ...]
    stdin_text: str = ""
    stdin_file: str = ""

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    def setting(self, *assignments: str) -> Command:
        """The command with these assignments of --set, in the place of its own of the same keys."""
        new = dict(one.partition("=")[::2] for one in assignments)
        words: list[str] = []
        old: list[str] = []
        behind = False  # --set
        for word in self.words:
            behind = word == "--set" or behind and not word.startswith("--")
            if not behind:
                words.append(word)
            elif word != "--set" and word.partition("=")[0] not in new:
                old.append(word)
        given = [*old, *(f"{key}={value}" for key, value in new.items())]
        return replace(self, words=(*words, "--set", *given))


@dataclass(frozen=True)
class Fence:
    page: str
    line: int  # of the first line inside
    language: str
    lines: tuple[str, ...]


def fences(root: Path, page: str) -> list[Fence]:
    """The fenced blocks of a page."""
    found, inside = [], None
    for number, line in enumerate((root / page).read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if inside is None:
                inside = (number + 1, line[3:].strip(), [])
            else:
                found.append(Fence(page, inside[0], inside[1], tuple(inside[2])))
                inside = None
        elif inside is not None:
            inside[2].append(line)
    if inside is not None:
        raise UserError(f"{page}:{inside[0]}: a fence is not closed")
    return found


def commands(root: Path, page: str) -> list[Command]:
    """Commands of the page's shell blocks, and of unnamed blocks where a line begins with one of PROGRAMS."""
    found = []
    for fence in fences(root, page):
        if fence.language not in (*SHELL, ""):
            continue
        begun = ""
        for number, line in enumerate(fence.lines, fence.line):
            begun += line.removesuffix("\\")
            if line.endswith("\\"):
                continue
            command, begun = _command(page, number, begun), ""
            if command and (fence.language in SHELL or command.words[0] in PROGRAMS):
                found.append(command)
    return found


def _command(page: str, number: int, text: str) -> Command | None:
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|<>;&")
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        words = list(lexer)
    except ValueError:  # an apostrophe in prose, not a command
        return None
    if not words:
        return None
    shown = " ".join(_uncommented(text).split())
    fed = name = ""
    if "|" in words:
        cut = words.index("|")
        fed, words = words[1], words[cut + 1 :]
    if "<" in words:
        cut = words.index("<")
        name, words = words[cut + 1], words[:cut]
    return Command(page, number, shown, tuple(words), fed, name)


def _uncommented(text: str) -> str:
    for mark in re.finditer(r"(?<!\S)#", text):
        if text[: mark.start()].count("'") % 2 == 0 and text[: mark.start()].count('"') % 2 == 0:
            return text[: mark.start()]
    return text


def mistakes(root: Path, page: str) -> list[str]:
    """Complaints about a page: commands that would not be understood, config keys and options that do not exist."""
    found = [f"{c.where}: {said}" for c in commands(root, page) if (said := mistake(c))]
    checks = (wrong_blocks, wrong_words, wrong_links, wrong_places)
    return found + [complaint for check in checks for complaint in check(root, page)]


def mistake(command: Command) -> str | None:
    """What is wrong with a command, or None. Nothing is run."""
    program, *words = command.words
    if program not in PROGRAMS:
        return f"'{program}' is not a program of this project; known programs: {', '.join(PROGRAMS)}"
    check = {"tele": _tele, "make": _make, "msrun": _raw, "torchrun": _raw}.get(program)
    try:
        if check:
            check(words)
    except UserError as error:
        return str(error)
    return None


def _tele(words: list[str]) -> None:
    if not words or words[0] not in cli.VERBS:
        raise UserError(f"no command 'tele {' '.join(words[:1])}'")
    options = parser(words[0]).parse_args(words[1:])
    if hasattr(options, "set") and getattr(options, "config", None) is not None:
        # A model's file that a command before has written is not here.
        _run_config(options.config, [text for text in options.set if not text.startswith("model=")])
    if isinstance(getattr(options, "model", None), str):
        load_model_config(options.model, "--model")


def _run_config(config: str, overrides: list[str]) -> None:
    if not config.isupper():  # F stands for a file of the reader's
        load_run_config(ROOT / config, overrides)


def _make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")  # a target's line may go on
    targets = re.search(r"^\.PHONY:(.*)$", text, flags=re.MULTILINE)
    assert targets is not None
    for word in words:
        name, equals, _ = word.partition("=")
        if equals and not re.search(rf"\b{re.escape(name)}\b", text):
            raise UserError(f"make: the Makefile knows no variable {name}")
        if not equals and word not in targets[1].split():
            raise UserError(f"make: no target '{word}'; there are: {targets[1].strip()}")


def _raw(words: list[str]) -> None:
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if script is None or not (ROOT / words[script]).is_file():
        raise UserError("launches no script of this project")
    options = script_parser().parse_args(words[script + 1 :])
    _run_config(options.config, options.set)


def parser(verb: str) -> cli.Parser:
    """The parser that `tele VERB` uses."""
    made = cli.Parser(prog=f"tele {verb}")
    importlib.import_module(f"telechat_twins.core.commands.{verb}").add_arguments(made)
    return made


def wrong_blocks(root: Path, page: str) -> list[str]:
    """Python blocks that do not compile, YAML blocks with unknown keys or wrong values: a search, or sections of a
    run."""
    from telechat_twins.core.schema import parse_yaml

    complaints = []
    for fence in fences(root, page):
        text = "\n".join(fence.lines)
        if fence.language == "python":
            try:
                tree = ast.parse(text, page)
            except SyntaxError as error:
                complaints.append(f"{page}:{fence.line}: {error}")
                continue
            names = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
            complaints += [
                f"{page}:{fence.line}: imports {name}; the import name is {NAME}.{name}"
                for name in names
                if name.partition(".")[0] in PACKAGES
            ]
        elif fence.language == "yaml":
            tree = parse_yaml(text, page)
            found = _search(tree) if "config" in tree else _sections(tree)
            complaints += [f"{page}:{fence.line}: {found}"] if found else []
    return complaints


def _sections(values: dict[str, Any]) -> str | None:
    """What is wrong with some sections of a run's YAML, judged together inside a recipe that is right."""
    from telechat_twins.core.config import run_config_from_dict
    from telechat_twins.core.schema import load_yaml

    tree = load_yaml(ROOT / "configs" / "train" / "telechat2-7b.yaml") | values
    try:
        run_config_from_dict(tree)
    except UserError as error:
        return str(error)
    return None


def _search(tree: dict[str, Any]) -> str | None:
    """What is wrong with the YAML of `tele mup search`, or None."""
    from telechat_twins.core.mup.search import SearchConfig
    from telechat_twins.core.schema import from_mapping

    try:
        from_mapping(SearchConfig, tree, "")
    except UserError as error:
        return str(error)
    return None


def wrong_words(root: Path, page: str) -> list[str]:
    """`tele VERB`, `--option` and `section.key` inside backticks that name nothing."""
    complaints = []
    fenced = {n for f in fences(root, page) for n in range(f.line, f.line + len(f.lines))}
    for number, line in enumerate((root / page).read_text(encoding="utf-8").splitlines(), 1):
        for span in re.findall(r"`([^`]+)`", line) if number not in fenced else ():
            for verb in re.findall(r"\btele ([a-z]+)", span):
                if verb not in cli.VERBS:
                    complaints.append(f"{page}:{number}: no command 'tele {verb}'")
            for option in re.findall(r"(?<!\S)--[a-z][\w-]*", span):
                if option not in all_options():
                    near = difflib.get_close_matches(option, all_options(), n=1)
                    complaints.append(f"{page}:{number}: no option {option}" + (f", nearest {near[0]}" if near else ""))
            for key in re.findall(
                r"(?<![\w./])((?:model|data|train|optim|parallel|checkpoint|health)\.[a-z_0-9]+)", span
            ):
                if key not in all_keys() and key.partition(".")[2] not in FILE_ENDINGS:
                    complaints.append(f"{page}:{number}: no config key {key}")
    return complaints


@cache
def all_options() -> frozenset[str]:
    """Every option of every verb and of the raw launchers' scripts."""

    def walk(of: argparse.ArgumentParser) -> Iterator[str]:
        for action in of._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    yield from walk(inner)

    made = [*(parser(verb) for verb in cli.VERBS), script_parser()]
    return frozenset(
        ["--help", "--version", "--print-completion", *FOREIGN_OPTIONS, *(name for one in made for name in walk(one))]
    )


@cache
def all_keys() -> frozenset[str]:
    """Every ``section.key`` of a run's YAML."""
    import typing

    sections = typing.get_type_hints(RunConfig)
    # A section that may be absent is ``Section | None``.
    kinds = {s: next(iter(typing.get_args(kind)), kind) for s, kind in sections.items()}
    groups = {s: dataclasses.fields(kind) for s, kind in kinds.items() if dataclasses.is_dataclass(kind)}
    inner = {"train.profile": dataclasses.fields(ProfileConfig)}
    return frozenset(f"{s}.{f.name.removesuffix('_')}" for s, found in {**groups, **inner}.items() for f in found)


def wrong_links(root: Path, page: str) -> list[str]:
    """Relative links to files that are not there, or to headings that their page has not."""
    complaints = []
    fenced = {n for f in fences(root, page) for n in range(f.line, f.line + len(f.lines))}
    for number, line in enumerate((root / page).read_text(encoding="utf-8").splitlines(), 1):
        for target in re.findall(r"\]\(([^)\s]+)\)", line) if number not in fenced else ():
            if re.match(r"[a-z]+:", target):
                continue
            name, _, heading = target.partition("#")
            file = (root / page).parent / name if name else root / page
            if not file.exists():
                complaints.append(f"{page}:{number}: link to {target}, which is not there")
            elif heading and heading not in anchors(file):
                complaints.append(f"{page}:{number}: link to {target}, a heading that is not there")
    return complaints


def wrong_places(root: Path, page: str) -> list[str]:
    """Source paths inside backticks that do not exist, and names after "path: name, name" that the file lacks."""
    if page == "CHANGELOG.md":  # names the paths of their time
        return []
    complaints = []
    fenced = {n for f in fences(root, page) for n in range(f.line, f.line + len(f.lines))}
    for number, line in enumerate((root / page).read_text(encoding="utf-8").splitlines(), 1):
        for place, names in re.findall(PLACE, line) if number not in fenced else ():
            if not (ROOT / place).exists():
                complaints.append(f"{page}:{number}: {place} does not exist")
                continue
            for name in re.findall(r"`(\w+)`", names):
                if not re.search(rf"\b{name}\b", (ROOT / place).read_text(encoding="utf-8")):
                    complaints.append(f"{page}:{number}: {place} has no {name}")
    return complaints


def anchors(file: Path) -> list[str]:
    """Headings as links name them."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def run_by(command: Command) -> str:
    """Who runs a command: "unit", "parity", or the reason why nobody does as it stands."""
    if command.page in OTHERS or command.text in NOT_RUN:
        return NOT_RUN.get(command.text, "")
    if command.text in elsewhere():
        return elsewhere()[command.text]
    program, *words = command.words
    heavy = any(word.startswith(TRAINED) or word.endswith(MINDSPORES) for word in words)
    light = program == "tele" and words[0] in LIGHT and not heavy
    return "unit" if light else "parity"


@cache
def elsewhere() -> dict[str, str]:
    """Commands of the pages in RUN_ELSEWHERE, and the test that runs them; the same line on another page is covered."""
    return {c.text: test for page, test in RUN_ELSEWHERE.items() for c in commands(ROOT, page)}


def to_run(who: str) -> list[Command]:
    """The commands that ``who`` runs, page by page; a line that stands on two pages is run on the first."""
    found: dict[str, Command] = {}
    for page in PAGES:
        for command in commands(ROOT, page):
            if run_by(command) == who:
                found.setdefault(command.text, command)
    return list(found.values())


def run(command: Command, monkeypatch: Any) -> int:
    """Run a `tele` command in this process and the present folder; its exit code."""
    fed = Path(command.stdin_file).read_text(encoding="utf-8") if command.stdin_file else command.stdin_text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(fed.encode())))
    return cli.main(list(command.words[1:]))
