"""MindFormers' names and packing: against the published converter's output, and against its description in loops.

A packing that is left out keeps every shape. So besides bytes there are numbers: how far float64 logits move when rows
are taken in another order than they were written in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from telechat_twins.convert.copy import to_canonical, to_hf, to_mindformers
from telechat_twins.convert.hf.folder import HfFolder
from telechat_twins.convert.mindformers.files import shared_axis, slices
from telechat_twins.convert.mindformers.source import Known, MindFormersSource
from telechat_twins.convert.names import InterleavedKeyValue, RowsByRank, bind, mindformers_rules
from telechat_twins.convert.source import HfSource, ModelSource, open_model
from telechat_twins.core.files.safetensors import SafetensorsFile
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.model.params import parameter_table
from tests.support.frameworks import GOLDENS, golden_source
from tests.support.numpy_decoder import logits

CASES = ("telechat2_gqa", "telechat2_mha")
FORMS = ("plain", "qkv_concat", "mcore")  # of TeleChat2


def released(case: str) -> ModelSource:
    return open_model(GOLDENS / case)


def fused(case: str) -> dict[str, dict[str, np.ndarray]]:
    """ "mp1", "mp2.rank0", "mp2.rank1" -> the fused tensors that the published converter made."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in load_file(GOLDENS / "mindformers_convert" / case / "qkv_concat.safetensors").items():
        where, _, tensor = name.partition("model.")
        found.setdefault(where.rstrip("."), {})[f"model.{tensor}"] = array
    return found


def write_published_ranks(case: str, folder: Path, mp: int) -> None:
    """Rank folders as MindFormers leaves them, with the safetensors library from the published tensors."""
    plain = load_file(GOLDENS / "mindformers_convert" / case / "plain.safetensors")
    for rank in range(mp):
        held = {}
        for name, array in plain.items():
            axis = {"wo.weight": 1, "w2.weight": 1, "lm_head.weight": 0, "embedding_weight": 0}
            cut = next((axis[end] for end in axis if name.endswith(end)), None)
            if not name.endswith(("wq.weight", "wk_v.weight", "w1.weight", "w3.weight")):
                shared = cut is not None and array.shape[cut] % mp == 0
                held[name] = np.ascontiguousarray(np.split(array, mp, cut)[rank]) if shared else array
        held |= fused(case)["mp1" if mp == 1 else f"mp{mp}.rank{rank}"]
        (folder / f"rank_{rank}").mkdir(parents=True)
        save_file(held, folder / f"rank_{rank}" / f"checkpoint_{rank}.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_plain_is_the_published_conversion(case: str) -> None:
    source = released(case)
    bindings = bind(source.config, mindformers_rules(source.config, "plain"))
    published = load_file(GOLDENS / "mindformers_convert" / case / "plain.safetensors")
    weights = {name: source.tensor(name) for name in source.names()}
    assert set(bindings) == set(published)
    for name, binding in bindings.items():
        assert binding.join(weights, source.config).tobytes() == published[name].tobytes(), name
        back = binding.split(published[name], source.config)
        assert all(back[part].tobytes() == weights[part].tobytes() for part in binding.logical), name


@pytest.mark.parametrize("mp", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_qkv_concat_is_the_published_conversion(case: str, mp: int) -> None:
    source = released(case)
    bindings = bind(source.config, mindformers_rules(source.config, "qkv_concat", mp))
    weights = {name: source.tensor(name) for name in source.names()}
    for rank in range(mp):
        for name, published in fused(case)["mp1" if mp == 1 else f"mp{mp}.rank{rank}"].items():
            binding = bindings[name]
            whole = binding.join(weights, source.config)
            assert slices(whole, binding.axis, mp)[rank].tobytes() == published.tobytes(), (name, rank)


@pytest.mark.parametrize("mp", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_published_ranks_are_read(case: str, mp: int, tmp_path: Path) -> None:
    """The way back that MindFormers does not have; the config comes from the release's config.json."""
    write_published_ranks(case, tmp_path, mp)
    source, truth = MindFormersSource(tmp_path, Known(tmp_path, file=GOLDENS / case / "config.json")), released(case)
    assert (source.form, source.mp) == ("qkv_concat", mp) and source.names() == truth.names()
    for name in truth.names():
        assert source.tensor(name).tobytes() == truth.tensor(name).tobytes(), name
        assert source.dtype(name) == truth.dtype(name)
    everything = {name: truth.tensor(name) for name in truth.names()}
    exported = source.export(everything)
    assert all(exported[name].tobytes() == source.released(name).tobytes() for name in source.bindings)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_release_to_mindformers_and_back_is_the_same_files(case: str, form: str, tmp_path: Path) -> None:
    golden_source(f"{case}/weights.safetensors", f"{case}/config.json", str(_made(tmp_path / "hf")))
    to_mindformers(HfSource(HfFolder(tmp_path / "hf")), tmp_path / "ms", form, 1 if form == "mcore" else 2)
    to_hf(MindFormersSource(tmp_path / "ms", Known(tmp_path / "ms")), tmp_path / "back")
    assert _files(tmp_path / "back") == _files(tmp_path / "hf")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 4), (4, 1), (4, 2)])
