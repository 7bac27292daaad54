"""The walk of `tele parity locate` on synthetic records: whichever quantity is planted as the first wrong one is named,
with all that follows from it wrong as well."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from telechat_twins.core.config import load_run_config
from telechat_twins.core.parity.locate.case import Case
from telechat_twins.core.parity.locate.examine import Examined
from telechat_twins.core.parity.locate.find import locate
from telechat_twins.core.parity.locate.verdict import Measured, Verdict
from telechat_twins.core.parity.locate.walk import Suspect
from telechat_twins.core.parity.record.format import Record
from telechat_twins.core.parity.record.sites import sites
from tests.support.records import synthetic_record

CONFIG = load_run_config("telechat2-tiny", [])
PLACES = sites(CONFIG.model)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Record, Record]:
    """A, B and the float64 record; A and B have rounding noise of their own."""
    folder, rng = tmp_path_factory.mktemp("records"), np.random.default_rng(0)
    exact = synthetic_record(folder / "r", precision="fp64")

    def rounded() -> Record:
        noisy = {
            key: replace(q, sketch=q.sketch + 1e-7 * q.norm * rng.standard_normal(q.sketch.shape) / 16)
            for key, q in exact.quantities.items()
        }
        return replace(exact, header=replace(exact.header, precision="fp32"), quantities=noisy)

    return rounded(), rounded(), exact


def planted_at(record: Record, key: str) -> Record:
    """The record with the tensor ``key`` too large by a tenth."""
    q = record.quantities[key]
    wrong = replace(q, sketch=q.sketch * 1.1, norm2=q.norm2 * 1.1**2)
    return replace(record, quantities={**record.quantities, key: wrong})


@pytest.mark.parametrize(
    ("planted", "operator", "site", "direction"),
    [
        ("weight_before:layers.1.attn.k.weight", "weights", "layers.1.attn.k.weight", "start"),
        ("activation:embed", "embedding", "embed", "forward"),
        ("activation:layers.1.attn.rope_k", "rope", "layers.1.attn.rope_k", "forward"),
        ("activation:loss", "cross_entropy", "loss", "forward"),
        ("activation_grad:logits", "cross_entropy", "loss", "backward"),
        ("gradient:head.weight", "linear", "logits", "backward"),
        ("activation_grad:norm", "linear", "logits", "backward"),
        ("activation_grad:layers.0.attn.core", "linear", "layers.0.attn.o", "backward"),
        ("activation_grad:layers.0.attn_sum", "add", "layers.0", "backward"),
        ("activation_grad:layers.0.attn.o", "rms_norm", "layers.0.ffn_norm", "backward"),
        ("gradient:embed.weight", "embedding", "embed", "backward"),
        ("activation:grad_norm", "norm", "grad_norm", "backward"),
        ("moment2:layers.0.ffn.up.weight", "adamw", "layers.0.ffn.up.weight", "update"),
        ("weight_after:norm.weight", "adamw", "norm.weight", "update"),
    ],
)
def test_the_first_wrong_quantity_is_named(records, planted, operator, site, direction) -> None:
    a, b, exact = records
    for wrong, right, judge, side in ((a, b, exact, "A"), (b, a, exact, "B"), (a, b, None, "A or B")):
        wrong = planted_at(wrong, f"{planted}@1")
        pair = (wrong, right) if side != "B" else (right, wrong)
        walk = locate(*pair, judge, PLACES, CONFIG.model.num_layers)
        assert walk.found is not None
        found = walk.found.suspect
        assert (found.operator, found.site, found.direction) == (operator, site, direction)
        assert walk.found.check.key == f"{planted}@1"
        assert walk.found.side == side


def test_equal_records_have_nothing_to_locate(records) -> None:
    a, b, exact = records
    walk = locate(a, b, exact, PLACES, CONFIG.model.num_layers)
    assert walk.found is None and walk.looked_at == len(a.quantities) and not walk.missing


def test_a_fault_of_both_sides_is_named(records) -> None:
    """A ceiling holds where both sides are equally far from the float64 record."""
    a, b, exact = records
    key = "activation:layers.1.attn.core@1"
    walk = locate(planted_at(a, key), planted_at(b, key), exact, PLACES, CONFIG.model.num_layers)
    assert walk.found is not None and walk.found.check.key == key and walk.found.side == "A or B"


def test_a_verdict_tells_settings_from_inputs() -> None:
    """An operator that is right alone and in the run: what differs is its inputs, or what its run was given."""
    held, case = Measured("out", 1e-8, 1e-7), Case("rms_norm", {}, {}, "fp32")
    one = Examined(Suspect("rms_norm", "norm", "forward"), "A", {"A": held, "B": held}, Verdict(case, "pt", [held]))
    assert one.verdict == "inputs" and "its inputs make the difference" in one.text()
    one = replace(one, unlike=("model.norm_eps: 1e-05 -> 1e-06",))
    assert one.verdict == "settings"
    assert "the settings of A and B differ, and make the difference: model.norm_eps: 1e-05 -> 1e-06" in one.text()


def test_a_number_that_is_not_finite_is_beyond_every_budget(records) -> None:
    a, b, exact = records
    key = "activation_grad:layers.0.ffn.act@1"
    wrong = replace(a, quantities={**a.quantities, key: replace(a.quantities[key], nonfinite=1)})
    walk = locate(wrong, b, exact, PLACES, CONFIG.model.num_layers)
    assert walk.found is not None and walk.found.check.key == key and walk.found.excess.nonfinite == {"A": 1, "B": 0}
