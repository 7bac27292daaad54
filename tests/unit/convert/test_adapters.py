"""Adapters between PEFT, the canonical form and MindFormers: names, packing, and that nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from telechat_twins.convert import adapter_packing
from telechat_twins.convert.hf.peft import open_peft, write_peft
from telechat_twins.convert.mindformers.lora import NAMES, open_lora, write_lora
from telechat_twins.convert.names import bind
from telechat_twins.core.checkpoint.adapter import Adapter, open_adapter, write_adapter
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.lora import AdapterModule
from tests.support.adapters import FAMILIES, deltas, golden_model, modules, random_adapter, tensors
from tests.support.frameworks import GOLDENS

PEFT = GOLDENS / "peft"


def peft_delta(folder: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """Released matrix -> scale B A of a PEFT folder without patterns, as PEFT adds it to the packed matrix."""
    values = json.loads((folder / "adapter_config.json").read_text())
    held = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in held.items():
        if ".lora_A." in name:
            b = held[name.replace(".lora_A.", ".lora_B.")].astype(np.float64)
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            pattern = next((k for k in values["alpha_pattern"] if module.endswith(k)), None)
            alpha = values["alpha_pattern"].get(pattern, values["lora_alpha"])
            delta = alpha / len(a) * (b @ a.astype(np.float64))
            found[f"{module}.weight"] = delta.T if config.family == "flm" else delta  # Conv1D has [in, out]
    return found


def same_deltas(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("case", FAMILIES)
def test_peft_adds_to_the_packed_matrix_what_we_add_to_its_parts(case: str, tmp_path: Path) -> None:
    source = golden_model(case)
    adapter = random_adapter(source, modules(source.config))
    write_peft(adapter, tmp_path / "peft")
    added = deltas(adapter)
    for released, delta in peft_delta(tmp_path / "peft", source.config).items():
        binding = bind(source.config)[released]
        for name, part in binding.split(delta, source.config).items():
            np.testing.assert_allclose(part, added.pop(name), rtol=0, atol=1e-13, err_msg=name)
    assert not added


def _keys_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of key_value taken as [all keys; all values]."""

    def join(self: object, parts: list[np.ndarray], config: ModelConfig) -> np.ndarray:
        return np.concatenate(parts)

    monkeypatch.setattr("telechat_twins.convert.names.InterleavedKeyValue.join", join)


def _unscaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """alpha of a stack left as it was: half the scale."""
    plain = adapter_packing._joined

    def joined(adapter: Adapter, linear: object, present: list[AdapterModule]) -> object:
        return replace(plain(adapter, linear, present), alpha=present[0].alpha)

    monkeypatch.setattr(adapter_packing, "_joined", joined)


