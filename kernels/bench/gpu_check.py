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
import contextlib
import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from telechat_twins.core import backends
from telechat_twins.core.bench.cases import OPERATORS
from telechat_twins.core.bench.decode import decode_to_markdown, measure_decode
from telechat_twins.core.bench.kernels import kernels_to_markdown, measure_kernels
from telechat_twins.core.bench.worker import random_batch, timed_steps
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.errors import UserError
from telechat_twins.core.files import ROOT
from telechat_twins.core.files.atomic import writable_file, write_text
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.flops import flops_per_token
from telechat_twins.core.model.params import count_parameters
from telechat_twins.core.train import trainer
from telechat_twins.core.train.stepper import Stepper
from telechat_twins.core.types import JsonObject
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
_WARM = 3  # steps before those measured


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


def step_config(layers: int, seq_len: int, recompute: str) -> RunConfig:
    """The 3B shape with ``layers`` layers, one sequence per step, bf16."""
    return run_config_from_dict(
        {
            "model": {"preset": "telechat2-3b", "num_layers": layers},
            "data": {"sources": [{"path": "random tokens"}], "seq_len": seq_len},
            "train": {
                "steps": 1_000_000,
                "global_batch": 1,
                "micro_batch": 1,
                "precision": "bf16",
                "recompute": recompute,
            },
            "optim": {"lr": 1e-4},
        }
    )


def measure_answers(model: JsonObject, prompt: int, steps: int) -> JsonObject:
    """``tele bench decode`` of a model in bf16: 1, 8 and 32 sequences after prompts of ``prompt`` tokens."""
    with tempfile.TemporaryDirectory(prefix="tele-gpu-") as folder:
        file = Path(folder) / "model.yaml"
        file.write_text(yaml.safe_dump(model), encoding="utf-8")
        options = {"model": str(file), "seq_len": 2 * prompt, "precision": "bf16", "quantize": "none"}
        options |= {"micro_batch": 1, "micro_batches": 1}
        return measure_decode(options, ["pt"], [1, 8, 32], prompt, steps, min(20, steps))


def measure_beside(config: RunConfig, steps: int) -> list[JsonObject]:
    """The step of ``config``, with adapters, and transformers' of the same shape, one after the other: seconds of
    ``steps`` steps after warm-up steps, peak of the device's memory. A contestant that is not here has ``missing``."""
    adapters = dataclasses.replace(config.train, init="random weights")
    data = {**config.to_dict(), "lora": {}, "train": dataclasses.asdict(adapters)}

    def twin(run: RunConfig) -> Callable[[], Any]:
        def make() -> Any:
            with _quick_weights() as train:
                made = train.Trainer(run)
            if run.lora is not None:  # whose base is read
                made.load_weights(lambda name, box: quick_weights(name, run.model, 0, box))
            return made

        return make

    contestants: dict[str, tuple[RunConfig, Callable[[], Any]]] = {
        "all weights": (config, twin(config)),
        "adapters (LoRA)": ((run := run_config_from_dict(data)), twin(run)),
    }
    found = [{"name": name, **_measured(make, run, steps)} for name, (run, make) in contestants.items()]
    if find_spec("transformers") is None:
        return [*found, {"name": "transformers", "missing": "the transformers library is not installed"}]
    from telechat_twins.kernels.bench.hf_step import HfTrainer

    return [*found, {"name": "transformers", **_measured(lambda: HfTrainer(config, False), config, steps)}]


def _measured(make: Callable[[], Any], config: RunConfig, steps: int) -> JsonObject:
    """Steps of the trainer that ``make`` returns, which is given up afterwards."""
    gc.collect()
    on_device = torch.cuda.is_available()
    if on_device:
        torch.cuda.empty_cache()
    made = make()
    timed_steps(made, config, 0, _WARM)
    if on_device:
        torch.cuda.reset_peak_memory_stats()
    seconds, loss = timed_steps(made, config, _WARM, steps)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_device else None
    return {"seconds": seconds, "median": statistics.median(seconds), "loss": loss, "memory_gib": peak}


@contextlib.contextmanager
def _quick_weights() -> Iterator[Any]:
    """The module of the PyTorch trainer. Speed does not depend on the weights' values, and the usual initialisation of
    billions of weights takes minutes."""
    usual = trainer.init_tensor
    vars(trainer)["init_tensor"] = quick_weights
    try:
        yield backends.load("pt", "train")
    finally:
        vars(trainer)["init_tensor"] = usual


def peers_to_markdown(rows: list[JsonObject]) -> str:
    """The steps as a Markdown table, each over the first."""
    lines = ["", "| step | median | over the first | memory |", "|---|---|---|---|"]
    for row in rows:
        if "missing" in row:
            lines.append(f"| {row['name']} | not measured: {row['missing']} | - | - |")
            continue
        memory = "-" if row["memory_gib"] is None else f"{row['memory_gib']:.1f} GiB"
        ratio = row["median"] / rows[0]["median"]
        lines.append(f"| {row['name']} | {row['median'] * 1e3:.0f} ms | {ratio:.2f} | {memory} |")
    return "\n".join(lines)


def measure_step(layers: int, seq_len: int, steps: int, recompute: str) -> JsonObject:
    """Durations of ``steps`` full optimizer steps after three warm-up steps, and a profile of one more."""
    config = step_config(layers, seq_len, recompute)
    with _quick_weights() as train:
        made = train.Trainer(config)
    timed_steps(made, config, 0, _WARM)
    torch.cuda.reset_peak_memory_stats()
    seconds, loss = timed_steps(made, config, _WARM, steps)
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
        "profile": profile(made, config, _WARM + steps),
    }


def quick_weights(
    name: str, config: ModelConfig, seed: int, box: tuple[slice, ...] | None = None, **_: object
) -> np.ndarray:
    """Weights of the right shape and scale: one block of normal samples, repeated."""
    from telechat_twins.core.model.params import parameter_table

    whole = parameter_table(config)[name].shape
    shape = whole if box is None else tuple(len(range(*part.indices(n))) for part, n in zip(box, whole, strict=True))
    if len(whole) == 1:
        return np.full(shape, 1.0 if "norm" in name else 0.0, np.float32)
    block = np.random.default_rng(seed).standard_normal(1 << 20, np.float32) * np.float32(config.init_std)
    return np.resize(block, shape)


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
