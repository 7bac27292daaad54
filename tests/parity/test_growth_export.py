"""A grown model in a plain format: what can be folded is, and computes the same; what cannot is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from telechat_twins.convert.copy import canonical_to_hf
from telechat_twins.convert.source import CanonicalSource, PlainSource, open_model
from telechat_twins.core.checkpoint.read import open_checkpoint, write_checkpoint
from telechat_twins.core.cli import main
from telechat_twins.core.inference.pages import pool_size
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.parity.bounds import relative_frobenius
from tests.parity.test_goldens import GRADIENT, LOGITS
from tests.support.engine_support import Feed
from tests.support.growing import FAMILIES, TINY, batch, grow, run, strong

# Sizes whose heads make up the width, which the released formats take for granted.
PLAIN = {name: replace(config, num_heads=4, head_dim=6) for name, config in FAMILIES.items()}
PLAIN["telechat2"] = replace(PLAIN["telechat2"], input_mult=1.0, logit_mult=1.0)  # it has no multipliers
SIZES = {"hidden_size": 36, "num_heads": 6, "ffn_hidden_size": 50, "num_layers": 3, "vocab_size": 64}


def grown_checkpoint(folder: Path, source: ModelConfig, **options: object) -> tuple[ModelConfig, CanonicalSource]:
    sizes = SIZES | {"num_kv_heads": 3 if source.num_kv_heads == 2 else 6}
    plan, weights = grow(source, replace(source, **sizes), strong(source), **options)
    write_checkpoint(folder, 7, model={"config": plan.config.to_dict(), "grown": []}, weights=weights.items())
    opened = open_model(folder)
    assert isinstance(opened, CanonicalSource)
    return plan.config, opened


@pytest.mark.parametrize("family", ["telechat2", "teleflm"])
def test_a_model_that_grew_without_masks_has_a_plain_form(family: str, tmp_path: Path) -> None:
    """Norms that count some channels become norms over all with other gains and another epsilon."""
    config, source = grown_checkpoint(tmp_path / "grown", PLAIN[family], method="zero")
    assert (config.norm_divisor, config.vocab_tokens) == (24.0, 53)
    canonical_to_hf(source, tmp_path / "hf")
    plain = open_model(tmp_path / "hf")
    assert (plain.config.vocab_size, plain.config.norm_divisor) == (53, None)
    assert plain.config.norm_eps == pytest.approx(1e-5 * 24 / 36)
    given = batch(config)
    weights = {name: source.tensor(name) for name in source.names()}
    exported = {name: plain.tensor(name) for name in plain.names()}
    grown, after = run("pt", config, weights, "fp64", given), run("pt", plain.config, exported, "fp64", given)
    # Gains rounded once to float32: 6e-8 of a norm.
    assert relative_frobenius(after["logits"], grown["logits"][..., :53]) <= LOGITS
    assert relative_frobenius(after["grads"]["embed.weight"], grown["grads"]["embed.weight"][:53]) <= GRADIENT
    unfolded = run("pt", replace(plain.config, norm_eps=1e-5), exported, "fp64", given)
    assert relative_frobenius(unfolded["logits"], grown["logits"][..., :53]) > 10 * LOGITS


def test_bfloat16_gains_are_rounded_once(tmp_path: Path) -> None:
    """0.640625 * sqrt(256 / 446) lies 4e-9 above the middle of 0.484375 and 0.486328125; as a float32 it is the middle,
    which goes to the even one."""
    config = replace(PLAIN["telechat2"], hidden_size=446, norm_divisor=256.0)
    gain = np.full(446, 0.640625, ml_dtypes.bfloat16)
    weights = {n: gain if n == "norm.weight" else w.astype(gain.dtype) for n, w in strong(config).items()}
    write_checkpoint(tmp_path / "grown", 7, model={"config": config.to_dict(), "grown": []}, weights=weights.items())
    folded = PlainSource(open_model(tmp_path / "grown")).tensor("norm.weight")
    assert folded.dtype == gain.dtype and (folded.astype(np.float64) == 0.486328125).all()


@pytest.mark.parametrize("family", ["telechat2", "teleflm", "flm"])
def test_a_model_whose_masks_are_gone_is_plain(family: str, tmp_path: Path) -> None:
    config, source = grown_checkpoint(tmp_path / "grown", PLAIN[family])
    whole = replace(config, growth=None)
    weights = {name: source.tensor(name) for name in source.names()}
    write_checkpoint(tmp_path / "whole", 9, model={"config": whole.to_dict()}, weights=weights.items())
    opened = open_model(tmp_path / "whole")
    assert isinstance(opened, CanonicalSource)
    canonical_to_hf(opened, tmp_path / "hf")
    plain, given = open_model(tmp_path / "hf"), batch(config)
    exported = {name: plain.tensor(name) for name in plain.names()}
    before, after = run("pt", whole, weights, "fp64", given), run("pt", plain.config, exported, "fp64", given)
    assert relative_frobenius(after["logits"], before["logits"][..., :53]) <= 1e-12


def test_the_command_says_what_was_folded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grown_checkpoint(tmp_path / "grown", PLAIN["telechat2"], method="zero")
    assert main(["convert", "--from", "canonical", "--to", "hf", str(tmp_path / "grown"), str(tmp_path / "hf")]) == 0
    told = capsys.readouterr().out
    assert "note: norm_divisor 24 is folded into gains and epsilon" in told
    assert "note: 11 rows of padding are left out" in told


@pytest.mark.parametrize("form", [["hf"], ["mindformers"], ["mindformers", "--qkv-concat"], ["mindformers", "--mcore"]])
def test_a_model_between_two_sizes_is_refused_with_the_way_out(
    form: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown_checkpoint(tmp_path / "grown", PLAIN["telechat2"], anneal_steps=50)
    command = ["convert", "--from", "canonical", "--to", *form, str(tmp_path / "grown"), str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "model.growth: the model is between two sizes (hidden 24 -> 36, ffn 40 -> 50, heads 4 -> 6" in error
    assert "train it until its masks are 1, at step 57" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "changes", "options", "says"),
    [
        ("flm", {}, {"method": "zero"}, "model.norm_divisor: 24.0 has no place"),
        ("telechat2", {"hidden_size": 40}, {"method": "zero"}, "model.head_dim: 6 has no place"),
    ],
)
def test_what_has_no_plain_form_is_refused(
    family: str, changes: dict[str, int], options: dict[str, str], says: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(SIZES, "hidden_size", changes.get("hidden_size", 36))
    grown_checkpoint(tmp_path / "grown", PLAIN[family], **options)
    command = ["convert", "--from", "canonical", "--to", "hf", str(tmp_path / "grown"), str(tmp_path / "out")]
    assert main(command) == 2
    assert says in capsys.readouterr().err


def test_a_checkpoint_of_a_grown_model_opens_everywhere(tmp_path: Path) -> None:
    """The forward command's own reader, and generation over a cache, between two sizes."""
    from telechat_twins.core.backends import load

    config, source = grown_checkpoint(tmp_path / "grown", replace(TINY, num_heads=4, head_dim=6))
    assert config.growth is not None
    half = replace(config, growth=replace(config.growth, mask=0.4))
    ids = batch(half).input_ids[0]
    judge = run("pt", half, {n: source.tensor(n) for n in source.names()}, "fp64", batch(half))["logits"][0]
    for backend in ("ms", "pt"):
        fed = Feed(load(backend, "generate").Runner(half, source.tensor, pool_size(len(ids))), len(ids))
        rows = [fed.extend(ids[:6].tolist()), *(fed.extend([int(token)]) for token in ids[6:])]
        assert max(relative_frobenius(row, judge[5 + i]) for i, row in enumerate(rows)) <= 4 * LOGITS
    assert open_checkpoint(tmp_path / "grown").model["config"]["growth"]["mask"] == 0.0
