"""``tele generate``: continue a prompt with either backend."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core import backends
from telechat_twins.core.commands.options import (
    add_adapter_argument,
    add_column_arguments,
    add_model_arguments,
    add_sampling_arguments,
    columns_from,
    given_sampling,
    load_model,
    note_rows,
    sampling_from,
)
from telechat_twins.core.data.forms.streams import UTF8
from telechat_twins.core.data.kinds.messages import REASONING, Reading
from telechat_twins.core.data.kinds.table import DIALOGUE, USES
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.load import Loaded
from telechat_twins.core.model.xpos_range import check_xpos_range
from telechat_twins.core.shown import controls_shown

if TYPE_CHECKING:
    from telechat_twins.core.inference.requests import Event, Request
    from telechat_twins.core.inference.sampling import SamplingConfig
    from telechat_twins.core.parallel.layout import Layout

DEFAULT_NEW = 128  # tokens
MAX_PROMPT_BYTES = 1 << 22  # about a million tokens

EPILOG = """\
examples:
  tele generate --backend pt --checkpoint runs/first --prompt "Once upon a time"
  tele generate --backend ms --checkpoint model --chat --prompt-file question.txt --temperature 0.7 --top-p 0.9
  tele generate --backend pt --checkpoint model --ids 4,96343,5 --max-new-tokens 20 --json
  tele generate --backend pt --checkpoint model --prompt "1. " --temperature 0.8 --samples 3 --stop "2."
  tele generate --backend ms --checkpoint model --prompt "Once upon a time" --layout tp2.pp2
  tele generate --backend pt --checkpoint model --prompt-file book.txt --layout ring2
  tele generate --backend ms --checkpoint model --adapter runs/sft-lora --chat --prompt "Hello"
  tele generate --backend pt --checkpoint model --prompts questions.jsonl --samples 8 --temperature 0.8 \\
    --score python:judge.py:score --out best.jsonl --preference-out pairs.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele generate``."""
    parser.epilog = EPILOG
    add_model_arguments(parser)
    add_adapter_argument(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="text to continue (default: read from stdin)")
    source.add_argument("--prompt-file", metavar="F", help="read the text from a file, without a final line end")
    source.add_argument("--ids", metavar="1,2,3", help="token ids instead of text; no tokenizer is needed")
    source.add_argument(
        "--prompts",
        nargs="+",
        metavar="F",
        help="rejection sampling: files of dialogue rows, whose last answer is sampled anew, or a question a line",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="tokens to generate at most (default: as --generation-config, or 128)",
    )
    parser.add_argument("--chat", action="store_true", help="wrap the prompt as a user's question in the chat template")
    parser.add_argument(
        "--allow-control", action="store_true", help="encode names of control tokens, e.g. <_user>, as these tokens"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="continue after the end token")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument(
        "--samples", type=int, default=1, metavar="N", help="answers to draw (1); several are not streamed"
    )
    parser.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: log-probability of each token and of the N likeliest"
    )
    parser.add_argument(
        "--prompt-logprobs",
        type=int,
        metavar="N",
        help="with --json: the same of the prompt's tokens; --max-new-tokens may then be 0",
    )
    add_sampling_arguments(parser)
    parser.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, default=True, help="print text as it is generated (default)"
    )
    parser.add_argument(
        "--layout",
        metavar="TEXT",
        help="divide the model among processes (tp2, tp2.pp2), or a long prompt and its cache (ring2)",
    )
    parser.add_argument("--nproc", type=int, metavar="N", help="processes (default: as many as the layout needs)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: ids, text, margins, finish_reason")
    _add_rejection_arguments(parser)


def _add_rejection_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of --prompts."""
    group = parser.add_argument_group("rejection sampling (--prompts)")
    group.add_argument(
        "--score",
        metavar="SPEC",
        help="python:FILE.py:function, called with messages, answer and row; or 'command:CMD ...', which reads a JSON "
        "object of these a line and writes a number a line",
    )
    group.add_argument("--out", metavar="F", help="rows that `tele data --sft` reads; repeat the command to resume")
    group.add_argument("--keep", choices=("best",), help="which answer of a prompt is written to --out (best)")
    group.add_argument(
        "--preference-out", metavar="F", help="best and worst answers as rows that `tele data --preference` reads"
    )
    group.add_argument("--min-score", type=float, metavar="X", help="drop prompts whose best score is below it")
    group.add_argument(
        "--keep-cut", action="store_true", help="score answers that reached --max-new-tokens (default: leave them out)"
    )
    add_column_arguments(group)
    group.add_argument("--encoding", metavar="NAME", help="of text files and rows (utf-8)")
    group.add_argument(
        "--ignore-key", action="append", default=[], metavar="NAME", help="leave this key of rows out (repeatable)"
    )
    group.add_argument(
        "--kind",
        choices=[kind.name for kind in USES[DIALOGUE]],
        help="what every row is (default: judged by the keys of each row)",
    )
    group.add_argument("--reasoning", choices=REASONING, help="reasoning of earlier answers, as in `tele data`")