@pytest.mark.parametrize("fault", [_keys_first, _unscaled])
def test_planted_faults_are_found(
    fault: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with monkeypatch.context() as judge:
        source = golden_model("telechat2_gqa")
        adapter = random_adapter(source, modules(source.config))
        write_peft(adapter, tmp_path / "peft")
        judge.undo()
    released = "transformer.h.1.self_attention.key_value.weight"
    parts = bind(source.config)[released].split(peft_delta(tmp_path / "peft", source.config)[released], source.config)
    worst = max(np.abs(part - deltas(adapter)[name]).max() for name, part in parts.items())
    assert worst > 0.1


@pytest.mark.parametrize("targets", [("q", "k", "v", "o", "gate", "up", "down"), ("q", "v"), ("k", "down"), ("v",)])
@pytest.mark.parametrize("case", FAMILIES)
def test_ours_comes_back_from_peft_bit_for_bit(case: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    source = golden_model(case)
    adapter = random_adapter(source, modules(source.config, targets))
    write_peft(adapter, tmp_path / "peft")
    back = open_peft(tmp_path / "peft", source.config)
    assert (back.modules, back.dropout) == (adapter.modules, adapter.dropout)
    assert tensors(back) == tensors(adapter)
    # Twice the rank only where parts of one matrix differ in A.
    ranks = {a.shape[0] for n, a in load_file(tmp_path / "peft" / "adapter_model.safetensors").items() if "lora_A" in n}
    packed = {"telechat2_gqa": [{"k", "v"}], "teleflm": []}.get(case, [{"q", "k", "v"}, {"gate", "up"}])
    there = {name.rpartition(".")[2] for name in adapter.modules}
    assert max(ranks) == 2 * max([1, *(len(group & there) for group in packed)])


@pytest.mark.parametrize("case", FAMILIES)
def test_peft_comes_back_from_ours_byte_for_byte(case: str, tmp_path: Path) -> None:
    """One A for all parts of a matrix, as PEFT trains it, in bfloat16 and with PEFT's own order and settings."""
    source = golden_model(case)
    folder = tmp_path / "peft"
    folder.mkdir()
    rng = np.random.default_rng(3)
    held = {}
    for released, linear in adapter_packing.packed_linears(bind(source.config), source.config).items():
        rank = 3 if "down" in released or "c_proj" in released else 4
        for half, shape in (("A", (rank, linear.columns)), ("B", (linear.rows, rank))):
            held[f"base_model.model.{released}.lora_{half}.weight"] = rng.normal(size=shape).astype(np.float16)
    save_file(dict(reversed(held.items())), folder / "adapter_model.safetensors", {"format": "pt", "by": "test"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 10, "use_rslora": True,
        "rank_pattern": {"down_proj": 3, "c_proj": 3}, "alpha_pattern": {"layers.0.*": 4}, "lora_dropout": 0.1,
        "target_modules": "all-linear", "bias": "none", "peft_version": "0.21.2", "fan_in_fan_out": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_adapter(tmp_path / "ours", open_peft(folder, source.config))
    ours = open_adapter(tmp_path / "ours")
    assert {module.rank for module in ours.modules.values()} == {3, 4}
    write_peft(ours, tmp_path / "back")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    # What trained on is written anew, under a config of its own.
    changed = random_adapter(source, modules(source.config))
    write_peft(replace(changed, record=ours.record, assets=ours.assets), tmp_path / "changed")
    same_deltas(deltas(open_peft(tmp_path / "changed", source.config)), deltas(changed))


def test_peft_patterns_decide_by_the_first_match(tmp_path: Path) -> None:
    """The golden adapter that PEFT saved and computed with; tests/parity/test_adapters.py has its logits."""
    source = golden_model("teleflm")
    found = open_peft(PEFT / "patterns", source.config).modules
    assert {name: module.rank for name, module in found.items()} == {
        "layers.0.attn.q": 4, "layers.0.attn.k": 4, "layers.0.attn.v": 3, "layers.0.ffn.down": 4,
        "layers.1.attn.q": 2, "layers.1.attn.k": 2, "layers.1.attn.v": 2, "layers.1.ffn.down": 4,
    }  # fmt: skip
    scales = {name: module.scale for name, module in found.items()}
    assert scales["layers.0.attn.v"] == pytest.approx(3 / 3**0.5)
    assert (scales["layers.0.ffn.down"], scales["layers.1.attn.k"]) == (5 / 2, pytest.approx(6 / 2**0.5))
    write_peft(replace(open_peft(PEFT / "patterns", source.config), record=None), tmp_path / "written")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "written" / name).read_bytes() == (PEFT / "written" / name).read_bytes()


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize(
    ("case", "form", "mp"),
    [("telechat2_gqa", "plain", 1), ("telechat2_gqa", "plain", 2), ("telechat2_gqa", "mcore", 1),
     ("telechat2_gqa", "qkv_concat", 2), ("telechat52b_like", "qkv_concat", 1)],
)  # fmt: skip
def test_mindformers_there_and_back(case: str, form: str, mp: int, names: str, tmp_path: Path) -> None:
    source = golden_model(case)
    source.config = replace(source.config, input_mult=1.0)  # MindFormers has no such multiplier
    adapter = random_adapter(source, modules(source.config, ("q", "v", "o", "up", "down")))
    write_lora(adapter, tmp_path / "ms", form, names, mp)
    back = open_lora(tmp_path / "ms", source.config, None, None if mp > 1 or form != "qkv_concat" else 1)
    assert back.modules == adapter.modules and tensors(back) == tensors(adapter)
    # One lora_rank for the whole network, and PEFT-like shapes.
    place = tmp_path / "ms" / ("rank_0/checkpoint_0.safetensors" if mp > 1 else "model.safetensors")
    held = load_file(place)
    ends = NAMES[names]
    assert {n.endswith(ends) for n in held} == {True}
    assert len({a.shape[0] for n, a in held.items() if n.endswith(ends[0])}) == 1
    described = json.loads((tmp_path / "ms" / "adapter_config.json").read_text())
    assert described["lora_alpha"] / described["lora_rank"] == 3.0


def test_mindformers_alpha_is_never_guessed(tmp_path: Path) -> None:
    source = golden_model("telechat2_gqa")
    adapter = random_adapter(source, modules(source.config, ("q",)))
    write_lora(adapter, tmp_path / "ms", "plain", "mindpet")
    with pytest.raises(UserError, match=r"--alpha 5: .*adapter_config.json says 6"):
        open_lora(tmp_path / "ms", source.config, 5.0)
    (tmp_path / "ms" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="do not record lora_alpha; give --alpha"):
        open_lora(tmp_path / "ms", source.config, None)
    same_deltas(deltas(open_lora(tmp_path / "ms", source.config, 6.0)), deltas(adapter))
    held = load_file(tmp_path / "ms" / "model.safetensors")
    base = {"model.layers.0.attention.wq.weight": np.zeros((48, 48), np.float32)}
    old = {n[:-1] + n[-1].upper(): a for n, a in held.items()}  # ..._lora_A, as some versions write it
    save_file({**old, **base}, tmp_path / "ms" / "model.safetensors")
    found = open_lora(tmp_path / "ms", source.config, 6.0)
    assert tensors(found) == tensors(adapter) and found.notes == (
        "1 tensors that are no adapter's (the base, or the optimizer's) are not read",
    )
    del old["model.layers.1.attention.wq.mindpet_delta_lora_B"]
    save_file(old, tmp_path / "ms" / "model.safetensors")
    with pytest.raises(UserError, match=r"layers.1.attention.wq' has no B"):
        open_lora(tmp_path / "ms", source.config, 6.0)


def test_scales_that_one_matrix_cannot_hold(tmp_path: Path) -> None:
    source = golden_model("telechat2_gqa")
    chosen = modules(source.config, ("k", "v"))
    chosen["layers.0.attn.v"] = AdapterModule(name="layers.0.attn.v", rank=2, alpha=5.0)
    with pytest.raises(UserError, match=r"key_value holds layers.0.attn.k and layers.0.attn.v under one scale"):
        write_peft(random_adapter(source, chosen), tmp_path / "peft")
    chosen["layers.0.attn.v"] = AdapterModule(name="layers.0.attn.v", rank=4, alpha=12.0)  # another rank, one scale
    adapter = random_adapter(source, chosen)
    write_peft(adapter, tmp_path / "peft")
    same_deltas(deltas(open_peft(tmp_path / "peft", source.config)), deltas(adapter))
    with pytest.raises(UserError, match="one lora_alpha for all layers"):
        chosen = modules(source.config, ("q",))
        chosen["layers.0.attn.q"] = AdapterModule(name="layers.0.attn.q", rank=2, alpha=1.0)
        write_lora(random_adapter(source, chosen), tmp_path / "ms", "plain", "lora_a")


def test_canonical_there_and_back(tmp_path: Path) -> None:
    source = golden_model("teleflm")
    adapter = random_adapter(source, modules(source.config, ("q", "v")))
    write_adapter(tmp_path / "plain", adapter)
    model = json.loads((tmp_path / "plain" / "model.json").read_text())
    assert model["adapter"] == {
        "rank": 2, "alpha": 6.0, "dropout": 0.05, "targets": ["q", "v"],
        "base": {"path": "base", "fingerprint": adapter.base.fingerprint},
    }  # fmt: skip
    back = open_adapter(tmp_path / "plain")
    assert (back.modules, back.base, tensors(back)) == (adapter.modules, adapter.base, tensors(adapter))
    del (uneven := modules(source.config, ("q", "v")))["layers.1.attn.v"]
    other = random_adapter(source, uneven)
    write_adapter(tmp_path / "uneven", other)
    assert open_adapter(tmp_path / "uneven").modules == uneven
    assert [m["name"] for m in json.loads((tmp_path / "uneven" / "model.json").read_text())["adapter"]["modules"]] == [
        *uneven
    ]
