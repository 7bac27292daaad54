"""Baseline for decoding and serving: Hugging Face's ``generate`` with its cache.

``python -m telechat_twins.kernels.bench.hf hf OPTIONS`` is a worker of ``tele bench decode`` and ``serve``: a Llama of
the measured model's shapes with random weights. The transformers library is not a dependency of this project; this
module is used only where it is installed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from telechat_twins.core.bench.worker import Handle, answer_orders, bench_config
from telechat_twins.core.files import ROOT
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.types import JsonObject
from telechat_twins.kernels.bench.decode import reading
from telechat_twins.kernels.bench.process import open_bench
from telechat_twins.kernels.pytorch.ops import default_device


def hide_checkout(path: list[str]) -> list[str]:
    """``path`` without the entries that resolve to this checkout.

    transformers 5.0 to 5.9 mistakes the folder ``kernels`` there for Hugging Face's package of that name and fails on
    its missing version. ``telechat_twins`` has a search path of its own and is not affected.
    """
    return [entry for entry in path if Path(entry or ".").resolve() != ROOT]


sys.path[:] = hide_checkout(sys.path)
import transformers  # noqa: E402  (with the filtered path)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def llama(config: ModelConfig, dtype: torch.dtype) -> transformers.LlamaForCausalLM:
    """A Llama of the model's shapes, on the device of the twin. It lacks TeleChat2's biases and length scaling, whose
    cost is negligible."""
    torch.manual_seed(0)
    made = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_seqlen,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied_embeddings,
    )
    with torch.device(default_device()):
        return transformers.LlamaForCausalLM(made).to(dtype).eval()


def where(device: torch.device) -> str:
    """The device's name, as the twin's workers give it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Clock(transformers.StoppingCriteria):
    """Records the time of each token; never stops the generation."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **_: object) -> torch.Tensor:
        self.ticks.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def timed_steps(model: transformers.LlamaForCausalLM, rows: int, prompt: int, count: int) -> dict[str, list[float]]:
    """ "seconds" of each of ``count`` steps after the first token, for a batch of ``rows`` greedy sequences, and
    "prompt": [seconds to the first token]."""
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (rows, prompt)).to(model.device)
    clock, began = Clock(), time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count + 1,
        min_new_tokens=count + 1,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=transformers.StoppingCriteriaList([clock]),
    )
    steps = [last - first for first, last in zip(clock.ticks, clock.ticks[1:], strict=False)]
    return {"seconds": steps, "prompt": [clock.ticks[0] - began]}


def static_batches(model: transformers.LlamaForCausalLM, batches: list[list[tuple[int, int]]]) -> JsonObject:
    """``seconds`` for all batches of (prompt's tokens, answer's tokens), one after another, those that this process
    spent on processors (``processor``), and the ``tokens`` asked for: each batch is padded on the left to its longest
    prompt and runs until its longest answer ends."""
    torch.manual_seed(1)
    began, before = time.perf_counter(), time.process_time()
    for requests in batches:
        longest, new = (max(lengths) for lengths in zip(*requests, strict=True))
        ids = torch.randint(0, model.config.vocab_size, (len(requests), longest))
        lengths = torch.tensor([length for length, _ in requests])
        mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        model.generate(ids.to(model.device), attention_mask=mask.to(model.device), **options)
    return {
        "seconds": time.perf_counter() - began,
        "processor": time.process_time() - before,
        "tokens": sum(made for requests in batches for _, made in requests),
    }


def main(argv: list[str]) -> int:
    def prepare() -> tuple[JsonObject, Handle]:
        options = json.loads(argv[1])
        model = llama(bench_config(options).model, DTYPES[options["precision"]])
        bench = open_bench("pt", {**options, "compile": False})

        def handle(order: JsonObject) -> JsonObject:
            if "batches" in order:
                return static_batches(model, order["batches"])
            return {**timed_steps(model, order["rows"], order["prompt"], order["steps"]), "read": reading(bench)}

        return {"backend": f"transformers {transformers.__version__}, PyTorch {torch.__version__}"}, handle

    return answer_orders(prepare)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
