"""Layouts: ranks and groups against a plain enumeration, the text form, and what is refused with which way out."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.parallel.layout import AXES, Coord, Layout, check_layout, parse_layout, stage_layers
from telechat_twins.core.schema import from_mapping

LAYOUTS = [
    Layout(),
    Layout(tp=4),
    Layout(pp=2, dp=3, cp=4, tp=2),
    Layout(pp=3, dp=2, cp=6, ulysses=2, tp=2),
    Layout(cp=4, ulysses=4, dp=2),
]


def model(**changes) -> ModelConfig:
    shape = dict(
        vocab_size=96, hidden_size=48, ffn_hidden_size=96, num_layers=6, num_heads=12, num_kv_heads=4, norm_eps=1e-5,
        training_seqlen=64, base_seqlen=64, max_seqlen=64,
    )  # fmt: skip
    return ModelConfig(**{**shape, **changes})


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_ranks_count_with_tp_fastest(layout):
    places = itertools.product(*(range(n) for n in (layout.pp, layout.dp, layout.cp, layout.tp)))
    assert [layout.coord(rank) for rank in range(layout.world)] == [Coord(*place) for place in places]
    assert all(layout.rank_of(layout.coord(rank)) == rank for rank in range(layout.world))
    with pytest.raises(ValueError):
        layout.coord(layout.world)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("axis", AXES)
def test_a_group_is_the_ranks_that_agree_on_all_other_axes(layout, axis):
    def key(rank):
        p, d, c, t = layout.coord(rank)
        r, u = divmod(c, layout.ulysses)
        kept = {
            "tp": (p, d, c), "cp": (p, d, t), "ring": (p, d, u, t), "ulysses": (p, d, r, t), "dp": (p, c, t),
            "replicas": (p, t), "pp": (d, c, t), "world": (), "model": (d, c),
        }  # fmt: skip
        return kept[axis]

    for rank in range(layout.world):
        group = layout.ranks(axis, rank)
        assert list(group) == [other for other in range(layout.world) if key(other) == key(rank)]


def test_groups_of_a_hybrid_by_hand():
    layout = parse_layout("dp2.cp4.ulysses2.tp2")
    assert layout.ranks("ulysses", 5) == (5, 7)  # c 2 and 3: r 1, u 0 and 1
    assert layout.ranks("ring", 5) == (1, 5)  # c 0 and 2
    assert layout.ranks("cp", 5) == (1, 3, 5, 7)
    assert layout.ranks("dp", 5) == (5, 13)
    assert layout.ranks("replicas", 5) == (1, 3, 5, 7, 9, 11, 13, 15)


@pytest.mark.parametrize(
    ("text", "fields", "name"),
    [
        ("single", {}, "single"),
        ("dp1.tp1", {}, "single"),
        ("tp2.pp2", {"tp": 2, "pp": 2}, "pp2.tp2"),
        ("pp2.dp2.cp4.ulysses2.tp2", {"pp": 2, "dp": 2, "cp": 4, "ulysses": 2, "tp": 2}, "pp2.dp2.cp4.ulysses2.tp2"),
        ("ring2", {"cp": 2}, "cp2"),
        ("ulysses2", {"cp": 2, "ulysses": 2}, "cp2.ulysses2"),
        ("ring2.ulysses2", {"cp": 4, "ulysses": 2}, "cp4.ulysses2"),
        ("ring3.cp6", {"cp": 6, "ulysses": 2}, "cp6.ulysses2"),
        ("cp8.ring4.ulysses2", {"cp": 8, "ulysses": 2}, "cp8.ulysses2"),
        ("pp2.vpp3", {"pp": 2, "virtual": 3}, "pp2.vpp3"),
        ("gpipe.pp4", {"pp": 4, "schedule": "gpipe"}, "pp4.gpipe"),
        ("tp2.nosp.nozero", {"tp": 2, "sequence_parallel": False, "zero1": False}, "tp2.nosp.nozero"),
    ],
)
def test_text_and_layout(text, fields, name):
    layout = parse_layout(text)
    assert layout == Layout(**fields)
    assert layout.name == name
    assert parse_layout(name) == layout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tq2", "unknown part 'tq2'; did you mean 'tp2'?"),
        ("TP2", "unknown part 'TP2'; did you mean 'tp2'?"),
        ("tp", "did you mean 'tp2'?"),
        ("ulyses4", "did you mean 'ulysses4'?"),
        ("gpipe2", "did you mean 'gpipe'?"),
        ("", "legal parts: ppN, dpN"),
        ("dp2tp3", "did you mean 'dp2.tp3'?"),
        ("pp2-dp2,nosp", "did you mean 'pp2.dp2.nosp'?"),
        ("pp2..tp2", "unknown part ''"),
        ("tp2.single", "'single' cannot be combined with other parts"),
        ("pp2.tp2.pp2", "'pp' appears twice"),
        ("nosp.nosp", "'nosp' appears twice"),
        ("dp0", "'dp0' is below 1"),
        ("dp-2", "'dp-2' is below 1"),
        ("cp4.ring3", "cp4 is not the product of ring3; nearest that is: cp3"),
        ("cp2.ring4", "cp2 is not the product of ring4; nearest that is: cp4"),
        ("cp4.ring2.ulysses4", "cp4 is not the product of ring2 x ulysses4; nearest that is: cp8"),
        ("vpp2", "parallel.virtual: 2 chunks a rank need pp >= 2"),
    ],
)
def test_text_that_is_no_layout(text, words):
    with pytest.raises(UserError, match=re.escape(words)):
        parse_layout(text)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tp": 0}, "parallel.tp: must be at least 1, found 0"),
        ({"schedule": "zb"}, "parallel.schedule: 'zb' is not one of 1f1b, gpipe"),
        ({"bucket_mb": 0.0}, "parallel.bucket_mb: must be above 0"),
        ({"cp": 8, "ulysses": 3}, "parallel.ulysses: 3 does not divide cp 8; nearest that does: 2"),
        ({"virtual": 2}, "parallel.virtual: 2 chunks a rank need pp >= 2, found pp 1"),
        ({"pp": 2, "virtual": 2, "schedule": "gpipe"}, "need schedule 1f1b, found gpipe"),
        ({"pp": 2, "virtual": 2, "stage_layers": [3, 3]}, "2 numbers for pp 2 x virtual 2 = 4 stages"),
        ({"pp": 3, "stage_layers": [3, 0, 3]}, "parallel.stage_layers: stage 1 has 0 layers"),
    ],
)
def test_numbers_that_contradict_each_other(fields, words):
    with pytest.raises(UserError, match=re.escape(words)):
        Layout(**fields)
    # The same from a file; the schema itself refuses what its limits exclude.
    with pytest.raises(UserError, match="^parallel."):
        from_mapping(Layout, fields, "parallel")


@pytest.mark.parametrize(
    ("text", "shape", "clash", "near"),
    [
        ("tp5", {}, "tp: 5 does not divide model.num_heads 12", 4),
        ("tp4", {"ffn_hidden_size": 98}, "tp: 4 does not divide model.ffn_hidden_size 98", 2),
        ("tp3", {}, "tp: 3 and model.num_kv_heads 4: neither divides the other", 2),
        ("tp6", {"num_kv_heads": 12, "ffn_hidden_size": 8}, "tp: 6 does not divide model.ffn_hidden_size 8", 4),
        ("tp2.ulysses5", {}, "ulysses: 5 does not divide the 6 heads of a rank (model.num_heads 12 / tp 2)", 1),
        ("cp12.ulysses4.tp2", {}, "ulysses: 4 does not divide the 6 heads of a rank (model.num_heads 12 / tp 2)", 2),
        (
            "ulysses8",
            {"num_heads": 24, "num_kv_heads": 3},
            "ulysses: 8 and the 3 kv heads of a rank: neither divides the other",
            1,
        ),
        ("pp7", {}, "pp: 7 stages are more than model.num_layers 6", 6),
        ("pp2.vpp4", {}, "virtual: pp 2 x virtual 4 = 8 stages are more than model.num_layers 6", 3),
    ],
)
def test_models_that_do_not_divide(text, shape, clash, near):
    layout, config = parse_layout(text), model(**shape)
    with pytest.raises(UserError, match=re.escape(f"parallel.{clash}")) as error:
        check_layout(layout, config)
    assert str(error.value).endswith(f": {near}")
    # The way out must be one: the suggested number passes.
    check_layout(dataclasses.replace(layout, **{clash.partition(":")[0]: near}), config)


@pytest.mark.parametrize("text", ["single", "tp2", "tp12", "tp4.ulysses3", "ulysses2.tp2", "cp8.ulysses4", "pp3.vpp2"])
def test_models_that_fit(text):
    check_layout(parse_layout(text), model())


def test_explicit_stages():
    layout = Layout(pp=2, virtual=2, stage_layers=[2, 1, 2, 1])
    assert stage_layers(layout, model()) == [[0, 1], [2], [3, 4], [5]]
    with pytest.raises(
        UserError, match=re.escape("add up to 6, model.num_layers is 8; nearest that fits: [2, 2, 2, 2]")
    ):
        check_layout(layout, model(num_layers=8))
    with pytest.raises(UserError, match=re.escape("nearest that fits: [1, 1, 1, 1]")):
        stage_layers(layout, model(num_layers=4))


def test_the_heaviest_stage_is_as_light_as_can_be():
    """Against all cuts, tried one by one."""
    for layers, pp, vocab in itertools.product((4, 5, 9), (1, 2, 3, 4), (96, 2000, 20000)):
        config = model(num_layers=layers, vocab_size=vocab)
        block = sum(s.size for name, s in parameter_table(config).items() if name.startswith("layers.0."))
        head = vocab * config.hidden_size

        def heaviest(counts, block=block, head=head):
            return max(n * block + (head if i == len(counts) - 1 else 0) for i, n in enumerate(counts))

        cuts = [c for c in itertools.product(range(1, layers + 1), repeat=pp) if sum(c) == layers]
        stages = stage_layers(Layout(pp=pp), config)
        assert sum(stages, []) == list(range(layers))
        assert heaviest([len(s) for s in stages]) == min(map(heaviest, cuts)), (layers, pp, vocab)


def test_balance_of_the_released_shapes():
    """The head of the 7B costs 2.6 blocks, so its last stage is shorter; ties leave the first stages light."""
    assert [len(s) for s in stage_layers(Layout(pp=8), load_model_config("telechat2-7b"))] == [4, 4, 4, 4, 4, 4, 4, 2]
    assert [len(s) for s in stage_layers(Layout(pp=4), model(num_layers=6))] == [1, 2, 2, 1]


@pytest.mark.parametrize(
    ("text", "run", "words"),
    [
        ("dp2.tp2", {"world": 6}, "dp2.tp2 has 4 ranks but 6 processes were started; start 4, or set parallel.dp to 3"),
        ("dp2.tp2", {"world": 5}, "dp2.tp2 has 4 ranks but 5 processes were started; start 4"),
        ("single", {"world": 2}, "single has 1 ranks but 2 processes were started; start 1, or set parallel.dp to 2"),
        (
            "dp4",
            {"global_batch": 10, "micro_batch": 1},
            "10 is not a multiple of dp 4 x micro_batch 1 = 4; nearest that is: 8, or parallel.dp 2",
        ),
        (
            "dp4",
            {"global_batch": 3, "micro_batch": 2},
            "3 is not a multiple of dp 4 x micro_batch 2 = 8; nearest that is: 8",
        ),
        (
            "pp3.dp2.vpp2",
            {"global_batch": 16, "micro_batch": 2},
            "16 makes 4 micro-batches, and interleaving (virtual 2) needs a multiple of pp 3; nearest global_batch "
            "that fits: 12",
        ),
        ("cp8", {"seq_len": 0}, "data.seq_len: must be at least 1, found 0"),
    ],
)
def test_runs_that_do_not_fit(text, run, words):
    with pytest.raises(UserError) as error:
        check_layout(parse_layout(text), model(), **run)
    assert str(error.value).endswith(words) or words in str(error.value).split(";")[0]


@pytest.mark.parametrize(
    ("text", "run"),
    [
        ("pp4.dp2.vpp1", {"global_batch": 12, "micro_batch": 1, "world": 8}),
        ("pp3.dp2.vpp2", {"global_batch": 12, "micro_batch": 2}),
        ("cp8", {"seq_len": 61}),  # padded
    ],
)
def test_runs_that_fit(text, run):
    check_layout(parse_layout(text), model(), **run)
