"""The memory model against what PyTorch saves for a backward pass, its closed forms, and MindFormers' lists."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.parallel.layout import Layout, parse_layout, stage_layers
from telechat_twins.core.parallel.schedule import peak_live
from telechat_twins.core.parallel.traffic import Widths
from telechat_twins.core.planner.memory import activations, estimate
from telechat_twins.core.planner.memory.estimate import Work, ranks_of
from telechat_twins.core.planner.memory.executor import MINDFORMERS, PYTORCH, on_cpu
from telechat_twins.core.planner.memory.live import live_graphs
from telechat_twins.core.planner.memory.recompute import resolve
from telechat_twins.core.planner.memory.states import held_by, held_quickly, part_sizes
from tests.campaigns.plan_check import __main__ as plan_check
from tests.house import ROOT

TINY = load_model_config("telechat2-tiny")
BIG = load_model_config("telechat2-115b")


def saved_bytes(preset: str, precision: str, recompute: str, batch: int, length: int) -> int:
    """Bytes of distinct storages, weights, ids and rotary tables aside, that autograd saves in a forward pass."""
    torch = pytest.importorskip("torch")
    from telechat_twins.pt_reference import ops
    from telechat_twins.pt_reference.model import Decoder

    config = load_model_config(preset)
    model = Decoder(config, precision, recompute).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    ids, rope = torch.zeros(batch, length, dtype=torch.long), model.rope(np.arange(length)[None], length)
    aside = {t.untyped_storage().data_ptr() for t in (ids, *rope, *model.parameters())}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in aside:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(ids, rope, ops.attention_blocks(length, length, None))
        _loss = ops.cross_entropy(logits, ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("preset", ["telechat2-tiny", "teleflm-tiny", "flm-tiny"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp"])
def test_activations_are_what_autograd_saves(preset: str, precision: str) -> None:
    """To the byte, with every kind of recomputation; a tensor forgotten in the model turns it red."""
    config, work = load_model_config(preset), Work(64, 2, 1, precision, executor=on_cpu(PYTORCH))
    for recompute in ("none", "selective", "full"):
        predicted = ranks_of(config, Layout(), dataclasses.replace(work, recompute=recompute))[0].activations
        assert predicted == saved_bytes(preset, precision, recompute, 2, 64), recompute


def test_a_forgotten_tensor_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = activations.block_kept

    def without(*arguments: object) -> list[activations.Kept]:
        return [one for one in whole(*arguments) if one.site != "feed_forward.w3"]  # type: ignore[arg-type]

    monkeypatch.setattr(estimate, "block_kept", without)
    predicted = ranks_of(TINY, Layout(), Work(64, 2, 1, "bf16", executor=on_cpu(PYTORCH)))[0].activations
    assert predicted != saved_bytes("telechat2-tiny", "bf16", "none", 2, 64)


@pytest.mark.parametrize("layout", ["tp2.pp2", "pp4", "tp4.pp2.vpp2", "tp8"])
@pytest.mark.parametrize("preset", ["telechat2-115b", "flm-101b", "teleflm-tiny"])
def test_parameters_in_closed_form(preset: str, layout: str) -> None:
    config, there = load_model_config(preset), parse_layout(layout)
    if config.num_heads % there.tp or there.stages > config.num_layers:
        pytest.skip("not a layout of this model")
    sizes, stages = part_sizes(config, there.tp), stage_layers(there, config)
    for rank in range(there.pp):
        layers = sum(len(stage) for stage in stages[rank :: there.pp])
        quick = held_quickly(sizes, config.tied_embeddings, there, rank, layers)
        assert quick == held_by(config, there, rank, Widths.of("bf16"))[0]


def test_live_graphs_agree_with_the_schedule() -> None:
    for schedule, pp, virtual, micro_batches in (
        ("1f1b", 4, 1, 9),
        ("gpipe", 3, 1, 5),
        ("1f1b", 4, 3, 16),
        ("1f1b", 2, 2, 40),
    ):
        for rank in range(pp):
            sets = live_graphs(schedule, pp, virtual, micro_batches, rank)
            assert max(map(sum, sets)) == peak_live(schedule, pp, virtual, micro_batches, rank)


def test_lists_of_layers_and_operators() -> None:
    """MindFormers' forms: true, a number a rank (dealt out to its chunks in turn), a list a chunk, patterns."""
    layout = Layout(pp=2, virtual=2, tp=2)
    section = {
        "recompute": [[1, 0], [0, 0]],
        "select_recompute": {r"feed_forward\.mul": True, r".*\.norm": [3, 1]},
        "select_comm_recompute": [0, 2],
    }
    lists = resolve(section, layout, [2, 2, 2, 2], "R")
    assert lists.operators[r".*\.norm"] == [[2, 1], [1, 0]]
    kept = activations.block_kept(BIG, layout, Widths.of("bf16"), MINDFORMERS, 8192, True)
    assert lists.kept(0, 0, 0, kept) == []
    sites = {one.site for one in lists.kept(0, 0, 1, kept)}
    assert "feed_forward.mul" not in sites and "attention_norm.norm" not in sites and "feed_forward.w1" in sites
    regathered = {one.site: one.elements for one in lists.kept(0, 1, 0, kept)}
    assert "attention_norm.norm" not in regathered  # recomputed altogether
    regathered = {one.site: one.elements for one in lists.kept(1, 1, 0, kept)}
    assert regathered["attention_norm.norm"] == BIG.hidden_size / 2
    for section, word in (
        ({"recompte": True}, "unknown"),
        ({"recompute": [1, 2, 3]}, "2 numbers"),
        ({"select_recompute": {"(": True}}, "regular"),
        ({"recompute_slice_activation": 1}, "true or false"),
        ({"mp_comm_recompute": [1, 0]}, "mp_comm_recompute: expected true or false"),
    ):
        with pytest.raises(UserError, match=word):
            resolve(section, layout, [2, 2, 2, 2], "R")


