"""Bytes a step against numbers worked out by hand for a tiny model; what processes really send is counted elsewhere."""

from __future__ import annotations

import pytest

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.parallel.layout import Layout, parse_layout
from telechat_twins.core.parallel.traffic import (
    Widths,
    expected_traffic,
    gather_bytes,
    ring_bytes,
    ulysses_bytes,
    wire_bytes,
)

# E 8, H 4, K 2, D 2, two layers.
MODEL = ModelConfig(
    vocab_size=30, hidden_size=8, ffn_hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, norm_eps=1e-5,
    training_seqlen=64, base_seqlen=64, max_seqlen=64,
)  # fmt: skip


def traffic(text, rank=0, config=MODEL, **changes):
    numbers = {"seq_len": 6, "micro_batch": 1, "micro_batches": 1, **changes}
    return expected_traffic(config, parse_layout(text), rank=rank, **numbers)


def test_one_process_sends_nothing():
    assert traffic("single", micro_batches=4) == {}


def test_tensor_parallel():
    """A position of the stream has 8 * 4 bytes; a rank keeps 3 of 6. Two gathers and two scatters a layer each way, one
    more pair for embedding and last norm; 72 gradients of norms and biases are summed once."""
    assert traffic("tp2", micro_batches=3) == {
        ("all_gather", "tp"): [3 * (2 * 4 + 2), 3 * (2 * 4 + 2) * 3 * 32],
        ("reduce_scatter", "tp"): [3 * (2 * 4 + 2), 3 * (2 * 4 + 2) * 6 * 32],
        ("all_reduce", "tp"): [3 * 2 + 1, 3 * (1 + 2) * 6 * 4 + 72 * 4],
    }
    assert traffic("tp2.nosp", micro_batches=3) == {
        ("all_reduce", "tp"): [3 * (2 * 4 + 2 + 2), 3 * (2 * 4 + 2) * 6 * 32 + 3 * (1 + 2) * 6 * 4]
    }


def test_gathers_travel_narrow_and_sums_wide():
    """bf16: a gathered position has 16 bytes, a summed one still 32; logits' sums are float32."""
    narrow = traffic("tp2", micro_batches=3, precision="bf16")
    assert narrow["all_gather", "tp"] == [30, 30 * 3 * 16]
    assert narrow["reduce_scatter", "tp"] == [30, 30 * 6 * 32]
    assert narrow["all_reduce", "tp"] == traffic("tp2", micro_batches=3)["all_reduce", "tp"]
    assert Widths.of("amp") == Widths(weight=4, compute=2, residual=4, stat=4, master=4)


def test_more_tensor_ranks_than_kv_heads():
    """tp 4 over 2 kv heads: pairs of ranks hold the same head, and sum the gradients of its 2 layers * 2 matrices."""
    assert traffic("tp4")["all_reduce", "kv"] == [1, 2 * 2 * (2 * 8) * 4]
    assert ("all_reduce", "kv") not in traffic("tp2")


def test_ring():
    """R 3: 6 places are a multiple; a rank's 2 places have 2 * 2 * 2 * 2 = 16 elements of keys and values, sent on
    twice in the forward and twice in the backward, and their gradients three times."""
    assert traffic("ring3")["shift", "ring"] == [2 * 7, 2 * 16 * (4 * 4 + 3 * 4)]
    assert traffic("ring3", seq_len=7)["shift", "ring"] == [2 * 7, 2 * 32 * (4 * 4 + 3 * 4)]  # padded to 12
    assert traffic("ring3", precision="bf16")["shift", "ring"] == [2 * 7, 2 * 16 * (4 * 2 + 3 * 4)]
    assert ring_bytes(2, 10, 8) == {("shift", "ring"): [4, 10 * 8 * 4]}
    gathered = traffic("ring3", method="allgather", precision="bf16")
    assert gathered["all_gather", "ring"] == [2, 2 * 16 * 2]
    assert gathered["reduce_scatter", "ring"] == [2, 2 * 3 * 16 * 4]
    assert ("shift", "ring") not in gathered
    assert gather_bytes(1, 10, 4) == ring_bytes(1, 10, 4) == {}


