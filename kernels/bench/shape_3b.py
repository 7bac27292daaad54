"""The steps and answers by which devices are checked: a TeleChat2 of the 3B shape, with quickly made weights.

Used by kernels/bench/gpu_check.py and npu_check.py; every function also runs on a CPU, with a smaller model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from telechat_twins.core import backends
from telechat_twins.core.bench.decode import measure_decode
from telechat_twins.core.bench.worker import timed_steps
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.train import trainer
from telechat_twins.core.types import JsonObject

WARM = 3  # steps before those measured


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


def measure_beside(config: RunConfig, steps: int, backend: str = "pt") -> list[JsonObject]:
    """The step of ``config``, with adapters, and beside PyTorch transformers' of the same shape, one after the other:
    seconds of ``steps`` steps after warm-up steps, peak of the device's memory. A contestant that is not here has
    ``missing``."""
    adapters = dataclasses.replace(config.train, init="random weights")
    data = {**config.to_dict(), "lora": {}, "train": dataclasses.asdict(adapters)}

    def twin(run: RunConfig) -> Callable[[], Any]:
        def make() -> Any:
            with quickly_made(backend) as train:
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
    if backend != "pt":
        return found
    if find_spec("transformers") is None:
        return [*found, {"name": "transformers", "missing": "the transformers library is not installed"}]
    if config.train.recompute != "none":
        return [*found, {"name": "transformers", "missing": "it is compared without recomputation only"}]
    from telechat_twins.kernels.bench.hf_step import HfTrainer

    return [*found, {"name": "transformers", **_measured(lambda: HfTrainer(config, False), config, steps)}]


def _measured(make: Callable[[], Any], config: RunConfig, steps: int) -> JsonObject:
    """Steps of the trainer that ``make`` returns, which is given up afterwards."""
    gc.collect()
    made = make()
    timed_steps(made, config, 0, WARM)
    seconds, loss = timed_steps(made, config, WARM, steps)
    peak = made.device_peak() / 2**30  # of this process so far
    return {"seconds": seconds, "median": statistics.median(seconds), "loss": loss, "memory_gib": peak or None}


@contextlib.contextmanager
def quickly_made(backend: str) -> Iterator[Any]:
    """A backend's module of the trainer, whose weights are ``quick_weights``: speed does not depend on their values,
    and the usual initialisation of billions of weights takes minutes."""
    usual = trainer.init_tensor
    vars(trainer)["init_tensor"] = quick_weights
    try:
        yield backends.load(backend, "train")
    finally:
        vars(trainer)["init_tensor"] = usual


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


def peers_to_markdown(rows: list[JsonObject]) -> str:
    """The steps as a Markdown table, each over the first; memory is the device's largest so far."""
    lines = ["", "| step | median | over the first | memory |", "|---|---|---|---|"]
    for row in rows:
        if "missing" in row:
            lines.append(f"| {row['name']} | not measured: {row['missing']} | - | - |")
            continue
        memory = "-" if row["memory_gib"] is None else f"{row['memory_gib']:.1f} GiB"
        ratio = row["median"] / rows[0]["median"]
        lines.append(f"| {row['name']} | {row['median'] * 1e3:.0f} ms | {ratio:.2f} | {memory} |")
    return "\n".join(lines)