def run(args: argparse.Namespace) -> int:
    """Generate; print text or JSON to stdout and a line of statistics to stderr."""
    from telechat_twins.core.inference.generation import answer
    from telechat_twins.core.inference.requests import check_request
    from telechat_twins.core.parallel.layout import check_layout

    # Before the weights are verified; without a temperature, the model's settings may draw.
    _check_samples(args, given_sampling(args).get("temperature") == 0)
    _check_mode(args)
    if args.prompts:
        return _reject(args)
    layout = _layout(args)
    ids = None if args.ids is None else parse_ids(args.ids)
    if ids is not None and (args.chat or args.allow_control):
        raise UserError("--ids: cannot be combined with --chat or --allow-control, which work on text; give one")
    text = _prompt_text(args) if ids is None else ""
    adapters = {} if args.adapter is None else {"": args.adapter}
    model = load_model(args, None if ids is not None else "a text prompt", adapters)
    sampling = _sampling(args, model)
    check_layout(layout, model.config)
    if ids is None:
        assert model.tokenizer is not None  # load_model refuses a text prompt without one
        ids = _encode(model, text, args)
    if args.add_bos and not (args.chat and ids[:1] == [model.config.bos_token_id]):
        ids = [model.config.bos_token_id, *ids]
    _default_length(args, model, len(ids))
    request = _request(args, model, ids, sampling)
    has_text = model.tokenizer is not None
    check_request(request, model.config.num_tokens, has_text)  # before weights are read
    terminal = sys.stdout.isatty()
    show = args.stream and not args.json and has_text and request.samples == 1
    made: list[list[Event]] = [[] for _ in range(request.samples)]
    if layout.world == 1:
        engine, started = model.engine(request.total, request.samples), time.perf_counter()
        for event in answer(engine, request):
            made[event.sample].append(event)
            if show and event.text:
                print(controls_shown(event.text) if terminal else event.text, end="", flush=True)
        seconds = time.perf_counter() - started
    else:
        code, events, seconds = _by_ranks(args, model, request, layout, show)
        if code:
            return code
        for event in events:
            made[event.sample].append(event)
    for sample in made:
        _report(args, request, sample, show)
    count = sum(map(len, made))
    ends = {"stop": "a stop", "length": "the limit"}
    print(
        f"{count} tokens in {seconds:.2f} s ({count / max(seconds, 1e-9):.1f} tokens/s), ended by "
        + ", ".join(ends[str(sample[-1].finish_reason)] for sample in made),
        file=sys.stderr,
    )
    return 0


def _sampling(args: argparse.Namespace, model: Loaded) -> SamplingConfig:
    """The sampling of the options and the model's settings; UserError for several samples that would be equal."""
    sampling = sampling_from(args, model.settings)
    args.stop = args.stop or list(model.settings.stops if model.tokenizer else ())
    _check_samples(args, sampling.greedy)
    return sampling


def _check_samples(args: argparse.Namespace, greedy: bool) -> None:
    if args.samples > 1 and greedy:
        raise UserError("--samples: several need --temperature, since greedy answers are equal; e.g. --temperature 0.7")


