"""How exact log-likelihoods are in float32: the engine of both backends, transformers, and the floor of any float32.

    python -m tests.campaigns.likelihoods [--models M ...] [--tokens N] [--hf]     (6 minutes of processor time)

For golden models and for telechat2-mini with a run's initial weights: the log-probabilities of N tokens, the sums of
500 continuations of 1 to 12 random tokens, and sums of 624 tokens, each against a float64 run in numpy that shares no
code with the product. Rows are the engine by backend and precision, as `tele eval` uses it, and

floor      the float64 run with the result of every operator rounded to float32, but all sums inside of operators exact:
           what no float32 implementation falls below but by luck
in turn    the same, but matrix products add one product after another in float32, as a kernel does that keeps one sum
in eight   the same with eight such sums for each output, added at the end (both: small models only)
moved      the float64 run on weights that are one rounding to float32 away
hf         transformers, with ``--hf``, where the model is a Llama with biases
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from telechat_twins.convert.copy import to_hf
from telechat_twins.convert.source import open_model
from telechat_twins.core import backends
from telechat_twins.core.checkpoint.save import write_checkpoint
from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.inference.requests import Request
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from tests.campaigns.float64_decoder import (
    Attention,
    Names,
    Norm,
    Shape,
    Weights,
    activate,
    growth,
    read_release,
    tables,
    turn,
    unpack,
)
from tests.parity.test_prompt_scores import Row, rows
from tests.support.engine_support import finish
from tests.support.frameworks import GOLDENS

MODELS = ("telechat2_gqa", "telechat2_mha", "teleflm", "flm101b_like", "telechat2-mini")
LIMIT = 1e-5
TEXT, TEXTS = 53, 12  # tokens of a text, of which the first is not scored; texts of a long sum
SMALL = 64  # hidden_size up to which products are added one by one in numpy
Rounding = Callable[[np.ndarray], np.ndarray]
Product = Callable[[np.ndarray, np.ndarray], np.ndarray]  # x [B, S, in], w [out, in] -> [B, S, out]


def as_is(x: np.ndarray) -> np.ndarray:
    return x


def to_fp32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(np.float64)


def exact_sums(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return x @ w.T


def float32_sums(x: np.ndarray, w: np.ndarray, sums: int = 1) -> np.ndarray:
    """x @ w.T with ``sums`` float32 sums by turns for each output, which fused multiply-adds round once a step."""
    held = np.zeros((sums, *x.shape[:-1], len(w)))
    for k in range(x.shape[-1]):
        held[k % sums] = to_fp32(held[k % sums] + x[..., k, None] * w[:, k])
    while len(held) > 1:
        held = to_fp32(held[0::2] + held[1::2])
    return held[0]


def release(name: str, folder: Path) -> Path:
    """A folder of the model in its released form."""
    if name in MODELS[:-1]:
        shutil.copy(GOLDENS / name / "config.json", folder)
        shutil.copy(GOLDENS / name / "weights.safetensors", folder / "model.safetensors")
        return folder
    config = load_model_config({"preset": name, "vocab_size": 4096})
    write_checkpoint(folder / "run", 0, model={"config": config.to_dict()}, weights=init_weights(config, 0).items())
    to_hf(open_model(folder / "run"), folder / "released")
    return folder / "released"


def texts(vocab_size: int, tokens: int) -> list[Row]:
    """The 500 continuations, and texts with ``tokens`` to score in all, each from its second token."""
    random = np.random.default_rng(6)
    more = ((tuple(random.integers(0, vocab_size, TEXT).tolist()), 1) for _ in range(tokens // (TEXT - 1)))
    return [*rows(vocab_size), *more]


def by_engine(folder: Path, backend: str, scored: Sequence[Row], precision: str) -> list[np.ndarray]:
    """Log-probabilities of the scored tokens of each row, as `tele eval` computes them."""
    source, module = open_model(str(folder)), backends.load(backend, "generate")
    runner = module.Runner(source.config, source.tensor, 4000, precision, module.short_page())
    engine = Engine(runner, limits=EngineLimits(max_len=64))
    numbers = [
        engine.submit(Request(prompt_ids=ids, max_new_tokens=0, prompt_logprobs=1, scored_from=first))
        for ids, first in scored
    ]
    found = finish(engine)
    return [np.array([choice.logprob for choice in found[number][0].scores.tokens]) for number in numbers]


def by_numpy(
    shape: Shape, weights: Weights, scored: Sequence[Row], rounded: Rounding, product: Product = exact_sums
) -> list[np.ndarray]:
    """The same in float64, the result of every operator ``rounded``."""
    found: list[np.ndarray | None] = [None] * len(scored)
    lengths: dict[int, list[int]] = {}
    for place, (ids, _) in enumerate(scored):
        lengths.setdefault(len(ids), []).append(place)
    for places in lengths.values():
        for start in range(0, len(places), 64):
            some = places[start : start + 64]
            ids = np.array([scored[place][0] for place in some])
            logits = forward(shape, weights, ids[:, :-1], rounded, product)
            for row, place in enumerate(some):
                found[place] = of_targets(logits[row], scored[place])
    return [one for one in found if one is not None]


def of_targets(logits: np.ndarray, scored: Row) -> np.ndarray:
    """Log-probabilities of a row's scored tokens by its logits [S - 1, V], in float64."""
    ids, first = scored
    mine = logits[first - 1 :].astype(np.float64)
    top = mine.max(-1, keepdims=True)
    total = np.log(np.exp(mine - top).sum(-1)) + top[:, 0]
    return mine[np.arange(len(mine)), list(ids[first:])] - total


