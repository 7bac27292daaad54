"""Learning rate, clipping and decay groups, against the published trace and the formula's corners."""

import json
import math
from pathlib import Path

import pytest

from core.config import CONFIGS, OptimConfig, load_model_config, load_run_config
from core.params import parameter_table
from core.recipe import clip_factor, learning_rate

OPTIM = OptimConfig(lr=0.006, min_lr=0.0006, warmup_steps=2)
# The rates of the golden optimizer trace (tests/goldens, float64), 8 steps: copied so that this test needs no file.
TRACE = [0.003, 0.006] + [0.0006 + 0.5 * 0.0054 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]


def test_learning_rate_equals_the_golden_trace():
    golden = Path(__file__).resolve().parents[1] / "goldens" / "optimizer_trace" / "telechat2_gqa"
    expected = TRACE
    if (golden / "io.safetensors").exists():
        from safetensors.numpy import load_file

        meta = json.loads((golden / "meta.json").read_text())["optimizer"]
        assert (meta["peak"], meta["floor"]) == (OPTIM.lr, OPTIM.min_lr)
        expected = load_file(golden / "io.safetensors")["lr"].tolist()
    # 1e-12 relative: both are float64 evaluations of one formula.
    assert [learning_rate(OPTIM, 8, s) for s in range(8)] == pytest.approx(expected, rel=1e-12)


def test_one_step_late_is_visible():
    late = [learning_rate(OPTIM, 8, s + 1) for s in range(8)]
    assert late != pytest.approx(TRACE, rel=1e-3)


def test_corners():
    optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=0)
    assert learning_rate(optim, 10, 0) == 1.0  # no warm-up: the peak at once
    assert learning_rate(optim, 10, 10) == pytest.approx(0.1)
    assert learning_rate(optim, 10, 10_000) == pytest.approx(0.1)  # stays at the floor, no second wave
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=4), 8, 3) == 1.0  # the last warm-up step reaches the peak


@pytest.mark.parametrize(
    ("norm", "limit", "factor"),
    [(0.0, 1.0, 1.0), (0.5, 1.0, 1.0), (2.0, 1.0, 1 / (2 + 1e-6)), (1.0, 1.0, 1 / (1 + 1e-6)), (1e9, 0.0, 1.0)],
)
def test_clip_factor(norm, limit, factor):
    assert clip_factor(norm, limit) == factor


def test_decay_on_matrices_only():
    table = parameter_table(load_model_config("telechat2-tiny"))
    decayed = {name for name, spec in table.items() if spec.decays}
    assert {"embed.weight", "head.weight", "layers.0.attn.k.weight"} <= decayed
    assert not {"norm.weight", "layers.3.attn.o.bias", "layers.0.ffn_norm.weight"} & decayed
    assert decayed == {name for name, spec in table.items() if len(spec.shape) == 2}


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_loads(path):
    config = load_run_config(path)
    assert config.model == load_model_config(path.stem)
    rates = [learning_rate(config.optim, config.train.steps, s) for s in range(config.train.steps)]
    assert max(rates) == config.optim.lr and rates[-1] == pytest.approx(config.optim.min_lr, rel=0.05)


def test_the_released_recipe_has_the_published_numbers():
    for name in ("telechat2-7b", "telechat2-115b"):
        config = load_run_config(CONFIGS / "train" / f"{name}.yaml")
        published = OptimConfig(
            lr=1.5e-4, min_lr=1.5e-5, warmup_steps=0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip_grad=1.0
        )
        assert config.optim == published
        assert config.data.seq_len == config.model.training_seqlen == 8192
