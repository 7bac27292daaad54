"""The other families against numbers of the original implementations: one device, cached, in layouts.

Tele-FLM, TeleChat-52B, FLM-101B and TeleChat3, whose numbers are those of transformers' Llama with its scale of YaRN.

Limits as for TeleChat2 (tests/parity/test_goldens.py): on these cases too the original's own float32 logits lie 5e-7 to
2e-6 from its float64 run, and the smallest planted fault moves logits by 2e-3 of their spread or more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import telechat_twins.core.model.position
from telechat_twins.convert.parity_rank import SCRIPT
from telechat_twins.convert.source import open_model
from telechat_twins.core.backends import load
from telechat_twins.core.inference.pages import pool_size
from telechat_twins.core.model.batch import IGNORE, Batch
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.position import RotaryRows
from telechat_twins.core.parallel.layout import parse_layout
from telechat_twins.core.parity.bounds import compare_tensors, relative_frobenius
from telechat_twins.core.parity.worker import Task, collect, launch_tasks, write_batch
from tests.parity.test_goldens import GRADIENT, LOGITS, LOSS, check_forward, check_gradients
from tests.support.engine_support import Feed
from tests.support.frameworks import BACKENDS, golden_arrays, golden_batch, golden_source

CASES = ("teleflm", "telechat52b_like", "flm101b_like", "telechat3")
GRADIENTS = [*((case, "loss_mean", "grads") for case in CASES), ("teleflm", "loss_masked", "grads_masked_loss")]


def opened(case: str) -> tuple[ModelConfig, Any, dict[str, np.ndarray]]:
    source = golden_source(f"{case}/weights.safetensors", f"{case}/config.json")
    return source.config, source, golden_arrays(f"{case}/io.safetensors")


@pytest.mark.parametrize("loss", ["loss_mean", "loss_ignore", "loss_masked"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_and_losses(backend: str, case: str, loss: str) -> None:
    config, source, io = opened(case)
    check_forward(backend, config, source.tensor, io, "fp64", golden_batch(io, loss), loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_folder_that_transformers_5_saved_anew_computes_the_same(backend: str, tmp_path: Path) -> None:
    """Its config.json keeps the rotary base in rope_parameters alone; taken as the usual 10000, it is another model."""
    logits, given = {}, golden_batch(opened("teleflm")[2], "loss_mean")
    half = {"rope_type": "default", "rope_theta": 5e5}
    for name, keys in {"old": {"rope_theta": 5e5}, "new": {"rope_parameters": half}, "usual": {}}.items():
        (tmp_path / name).mkdir()
        golden_source("teleflm/weights.safetensors", "teleflm/config.json", str(tmp_path / name))
        file = tmp_path / name / "config.json"
        kept = {k: v for k, v in json.loads(file.read_text(encoding="utf-8")).items() if k != "rope_theta"}
        file.unlink()  # a link to the golden file
        file.write_text(json.dumps(kept | keys), encoding="utf-8")
        source = open_model(tmp_path / name)
        logits[name] = load(backend, "forward").run(source.config, source.tensor, given, "fp32")["logits"]
    assert np.array_equal(logits["old"], logits["new"])
    assert relative_frobenius(logits["usual"], logits["old"]) > 100 * LOGITS


@pytest.mark.parametrize(("case", "loss", "file"), GRADIENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_gradient(backend: str, case: str, loss: str, file: str) -> None:
    config, source, io = opened(case)
    truth = golden_arrays(f"{case}/{file}.safetensors")
    check_gradients(backend, config, source.tensor, golden_batch(io, loss), source.export, truth)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_reproduces_the_formulas(backend: str, case: str) -> None:
    config, source, io = opened(case)
    result = load(backend, "forward").run(config, source.tensor, golden_batch(io, "loss_mean"), "fp64")
    # 1e-12: the released gelu_fast writes sqrt(2 / pi) with ten digits, which is 4e-11 off.
    assert relative_frobenius(result["logits"], io["fp64.logits"]) <= 1e-12
    assert abs(result["loss"] - float(io["fp64.loss_mean"])) <= 1e-12


Get = Callable[[str], np.ndarray]


def zeroed(*endings: str) -> Callable[[Get], Get]:
    return lambda get: lambda name: get(name) * (0 if name.endswith(endings) else 1)


def gate_and_up_swapped(get: Get) -> Get:
    names = {"gate": "up", "up": "gate"}
    return lambda name: get(".".join(names.get(part, part) for part in name.split(".")))


FAULTS: dict[str, tuple[str, dict[str, Any], Callable[[Get], Get]]] = {
    "input multiplier missed": ("teleflm", {"input_mult": 1.0}, zeroed()),
    "logit multiplier missed": ("teleflm", {"logit_mult": 1.0}, zeroed()),
    "gate and up swapped": ("telechat52b_like", {}, gate_and_up_swapped),
    "input multiplier of flm missed": ("flm101b_like", {"input_mult": 1.0}, zeroed()),
    "plain rotation for xpos": ("flm101b_like", {"position": "rope"}, zeroed()),
    "another scale base": ("flm101b_like", {"xpos_scale_base": 256.0}, zeroed()),
    "norm biases missed": ("flm101b_like", {}, zeroed("norm.bias")),
    "query, key and value biases missed": ("flm101b_like", {}, zeroed("q.bias", "k.bias", "v.bias")),
    "ffn input bias missed": ("flm101b_like", {}, zeroed("up.bias")),
    "plain rotation for yarn": ("telechat3", {"position": "rope"}, zeroed()),
    "another factor of yarn": ("telechat3", {"yarn_factor": 4.01}, zeroed()),
    "the usual scale of yarn": ("telechat3", {"yarn_mscale": 0.1}, zeroed()),
    "ramp of yarn one channel off": ("telechat3", {"yarn_slow": 0.3}, zeroed()),
    "rotary base of yarn's range": ("telechat3", {"base_seqlen": 400}, zeroed()),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fault_is_caught(backend: str, fault: str) -> None:
    case, change, weights = FAULTS[fault]
    config, source, io = opened(case)
    faulty, get, batch = replace(config, **change), weights(source.tensor), golden_batch(io, "loss_mean")
    with pytest.raises(AssertionError):
        check_forward(backend, faulty, get, io, "fp64", batch, "loss_mean")
    with pytest.raises(AssertionError):
        check_gradients(backend, faulty, get, batch, source.export, golden_arrays(f"{case}/grads.safetensors"))


def batch_of(ids: list[int]) -> Batch:
    row = np.asarray([ids], np.int32)
    return Batch(row, np.full_like(row, IGNORE), np.arange(len(ids), dtype=np.int32)[None])


def cached_rows(backend: str, config: ModelConfig, source: Any, ids: list[int]) -> tuple[list[int], np.ndarray]:
    """Places and logits of a prompt, steps, a second piece, steps."""
    runner = load(backend, "generate").Runner(config, source.tensor, pool_size(len(ids)))
    fed = Feed(runner, len(ids))
    places, rows, at = [], [], 0
    for size in (17, *[1] * 8, 5, *[1] * (len(ids) - 30)):
        rows.append(fed.extend(ids[at : at + size]))
        at += size
        places.append(at - 1)
    return places, np.stack(rows)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_steps_equal_one_pass(backend: str, case: str) -> None:
    config, source, _ = opened(case)
    ids = np.random.default_rng(5).integers(0, config.vocab_size, 60).tolist()
    judge = load(backend, "forward").run(config, source.tensor, batch_of(ids), "fp64", False)["logits"][0]
    places, rows = cached_rows(backend, config, source, ids)
    assert relative_frobenius(rows, judge[places]) < LOGITS
    assert max(relative_frobenius(row, judge[place]) for place, row in zip(places, rows, strict=True)) < 4 * LOGITS


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_origin_that_moves_with_the_keys_spoils_the_cache(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released centring, in a cache of keys that are rotated and scaled already."""
    config, source, _ = opened("flm101b_like")
    ids = np.random.default_rng(5).integers(0, config.vocab_size, 60).tolist()
    judge = load(backend, "forward").run(config, source.tensor, batch_of(ids), "fp64", False)["logits"][0]
    fixed = RotaryRows.rows

    def centred(self: RotaryRows, positions: np.ndarray, seq_lens: np.ndarray) -> Any:
        last = int(np.max(positions)) + 1
        cos, sin, *_ = fixed(self, positions, seq_lens)
        return (
            cos,
            sin,
            *telechat_twins.core.model.position.xpos_scales(replace(config, max_seqlen=2 * (-(-last // 2))), positions),
        )

    monkeypatch.setattr(RotaryRows, "rows", centred)
    places, rows = cached_rows(backend, config, source, ids)
    assert relative_frobenius(rows, judge[places]) > 100 * LOGITS


LAYOUTS = ("tp2", "tp2.nosp", "pp2", "ring2", "ulysses2", "dp2")
IN_LAYOUTS = ("teleflm", "flm101b_like", "telechat3")


@pytest.fixture(scope="module", params=BACKENDS)
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """The models in every layout of two processes, in one launch a backend."""
    folder = tmp_path_factory.mktemp(request.param)
    tasks, keys = [], []
    for case in IN_LAYOUTS:
        release = folder / case
        release.mkdir()
        golden_source(f"{case}/weights.safetensors", f"{case}/config.json", str(release))
        io = golden_arrays(f"{case}/io.safetensors")
        batch = write_batch(folder / f"{case}.safetensors", golden_batch(io, "loss_mean"))
        for text in LAYOUTS:
            layout = parse_layout(text)
            task = Task(
                name=f"{case} {text}", model=opened(case)[0], layout=layout, batch=batch, weights=str(release),
                logits=True,
            )  # fmt: skip
            tasks.append(task)
            keys.append((case, text))
    out = Path(folder / "out")
    code = launch_tasks(request.param, tasks, out, script=SCRIPT, timeout=500, collective_timeout=120)
    assert code == 0, f"see {out}/logs"
    return {key: collect(out / str(i), 2) for i, key in enumerate(keys)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", IN_LAYOUTS)
def test_released_numbers_in_layouts(launched: dict[tuple[str, str], Any], case: str, layout: str) -> None:
    outcome = launched[case, layout]
    _, source, io = opened(case)
    assert outcome.problems == []
    assert relative_frobenius(outcome.logits, io["fp64.logits"]) <= LOGITS
    truth = float(io["fp64.loss_mean"])
    assert abs(outcome.losses[0] - truth) <= LOSS * abs(truth)
    compared = compare_tensors(source.export(outcome.gradients), golden_arrays(f"{case}/grads.safetensors"))
    assert compared.same_names
    assert compared.worst() <= GRADIENT, compared.rows[0]
