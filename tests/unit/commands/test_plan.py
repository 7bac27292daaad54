"""`tele plan`: sums that can be done by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.convert.hf.config import dump_config, write_config
from telechat_twins.core import cli
from telechat_twins.core.checkpoint.read import whole, write_checkpoint
from telechat_twins.core.config import load_run_config
from telechat_twins.core.model.config import CONFIGS, load_model_config
from telechat_twins.core.model.lora import LoraConfig
from telechat_twins.core.model.params import count_parameters, parameter_table
from telechat_twins.core.parallel.layout import parse_layout
from telechat_twins.core.planner.memory.estimate import estimate

TINY = load_model_config("telechat2-tiny")


def test_parameters_and_states_by_hand() -> None:
    plan = estimate(TINY, 64, precision="fp32")
    total = count_parameters(TINY)
    classes = plan["parameters"]
    assert classes["total"] == total == sum(v for k, v in classes.items() if k != "total")
    assert classes["embedding"] == TINY.vocab_size * TINY.hidden_size
    memory = plan["memory_bytes"]
    assert (memory["masters"], memory["gradients"], memory["optimizer"]) == (4 * total, 4 * total, 8 * total)
    assert memory["compute_copy"] == 0
    assert estimate(TINY, 64, precision="bf16")["memory_bytes"]["compute_copy"] == 2 * total


def test_adapters_by_hand() -> None:
    """The base in the compute dtype without states; an adapter's bytes are those of any parameter that is trained."""
    lora = LoraConfig(rank=4, targets=["q", "down"])
    base, adapters = count_parameters(TINY), 4 * 4 * (128 + 128 + 320 + 128)
    for precision, width, copy in (("fp32", 4, 0), ("bf16", 2, 2)):
        plan = estimate(TINY, 64, 1, precision, lora=lora, constants=list(parameter_table(TINY)))
        assert plan["parameters"]["trained"] == plan["parameters"]["adapter"] == adapters
        memory = plan["memory_bytes"]
        assert (memory["masters"], memory["gradients"], memory["optimizer"]) == (
            4 * adapters,
            4 * adapters,
            8 * adapters,
        )
        assert (memory["frozen"], memory["compute_copy"]) == (width * base, copy * adapters)
    # Of the inputs of frozen products, those of q, k, v and of down are kept for adapters, those of gate and up and of
    # the head are not; and of each adapter its low-rank product is.
    whole = estimate(TINY, 64, 1, "bf16")["memory_bytes"]["activations"]
    assert whole - memory["activations"] == 64 * 2 * (4 * (128 - 2 * 4) + 128)
    flops = plan["flops_per_token"]["matrices"], estimate(TINY, 64)["flops_per_token"]["matrices"]
    assert flops[0] == flops[1] * 2 // 3 + 6 * adapters


def test_activations_by_hand() -> None:
    # E 128, F 320, H 4, K 2, D 32, L 4, V 2048. A layer keeps of each position four times E, queries and attention's
    # output, keys and values, gate, up and product, statistics of norms and heads, and the probabilities of 64 keys.
    memory = estimate(TINY, 64, micro_batch=2, precision="fp32")["memory_bytes"]
    layer = 4 * 128 + 2 * 128 + 2 * 64 + 3 * 320 + 2 + 4 + 4 * 64
    ends = 2 * 128 + 2 + 2048  # the final norm with its statistic, the loss with its, the logits
    assert memory["activations"] == 2 * 64 * 4 * (4 * layer + ends)