def _default_length(args: argparse.Namespace, model: Loaded, prompt: int) -> None:
    """Set --max-new-tokens where it is not given, for a prompt of ``prompt`` tokens."""
    if args.max_new_tokens is None:
        args.max_new_tokens = model.settings.new_tokens(prompt, DEFAULT_NEW, model.config.training_seqlen)


_ONLY_PROMPTS = ["score", "out", "keep", "preference_out", "min_score", "keep_cut"]
_ONLY_PROMPTS += ["encoding", "ignore_key", "kind", "reasoning", "column", "role", "dataset_info"]
_NOT_PROMPTS = ["allow_control", "ignore_eos", "logprobs", "prompt_logprobs", "layout", "nproc", "json"]


def _check_mode(args: argparse.Namespace) -> None:
    """UserError for options that do not go together, those of rejection sampling among them."""

    def given(names: Sequence[str]) -> str | None:
        values = {name: getattr(args, name) for name in names}
        # By identity: 0 is a value that was given, and equals False.
        name = next((name for name, v in values.items() if v is not None and v is not False and v != []), None)
        return name and name.replace("_", "-")

    least = 1 if args.prompt_logprobs is None else 0
    if args.max_new_tokens is not None and args.max_new_tokens < least:
        raise UserError(f"--max-new-tokens: must be at least {least}, found {args.max_new_tokens}")
    if not args.prompts:
        if name := given(_ONLY_PROMPTS):
            raise UserError(f"--{name}: belongs to rejection sampling; give --prompts FILE, or leave it out")
        if not args.json and (name := given(["logprobs", "prompt_logprobs"])):
            raise UserError(f"--{name} requires --json; add --json")
        return
    if name := given(_NOT_PROMPTS):
        raise UserError(f"--{name}: cannot be combined with --prompts; leave it out")
    for name in ("score", "out"):
        if getattr(args, name) is None:
            raise UserError(f"--{name}: missing; --prompts needs a scorer (--score) and a file to write (--out)")
    if args.preference_out and args.samples < 2:
        raise UserError(f"--preference-out: needs two answers or more, found --samples {args.samples}; e.g. 8")
    if args.preference_out and Path(args.preference_out).resolve() == Path(args.out).resolve():
        raise UserError(f"--preference-out: must not be the file of --out, {args.out}; give another")


