"""Learning rate, clipping and decay groups, against the published trace and the formula's corners."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from telechat_twins.core.config import OptimConfig, load_run_config, run_config_from_dict
from telechat_twins.core.data.mix import describe_mix, plan_mix
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import CONFIGS, load_model_config
from telechat_twins.core.model.params import MATRIX, OUTPUT, VECTOR, parameter_table
from telechat_twins.core.schema import load_yaml
from telechat_twins.core.train.recipe import (
    class_decay,
    class_rate,
    clip_factor,
    learning_rate,
    rate_at,
    tells_classes_apart,
    with_steps,
)
from tests.support.numpy_stepper import run_config

OPTIM = OptimConfig(lr=0.006, min_lr=0.0006, warmup_steps=2)
# The rates of the golden optimizer trace (tests/goldens, float64), 8 steps: copied so that this test needs no file.
TRACE = [0.003, 0.006] + [0.0006 + 0.5 * 0.0054 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]


def test_learning_rate_equals_the_golden_trace():
    golden = Path(__file__).resolve().parents[2] / "goldens" / "optimizer_trace" / "telechat2_gqa"
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


def test_matrix_like_parameters_follow_the_same_schedule_with_their_own_peak():
    optim = OptimConfig(lr=1.5e-4, min_lr=1.5e-5, warmup_steps=2, matrix_lr=2.4e-3)
    matrix = OptimConfig(lr=2.4e-3, min_lr=2.4e-4, warmup_steps=2)
    for step in range(12):
        lr = learning_rate(optim, 10, step)
        # 1e-14: one formula in float64, rounded in another order.
        assert class_rate(optim, lr, MATRIX) == pytest.approx(learning_rate(matrix, 10, step), rel=1e-14)
        assert class_rate(optim, lr, VECTOR) == class_rate(optim, lr, OUTPUT) == lr
    assert class_rate(optim, optim.lr, MATRIX) == optim.matrix_lr, "the peak is the number in the file"


@pytest.mark.parametrize("optim", [OPTIM, OptimConfig(lr=0.006, min_lr=0.0006, warmup_steps=2, matrix_lr=0.006)])
def test_without_a_rate_of_its_own_no_class_differs_by_a_bit(optim):
    for step in range(8):
        lr = learning_rate(optim, 8, step)
        assert {class_rate(optim, lr, one) for one in (VECTOR, MATRIX, OUTPUT)} == {lr}


def test_decay_by_class():
    optim = OptimConfig(lr=1.0, weight_decay=0.1, matrix_weight_decay=0.4)
    assert [class_decay(optim, True, one) for one in (VECTOR, MATRIX, OUTPUT)] == [0.1, 0.4, 0.1]
    assert class_decay(optim, False, VECTOR) == 0.0
    assert class_decay(OptimConfig(lr=1.0, matrix_weight_decay=0.0), True, MATRIX) == 0.0, "0 is a value"
    assert class_decay(OptimConfig(lr=1.0), True, MATRIX) == 0.1
    assert [tells_classes_apart(o) for o in (OPTIM, optim, OptimConfig(lr=1.0, matrix_lr=1.0))] == [False, True, True]


def test_every_parameter_has_its_class():
    for preset, head in (("telechat2-tiny", {"head.weight"}), ("flm-tiny", set())):
        table = parameter_table(load_model_config(preset))
        found = {one: {name for name, spec in table.items() if spec.mup_class == one} for one in (MATRIX, OUTPUT)}
        assert found[OUTPUT] == head, "a tied table is vector-like"
        linears = {name for name in table if ".attn." in name or ".ffn." in name}
        assert found[MATRIX] == {name for name in linears if name.endswith(".weight")}


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
    config, _ = with_steps(load_run_config(path), 30_735)
    assert config.model == load_model_config(load_yaml(path)["model"])
    steps = config.train.schedule_steps or config.train.steps
    rates = [learning_rate(config.optim, steps, s) for s in range(0, steps, max(1, steps // 5000))]
    assert max(rates) == pytest.approx(config.optim.lr, rel=1e-3)
    assert rate_at(config, steps - 1) == pytest.approx(config.optim.min_lr, abs=0.05 * config.optim.lr)


def test_the_released_recipe_has_the_published_numbers():
    for name in ("telechat2-7b", "telechat2-115b"):
        config = load_run_config(CONFIGS / "train" / f"{name}.yaml")
        published = OptimConfig(
            lr=1.5e-4, min_lr=1.5e-5, warmup_steps=0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip_grad=1.0
        )
        assert config.optim == published
        assert config.data.seq_len == config.model.training_seqlen == 8192
        # runner_config.batch_size 1 is MindFormers' micro-batch; data-parallel 8, and 8 micro-batches for 115B.
        assert (config.train.micro_batch, config.train.global_batch) == (1, 64 if "115b" in name else 8)
    layout = load_run_config("telechat2-115b").parallel
    assert (layout.pp, layout.virtual, sum(layout.stage_layers), layout.stage_layers[-5:]) == (
        8,
        3,
        96,
        [5, 5, 5, 5, 3],
    )


def test_the_fine_tuning_recipes_have_the_published_numbers():
    full, lora, mindformers, instruct = (
        load_run_config(name)
        for name in ("telechat2-7b-sft", "telechat2-7b-lora", "telechat2-7b-lora-mindformers", "flm-2-sft")
    )
    for config in (full, lora):
        assert (config.optim.lr, config.optim.schedule, config.optim.warmup_ratio) == (3e-5, "cosine", 0.05)
        train, ranks = config.train, config.parallel.dp
        assert (train.epochs, train.micro_batch, train.global_batch // ranks, config.data.seq_len) == (1, 1, 4, 4096)
    assert (lora.lora.rank, lora.lora.alpha, lora.lora.dropout, len(lora.lora.targets)) == (64, 16, 0.05, 7)
    assert (mindformers.lora.rank, mindformers.lora.alpha, mindformers.lora.dropout) == (8, 16, 0.0)
    assert tuple(mindformers.lora.targets) == ("q", "k", "v", "o")
    assert (instruct.optim.lr, instruct.optim.min_lr, instruct.optim.schedule) == (2.7e-5, 1e-9, "linear")


def test_the_mix_of_the_52b_has_the_published_epochs():
    config = load_run_config("teleflm-52b-mix")
    assert len(config.data.sources) == 11 and round(sum(s.weight for s in config.data.sources), 2) == 100.01
    shares = plan_mix(config.data, config.train.steps * config.train.global_batch * 4096)
    epochs = [1.0, 1.0, 0.8, 2.5, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 2.5]
    assert [share.epochs for share in shares] == pytest.approx(epochs, rel=1e-3)
    assert describe_mix(shares)[3].split()[:2] == ["book", "7.169%"]


def test_the_52b_recipe_has_the_published_numbers():
    """The table of Tele-FLM's model card and report; betas and eps are not in it."""
    config = load_run_config(CONFIGS / "train" / "teleflm-52b.yaml")
    model, optim, layout = config.model, config.optim, config.parallel
    assert (optim.lr, optim.matrix_lr, optim.min_lr, optim.warmup_steps) == (1.5e-4, 1.5e-4, 1.5e-5, 2000)
    assert (optim.weight_decay, optim.matrix_weight_decay, optim.clip_grad) == (0.0, None, 1.0)
    assert (model.init_std, model.matrix_init_std) == (4e-3, 4.242e-3)
    assert (model.input_mult, model.logit_mult, model.rope_theta) == (1.0, 3.125e-2, 10000.0)
    tokens = config.train.global_batch * config.data.seq_len
    assert tokens == 5_505_024 and round(config.train.steps * tokens / 1e12, 5) == 2.5
    assert (layout.tp, layout.pp, layout.dp) == (4, 2, 112)