def test_ulysses():
    """q and out have 4 heads, k and v 2: over 4 ranks these are doubled first. Each of the 4 goes there and back."""
    assert traffic("ulysses2")["all_to_all", "ulysses"] == [2 * 8, 2 * 2 * (3 * 2) * (4 + 4 + 2 + 2) * 4]
    assert traffic("ulysses4", seq_len=8)["all_to_all", "ulysses"] == [2 * 8, 2 * 2 * (2 * 2) * (4 + 4 + 4 + 4) * 4]
    assert ulysses_bytes(Layout(), 10, 4, 2, 4) == {}
    # A hybrid's ring carries the same 4 places as a ring of two, and half of their kv heads.
    assert traffic("ring2", seq_len=8)["shift", "ring"] == [2 * 4, 2 * 32 * (2 * 4 + 2 * 4)]
    assert traffic("ring2.ulysses2", seq_len=8)["shift", "ring"] == [2 * 4, 2 * 16 * (2 * 4 + 2 * 4)]


@pytest.mark.parametrize(
    ("text", "forward", "backward"),
    [
        ("pp2", [4, 0], [0, 4]),
        ("pp2.gpipe", [4, 0], [0, 4]),
        ("pp2.vpp2", [8, 4], [4, 8]),  # the first rank passes on stages 0 and 2, the last rank stage 1 only
    ],
)
def test_pipeline(text, forward, backward):
    config = ModelConfig(**{**MODEL.to_dict(), "num_layers": 4})
    for rank in (0, 1):
        sent = traffic(text, rank, config, micro_batches=4, precision="bf16")
        for name, number in (("forward_out", forward[rank]), ("backward_out", backward[rank])):
            assert sent.get(("send", name), [0, 0]) == [number, number * 6 * 8 * 2]
    split = traffic("pp2.tp2", 0, config, micro_batches=4)
    assert split["send", "forward_out"] == [4, 4 * 3 * 8 * 4], "with sequence parallelism each rank sends its places"


def test_gradients_of_replicas():
    """Matrices and vectors are bucketed apart, each padded to the number of replicas."""
    matrices = sum(spec.size for spec in parameter_table(MODEL).values() if spec.decays)
    vectors = sum(spec.size for spec in parameter_table(MODEL).values() if not spec.decays)
    assert (matrices % 5, vectors % 5) == (2, 2)
    padded = matrices + 3 + vectors + 3
    assert traffic("dp5", precision="bf16") == {
        ("reduce_scatter", "replicas"): [2, padded * 4],
        ("all_gather", "replicas"): [2, padded // 5 * 2],
    }
    assert traffic("dp5.nozero") == {("all_reduce", "replicas"): [2, (matrices + vectors) * 4]}
    apart = traffic("dp5.nozero", by_class=True)  # embedding and head, whose padding is none here, go in two more
    assert apart == {("all_reduce", "replicas"): [4, (matrices + vectors) * 4]}
    layout = Layout(dp=5, zero1=False, bucket_mb=500 * 4 / 2**20)
    many = expected_traffic(MODEL, layout, seq_len=6, micro_batch=1, micro_batches=1, rank=0)
    calls, payload = many["all_reduce", "replicas"]
    assert calls > 2 and payload == (matrices + vectors) * 4, "smaller buckets are more calls of the same bytes"


def test_tied_embeddings_are_summed_between_the_ends_of_the_pipeline():
    tied = ModelConfig(**{**MODEL.to_dict(), "tied_embeddings": True})
    for rank in (0, 1):
        assert traffic("pp2", rank, tied)["all_reduce", "tied"] == [1, 30 * 8 * 4]
    assert not any(group == "tied" for _, group in traffic("tp2", 0, tied))


@pytest.mark.parametrize(
    ("op", "bytes_sent"),
    [
        ("all_reduce", 150),
        ("reduce_scatter", 75),
        ("all_to_all", 75),
        ("all_gather", 300),
        ("shift", 100),
        ("send", 100),
    ],
)
def test_on_the_wire(op, bytes_sent):
    assert wire_bytes(op, 4, 100) == bytes_sent
    assert wire_bytes(op, 1, 100) == 0
    with pytest.raises(ValueError, match="no wire formula"):
        wire_bytes("gather", 4, 100)
