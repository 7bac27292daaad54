"""All checks that need a GPU: the device tests, the operators, decoding, and training steps of a realistic shape.

    python -m telechat_twins.kernels.bench.gpu_check --out gpu-check.json

The step is a TeleChat2 of 1 to 3 billion parameters at sequence length 8192 in bf16: TFLOP/s and MFU against the
vendor's dense bf16 peak, with full attention (the convention of published figures) and with causal attention, and a
profile by kernel; then, one after the other, the same step with adapters (LoRA) and transformers' Llama of the same
shape, with PyTorch's FlashAttention and fused AdamW. Decoding is compared with transformers' generate. Where the
transformers library is not installed, its lines say "not measured". Without a GPU the exit code is 2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from telechat_twins.core.bench.cases import OPERATORS
from telechat_twins.core.bench.decode import decode_to_markdown
from telechat_twins.core.bench.kernels import kernels_to_markdown, measure_kernels
from telechat_twins.core.bench.worker import random_batch, timed_steps
from telechat_twins.core.config import RunConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.files import ROOT
from telechat_twins.core.files.atomic import writable_file, write_text
from telechat_twins.core.model.flops import flops_per_token
from telechat_twins.core.model.params import count_parameters
from telechat_twins.core.train.stepper import Stepper
from telechat_twins.core.types import JsonObject
from telechat_twins.kernels.bench.shape_3b import (
    WARM,
    measure_answers,
    measure_beside,
    peers_to_markdown,
    quickly_made,
    step_config,
)
from telechat_twins.kernels.dispatch import describe
from telechat_twins.kernels.pytorch import ops as pytorch

# Dense bf16 peak in FLOP/s from NVIDIA's data sheets (without sparsity), by a substring of the device's name.
PEAKS = {
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}
PARTS = ("tests", "kernels", "decode", "step", "peers")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu-check.json", metavar="FILE", help="results as JSON")
    parser.add_argument("--layers", type=int, default=18, metavar="L", help="layers of the 3B shape, at most 24 (18)")
    parser.add_argument("--seq-len", type=int, default=8192, metavar="S", help="tokens per sequence (8192)")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="measured training steps (8)")
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"), help="recomputation")
    parser.add_argument("--calls", type=int, default=20, metavar="N", help="measured calls per operator (20)")
    parser.add_argument("--sizes", nargs="+", default=["gpu", "gpu-gqa"], help="operator sizes (gpu gpu-gqa)")
    parser.add_argument("--skip", nargs="+", default=[], choices=PARTS, help="parts to omit")
    args = parser.parse_args(argv)
    try:
        return check(args)
    except UserError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2


def check(args: argparse.Namespace) -> int:
    """Exit code 0 when the tests passed or were omitted, else 1. Raises UserError without a GPU."""
    if not torch.cuda.is_available():
        raise UserError("no GPU found, nothing was run on device; run this command on a machine with a GPU")
    writable_file(args.out, "--out")
    name = torch.cuda.get_device_name()
    result: JsonObject = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}
    result["choices"] = describe(pytorch.choices())
    failed = 0
    if "tests" not in args.skip:
        command = [sys.executable, "-m", "pytest", "-q", "tests/device"]
        failed = subprocess.run(command, cwd=ROOT, check=False).returncode
        result["tests"] = {"command": " ".join(command[1:]), "code": failed}
    if "kernels" not in args.skip:
        result["kernels"] = measure_kernels(["pt"], list(OPERATORS), args.sizes, "bf16", args.calls, 5, False)
        print(kernels_to_markdown(result["kernels"]))
    write_text(Path(args.out), json.dumps(result, indent=1) + "\n")  # saved in case a step runs out of memory
    if "decode" not in args.skip:
        result["decode"] = measure_answers({"preset": "telechat2-3b", "num_layers": args.layers}, 512, 100)
        print(decode_to_markdown(result["decode"]))
    if "step" not in args.skip:
        result["step"] = measure_step(args.layers, args.seq_len, args.steps, args.recompute)
        print(step_to_markdown(result["step"]))
    write_text(Path(args.out), json.dumps(result, indent=1) + "\n")
    if "peers" not in args.skip:
        config = step_config(args.layers, args.seq_len, args.recompute)
        result["peers"] = measure_beside(config, args.steps)
        print(peers_to_markdown(result["peers"]))
    write_text(Path(args.out), json.dumps(result, indent=1) + "\n")
    return 1 if failed else 0


def measure_step(layers: int, seq_len: int, steps: int, recompute: str) -> JsonObject:
    """Durations of ``steps`` full optimizer steps after three warm-up steps, and a profile of one more."""
    config = step_config(layers, seq_len, recompute)
    with quickly_made("pt") as train:
        made = train.Trainer(config)
    timed_steps(made, config, 0, WARM)
    torch.cuda.reset_peak_memory_stats()
    seconds, loss = timed_steps(made, config, WARM, steps)
    torch.cuda.synchronize()
    median = statistics.median(seconds)
    whole, causal = (seq_len * flops_per_token(config.model, seq_len, causal) for causal in (False, True))
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    return {
        "device": name,
        "parameters": count_parameters(config.model),
        "layers": layers,
        "seq_len": seq_len,
        "recompute": recompute,
        "seconds": seconds,
        "median": median,
        "loss": loss,
        "tokens_per_s": seq_len / median,
        "tflops": whole / median / 1e12,
        "tflops_causal": causal / median / 1e12,
        "peak_tflops": None if peak is None else peak / 1e12,
        "mfu": None if peak is None else whole / median / peak,
        "mfu_causal": None if peak is None else causal / median / peak,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "profile": profile(made, config, WARM + steps),
    }


def profile(made: Stepper, config: RunConfig, step: int) -> list[JsonObject]:
    """Kernels of one step by descending time, with their share of the device's busy time."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    started = time.perf_counter()
    with torch.profiler.profile(activities=activities) as found:
        batch = random_batch(config, step)
        made.gradients(batch, batch.num_targets, 1.0)
        made.update(1e-4, min(1.0, 1.0 / (made.grad_norm(1.0) + 1e-6)))
        torch.cuda.synchronize()
    wall = time.perf_counter() - started
    kernels = [e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.self_device_time_total for e in kernels) or 1.0
    kernels.sort(key=lambda e: -e.self_device_time_total)
    rows = [
        {
            "kernel": e.key[:120],
            "calls": e.count,
            "ms": e.self_device_time_total / 1e3,
            "share": e.self_device_time_total / busy,
        }
        for e in kernels[:25]
    ]
    return [{"kernel": "total", "calls": 1, "ms": busy / 1e3, "share": 1.0, "wall_ms": wall * 1e3}, *rows]


def step_to_markdown(step: JsonObject) -> str:
    """Summary of the step and its profile as a Markdown table."""
    if step["mfu"] is None:
        share = "MFU unknown (no peak recorded for this device)"
    else:
        share = (
            f"MFU {100 * step['mfu']:.1f} % of the vendor's dense bf16 peak of {step['peak_tflops']:.0f} TFLOP/s "
            f"({100 * step['mfu_causal']:.1f} % with causal attention)"
        )
    lines = [
        "",
        f"Training step on {step['device']}: {step['parameters']:,} parameters, sequence {step['seq_len']}, bf16, "
        f"recompute {step['recompute']}: {step['median'] * 1e3:.0f} ms, {step['tokens_per_s']:,.0f} tokens/s, "
        f"{step['tflops']:.0f} TFLOP/s, {share}; {step['memory_gib']:.1f} GiB at most.",
        "",
        "| kernel | calls | ms | of busy time |",
        "|---|---|---|---|",
    ]
    for row in step["profile"]:
        lines.append(f"| `{row['kernel']}` | {row['calls']} | {row['ms']:.2f} | {100 * row['share']:.1f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