def test_the_101b_recipe_has_the_published_numbers():
    config = load_run_config(CONFIGS / "train" / "flm-101b.yaml")
    optim, layout = config.optim, config.parallel
    assert (optim.lr, optim.min_lr, optim.weight_decay, optim.clip_grad) == (2e-4, 6e-6, 0.1, 1.0)
    assert (optim.beta1, optim.beta2) == (0.9, 0.95)
    assert (layout.tp, layout.pp, layout.dp) == (4, 4, 12)
    assert config.train.global_batch == 2160 and round(optim.warmup_steps * 2160, -4) == 230_000
    # 26.54B tokens, as rounded as that number.
    assert config.train.steps * 2160 * 2048 / 1e9 == pytest.approx(26.54, abs=0.005)


SPAN = 40


def closed_form(schedule, shape, warmup, decay, peak, floor, step):
    """The definition in docs/training.md, written out once more."""
    if step < warmup:
        return peak * (step + 1) / warmup
    p = min(1.0, (step - warmup) / (SPAN - warmup))
    q = min(1.0, max(0.0, (step - (SPAN - decay)) / decay))
    left = {
        "cosine": (1 + math.cos(math.pi * p)) / 2,
        "linear": 1 - p,
        "constant": 1.0,
        "wsd": {"linear": 1 - q, "cosine": (1 + math.cos(math.pi * q)) / 2, "sqrt": 1 - math.sqrt(q)}[shape],
    }[schedule]
    return floor + (peak - floor) * left


