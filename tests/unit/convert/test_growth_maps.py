"""Axis maps of a growth step, ages of entries, and what a growth is refused for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.convert.growth.plan import Options, plan_growth
from telechat_twins.core.config import OptimConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.model.growth import Growth, Sizes, axis_maps, sizes_of
from telechat_twins.core.model.growth_mask import GrowthMask, head_map, kv_map
from telechat_twins.core.model.params import parameter_axes, parameter_table
from telechat_twins.core.train.births import born
from telechat_twins.core.train.recipe import corrections, is_young, learning_rate
from telechat_twins.core.types import JsonObject
from tests.support.growing import FAMILIES, TINY

Heads = tuple[int, int]  # query heads, key/value heads


@pytest.mark.parametrize(
    ("old", "new", "heads", "kv_heads"),
    [
        # More heads in each group: old ones stay first in their group, appending would regroup them.
        ((4, 2), (8, 2), [0, 1, -1, -1, 2, 3, -1, -1], [0, 1]),
        # More groups of the same size.
        ((4, 2), (8, 4), [0, 1, 2, 3, -1, -1, -1, -1], [0, 1, -1, -1]),
        ((2, 2), (4, 4), [0, 1, -1, -1], [0, 1, -1, -1]),
        # Both.
        ((2, 1), (9, 3), [0, 1, -1, -1, -1, -1, -1, -1, -1], [0, -1, -1]),
        # Smaller groups: keys and values are copied.
        ((4, 2), (4, 4), [0, 1, 2, 3], [0, 0, 1, 1]),
        ((4, 1), (8, 4), [0, 1, 2, 3, -1, -1, -1, -1], [0, 0, -1, -1]),
        # 3 heads a group, cut into groups of 1, with room to spare.
        ((3, 1), (4, 4), [0, 1, 2, -1], [0, 0, 0, -1]),
    ],
)
def test_heads_stay_with_their_keys(
    old: tuple[int, int], new: tuple[int, int], heads: list[int], kv_heads: list[int]
) -> None:
    assert head_map(old, new).tolist() == heads
    assert kv_map(old, new).tolist() == kv_heads


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_every_head_map_keeps_groups(kv: int, group: int, new_kv: int, new_group: int) -> None:
    """Every old head appears once, and reads a copy of the keys it read."""
    old, new = (kv * group, kv), (new_kv * new_group, new_kv)
    try:
        heads, kv_heads = head_map(old, new), kv_map(old, new)
    except UserError:
        return
    assert sorted(heads[heads >= 0].tolist()) == list(range(old[0]))
    for place, head in enumerate(heads):
        if head >= 0:
            assert kv_heads[place // new_group] == head // group


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ((8, 2), (8, 3), "num_kv_heads: 3 does not divide num_heads 8"),
        ((12, 2), (16, 4), "groups of 4 heads cannot hold the groups of 6"),
        ((8, 2), (8, 8), None),
        ((8, 4), (8, 2), "num_kv_heads 2: groups of 4 heads need 4 kv heads"),
        ((8, 2), (4, 2), "num_kv_heads 2: groups of 2 heads need 4 kv heads"),
    ],
)
def test_heads_that_break_their_groups_are_refused(
    old: tuple[int, int], new: tuple[int, int], says: str | None
) -> None:
    if says is None:
        kv_map(old, new)
        return
    with pytest.raises(UserError, match=says):
        kv_map(old, new)


def test_wider_heads_keep_their_rotary_pairs() -> None:
    """Half rotation: pair i of 4 dimensions is (i, i + 2); in 8 dimensions it becomes pair 2i, (2i, 2i + 4)."""
    before = Sizes(
        vocab_size=1, hidden_size=4, ffn_hidden_size=1, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=4
    )
    maps = axis_maps(before, dataclasses.replace(before, head_dim=8))
    assert maps["H"].tolist() == maps["K"].tolist() == [0, -1, 1, -1, 2, -1, 3, -1]


def test_axes_of_every_parameter_have_its_shape() -> None:
    for config in (*FAMILIES.values(), load_model_config("telechat2-tiny")):
        sizes = sizes_of(config)
        lengths = {axis: len(index) for axis, index in axis_maps(sizes, sizes).items()}
        for name, spec in parameter_table(config).items():
            assert tuple(lengths[axis] for axis in parameter_axes(name)) == spec.shape, name


def grown(config: ModelConfig, updates: int, **changes: object) -> tuple[ModelConfig, Growth]:
    depth = changes.pop("depth", "insert")
    plan = plan_growth(
        config, dataclasses.replace(config, **changes), Options(method="zero", depth=depth), updates, updates
    )
    return plan.config, plan.growth


def test_ages_follow_every_growth() -> None:
    """Three growths; each entry is as young as the youngest of its row, column and block, against a slow walk."""
    config, history = TINY, []
    for updates, changes in (
        (10, {"hidden_size": 30, "num_layers": 3}),
        (20, {"num_heads": 8, "ffn_hidden_size": 50, "num_layers": 4}),
        (35, {"hidden_size": 36, "num_kv_heads": 4, "vocab_size": 60}),
    ):
        config, growth = grown(config, updates, **changes)
        history.append(growth)
    ages = set()
    for name, spec in parameter_table(config).items():
        box = tuple(slice(0, n) for n in spec.shape)
        found = born(history, name, box)
        slow = _slow_born(history, name, spec.shape)
        assert np.array_equal(np.zeros(spec.shape) if found is None else found, slow), name
        part = tuple(slice(n // 3, n) for n in spec.shape)
        cut = born(history, name, part)
        assert np.array_equal(np.zeros(slow[part].shape) if cut is None else cut, slow[part]), name
        ages |= set(np.unique(slow).tolist())
    assert ages == {0, 10, 20, 35}
    assert born((), "embed.weight", (slice(0, 2), slice(0, 2))) is None


def _slow_born(history: list[Growth], name: str, shape: tuple[int, ...]) -> np.ndarray:
    out = np.zeros(shape, int)
    for place in np.ndindex(*shape):
        index, layer = list(place), int(name.split(".")[1]) if name.startswith("layers.") else None
        for growth in reversed(history):
            maps = axis_maps(growth.before, growth.after)
            index = [int(maps[axis][i]) for axis, i in zip(parameter_axes(name), index, strict=True)]
            if -1 in index or layer in growth.new_layers:
                out[place] = growth.optimizer_steps
                break
            layer = None if layer is None else growth.layers[layer]
    return out


@pytest.mark.parametrize(
    ("depth", "layers", "new"),
    [
        ("insert", (0, 0, 1, 1, 2), (1, 3)),
        ("stack", (0, 1, 2, 1, 2), (3, 4)),
        ((0, 1, -1, 2, 2), (0, 1, -1, 2, 2), (2, 4)),
    ],
)
def test_where_new_blocks_come_from(depth: object, layers: object, new: object) -> None:
    source = dataclasses.replace(TINY, num_layers=3)
    plan = plan_growth(source, dataclasses.replace(source, num_layers=5), Options(depth=depth))
    assert (plan.growth.layers, plan.growth.new_layers) == (layers, new)
    assert plan.config.growth is not None
    assert plan.config.growth.new_layers == new
    fresh = plan_growth(source, dataclasses.replace(source, num_layers=5), Options(depth=depth, fresh_layers=True))
    assert [i for n, i in enumerate(fresh.growth.layers) if n in new] == [-1, -1]


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"hidden_size": 16}, {}, "target.hidden_size: 16 is smaller than the 24 of the model"),
        ({"num_layers": 1}, {}, "target.num_layers: 1 is smaller than the 2"),
        ({"vocab_size": 40}, {}, "target.vocab_size: 40 is smaller than the 53"),
        (
            {"family": "teleflm"},
            {},
            "target.family: the model has 'telechat2', the target 'teleflm'; growth stays within",
        ),
        ({"norm_eps": 1e-6}, {}, "target.norm_eps: the model has 1e-05, the target 1e-06; growth changes sizes only"),
        ({"tied_embeddings": True}, {}, "target.tied_embeddings"),
        ({"num_heads": 9, "num_kv_heads": 3}, {}, "groups of 3 heads cannot hold the groups of 4"),
        (
            {"head_dim": 8},
            {},
            r"target.head_dim: 8 \(hidden_size 24, num_heads 4\), the model has 6; put .*head_dim: 6",
        ),
        ({"head_dim": 8}, {"grow_head_dim": True}, "target.head_dim: 8 is not a multiple of the model's 6"),
        ({"vocab_tokens": 50}, {}, "target.vocab_tokens: 50, the model has 53 tokens"),
        ({"norm_divisor": 8.0}, {}, "target.norm_divisor: is for `tele grow` to set"),
        ({"num_layers": 4}, {"depth": "top"}, "--depth: 'top' is not one of insert, stack"),
        ({"num_layers": 4}, {"depth": (0, 1)}, "--depth: 2 blocks are named, the target has num_layers 4"),
        ({"num_layers": 3}, {"depth": (0, 1, 2)}, "--depth: there is no block 2 among the 2"),
        ({"num_layers": 3}, {"depth": (1, 0, 0)}, "--depth: blocks 0 to 1 must all appear.*they appear as 1, 0"),
        ({"num_layers": 3}, {"depth": (0, 0, 0)}, "--depth: blocks 0 to 1 must all appear"),
        ({}, {"method": "net2net"}, "--method: 'net2net' is not one of masked, zero"),
        ({}, {"multipliers": "drop"}, "--multipliers: 'drop' is not one of keep, fold"),
    ],
)
def test_refusals_name_the_field_and_the_way_out(changes: JsonObject, options: JsonObject, says: str) -> None:
    source = dataclasses.replace(TINY, num_kv_heads=1) if "num_heads" in changes else TINY
    target = dataclasses.replace(TINY, **changes)
    with pytest.raises(UserError, match=says):
        plan_growth(source, target, Options(**options))


def test_a_model_whose_masks_are_not_one_does_not_grow_again() -> None:
    half = plan_growth(TINY, dataclasses.replace(TINY, ffn_hidden_size=48), Options(anneal_steps=20), step=100).config
    with pytest.raises(UserError, match=r"still growing \(ffn 40 -> 48, at c = 0\).*anneal_steps 20 after step 100"):
        plan_growth(half, dataclasses.replace(half, ffn_hidden_size=64, growth=None), Options())


def test_the_mask_rises_to_one_and_goes() -> None:
    mask = GrowthMask(
        mask=0.0, start_step=10, anneal_steps=4, hidden_size=8, ffn_hidden_size=8, num_heads=1, num_kv_heads=1
    )
    assert [mask.at_step(s) for s in (9, 10, 11, 13, 14, 99)] == [0.0, 0.0, 0.25, 0.75, None, None]


def test_multipliers_stay_unless_they_are_folded() -> None:
    target = dataclasses.replace(TINY, hidden_size=48, logit_mult=0.35, head_dim=6)
    kept = plan_growth(TINY, target, Options())
    assert kept.config.logit_mult == 0.7
    assert "logit_mult stays 0.7; the target says 0.35" in kept.notes[0]
    folded = plan_growth(TINY, target, Options(multipliers="fold"))
    assert (folded.config.logit_mult, folded.scales) == (0.35, {"head.weight": 2.0})


def test_learning_rate_warms_up_again_after_growth() -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=2, rewarmup_steps=4)
    same = [learning_rate(optim, 20, s) for s in range(20)]
    after = [learning_rate(optim, 20, s, grown_at=10) for s in range(10, 20)]
    assert after == pytest.approx([same[10 + i] * min(1.0, (i + 1) / 4) for i in range(10)], rel=1e-15)
    again = dataclasses.replace(optim, restart_lr=0.5)
    rates = [learning_rate(again, 20, s, grown_at=10) for s in range(10, 21)]
    assert rates[3] == pytest.approx(0.5)  # the warm-up ends at the new peak
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert rates[4] == pytest.approx(0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


def test_bias_corrections_by_age() -> None:
    optim = OptimConfig(lr=1.0, beta1=0.9, beta2=0.95)
    assert corrections(optim, 7, 5) == pytest.approx((1 / (1 - 0.9**2), (1 - 0.95**2) ** -0.5))
    assert is_young(optim, 1000, 990)
    assert not is_young(optim, 1400, 1000)  # both corrections are 1 in float32
    assert is_young(optim, 1400, 1000, "float64") and not is_young(optim, 2000, 1000, "float64")