def test_sliced_inputs_of_recomputed_layers() -> None:
    """Each tensor rank keeps its part of them, as it does with sequence parallelism in any case."""

    def kept(name: str, sliced: bool) -> int:
        layout, section = parse_layout(name), {"recompute": True, "recompute_slice_activation": sliced}
        lists = resolve(section, layout, [TINY.num_layers], "R")
        return estimate.estimate(TINY, 64, layout=layout, lists=lists)["memory_bytes"]["activations"]

    inputs = TINY.num_layers * 64 * TINY.hidden_size * Widths.of("bf16").residual
    assert kept("tp2.nosp", False) - kept("tp2.nosp", True) == inputs / 2
    assert kept("tp2", False) == kept("tp2", True)


def test_keys_that_reach_no_layer_are_named() -> None:
    """What MindFormers' LayerSetting does with them: Layer.recompute() is called without."""
    layout = parse_layout("pp2.tp2.nosp")

    def idle(**section: object) -> list[str]:
        return [one.partition(":")[0] for one in resolve(section, layout, [2, 2], "R").idle]

    usual = {"mp_comm_recompute": True, "parallel_optimizer_comm_recompute": False, "recompute_slice_activation": True}
    assert idle(recompute=True, **usual) == idle(recompute=False, **usual) == idle() == []
    assert idle(recompute=[1, 0], **usual) == ["recompute_slice_activation"]
    assert resolve({"recompute": [2, 2], **usual}, layout, [2, 2], "R").slices == 1
    both = {"mp_comm_recompute": False, "parallel_optimizer_comm_recompute": True}
    assert idle(recompute=True, **both) == list(both)
    assert resolve({"recompute": [[True, 1]]}, layout, [2, 2], "R").full == [[2, 1]]


def page_rows(page: str) -> list[list[tuple[int, int]]]:
    """(measured, predicted) MB of both frameworks in each row of the page's table of trials."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = [re.findall(r"([\d,]+), ([\d,]+) MB \| [+-]", line) for line in text.splitlines()]
    return [[(int(a.replace(",", "")), int(b.replace(",", ""))) for a, b in row] for row in found if row]


@pytest.mark.parametrize("page", ["parallel.md", "parallel.zh.md"])
def test_the_page_shows_the_predictions_of_today(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all trials of `make plan-check`, measured, lie within its limit; without what was measured they do not."""
    rows = page_rows(page)
    assert len(rows) == len(plan_check.TRIALS)

    def predictions(trial: int, backend: str) -> set[int]:
        found = plan_check.predict(backend, {**plan_check.PLAIN, **plan_check.TRIALS[trial]})
        return {round(one / 1e6) for one in found}

    for trial, row in enumerate(rows):
        for backend, (measured, predicted) in zip(("ms", "pt"), row, strict=True):
            assert predicted in predictions(trial, backend), f"{trial} {backend}"
            assert abs(predicted / measured - 1.0) <= plan_check.LIMIT
    monkeypatch.setattr(plan_check, "on_cpu", lambda executor: executor)
    assert rows[14][0][1] not in predictions(14, "ms")