def test_other_ranks_by_way_of_a_checkpoint(before: int, after: int, tmp_path: Path) -> None:
    """mp=k -> canonical -> mp=j is what the release gives for mp=j."""
    source = released("telechat2_gqa")
    to_mindformers(source, tmp_path / "k", "qkv_concat", before)
    to_canonical(MindFormersSource(tmp_path / "k", Known(tmp_path / "k")), tmp_path / "c")
    to_mindformers(open_model(tmp_path / "c"), tmp_path / "j", "qkv_concat", after)
    to_mindformers(source, tmp_path / "truth", "qkv_concat", after)
    made, truth = (
        {name: data for name, data in _files(tmp_path / folder).items() if name.endswith(".safetensors")}
        for folder in ("j", "truth")
    )
    assert made == truth and len(made) == after


# --- against MindFormers' description, in loops


def by_the_description(
    config: ModelConfig, weights: dict[str, np.ndarray], mp: int, rank: int
) -> dict[str, np.ndarray]:
    """The fused tensors of one rank: cut the rows of wq, wk_v, w1, w3, then walk over the heads of wk_v."""
    made = {}
    for i in range(config.num_layers):
        at, dim = f"layers.{i}.", config.head_dim
        k, v = (weights[f"{at}attn.{x}.weight"] for x in "kv")
        packed = np.concatenate(
            [part[j * dim : (j + 1) * dim] for j in range(config.num_kv_heads) for part in (k, v)]
        )  # wk_v
        q, packed, gate, up = (
            np.split(a, mp)[rank]
            for a in (
                weights[f"{at}attn.q.weight"],
                packed,
                weights[f"{at}ffn.gate.weight"],
                weights[f"{at}ffn.up.weight"],
            )
        )
        heads = [packed[j * dim : (j + 1) * dim] for j in range(config.num_kv_heads // mp * 2)]
        made[f"model.layers.{i}.attention.w_qkv.weight"] = np.concatenate([q, *heads[0::2], *heads[1::2]])
        made[f"model.layers.{i}.feed_forward.w_gate_hidden.weight"] = np.concatenate([gate, up])
    return made


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """A model of any ratio of heads, and ranks that it can be shared among."""
    mp = draw(st.integers(1, 4))
    kv, group, half = mp * draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    config = ModelConfig(
        vocab_size=draw(st.integers(4, 12)), hidden_size=kv * group * half * 2,
        ffn_hidden_size=mp * draw(st.integers(1, 5)), num_layers=draw(st.integers(1, 2)),
        num_heads=kv * group, num_kv_heads=kv, norm_eps=1e-5, training_seqlen=8, base_seqlen=8, max_seqlen=8,
    )  # fmt: skip
    return config, mp


def numbered(config: ModelConfig) -> dict[str, np.ndarray]:
    """Weights in which every element differs from every other."""
    weights, start = {}, 0
    for name, spec in parameter_table(config).items():
        weights[name] = np.arange(start, start + spec.size, dtype=np.float64).reshape(spec.shape)
        start += spec.size
    return weights


@given(models())
def test_any_shape_is_packed_as_described(made: tuple[ModelConfig, int]) -> None:
    config, mp = made
    weights = numbered(config)
    for form in FORMS:
        bindings = bind(config, mindformers_rules(config, form, mp))
        assert sorted(part for b in bindings.values() for part in b.logical) == sorted(weights)
        for name, binding in bindings.items():
            whole = binding.join(weights, config)
            assert whole.shape == binding.shape
            back = binding.split(whole, config)
            assert all(np.array_equal(back[part], weights[part]) for part in binding.logical), name
            parts = slices(whole, shared_axis(binding, mp), mp)
            if isinstance(binding.transform, RowsByRank):
                for rank, part in enumerate(parts):
                    assert np.array_equal(part, by_the_description(config, weights, mp, rank)[name]), (name, rank)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_telechat_52b_is_packed_as_its_converter_does(mp: int, heads: int, half: int) -> None:
    """From the release on: (3, heads, D, E) -> (heads, 3, D, E); for more ranks (mp, 3, heads / mp, D, E)."""
    H, D = mp * heads, 2 * half
    E, F = H * D, mp * 3
    config = ModelConfig(
        family="flm", vocab_size=5, hidden_size=E, ffn_hidden_size=F, num_layers=1, num_heads=H, num_kv_heads=H,
        norm_eps=1e-5, biases="none", position="rope", training_seqlen=8, base_seqlen=8, max_seqlen=8,
    )  # fmt: skip
    weights = numbered(config)
    c_attn = bind(config)["transformer.h.0.attn.c_attn.weight"].join(weights, config)
    c_fc = bind(config)["transformer.h.0.mlp.c_fc.weight"].join(weights, config)
    qkv = c_attn.T.reshape(3, H, D, E).transpose(1, 0, 2, 3)
    if mp > 1:
        qkv = qkv.reshape(mp, H // mp, 3, D, E).transpose(0, 2, 1, 3, 4)
    gate, up = (half.reshape(mp, F // mp, E) for half in np.split(c_fc.T, 2))
    bindings = bind(config, mindformers_rules(config, "qkv_concat", mp))
    at = "model.layers.0."
    made = {name: bindings[name].join(weights, config) for name in bindings}
    np.testing.assert_array_equal(made[f"{at}attention.w_qkv.weight"], qkv.reshape(-1, E))
    np.testing.assert_array_equal(
        made[f"{at}feed_forward.w_gate_hidden.weight"], np.concatenate([gate, up], 1).reshape(-1, E)
    )
    assert not any(name.endswith(".bias") for name in made)
    for binding in bindings.values():
        back = binding.split(made[binding.released], config)
        assert all(np.array_equal(back[part], weights[part]) for part in binding.logical)


def test_the_52b_has_the_fused_form_only_and_says_its_multiplier(tmp_path: Path) -> None:
    config = load_model_config({"preset": "telechat-52b", "hidden_size": 8, "ffn_hidden_size": 12, "num_layers": 1,
                                "num_heads": 4, "num_kv_heads": 4, "vocab_size": 6})  # fmt: skip
    from telechat_twins.core.checkpoint.read import write_checkpoint

    write_checkpoint(tmp_path / "c", 0, model={"config": config.to_dict()}, weights=numbered(config).items())
    to_mindformers(open_model(tmp_path / "c"), tmp_path / "ms", "qkv_concat", 2, whole=True)
    (tmp_path / "ms" / "model.json").unlink()
    known = Known(tmp_path / "ms", file=tmp_path / "ms" / "model_config.yaml")
    assert known.config == config
    back = MindFormersSource(tmp_path / "ms", known, 2)
    assert all(np.array_equal(back.tensor(n), a) for n, a in numbered(config).items())


# --- numbers that tell a left-out permutation

PACK, INTERLEAVE = RowsByRank.join, InterleavedKeyValue.join


def keys_and_values_as_they_lie(self: RowsByRank, parts: list[np.ndarray], config: ModelConfig) -> np.ndarray:
    """[wq; wk_v] of each rank, without taking wk_v apart."""
    if len(parts) == 2:
        return PACK(self, parts, config)
    together = RowsByRank(self.ranks, (config.num_heads, 2 * config.num_kv_heads))
    return PACK(together, [parts[0], INTERLEAVE(InterleavedKeyValue(), parts[1:], config)], config)


def projections_for_one_rank(self: RowsByRank, parts: list[np.ndarray], config: ModelConfig) -> np.ndarray:
    return np.concatenate(parts) if len(parts) == 3 else PACK(self, parts, config)


def gates_for_one_rank(self: RowsByRank, parts: list[np.ndarray], config: ModelConfig) -> np.ndarray:
    return np.concatenate(parts) if len(parts) == 2 else PACK(self, parts, config)


def all_keys_then_all_values(self: InterleavedKeyValue, parts: list[np.ndarray], config: ModelConfig) -> np.ndarray:
    return np.concatenate(parts)


FAULTS = {
    keys_and_values_as_they_lie: RowsByRank,
    projections_for_one_rank: RowsByRank,
    gates_for_one_rank: RowsByRank,
    all_keys_then_all_values: InterleavedKeyValue,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("case", CASES)
def test_a_left_out_permutation_moves_the_logits(case: str, fault: Callable[..., object], tmp_path: Path) -> None:
    """Files for two ranks are written with a fault and read without: shapes fit, and the float64 decoder tells."""
    truth, owner = released(case), FAULTS[fault]
    io = SafetensorsFile(GOLDENS / case / "io.safetensors")
    ids, expected = io.read("input_ids"), io.read("fp64.logits")

    def distance(folder: Path) -> float:
        source = MindFormersSource(folder, Known(folder))
        return float(np.abs(logits(source.config, source.tensor, ids) - expected).max())

    form = "plain" if owner is InterleavedKeyValue else "qkv_concat"
    to_mindformers(truth, tmp_path / "right", form, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "join", fault)
        to_mindformers(truth, tmp_path / "wrong", form, 2)
    right, wrong = distance(tmp_path / "right"), distance(tmp_path / "wrong")
    print(f"{case}, {fault.__name__}: float64 logits move by {wrong:.3f}; rightly packed {right:.1e}, bound 1e-12")
    # goldens/README: separate float64 code reproduces the logits to better than 1e-12.
    assert right < 1e-12
    assert wrong > 1