def forward(shape: Shape, W: Weights, ids: np.ndarray, r: Rounding, product: Product) -> np.ndarray:
    """Logits [B, S, V] of ids [B, S], the result of every operator through ``r``."""
    names = {"teleflm": ("model.embed_tokens", "model.norm"), "flm": ("wte", "ln_f")}
    embed, last = names.get(shape.family, ("word_embeddings", "ln_f"))
    prefix = "" if shape.family == "teleflm" else shape.prefix
    embed, last = f"{prefix}{embed}.weight", prefix + last

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        bias = W[f"{name}.bias"] if shape.centred else None
        return r(Norm(x, W[f"{name}.weight"], bias, shape.eps, shape.centred).y)

    positions = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    q_table, k_table = ((r(cos), r(sin)) for cos, sin in tables(shape, positions, "", as_is))
    x = r(W[embed][ids] * shape.input_mult)
    for i in range(shape.L):
        w, at = unpack(shape, W, i, ""), Names.of(shape, i)

        def linear(y: np.ndarray, name: str, w: Weights = w) -> np.ndarray:
            return r(product(y, w[name]) + w.get(f"{name}.b", 0.0))

        normed = norm(at.norm1, x)
        q, k, v = (linear(normed, name).reshape(*ids.shape, -1, shape.D) for name in "qkv")
        q, k = r(turn(q, q_table, "")), r(turn(k, k_table, ""))
        x = r(x + linear(r(Attention(q, k, v, None, "", as_is).y).reshape(x.shape), "o"))
        normed = norm(at.norm2, x)
        gate = linear(normed, "gate") if shape.gated else None
        x = r(x + linear(r(activate(gate, linear(normed, "up"))), "down"))
    head = W[embed] if shape.tied else W["lm_head.weight"]
    return r(product(norm(last, x), head) * shape.logit_mult)