def _reject(args: argparse.Namespace) -> int:
    """Rejection sampling of every prompt of the files; prints the summary."""
    from telechat_twins.core.data.chat_layout import require_layout
    from telechat_twins.core.files.atomic import writable_file
    from telechat_twins.core.inference.prompts import Prompt, prompt_encoder, read_prompts, survey
    from telechat_twins.core.inference.rejection import Journal, Selection, deciding, draw, request_of, sample_prompts
    from telechat_twins.core.inference.rejection import summary as summary_of
    from telechat_twins.core.inference.requests import Request, check_request, turn_stops
    from telechat_twins.core.inference.scorers import open_scorer
    from telechat_twins.core.launch.run_lock import hold_place

    selection = Selection(
        Path(args.out), Path(args.preference_out) if args.preference_out else None, args.min_score, args.keep_cut
    )
    for option, path in (("--out", args.out), ("--preference-out", args.preference_out)):
        if path:
            writable_file(path, option)
    model = load_model(args, "a text prompt", {} if args.adapter is None else {"": args.adapter})
    assert model.tokenizer is not None  # load_model refuses a text prompt without one
    sampling = _sampling(args, model)
    layout = require_layout(model.tokenizer, model.layout)
    encode = prompt_encoder(layout, model.config.bos_token_id if args.add_bos else None)

    columns = columns_from(args, args.prompts, DIALOGUE)
    reading = Reading(frozenset(args.ignore_key), args.reasoning or REASONING[0], args.kind, columns)

    def prompts() -> Iterator[Prompt]:
        return read_prompts(args.prompts, reading, args.encoding or UTF8, layout.thinks())

    found = survey(prompts(), encode)
    note_rows(reading, args.prompts, args.encoding)
    _default_length(args, model, len(found.longest))
    template = Request(
        prompt_ids=tuple(found.longest),
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=model.settings.least_tokens(args.max_new_tokens),
        sampling=sampling,
        samples=args.samples,
        stop_ids=turn_stops(model.tokenizer, model.config),
        stop_texts=tuple(args.stop),
        text="answer",
        adapter=len(model.adapters),
    )
    check_request(template, model.config.num_tokens, True)  # before weights are read
    with hold_place(args.out, f"--out {args.out}"), open_scorer(args.score, _to_stderr) as scorer:
        journal = Journal(selection, deciding(model, found.digest, scorer.identity))
        earlier = len(journal.records)
        if earlier < found.count:
            engine = model.engine(template.total, args.samples)
            sample_prompts(
                prompts(),
                found.count,
                lambda index, prompt: draw(engine, request_of(template, prompt, index, encode(prompt))),
                scorer,
                selection,
                journal,
            )
    for line in summary_of(selection, journal.records, earlier):
        print(line)
    return 0


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _request(args: argparse.Namespace, model: Loaded, ids: Sequence[int], sampling: SamplingConfig) -> Request:
    """The engine's request for a prompt's ids, with the options."""
    from telechat_twins.core.inference.requests import Request, turn_stops

    stops = turn_stops(model.tokenizer, model.config) if args.chat and model.tokenizer else model.config.stop_ids
    has_text = model.tokenizer is not None
    return Request(
        prompt_ids=tuple(ids),
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=model.settings.least_tokens(args.max_new_tokens),
        sampling=sampling,
        samples=args.samples,
        stop_ids=frozenset() if args.ignore_eos else stops,
        stop_texts=tuple(args.stop),
        logprobs=args.logprobs,
        prompt_logprobs=args.prompt_logprobs,
        margins=args.json,
        # An answer is a text of its own; a raw continuation continues after the prompt's last word.
        text=("answer" if args.chat else "continuation") if has_text else "none",
        adapter=len(model.adapters),
    )


def _by_ranks(
    args: argparse.Namespace, model: Loaded, request: Request, layout: Layout, show: bool
) -> tuple[int, list[Event], float]:
    """Run a request in the processes of a layout: the launcher's exit code, the events, and the seconds from the first
    step to the last. With ``show``, the text goes to stdout as it is generated. After a failure of a rank (code 1) the
    folder with the logs is kept; the launcher has printed its name.
    """
    from telechat_twins.convert.generation_rank import SCRIPT
    from telechat_twins.core.inference.generation import note_length
    from telechat_twins.core.inference.worker import GenerationJob, read_events, write_job
    from telechat_twins.core.launch.launcher import launch

    note_length(model.config, request.total)
    check_xpos_range(model.config, args.precision, request.total)
    folder = Path(tempfile.mkdtemp(prefix="tele-generate-"))
    job = GenerationJob(
        backend=args.backend,
        checkpoint=str(Path(args.checkpoint).resolve()),
        config=model.config,
        layout=args.layout,
        precision=args.precision,
        quantize=args.quantize,
        rescale=args.rescale,
        pages=model.pages(request.total, request.samples),
        request=request,
        tokenizer=None if model.tokenizer is None else str(Path(model.tokenizer.path).resolve()),
        control=args.control,
        adapter=None if args.adapter is None else str(Path(args.adapter).resolve()),
    )
    write_job(folder / "job.json", job)
    code = 1
    try:
        _to_stderr(
            f"starting {layout.world} processes with {backends.TITLES[args.backend]}; they first read the weights"
        )
        with _shown(folder / "text", show):
            code = launch(args.backend, [str(folder / "job.json")], layout.world, folder / "logs", script=SCRIPT)
        return (code, [], 0.0) if code else (code, *read_events(folder / "samples.json"))
    finally:
        if code != 1:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _shown(path: Path, show: bool) -> Iterator[None]:
    """In this context, text appended to a file is copied to stdout, and the launcher's output goes to stderr."""
    out, done = sys.stdout, threading.Event()
    terminal = out.isatty()

    def copy() -> None:
        with open(path, encoding="utf-8") as file:
            while True:
                last = done.wait(0.05)
                out.write(controls_shown(file.read()) if terminal else file.read())
                out.flush()
                if last:
                    return

    path.touch()
    thread = threading.Thread(target=copy, daemon=True)
    if show:
        thread.start()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        done.set()
        if show:
            thread.join()


