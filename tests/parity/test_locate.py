"""`tele parity locate` on faults planted in both twins: named by operator and layer, replayed, and shrunk.

A sample of tests/campaigns/locate_catalogue.py; the whole of it is `make locate`.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.core import cli
from telechat_twins.core.config import load_run_config
from telechat_twins.core.model.init import init_tensor
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.parity.locate.case import read_case
from telechat_twins.core.parity.locate.examine import CALL, OPERATOR, examine
from telechat_twins.core.parity.locate.find import locate
from telechat_twins.core.parity.locate.operators import OPERATORS
from telechat_twins.core.parity.locate.recipe import Setting, fill, missing, recipe, unknown, whole_tensors
from telechat_twins.core.parity.locate.report import smaller, write_reproduction
from telechat_twins.core.parity.locate.verdict import compare
from telechat_twins.core.parity.locate.walk import BACKWARD, FORWARD, UPDATE, Suspect
from telechat_twins.core.parity.record.sites import sites
from telechat_twins.kernels.replay import define
from tests.campaigns.locate import OTHER, Scene, catalogue, clean, is_named, walk
from tests.campaigns.located_faults import planted
from tests.support.frameworks import BACKENDS
from tests.support.recording import LENGTH, RATE, ROWS

SAMPLE = [
    "eps of another release",
    "o input's gradient transposed",
    "positions off by one",
    "gradient of values of one head a group",
    "weight decay missed",
    "new block without identity",
    "adapter's A without gradient",
]


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_planted_faults_are_named(backend: str, name: str, tmp_path: Path) -> None:
    fault = catalogue()[name]
    found = walk(fault, backend, tmp_path)
    assert is_named(fault, found), found.found


SCENES = [("telechat2-tiny", ""), ("flm-tiny", ""), ("telechat2-tiny", "documents"), ("telechat2-tiny", "growth")]


@pytest.mark.parametrize(("preset", "case"), [*SCENES, ("telechat2-tiny", "lora")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_recorded_operators_follow_from_their_recorded_inputs(
    backend: str, preset: str, case: str, tmp_path: Path
) -> None:
    """Every operator's recipe, forward, backward and of the update, filled from a right run, meets its definition."""
    scene = Scene(preset, case)
    record = scene.record(backend, "fp32", tmp_path, ("*",))
    setting = setting_of(scene, record)
    suspects = [Suspect(site.operator, site.name, way) for site in setting.sites[:-1] for way in (FORWARD, BACKWARD)]
    gradients = [q.name for q in record.quantities.values() if q.kind == "gradient"]
    seen, read = set(), whole_tensors(record)
    for suspect in [*suspects, *(Suspect("adamw", name, UPDATE) for name in gradients)]:
        made = recipe(suspect, setting)
        if made.why_not:
            assert case == "growth" and "new block" in made.why_not, made.why_not
            continue
        if case == "lora" and suspect.direction == BACKWARD and unknown(made, record, 1):
            continue  # below the first adapter nothing has a gradient
        assert not missing(made, record, 1) and not unknown(made, record, 1), suspect
        filled, results = fill(made, record, 1, "fp32", read, setting.weight)
        seen.add(filled.operator)
        for row in compare(filled, results, define):
            assert row.holds, (suspect, row)
    odd = {"layer_norm", "gelu"} if preset != "flm-tiny" else {"rms_norm", "add_rms_norm", "swiglu"}
    odd |= {"adapted_linear"} if case != "lora" else set()
    assert seen == set(OPERATORS) - odd


def setting_of(scene: Scene, record) -> Setting:
    run, norm = scene.run("fp32"), record.header.grad_norm

    def weight(name: str) -> np.ndarray:
        return init_tensor(name, run.model, 0, parameter_table(run.model)[name].index, "strong")

    return Setting(run, scene.batch(), ROWS, LENGTH, 1, RATE, norm, weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_operator_is_replayed_and_shrunk(backend: str, tmp_path: Path) -> None:
    """Its script fails on the small input while the fault is there, and passes without it."""
    fault = catalogue()["rotation reversed"]
    scene, full = Scene(fault.preset, fault.case), ("layers.0.attn.*",)
    with planted(fault, backend):
        faulty = scene.record(backend, "fp32", tmp_path / "a", full)
    right = scene.record(OTHER[backend], "fp32", tmp_path / "b", full)
    setting = setting_of(scene, right)
    found = locate(faulty, right, clean(scene, "pt", "fp64"), sites(setting.config.model), 2).found
    assert found is not None
    records = {"A": faulty, "B": right}
    # The program of this process is right: the run was wrong with a right operator.
    assert examine(found, setting, records)[0].verdict == CALL
    real = catalogue()["rotation reversed everywhere"]
    with planted(real, backend):
        examined = examine(found, setting, records)[0]
        assert examined.verdict == OPERATOR and examined.replayed is not None
        small = smaller(examined.replayed)
        script = write_reproduction(tmp_path / "out", small, backend, backend)
        assert small.size <= 40 and small.inputs["q"].shape[:3] == (1, 1, 1)
        assert read_case(tmp_path / "out" / "case.safetensors").size == small.size
        assert len(script.read_text().splitlines()) == 10
        assert run_script(script) == 1
    assert run_script(script) == 0


def test_the_command_names_the_operator_and_says_what_to_record(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scene, out = Scene("telechat2-tiny", ""), tmp_path / "out"
    with planted(catalogue()["v halves swapped"], "pt"):
        faulty = scene.record("pt", "fp32", tmp_path / "a")
    right, exact = clean(scene, "ms", "fp32"), clean(scene, "pt", "fp64")
    paths = [str(record.path) for record in (faulty, right)]
    judged = ["--reference", str(exact.path)]
    assert cli.main(["parity", "locate", *paths, *judged, "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "linear, forward, layer 0 (layers.0.attn.v)" in said and "  side      A" in said
    assert f"--backend ms --config {out / 'b.yaml'} --steps 1 --at 1 --out B --full 'activation:layers.0" in said
    assert load_run_config(str(out / "b.yaml"), []) == scene.run("fp32")
    found = json.loads((out / "locate.json").read_text())["found"]
    assert (found["operator"], found["layer"], found["side"]) == ("linear", 0, "A")
    assert cli.main(["parity", "locate", paths[1], paths[1], *judged, "--out", str(out)]) == 0
    assert cli.main(["parity", "locate", *paths, "--out", str(out)]) == 1
    assert "  side      A or B" in capsys.readouterr().out


def run_script(script: Path) -> int:
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(script), run_name="__main__")
    return int(left.value.code or 0)


@pytest.mark.parametrize(
    ("preset", "precision"), [("telechat2-tiny", "fp32"), ("flm-tiny", "fp32"), ("flm-tiny", "bf16")]
)
def test_right_twins_have_nothing_to_locate(preset: str, precision: str) -> None:
    """And no error comes near its limit."""
    scene = Scene(preset, "")
    ms, pt = (clean(scene, backend, precision) for backend in BACKENDS)
    for exact in (clean(scene, "pt", "fp64"), None):
        walk = locate(ms, pt, exact, sites(scene.run("fp32").model), 2)
        assert walk.found is None and not walk.missing
        assert walk.looked_at == len(ms.quantities) and walk.largest < 0.75