@pytest.mark.parametrize("warmup", [{"warmup_steps": 3}, {"warmup_ratio": 0.06}, {}])
@pytest.mark.parametrize(
    ("schedule", "shape", "decay"),
    [
        ("cosine", "linear", {}),
        ("linear", "linear", {}),
        ("constant", "linear", {}),
        ("wsd", "linear", {"decay_steps": 10}),
        ("wsd", "cosine", {"decay_ratio": 0.25}),
        ("wsd", "sqrt", {}),
    ],
)
def test_schedules_equal_their_closed_forms(schedule, shape, decay, warmup):
    floor = 0.0 if schedule == "constant" else 2e-5
    optim = OptimConfig(lr=3e-4, min_lr=floor, schedule=schedule, decay_shape=shape, **decay, **warmup)
    warm = 3 if warmup else 0  # 0.06 of 40 steps, rounded up
    length = 10 if decay else 4  # by default a tenth
    expected = [closed_form(schedule, shape, warm, length, 3e-4, floor, step) for step in range(SPAN + 5)]
    # 1e-13: float64, the same formula in another order.
    assert [learning_rate(optim, SPAN, step) for step in range(SPAN + 5)] == pytest.approx(expected, rel=1e-13)
    late = [closed_form(schedule, shape, warm, length, 3e-4, floor, step + 1) for step in range(SPAN + 5)]
    assert schedule == "constant" and not warm or late != pytest.approx(expected, rel=1e-6), "one step late is visible"
    # A restart after growth has the same form, from its own peak to the same end.
    again = dataclasses.replace(optim, restart_lr=1e-4, rewarmup_steps=2)
    rates = [learning_rate(again, SPAN, step, grown_at=10) for step in range(10, SPAN + 1)]
    assert rates[2] == pytest.approx(1e-4) and rates[-1] == pytest.approx(1e-4 if schedule == "constant" else floor)


@pytest.mark.parametrize(
    ("train", "optim", "message"),
    [
        ({"epochs": 2.0}, {}, "both say how long the run is"),
        ({"steps": None}, {}, "train.steps"),
        ({}, {"schedule": "constnat"}, "did you mean 'constant'"),
        ({}, {"schedule": "constant", "min_lr": 1e-5}, "never reached"),
        ({}, {"decay_steps": 4}, "belongs to schedule wsd"),
        ({}, {"schedule": "wsd", "decay_steps": 4, "decay_ratio": 0.1}, "give one"),
        ({}, {"schedule": "wsd", "decay_steps": 12, "warmup_steps": 1}, "does not fit after the 1 of warm-up"),
        ({}, {"warmup_steps": 2, "warmup_ratio": 0.1}, "both say how long warm-up is"),
        ({}, {"warmup_ratio": 1.0}, "leaves no step after warm-up"),
    ],
)
def test_contradictions_are_refused(train, optim, message):
    tree = run_config().to_dict()
    tree["train"] |= train
    tree["optim"] = {"lr": 1e-3, **optim}
    with pytest.raises(UserError, match=message):
        run_config_from_dict(tree)


def test_epochs_become_steps():
    tree = run_config().to_dict()
    del tree["train"]["steps"]
    tree["train"] |= {"epochs": 1.5, "global_batch": 4}
    tree["optim"] = {"lr": 1e-3, "warmup_ratio": 0.05}
    config = run_config_from_dict(tree)
    assert run_config_from_dict(config.to_dict()) == config, "a config without steps survives its own mapping"
    known, notes = with_steps(config, 101)
    assert (known.train.steps, known.train.epochs) == (38, None)  # 152 samples, 38 steps of 4
    assert notes == ["train.epochs 1.5: 101 samples a pass of 4 a step are 38 steps"]
    assert known.optim.warmup(known.train.steps) == 2
    _, notes = with_steps(config, 100)
    assert notes[0].endswith("38 steps; the last draws 2 samples more")
    assert with_steps(run_config(), 100) == (run_config(), [])
    tree["train"] |= {"epochs": 1.1, "global_batch": 10}
    known, notes = with_steps(run_config_from_dict(tree), 100)
    assert known.train.steps == 11 and "more" not in notes[0]  # 110 samples, not the 111 of 1.1 * 100 in binary
