"""The measurements that need an Ascend, as one command: operators, decoding, serving, and training steps.

    python -m telechat_twins.kernels.bench.npu_check --out npu-check.json

The model is a TeleChat2 of the 3B shape in bf16, steps at sequence length 8192; both frameworks are measured, in
processes of their own, and MindSpore's step with adapters (LoRA) after its step of all weights. Without an Ascend every
line says "not run on device", and the exit code is 2. ``tele bench`` without this command measures single tables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from telechat_twins.core.bench.suite import run
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import writable_file, write_text
from telechat_twins.core.types import JsonObject
from telechat_twins.kernels.bench.shape_3b import measure_beside, peers_to_markdown, step_config

BOTH = ("--backends", "ms", "pt")
STEPS = "step and adapters"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="npu-check.json", metavar="FILE", help="results as JSON (npu-check.json)")
    parser.add_argument("--layers", type=int, default=18, metavar="L", help="layers of the 3B shape, at most 24 (18)")
    parser.add_argument("--seq-len", type=int, default=8192, metavar="S", help="tokens per sequence (8192)")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="measured training steps (8)")
    parser.add_argument("--beside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.beside:  # a process of its own, whose device no other framework holds
        return beside(args)
    if not ascends():
        print(
            "\n".join(
                ["| measurement | result |", "|---|---|", *(f"| {name} | not run on device |" for name in names())]
            )
        )
        print("npu-check: no Ascend found; run this command on a machine with one", file=sys.stderr)
        return 2
    try:
        writable_file(args.out, "--out")
    except UserError as error:
        print(f"npu-check: {error}", file=sys.stderr)
        return 2
    return check(args)


def ascends() -> int:
    """Number of Ascend devices that the system shows."""
    return sum(device.name.removeprefix("davinci").isdigit() for device in Path("/dev").glob("davinci*"))


def tables(model: str, seq_len: int, steps: int) -> dict[str, tuple[str, ...]]:
    """Arguments of ``tele bench`` by the title of the table."""
    shape, bf16 = ("--model", model), ("--precision", "bf16")
    many = ("--rows", "1", "8", "32", "--prompt", "512", "--steps", "100")
    step = ("--seq-len", str(seq_len), "--micro-batch", "1", "--steps", str(steps), "--block", "2")
    return {
        "operators": ("kernels", *BOTH, *bf16, "--sizes", "gpu", "gpu-gqa"),
        "decode, 1, 8 and 32 sequences": ("decode", *BOTH, *shape, *bf16, *many),
        "serve, 32 clients of unequal lengths over shared pages": ("serve", *BOTH, *shape, *bf16, "--clients", "32"),
        "step, MindSpore and PyTorch": ("step", *BOTH, *shape, *bf16, *step),
    }


def names() -> list[str]:
    """Titles of all measurements."""
    return [*tables("", 0, 0), STEPS]


def check(args: argparse.Namespace) -> int:
    """Run everything, writing ``args.out`` after each table; 1 if one failed."""
    out = Path(args.out)
    with tempfile.TemporaryDirectory(prefix="tele-npu-") as folder:
        model = Path(folder) / "model.yaml"
        model.write_text(yaml.safe_dump({"preset": "telechat2-3b", "num_layers": args.layers}), encoding="utf-8")
        failed = run(out, tables(str(model), args.seq_len, args.steps))
        found = Path(folder) / "beside.json"
        command = [sys.executable, "-m", "telechat_twins.kernels.bench.npu_check", "--beside", "--out", str(found)]
        command += ["--layers", str(args.layers), "--seq-len", str(args.seq_len), "--steps", str(args.steps)]
        if subprocess.run(command, check=False).returncode:
            return 1
        whole: JsonObject = json.loads(out.read_text(encoding="utf-8"))
        whole["tables"][STEPS] = json.loads(found.read_text(encoding="utf-8"))
    write_text(out, json.dumps(whole, indent=1) + "\n")
    return failed


def beside(args: argparse.Namespace) -> int:
    """MindSpore's step of all weights and then with adapters, in this process."""
    rows = measure_beside(step_config(args.layers, args.seq_len, "none"), args.steps, "ms")
    print(peers_to_markdown(rows))
    write_text(Path(args.out), json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