def test_recompute_and_fused_attention_only_lower_the_activations() -> None:
    sizes = [
        estimate(TINY, 256, recompute=r, fused_attention=f)["memory_bytes"]["activations"]
        for r, f in (("none", False), ("selective", False), ("none", True), ("full", True))
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_arithmetic_by_hand() -> None:
    flops = estimate(TINY, 64)["flops_per_token"]
    layer = 128 * 128 * 2 + 2 * 64 * 128 + 3 * 128 * 320  # q and o, k and v, the three of the feed-forward
    assert flops["matrices"] == 6 * (4 * layer + 2048 * 128)
    assert flops["attention"] == 6 * 4 * 128 * 64


def test_layout_divides_what_it_should() -> None:
    single = estimate(TINY, 64, precision="bf16")["memory_bytes"]
    shared = estimate(TINY, 64, precision="bf16", layout=parse_layout("dp4"))["memory_bytes"]
    assert (shared["optimizer"], shared["masters"]) == (single["optimizer"] // 4, single["masters"] // 4)
    assert (shared["gradients"], shared["compute_copy"]) == (single["gradients"], single["compute_copy"])
    plan = estimate(TINY, 64, layout=parse_layout("tp2.pp2"), micro_batches=4)
    held = [rank["parameters"] for rank in plan["ranks"]]
    norms_and_biases = 4 * 4 * 128 + 128  # held by both tensor ranks
    assert 2 * (sum(held) - norms_and_biases) + norms_and_biases == count_parameters(TINY)
    assert [rank["graphs"] for rank in plan["ranks"]] == [2, 1]
    assert plan["bubble"] == pytest.approx(1 / 5)


def test_the_published_run_fits_where_it_ran(capsys: pytest.CaptureFixture[str]) -> None:
    """115B on 512 devices with at most 54.5 GB of each: with MindFormers' lists, and no rank much emptier than another;
    one device must not hold it."""
    config = load_run_config(CONFIGS / "train" / "telechat2-115b.yaml")
    assert cli.main(["plan", "--config", "telechat2-115b", "--json"]) == 0
    published = json.loads(capsys.readouterr().out)["published"]
    assert 35e9 < published["bf16"] < published["amp"] < 54.5e9, "the published run's cap on a device"
    words = ["plan", "--config", "telechat2-115b", "--recompute-lists", "telechat2-115b", "--precision", "amp"]
    assert cli.main([*words, "--fused-attention", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["memory_bytes"]["total"] == published["amp"]
    ranks = [sum(rank["memory_bytes"].values()) for rank in plan["ranks"]]
    assert min(ranks) > 0.8 * max(ranks), "the recipe's offsets and lists balance the memory"
    assert 0.22 < plan["bubble"] < 0.23
    assert estimate(config.model, 8192)["memory_bytes"]["total"] > 1e12


GROWTH = [
    "plan", "--config", str(CONFIGS / "train" / "flm-101b.yaml"), "--growth", str(CONFIGS / "growth" / "flm-101b.yaml")
]  # fmt: skip


def test_a_stage_of_a_growth_costs_what_its_size_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """The total of a stage is the sum of its uses, each counted once, and that of `tele plan` for the same size."""
    assert cli.main([*GROWTH, "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["name"] for stage in stages] == ["16b", "51b", "101b"]
    for stage in stages:
        assert stage["device_bytes"] == sum(stage["memory_bytes"].values())
        uses = {"masters", "compute_copy", "gradients", "optimizer", "buffers", "activations", "workspace"}
        assert set(stage["memory_bytes"]) == uses
    last = load_run_config(CONFIGS / "train" / "flm-101b.yaml")
    layout = last.parallel
    alone = estimate(last.model, 2048, 1, "bf16", "selective", layout=layout, micro_batches=2160 // layout.dp)
    assert stages[-1]["device_bytes"] == alone["memory_bytes"]["total"]
    # By hand, 16B on tp2, bf16, dp96: masters, m and v 12 P / 96, the compute copy 2 P and gradients 4 P of P = half
    # of the parameters (and the norms and biases, which both hold whole).
    held, memory = stages[0]["parameters"] / 2, stages[0]["memory_bytes"]
    states = memory["masters"] + memory["optimizer"] + memory["compute_copy"] + memory["gradients"]
    assert states == pytest.approx(held * (12 / 96 + 2 + 4), rel=1e-3)


def test_growth_honours_or_refuses_the_options_of_one_size(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = []
    for more in ([], ["--fused-attention"]):
        assert cli.main([*GROWTH, "--json", *more]) == 0
        sizes.append([s["memory_bytes"]["activations"] for s in json.loads(capsys.readouterr().out)["stages"]])
    assert all(fused < plain for plain, fused in zip(*sizes, strict=True))
    for option, value in (("--layout", "tp2"), ("--seq-len", "64"), ("--precision", "fp32"), ("--micro-batches", "3")):
        assert cli.main([*GROWTH, option, value]) == 2
        assert f"{option}: cannot be combined with --growth" in capsys.readouterr().err
    lone = ("--tokens", "1e12"), ("--trace", "step.json"), ("--timeline", "step.png"), ("--budget", "1e20")
    for option, value in lone:
        assert cli.main([*GROWTH, "--machine", "a800-80g-sxm", option, value]) == 2
        assert f"{option}: is for a run of one size" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["single", "tp2.pp2", "dp4"])
def test_every_total_is_the_sum_of_its_parts(layout: str) -> None:
    plan = estimate(TINY, 64, layout=parse_layout(layout))
    for group in ("parameters", "memory_bytes", "flops_per_token"):
        assert plan[group]["total"] == sum(size for use, size in plan[group].items() if use != "total"), group


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "telechat2-115b", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["estimate"] is True and plan["parameters"]["total"] > 100e9
    assert cli.main(["plan", "--model", "telechat2-7b"]) == 0
    assert "telechat2-7b: estimate" in capsys.readouterr().out
    assert cli.main(["plan", "--config", str(CONFIGS / "train" / "telechat2-115b.yaml")]) == 0
    assert "by pipeline rank (bubble 22.6% of the step)" in capsys.readouterr().out
    assert cli.main(["plan", "--model", "telechat2-7b", "--layout", "tp3"]) == 2
    assert "nearest" in capsys.readouterr().err
    assert cli.main(["plan", "--model", "telechat2-7c"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert cli.main(["plan", "--model", "telechat2-7b", "--seq-len", "-1"]) == 2
    assert cli.main(["plan", "--model", "telechat2-7b", "--seq-len", "0"]) == 2


def test_the_model_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A release of which only config.json has been fetched, and a checkpoint; a preset's name stays a preset."""
    released, checkpoint = tmp_path / "released", tmp_path / "checkpoint"
    released.mkdir()
    config = write_config(load_model_config("telechat2-7b"), None, "bfloat16")
    (released / "config.json").write_text(dump_config(config))
    tiny = load_model_config("telechat2-tiny")
    weights = (whole(name, np.zeros(spec.shape, np.float32)) for name, spec in parameter_table(tiny).items())
    write_checkpoint(checkpoint, 1, model={"config": tiny.to_dict()}, weights=weights)
    for folder, preset in ((released, "telechat2-7b"), (checkpoint, "telechat2-tiny")):
        found = []
        for model in (str(folder), preset):
            words = ["--model", model, "--seq-len", "64", "--layout", "tp2", "--json"]
            assert cli.main(["plan", *words]) == 0
            found.append(json.loads(capsys.readouterr().out))
        assert found[0]["memory_bytes"] == found[1]["memory_bytes"]
    words = ["plan", "--search", "--machine", "h200-sxm", "--devices", "1", "--global-batch", "8", "--json"]
    assert cli.main([*words, "--model", str(checkpoint)]) == 0
    (tmp_path / "empty").mkdir()
    assert cli.main(["plan", "--model", str(tmp_path / "empty")]) == 2
    assert "no model found; a released folder has config.json" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["ascend-910b", "Ascend910B3", "910b"])
def test_a_chip_in_place_of_its_machine(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "telechat2-7b", "--machine", word]) == 2
    assert f"no machine '{word}'; did you mean 'atlas-800t-a2'?" in capsys.readouterr().err


RUN = """
model: telechat2-7b
data: {sources: [{path: pairs}], seq_len: 4096}
train: {steps: 100, global_batch: 8, micro_batch: 2, precision: bf16, recompute: full, record_every: 10}
optim: {lr: 1.0e-5}
lora: {rank: 8, rank_pattern: {"layers.[0-3].*": 4}}
preference: {reference: live}
eval: {sources: [{path: h}, {path: g}], every: 30, batches: 3, samples: [Hello]}
"""


def test_what_a_run_does_beside_its_steps_is_counted_or_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def planned(text: str) -> tuple[dict, str]:
        (tmp_path / "run.yaml").write_text(text)
        assert cli.main(["plan", "--config", str(tmp_path / "run.yaml"), "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert cli.main(["plan", "--config", str(tmp_path / "run.yaml")]) == 0
        return plan, capsys.readouterr().out

    live, text = planned(RUN)
    assert live["beside"]["evaluation"] == {
        "rounds": 4,
        "global_batches": 6,
        "share_of_the_steps_operations": pytest.approx(4 * 6 / 300),
    }
    assert live["beside"]["not_counted"] == ["eval.samples", "train.record_every"]
    assert "reference is a forward pass of the base in every step" in text
    assert "4 times, 8.00% of the steps' operations" in text and "eval.samples, train.record_every" in text
    once, text = planned(RUN.replace("live", "once"))
    whole = estimate(load_model_config("telechat2-7b"), 4096)["flops_per_token"]["total"]
    assert live["flops_per_token"]["reference"] == pytest.approx(whole / 3)
    assert live["flops_per_token"]["total"] - once["flops_per_token"]["total"] == pytest.approx(whole / 3)
    assert "reference" not in once["flops_per_token"] and "before step 1" in text
    wider = planned(RUN.replace('"layers.[0-3].*": 4', '"layers.[0-3].*": 16'))[0]
    assert wider["parameters"]["adapter"] > once["parameters"]["adapter"]


def test_several_layouts_make_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line has the figures of that layout's own plan, whichever way they are given."""
    words = [
        "plan",
        "--model",
        "telechat2-7b",
        "--machine",
        "a100-80g-sxm",
        "--global-batch",
        "64",
        "--seq-len",
        "8192",
    ]
    assert cli.main([*words, "--layout", "tp8,dp8", "--layout", "tp4.dp2,tp8", "--json"]) == 0
    rows = {row["layout"]: row for row in json.loads(capsys.readouterr().out)["layouts"]}
    assert list(rows) == ["tp8", "dp8", "dp2.tp4"]
    for layout, row in rows.items():
        assert cli.main([*words, "--layout", layout, "--fused-attention", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        for name in ("seconds", "tokens_per_s", "mfu", "bubble", "exposed_seconds"):
            assert row[name] == plan["time"][name]
        assert row["memory_bytes"] == plan["memory_bytes"]["total"] and row["fits"] == plan["time"]["memory"]["fits"]
        assert row["global_batch"] * 8192 == plan["time"]["tokens_per_step"] == 64 * 8192
    assert cli.main([*words, "--layout", "tp8,dp8,tp7", "--tokens", "1T"]) == 0
    text = capsys.readouterr().out
    assert "GiB over" in text and "tp7 is not possible: parallel.tp: 7 does not divide" in text and "days" in text
    assert cli.main([*words, "--layout", "dp8,tp7"]) == 1, "none of them fits"
    assert cli.main([*words, "--layout", "tp8", "--layout", "tp8"]) == 0
    assert "by pipeline rank" in capsys.readouterr().out, "one layout, said twice"
    rows = [one.split() for one in text.splitlines() if one.startswith(("tp8", "dp8"))]
    assert [row[-1] for row in rows if len(row) > 5] == ["yes", "over"]
    capsys.readouterr()
    assert cli.main(["plan", "--config", "flm-101b", "--machine", "a800-80g-sxm", "--layout", "tp4.pp4.dp12,tp8"]) == 0
    assert "tightly\n" in capsys.readouterr().out, "74.3 GiB of 80"
    assert cli.main(["plan", "--model", "telechat2-7b", "--layout", "tp8,pp4.dp2"]) == 0
    assert "the batch is not the same everywhere" in capsys.readouterr().out


def test_a_run_keeps_its_global_batch_in_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    """As `tele train` does with --layout, or with another micro-batch."""
    words = ["plan", "--config", "telechat2-115b", "--machine", "atlas-800t-a2"]
    for more in ("", "--layout tp8.pp8.dp4", "--layout tp8.pp8.dp16", "--layout tp8.pp8 --micro-batch 2"):
        assert cli.main([*words, *more.split(), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["time"]["tokens_per_step"] == 64 * 8192
    assert cli.main([*words, "--layout", "tp8.pp8.dp16.vpp3"]) == 2
    assert "64 makes 4 micro-batches, and interleaving (virtual 3) needs a multiple of pp 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--layout", "tp2,tp4", "--budget", "1e20"], "--budget: is for a plan of one layout"),
        (["--layout", "tp2,tp4x"], "unknown part 'tp4x'"),
        (["--layout", "tp7,tp11"], "none of them is possible; tp7: parallel.tp: 7 does not divide model.num_heads 32"),
        (["--global-batch", "8", "--micro-batches", "8"], "--global-batch: --micro-batches says how many there are"),
        (["--global-batch", "0"], "--global-batch: must be at least 1, found 0"),
    ],
)
def test_mistakes_about_several_layouts(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "telechat2-7b", *words]) == 2
    assert message in capsys.readouterr().err
