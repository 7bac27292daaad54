"""The golden TeleChat3: what transformers' Llama computes with TeleChat3's scale of YaRN.

    python -m tests.campaigns.telechat3_goldens [--write]

needs transformers 5.24.0 beside the packages of the tests. The modelling code of the release is not in a public
repository; vLLM runs the model as its Llama with YaRN whose scale is 0.07 ln(factor) + 1, which transformers takes as
``attention_factor``. Without --write nothing changes: transformers computes again, and everything must agree with
tests/goldens/telechat3 within 1e-12 (float64) and 1e-5 (float32). With it, that folder is made. ``fp64``: the same
model in float64, its norms and rotary tables too (transformers' are float32 in any model), by the formulas below.
"""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.frameworks import GOLDENS, golden_batch

PLACE = GOLDENS / "telechat3"
FACTOR, ORIGINAL, THETA, SCALE = 4.0, 512, 1000.0, 0.07
LOSSES = ("loss_mean", "loss_ignore", "loss_masked")
CONFIG = {
    "architectures": ["Telechat3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.0048,
    "intermediate_size": 88,
    "max_position_embeddings": int(FACTOR * ORIGINAL),
    "mlp_bias": False,
    "model_type": "telechat3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": FACTOR,
        "original_max_position_embeddings": ORIGINAL,
        "rope_type": "telechat3-yarn",
        "type": "telechat3-yarn",
    },
    "rope_theta": THETA,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.53.2",
    "use_cache": True,
    "vocab_size": 157,
}


class Rotary64(torch.nn.Module):
    """YaRN's tables in float64, from the paper's formulas with TeleChat3's scale."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dim = CONFIG["head_dim"]
        turning = [dim * math.log(ORIGINAL / (2 * math.pi * n)) / (2 * math.log(THETA)) for n in (32.0, 1.0)]
        low, high = max(math.floor(turning[0]), 0), min(math.ceil(turning[1]), dim - 1)
        channel = torch.arange(dim // 2, dtype=torch.float64)
        slow = ((channel - low) / (high - low)).clamp(0, 1)
        frequency = THETA ** (-2 * channel / dim) * (1 - slow + slow / FACTOR)
        angle = (position_ids[..., None].double() * frequency).repeat(1, 1, 2)
        scale = SCALE * math.log(FACTOR) + 1
        return angle.cos() * scale, angle.sin() * scale


class Norm64(torch.nn.Module):
    """RMSNorm in float64."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]) * self.weight


def model(weights: dict[str, np.ndarray], dtype: torch.dtype) -> LlamaForCausalLM:
    kept = {k: v for k, v in CONFIG.items() if k not in ("rope_scaling", "rope_theta", "model_type", "architectures")}
    section = {
        "rope_type": "yarn",
        "rope_theta": THETA,
        "factor": FACTOR,
        "original_max_position_embeddings": ORIGINAL,
        "attention_factor": SCALE * math.log(FACTOR) + 1,
    }
    made = LlamaForCausalLM(LlamaConfig(**kept, rope_parameters=section, attn_implementation="sdpa"))
    made.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=True)
    made = made.to(dtype)
    if dtype == torch.float64:
        made.model.rotary_emb = Rotary64()
        for path, module in list(made.named_modules()):
            if type(module).__name__ == "LlamaRMSNorm":
                made.set_submodule(path, Norm64(module.weight))
    return made.train()  # without dropout the same as eval


def inputs(random: np.random.Generator) -> dict[str, np.ndarray]:
    ids = random.integers(0, CONFIG["vocab_size"], (2, 41))
    ignored = np.where(random.random(ids.shape) < 0.3, -100, ids)
    mask = (random.random(ids.shape) < 0.6).astype(np.float32)
    return {"input_ids": ids, "labels": ids.copy(), "labels_ignore": ignored, "loss_mask": mask}


def drawn(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Strong weights, as the other goldens have: gains 0.6 to 1.4, matrices of spread 1.15 / sqrt(fan in)."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in LlamaForCausalLM(LlamaConfig(**_sizes())).state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            array = random.uniform(0.6, 1.4, shape)
        else:
            spread = 0.02 if "embed" in name else 3 / math.sqrt(shape[1]) if "head" in name else 1.15 / shape[1] ** 0.5
            array = random.normal(0, spread, shape)
        weights[name] = array.astype(np.float32)
    return weights


def _sizes() -> dict[str, object]:
    return {k: v for k, v in CONFIG.items() if k.endswith(("size", "layers", "heads", "head_dim"))}


def compute(weights: dict[str, np.ndarray], given: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """(arrays of io.safetensors, gradients of loss_mean in float64)."""
    arrays, gradients = dict(given), {}
    for variant, dtype in (("released", torch.float32), ("fp64", torch.float64)):
        made = model(weights, dtype)
        logits = made(torch.from_numpy(given["input_ids"])).logits
        arrays[f"{variant}.logits"] = logits.detach().numpy().copy()
        for loss in LOSSES:
            targets = torch.from_numpy(golden_batch(given, loss).targets.astype(np.int64))
            value = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
            arrays[f"{variant}.{loss}"] = value.detach().numpy().copy()
            if loss == "loss_mean" and variant == "fp64":
                value.backward(retain_graph=True)
                gradients = {name: p.grad.float().numpy() for name, p in made.named_parameters()}
    return arrays, gradients


def main() -> int:
    random = np.random.default_rng(1223)
    weights, given = drawn(random), inputs(random)
    arrays, gradients = compute(weights, given)
    files = {"weights": weights, "io": arrays, "grads": gradients}
    if "--write" in sys.argv:
        PLACE.mkdir(exist_ok=True)
        for name, content in files.items():
            save_file({k: np.array(v, order="C") for k, v in content.items()}, PLACE / f"{name}.safetensors")
        (PLACE / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
        return 0
    worst = 0.0
    for name, content in files.items():
        known = load_file(PLACE / f"{name}.safetensors")
        assert set(known) == set(content), name
        for key, array in content.items():
            bound = 1e-12 if array.dtype == np.float64 else 1e-5
            off = float(np.linalg.norm(known[key] - array) / max(np.linalg.norm(array), 1e-30))
            worst = max(worst, off / bound)
            assert off <= bound, (name, key, off)
    print(f"transformers agrees with {PLACE.name}: at worst {worst:.3f} of its bound")
    return 0


if __name__ == "__main__":
    sys.exit(main())
