"""``tele serve``: serves a model over HTTP with the OpenAI API, and a chat page."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core.backends import install_command
from telechat_twins.core.commands.options import add_model_arguments, load_model, read_layout
from telechat_twins.core.errors import UserError
from telechat_twins.core.serve.process.options import adapter_paths, check_options, read_keys

if TYPE_CHECKING:
    from telechat_twins.core.inference.engine import Engine, EngineLimits

EPILOG = """\
examples:
  tele serve --backend pt --checkpoint model
  tele serve --backend ms --checkpoint model --host 0.0.0.0 --api-key-file keys.txt --name telechat2-7b
  tele serve --backend pt --checkpoint model --adapter law=runs/law --adapter code=peft/code
  tele serve --backend ms --checkpoint model --layout tp2
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "model", "messages": [{"role": "user", "content": "Hello"}]}'

Routes: /v1/chat/completions, /v1/responses, /v1/completions, /v1/models, /health, /metrics, and / for the chat page.
On SIGTERM or Ctrl-C new requests get 503, and running ones have --grace seconds; a second signal ends them at once."""

INTERRUPTED = 130  # the launcher's code after a signal
MISSING = f"fastapi and uvicorn are not installed; run: {install_command('serve')}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele serve``."""
    parser.epilog = EPILOG
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (8000); 0: any free one")
    parser.add_argument("--name", metavar="NAME", help="the model's name to clients (default: the checkpoint's folder)")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="low-rank adapter (LoRA) of the model that clients get by this name: trained here, or a PEFT folder (may "
        "be given again: answers through different adapters are made in one batch)",
    )
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument(
        "--api-key", metavar="KEY", help="key that clients must send; visible to other users of the machine"
    )
    keys.add_argument("--api-key-file", metavar="F", help="file of such keys, one per line")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name that clients may use, beside local ones (may be given several times; *: any)",
    )
    parser.add_argument(
        "--no-prompt-reuse", action="store_true", help="compute every prompt anew, without the cache of common prefixes"
    )
    parser.add_argument(
        "--layout",
        metavar="TEXT",
        help="divide the model among processes (tp2, tp2.pp2), or long prompts and the cache (ring2)",
    )
    parser.add_argument("--nproc", type=int, metavar="N", help="processes (default: as many as the layout needs)")
    parser.add_argument("--max-len", type=int, metavar="N", help="tokens of prompt and answer (the model's max_seqlen)")
    parser.add_argument("--max-prompt-tokens", type=int, metavar="N", help="tokens of a prompt (--max-len - 1)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of an answer (--max-len - 1)")
    parser.add_argument("--cache-tokens", type=int, metavar="N", help="size of the key-value cache (4 x --max-len)")
    parser.add_argument("--max-running", type=int, default=32, metavar="N", help="answers generated at once (32)")
    parser.add_argument("--max-queue", type=int, default=128, metavar="N", help="answers that may wait (128)")
    parser.add_argument(
        "--max-connections", type=int, metavar="N", help="open connections (--max-running + --max-queue + 128)"
    )
    parser.add_argument("--max-seconds", type=float, default=600.0, metavar="S", help="time limit of a request (600)")
    parser.add_argument(
        "--max-body", type=int, default=4 << 20, metavar="BYTES", help="size of a request's body (4 MiB)"
    )
    parser.add_argument(
        "--grace", type=float, default=30.0, metavar="S", help="time for running answers during shutdown (30)"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    try:
        from telechat_twins.core.serve.hosts import allowed_hosts
        from telechat_twins.core.serve.process.run import serve_model
        from telechat_twins.core.serve.server import open_socket
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise UserError(MISSING) from None

    check_options(args)
    adapters, layout = adapter_paths(args), read_layout(args.layout, args.nproc, None)
    keys = read_keys(args)
    with open_socket(args.host, args.port) as opened:  # before the weights, which may take minutes
        allowed_hosts(opened.getsockname()[0], args.host, args.allowed_host)
        if layout.world == 1:
            model = load_model(args, "tele serve", adapters)

            def make_engine(pages: int, limits: EngineLimits) -> Engine:
                return model.engine_with(pages, limits, reuse=not args.no_prompt_reuse)

            serve_model(args, opened, keys, model, make_engine)
            return 0
    return _by_ranks(args, keys)


def _by_ranks(args: argparse.Namespace, keys: Sequence[str]) -> int:
    """Serve with a model that spans the processes of --layout; the launcher's exit code, 0 after a signal."""
    from telechat_twins.convert.source import open_model
    from telechat_twins.core.files import ROOT
    from telechat_twins.core.inference.worker import inference_layout
    from telechat_twins.core.launch.launcher import launch
    from telechat_twins.core.parallel.layout import check_layout
    from telechat_twins.core.serve.process.ranks import write_job

    layout = inference_layout(args.layout)
    check_layout(layout, open_model(args.checkpoint).config)  # the ranks do not verify the files again
    folder = Path(tempfile.mkdtemp(prefix="tele-serve-"))
    write_job(folder / "job.json", args, keys)
    script = ROOT / "convert" / "serving_rank.py"
    code = launch(args.backend, [str(folder / "job.json")], layout.world, folder / "logs", script=script)
    if code != 1:  # the launcher has printed where the logs of a failure are
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if code == INTERRUPTED else code
