"""Every element of the model lies on the ranks that need it, and exactly one rank counts and writes it."""

from dataclasses import replace

import numpy as np
import pytest

from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.params import VECTOR, parameter_table
from telechat_twins.core.parallel.layout import parse_layout
from telechat_twins.core.parallel.sharding import chunk_table, flat_pieces, kv_copies, plan_buckets

MODEL = replace(load_model_config("telechat2-tiny"), num_layers=5, vocab_size=307)
# Biases of split matrices, kv heads shared by tensor ranks.
FLM = replace(load_model_config("flm-tiny"), num_layers=5, vocab_size=307, num_kv_heads=2)
LAYOUTS = [
    "single",
    "tp2",
    "tp4",
    "tp4.nosp",
    "pp2",
    "pp2.vpp2",
    "dp3",
    "dp2.nozero",
    "cp2.dp2",
    "dp2.tp4.pp2",
    "ulysses2.tp2",
]


def tables(model, layout, rank):
    coord = layout.coord(rank)
    table = {}
    for chunk in range(layout.virtual):
        table |= chunk_table(model, layout, coord, chunk)
    return table


def pieces_of(model, layout, rank, limit=None):
    """(name, box, global flat values) that this rank owns, as its optimizer exports them."""
    table = tables(model, layout, rank)
    replicas = layout.ranks("replicas", rank)
    parts, part = (len(replicas), replicas.index(rank)) if layout.zero1 else (1, 0)
    if not layout.zero1 and replicas.index(rank):
        return
    for bucket in plan_buckets(table, parts, limit):
        if bucket.owner:
            yield from flat_pieces(bucket, table, part, parts)


@pytest.mark.parametrize("base", [MODEL, FLM], ids=lambda model: model.family)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("limit", [None, 1000, 20_000])
@pytest.mark.parametrize("text", LAYOUTS)
def test_every_element_is_owned_once(text, limit, tied, base):
    model, layout = replace(base, tied_embeddings=tied), parse_layout(text)
    counts = {name: np.zeros(spec.shape, np.int64) for name, spec in parameter_table(model).items()}
    for rank in range(layout.world):
        for piece in pieces_of(model, layout, rank, limit):
            counts[piece.name][piece.box] += 1
            assert counts[piece.name][piece.box].size == piece.last - piece.first
    assert all((count == 1).all() for count in counts.values())


@pytest.mark.parametrize("text", LAYOUTS)
def test_a_flat_part_holds_the_values_of_its_boxes(text):
    """Fill flat vectors from the boxes and from the local tensors: the same numbers, and padding is zero."""
    layout = parse_layout(text)
    whole = {
        name: np.random.default_rng(len(name)).standard_normal(spec.shape)
        for name, spec in parameter_table(MODEL).items()
    }
    for rank in range(layout.world):
        table = tables(MODEL, layout, rank)
        parts = len(layout.ranks("replicas", rank))
        for bucket in plan_buckets(table, parts, 30_000):
            local = np.zeros(bucket.size)
            for segment in bucket.segments:
                shard = table[segment.name]
                held = np.zeros(shard.shape)
                cut = whole[segment.name][shard.index]
                held[: len(cut)] = cut
                local[segment.start : segment.start + segment.size] = held.reshape(-1)
            joined = np.zeros((parts, bucket.size // parts))
            for part in range(parts):
                for piece in flat_pieces(bucket, table, part, parts):
                    joined[part, piece.first : piece.last] = whole[piece.name][piece.box].reshape(-1)
            np.testing.assert_array_equal(joined.reshape(-1), local)


@pytest.mark.parametrize("text", LAYOUTS)
def test_classes_have_buckets_of_their_own_when_asked(text):
    """And when not asked the plan is the one of a recipe without classes."""
    layout = parse_layout(text)
    specs = parameter_table(MODEL)
    for rank in range(layout.world):
        table = tables(MODEL, layout, rank)
        parts = len(layout.ranks("replicas", rank))
        apart, together = plan_buckets(table, parts, 30_000, by_class=True), plan_buckets(table, parts, 30_000)
        for bucket in apart:
            assert {specs[s.name].mup_class for s in bucket.segments} == {bucket.mup_class}
        assert {bucket.mup_class for bucket in together} == {VECTOR}
        for plan in (apart, together):
            assert sorted(s.name for bucket in plan for s in bucket.segments) == sorted(table)
        classless = {name: replace(shard, mup_class=VECTOR) for name, shard in table.items()}
        assert plan_buckets(classless, parts, 30_000, by_class=True) == together


def test_a_shifted_part_is_noticed():
    """The comparison above sees a ZeRO part that begins one element late."""
    layout = parse_layout("dp2")
    table = tables(MODEL, layout, 0)
    bucket = plan_buckets(table, 2)[0]
    right = [(p.name, p.box) for p in flat_pieces(bucket, table, 1, 2)]
    late = replace(bucket, segments=tuple(replace(s, start=s.start + 1) for s in bucket.segments))
    assert [(p.name, p.box) for p in flat_pieces(late, table, 1, 2)] != right


def test_kv_heads_are_held_by_neighbours_when_there_are_fewer_than_ranks():
    layout = parse_layout("tp4")
    assert (MODEL.num_kv_heads, kv_copies(MODEL, layout)) == (2, 2)
    shards = [tables(MODEL, layout, rank)["layers.0.attn.k.weight"] for rank in range(4)]
    starts = [shard.index[0].start for shard in shards]
    assert starts == [0, 0, MODEL.head_dim, MODEL.head_dim]
    assert [shard.owner for shard in shards] == [True, False, True, False]
    assert all(shard.sum_over == ("kv",) for shard in shards)


def test_vocabulary_is_padded_to_equal_rows():
    shards = [tables(MODEL, parse_layout("tp4"), rank)["head.weight"] for rank in range(4)]
    assert {shard.shape for shard in shards} == {(77, MODEL.hidden_size)}
    assert [shard.index[0].stop - shard.index[0].start for shard in shards] == [77, 77, 77, 76]


def test_replicated_parameters_are_summed_where_each_rank_sees_its_own_positions():
    for text, sums in (("tp2", ("tp",)), ("tp2.nosp", ()), ("dp2", ())):
        table = tables(MODEL, parse_layout(text), 0)
        assert table["norm.weight"].sum_over == sums
        assert table["layers.0.attn.o.bias"].sum_over == sums
        assert table["layers.0.attn.q.weight"].sum_over == ()


def test_a_tied_embedding_is_on_both_ends_of_a_pipeline():
    model = replace(MODEL, tied_embeddings=True)
    first, last = (tables(model, parse_layout("pp2"), rank)["embed.weight"] for rank in (0, 1))
    assert first.sum_over == last.sum_over == ("tied",)
    assert (first.owner, last.owner) == (True, False)
    assert "embed.weight" not in tables(MODEL, parse_layout("pp2"), 1)


def test_biases_lie_where_the_rows_of_their_matrices_lie():
    layout = parse_layout("tp4")
    for rank in range(4):
        table = tables(FLM, layout, rank)
        for name in ("attn.q", "attn.k", "attn.v", "ffn.up"):
            weight, bias = (table[f"layers.0.{name}.{kind}"] for kind in ("weight", "bias"))
            assert bias.index == weight.index[:1] and bias.shape == weight.shape[:1], name
            assert (bias.owner, bias.sum_over) == (weight.owner, weight.sum_over), name
        for name in ("attn.o", "ffn.down", "ffn_norm"):
            bias = table[f"layers.0.{name}.bias"]
            assert bias.shape == (FLM.hidden_size,) and bias.sum_over == ("tp",) and bias.owner == (rank == 0), name
