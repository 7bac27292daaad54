"""Random releases and batches for the equivalence campaign: folders as published models have them, of odd small sizes.

What varies: family; multi-query, grouped and full attention; head sizes 2 to 128; the norm's epsilon; rotary base, its
growth and rows on both sides of every power of two; ffn sizes and vocabularies that nothing divides; biases; tied
heads; multipliers of embeddings and logits; storage in fp32, bf16 and fp16, in one file or several; documents packed
into a row, masks over the loss. Case n of a seed is always the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.campaigns.float64_run import Inputs

FAMILIES = ("telechat2", "telechat2", "teleflm", "flm-101b", "telechat-52b")  # TeleChat2 has the most variants
HEAD_SIZES = (2, 4, 6, 8, 10, 16, 20, 32, 64, 96, 128)
WIDEST = 256  # channels: what keeps a case at a fraction of a second
CODES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


@dataclass(frozen=True, eq=False)
class Case:
    """One release and one batch; ``text`` describes both."""

    number: int
    family: str
    folder: Path
    inputs: Inputs
    text: str


def make_case(seed: int, number: int, folder: Path) -> Case:
    """Case ``number`` of ``seed``, its release written to ``folder``."""
    random = np.random.default_rng([seed, number])
    family = FAMILIES[number % len(FAMILIES)]
    D = int(random.choice(HEAD_SIZES))
    H = int(random.integers(1, max(1, min(8, WIDEST // D)) + 1))
    K = int(random.choice([k for k in range(1, H + 1) if H % k == 0]))
    if family in ("flm-101b", "telechat-52b"):
        K = H
    sizes = {"V": int(random.integers(5, 260)), "E": H * D, "F": int(random.integers(1, 300)), "H": H, "K": K, "D": D}
    sizes["L"] = int(random.integers(1, 5))
    config, S = _CONFIGS[family](random, sizes)
    weights = _weights(random, family, config, sizes)
    storage = str(random.choice(list(CODES)))
    shards = int(random.integers(1, 4)) if len(weights) > 4 else 1
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    _write(random, folder, weights, CODES[storage], shards)
    inputs = _inputs(random, sizes["V"], S)
    B = len(inputs.ids)
    more = [name for name in ("counted", "docs") if getattr(inputs, name) is not None]
    text = (
        f"{family} V{sizes['V']} E{sizes['E']} F{sizes['F']} L{sizes['L']} H{H} K{K} D{D} {storage} in {shards} files, "
        f"{B} x {S} tokens {' '.join(more)}"
    )
    return Case(number, family, folder, inputs, text.strip())


def _telechat2(random: np.random.Generator, n: dict[str, int]) -> tuple[dict[str, Any], int]:
    """Lengths on both sides of the trained one and of every power of two times the base length."""
    base = int(random.integers(2, 25))
    trained = int(random.choice([base, 2 * base, base + 3, 3 * base]))
    S = int(random.choice([trained, trained + 1, 2 * base, 2 * base + 1, 4 * base, 4 * base + 1, max(2, trained // 2)]))
    config: dict[str, Any] = {
        "model_type": "telechat", "vocab_size": n["V"], "hidden_size": n["E"], "ffn_hidden_size": n["F"],
        "n_layer": n["L"], "n_head": n["H"], "layer_norm_epsilon": _eps(random), "training_seqlen": trained,
        "base_seqlen": base, "seq_length": 4 * trained + 4 * base,
    }  # fmt: skip
    if n["K"] != n["H"] or random.random() < 0.5:
        config["num_key_value_heads"] = n["K"]
    if random.random() < 0.5:
        config["rope_theta"] = float(random.choice([500.0, 10000.0, 1e6]))
    return config, min(S, 97)


def _teleflm(random: np.random.Generator, n: dict[str, int]) -> tuple[dict[str, Any], int]:
    config: dict[str, Any] = {
        "model_type": "TeleFLM", "vocab_size": n["V"], "hidden_size": n["E"], "intermediate_size": n["F"],
        "num_hidden_layers": n["L"], "num_attention_heads": n["H"], "num_key_value_heads": n["K"],
        "rms_norm_eps": _eps(random), "max_position_embeddings": 128, "rope_theta": float(random.choice([1e4, 3e3])),
        "tie_word_embeddings": False, "use_mup": True, **_multipliers(random),
    }  # fmt: skip
    return config, int(random.integers(2, 70))


def _flm(random: np.random.Generator, n: dict[str, int], bigger: bool) -> tuple[dict[str, Any], int]:
    config: dict[str, Any] = {
        "model_type": "flm" if bigger else "telechat", "vocab_size": n["V"], "n_embd": n["E"], "n_inner": n["F"],
        "n_layer": n["L"], "n_head": n["H"], "n_positions": int(random.choice([64, 128, 255])),
        "layer_norm_epsilon": _eps(random), "relative_encoding": "rotary",
        "rotary_theta": float(random.choice([1e4, 700.0])), "rotary_use_xpos": bigger,
        "rotary_xpos_scale_base": int(random.choice([32, 100, 512])), "use_mup": True, "use_RMSNorm": not bigger,
        "add_bias_linear": bigger, "activation_function": "gelu_fast" if bigger else "silu",
        "tie_word_embeddings": bool(random.random() < 0.4), **_multipliers(random),
    }  # fmt: skip
    return config, int(random.integers(2, 64))


_CONFIGS = {
    "telechat2": _telechat2,
    "teleflm": _teleflm,
    "flm-101b": lambda random, n: _flm(random, n, True),
    "telechat-52b": lambda random, n: _flm(random, n, False),
}


def _eps(random: np.random.Generator) -> float:
    return float(random.choice([1e-8, 1e-6, 1e-5, 1e-3, 0.1]))


def _multipliers(random: np.random.Generator) -> dict[str, float]:
    return {
        "input_mult": float(random.choice([1.0, 0.5, 3.0])),
        "output_mult": float(random.choice([0.5, 1.0, 2.0])),
        "mup_scale_factor": float(random.choice([1.0, 2.0, 16.0])),
    }


def _weights(
    random: np.random.Generator, family: str, config: dict[str, Any], n: dict[str, int]
) -> dict[str, np.ndarray]:
    """Large matrices, gains around 1, biases of a third: what is missed or mixed up shows."""
    V, E, F = n["V"], n["E"], n["F"]
    size = float(random.choice([0.6, 1.0, 1.5]))

    def matrix(rows: int, columns: int, inner: int) -> np.ndarray:
        return random.standard_normal((rows, columns)) * size / np.sqrt(inner)

    def gain(count: int) -> np.ndarray:
        return 1.0 + 0.3 * random.standard_normal(count)

    def bias(count: int) -> np.ndarray:
        return 0.3 * random.standard_normal(count)

    found: dict[str, np.ndarray] = {}
    if family == "teleflm":
        found["model.embed_tokens.weight"] = random.standard_normal((V, E))
        for i in range(n["L"]):
            at, kv = f"model.layers.{i}.", n["K"] * n["D"]
            found |= {f"{at}{norm}_layernorm.weight": gain(E) for norm in ("input", "post_attention")}
            found |= {f"{at}self_attn.{x}_proj.weight": matrix(kv if x in "kv" else E, E, E) for x in "qkvo"}
            found |= {f"{at}mlp.{x}_proj.weight": matrix(F, E, E) for x in ("gate", "up")}
            found[f"{at}mlp.down_proj.weight"] = matrix(E, F, F)
        return found | {"model.norm.weight": gain(E), "lm_head.weight": matrix(V, E, E)}
    if family == "telechat2":
        top = "" if random.random() < 0.3 else "transformer."
        found[f"{top}word_embeddings.weight"] = random.standard_normal((V, E))
        for i in range(n["L"]):
            at = f"{top}h.{i}."
            found |= {f"{at}{norm}_layernorm.weight": gain(E) for norm in ("input", "post_attention")}
            found[f"{at}self_attention.query.weight"] = matrix(E, E, E)
            found[f"{at}self_attention.key_value.weight"] = matrix(2 * n["K"] * n["D"], E, E)
            found |= {f"{at}self_attention.dense.weight": matrix(E, E, E), f"{at}self_attention.dense.bias": bias(E)}
            found |= {f"{at}mlp.{x}_proj.weight": matrix(F, E, E) for x in ("gate", "up")}
            found |= {f"{at}mlp.down_proj.weight": matrix(E, F, F), f"{at}mlp.down_proj.bias": bias(E)}
        return found | {f"{top}ln_f.weight": gain(E), "lm_head.weight": matrix(V, E, E)}
    biased, inner = config["add_bias_linear"], F if config["add_bias_linear"] else 2 * F
    found["transformer.wte.weight"] = random.standard_normal((V, E))
    for i in range(n["L"]):
        at = f"transformer.h.{i}."
        shapes = {"attn.c_attn": (E, 3 * E), "attn.c_proj": (E, E), "mlp.c_fc": (E, inner), "mlp.c_proj": (F, E)}
        for name, (rows, columns) in shapes.items():
            found[f"{at}{name}.weight"] = matrix(rows, columns, rows)
            if biased:
                found[f"{at}{name}.bias"] = bias(columns)
        found |= {f"{at}{norm}.weight": gain(E) for norm in ("ln_1", "ln_2")}
        found |= {f"{at}{norm}.bias": bias(E) for norm in ("ln_1", "ln_2") if biased}
    found["transformer.ln_f.weight"] = gain(E)
    if biased:
        found["transformer.ln_f.bias"] = bias(E)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = matrix(V, E, E)
    return found


def _inputs(random: np.random.Generator, V: int, S: int) -> Inputs:
    B = int(random.integers(1, 4))
    ids = random.integers(0, V, (B, S))
    labels = ids.copy()
    if random.random() < 0.5:
        labels = np.where(random.random((B, S)) < 0.3, -100, labels)
    labels[0, -1] = ids[0, -1]  # something is left to predict
    counted = docs = None
    if random.random() < 0.4:
        counted = random.random((B, S)) < 0.7
        counted[0, -1] = True
    if S >= 4 and random.random() < 0.35:
        cuts = random.random((B, S)) < 0.15
        cuts[:, [0, -1]] = False
        docs = np.cumsum(cuts, 1)
    return Inputs(ids, labels, counted, docs)


def _encode(array: np.ndarray, code: str) -> bytes:
    """The bytes of an array in a storage type, rounded to nearest even."""
    if code == "F16":
        return array.astype("<f2").tobytes()
    bits = array.astype("<f4").view("<u4")
    if code == "F32":
        return bits.tobytes()
    return ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def _write(random: np.random.Generator, folder: Path, weights: dict[str, np.ndarray], code: str, shards: int) -> None:
    names = list(weights)
    random.shuffle(names)
    if shards == 1:
        _write_file(folder / "model.safetensors", {name: weights[name] for name in names}, code)
        return
    places = {
        name: f"model-{1 + k * shards // len(names):05d}-of-{shards:05d}.safetensors" for k, name in enumerate(names)
    }
    for file in sorted(set(places.values())):
        _write_file(folder / file, {name: weights[name] for name in names if places[name] == file}, code)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _write_file(path: Path, tensors: dict[str, np.ndarray], code: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    end = 0
    for name, array in tensors.items():
        parts.append(_encode(array, code))
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [end, end + len(parts[-1])]}
        end += len(parts[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