def _report(args: argparse.Namespace, request: Request, made: list[Event], shown: bool) -> None:
    """Print one sample to stdout, unless its text has been ``shown`` already."""
    choices = [event.choice for event in made if event.choice is not None]
    last = made[-1]
    by_token = isinstance(last.stop, int)
    tokens = [choice.token for choice in choices[: len(choices) - by_token]]
    text = None if request.text == "none" else "".join(event.text for event in made)
    if args.json:
        report = {
            "backend": args.backend,
            "precision": args.precision,
            "prompt_ids": list(request.prompt_ids),
            "ids": tokens,
            "text": text,
            "finish_reason": last.finish_reason,
            "stop_token": last.stop if by_token else None,
            "stop_text": None if by_token else last.stop,
            "top2_margins": [choice.margin for choice in choices],
        }
        if request.samples > 1:
            report["sample"] = last.sample
        if request.logprobs is not None:
            report["logprobs"] = [choice.logprob for choice in choices]
            report["top_logprobs"] = [dict(choice.top) for choice in choices]
        scores = next((event.scores for event in made if event.scores is not None), None)
        if scores is not None:  # the first token follows nothing
            report["prompt_logprobs"] = [None, *(choice.logprob for choice in scores.tokens)]
            report["prompt_top_logprobs"] = [None, *(dict(choice.top) for choice in scores.tokens)]
        print(json.dumps(report, ensure_ascii=False))
    elif text is None:
        print(",".join(map(str, tokens)))
    else:
        print("" if shown else controls_shown(text) if sys.stdout.isatty() else text)


def _layout(args: argparse.Namespace) -> Layout:
    """The layout of --layout and --nproc; by default one process."""
    from telechat_twins.core.commands.options import read_layout
    from telechat_twins.core.inference.worker import inference_layout

    layout = read_layout(args.layout, args.nproc, None)
    return layout if layout.world == 1 else inference_layout(args.layout)


def parse_ids(text: str) -> list[int]:
    """``"1,2,3"`` -> [1, 2, 3]; UserError names the entry that is not a whole number."""
    ids = []
    for place, word in enumerate(text.split(",")):
        try:
            ids.append(int(word))
        except ValueError:
            raise UserError(f"--ids: entry {place} is {word!r}, not a token id; write them as 1,2,3") from None
    return ids


def _prompt_text(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is not None:
        try:
            with open(args.prompt_file, "rb") as file:  # may be a pipe
                raw = file.read(MAX_PROMPT_BYTES + 1)
        except OSError as error:
            raise UserError(f"--prompt-file {args.prompt_file}: cannot be read ({error.strerror})") from None
        name = args.prompt_file
    elif sys.stdin is None or sys.stdin.isatty():
        raise UserError("prompt: required; give --prompt TEXT, --prompt-file F, --ids 1,2,3, or pipe text in")
    else:
        raw, name = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1), "stdin"
    if len(raw) > MAX_PROMPT_BYTES:
        raise UserError(f"{name}: must have at most {MAX_PROMPT_BYTES} bytes, found more; shorten the prompt")
    try:
        return raw.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start})") from None


def _encode(model: Loaded, text: str, args: argparse.Namespace) -> list[int]:
    assert model.tokenizer is not None
    if args.chat:
        from telechat_twins.core.data.chat_layout import require_layout

        if not text.strip():
            raise UserError("prompt: must not be empty; type some text")
        return require_layout(model.tokenizer, model.layout).encode([{"role": "user", "content": text}])
    return model.tokenizer.encode(text, allow_control=args.allow_control)