def by_transformers(shape: Shape, W: Weights, scored: Sequence[Row], name: str) -> list[np.ndarray]:
    """The same with transformers' Llama in the dtype ``name``, row by row."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    theta = shape.theta
    if shape.scaled and shape.D > 2:
        theta *= growth(shape, shape.trained, "") ** (shape.D / (shape.D - 2))
    config = LlamaConfig(
        vocab_size=shape.V, hidden_size=shape.E, intermediate_size=shape.F, num_hidden_layers=shape.L,
        num_attention_heads=shape.H, num_key_value_heads=shape.K, rms_norm_eps=shape.eps, attention_bias=True,
        mlp_bias=True, rope_parameters={"rope_type": "default", "rope_theta": theta},
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(getattr(torch, name)).eval()
    prefix = "model." if shape.family == "teleflm" else shape.prefix
    embed, last = ("embed_tokens", "norm") if shape.family == "teleflm" else ("word_embeddings", "ln_f")
    state = {"model.embed_tokens.weight": W[f"{prefix}{embed}.weight"] * shape.input_mult}
    state |= {"model.norm.weight": W[f"{prefix}{last}.weight"], "lm_head.weight": W["lm_head.weight"]}
    state["lm_head.weight"] = state["lm_head.weight"] * shape.logit_mult
    for i in range(shape.L):
        w, names = unpack(shape, W, i, ""), Names.of(shape, i)
        at = f"model.layers.{i}."
        state |= {at + "input_layernorm.weight": W[names.norm1 + ".weight"]}
        state |= {at + "post_attention_layernorm.weight": W[names.norm2 + ".weight"]}
        for part in ("q", "k", "v", "o", "gate", "up", "down"):
            target = f"{at}{'self_attn' if part in 'qkvo' else 'mlp'}.{part}_proj."
            state |= {target + "weight": w[part], target + "bias": w.get(f"{part}.b", np.zeros(len(w[part])))}
    model.load_state_dict({key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in state.items()})
    with torch.inference_mode():
        outs = (model(torch.tensor([row[0][:-1]])).logits[0].numpy() for row in scored)
        return [of_targets(logits, row) for logits, row in zip(outs, scored, strict=True)]


class Report:
    """Prints errors against ``exact``: largest, root mean square, and how many are beyond the limit."""

    def __init__(self, exact: Sequence[np.ndarray]) -> None:
        self.exact = exact

    def __call__(self, what: str, compute: Callable[[], list[np.ndarray]]) -> None:
        begun = time.process_time()
        found = compute()
        took = time.process_time() - begun
        apart = [a - b for a, b in zip(found, self.exact, strict=True)]
        sums = np.array([one.sum() for one in apart])
        shown = [_sizes(np.concatenate(apart)), _sizes(sums[:500])]
        long = sums[500:][: (len(sums) - 500) // TEXTS * TEXTS].reshape(-1, TEXTS).sum(1)
        shown += [_sizes(long)] if len(long) else []
        print(f"  {what:10} {' | '.join(shown)} | {took:.0f} s", flush=True)


def _sizes(errors: np.ndarray) -> str:
    rms = np.sqrt((errors**2).mean())
    return f"{len(errors):6,}: {np.abs(errors).max():.1e} {rms:.1e} {(np.abs(errors) > LIMIT).sum():3}"


def measure(name: str, tokens: int, hf: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="tele-likelihoods-") as made:
        folder = release(name, Path(made))
        shape, weights = read_release(folder)
        scored = texts(shape.V, tokens)
        exact = by_numpy(shape, weights, scored, as_is)
        print(f"{name}: hidden_size {shape.E}, sums of 1 to 12 tokens down to {min(one.sum() for one in exact):.0f}")
        print(
            f"  tokens | 500 sums | sums of {TEXTS * (TEXT - 1)} tokens, each: number: largest rms beyond {LIMIT:.0e}"
        )
        report = Report(exact)
        for precision in ("fp32", "fp64"):
            for backend in ("pt", "ms"):
                report(f"{backend} {precision}", partial(by_engine, folder, backend, scored, precision))
        report("floor", partial(by_numpy, shape, weights, scored, to_fp32))
        if shape.E <= SMALL:
            report("in turn", partial(by_numpy, shape, weights, scored, to_fp32, float32_sums))
            eight = partial(float32_sums, sums=8)
            report("in eight", partial(by_numpy, shape, weights, scored, to_fp32, eight))
        random = np.random.default_rng(0)
        moved = {key: w * (1 + 2.0**-24 * random.standard_normal(w.shape)) for key, w in weights.items()}
        report("moved", partial(by_numpy, shape, moved, scored, as_is))
        if hf and shape.gated and not shape.centred:
            for dtype in ("float32", "float64"):
                report(f"hf {dtype}", partial(by_transformers, shape, weights, scored, dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--hf", action="store_true")
    args = parser.parse_args()
    for name in args.models:
        measure(name, args.tokens, args.hf)


if __name__ == "__main__":
    main()
