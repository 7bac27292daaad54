"""Many ranks against one device: loss, gradient norm, every gradient by name, weights after updates, the messages
sent and the graphs held, for every layout in both backends; the records of some; and the released code's numbers under
layouts.

Starting processes takes longer than a layout on a tiny model, so each backend starts once for each number of processes
and its ranks do all layouts, and all planted faults, one after another. The comparison is core.parity.layouts's, which
`tele parity --layouts` uses. Limits: core.parity.layouts says where they come from; what is measured is in
docs/parity.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.config import OptimConfig, PreferenceConfig
from telechat_twins.core.model.batch import Batch, shift_labels
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.growth_mask import GrowthMask
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.model.lora import TARGETS, LoraConfig, init_adapter, lora_table
from telechat_twins.core.parallel.layout import Layout, parse_layout
from telechat_twins.core.parity.bounds import compare_tensors, relative_frobenius
from telechat_twins.core.parity.layouts import LayoutReport, References, judge_layout, one_device, smooth_optim
from telechat_twins.core.parity.record.format import KINDS, Record
from telechat_twins.core.parity.record.read import open_record
from telechat_twins.core.parity.record.recorder import step_folder
from telechat_twins.core.parity.worker import Outcome, Task, collect, launch_tasks, run_alone, write_batch
from tests.parity.layout_faults import FAULTS
from tests.parity.test_goldens import GRADIENT, LOGITS, LOSS
from tests.support.frameworks import BACKENDS, golden_arrays, golden_batch, golden_source
from tests.support.records import apart

# 307 is prime, so that no tp divides the vocabulary; 2 kv heads are fewer than tp 4; ffn 96 and 8 heads divide by 8.
MODEL = ModelConfig(
    vocab_size=307, hidden_size=64, ffn_hidden_size=96, num_layers=2, num_heads=8, num_kv_heads=2, norm_eps=1e-5,
    training_seqlen=256, base_seqlen=256, max_seqlen=256,
)  # fmt: skip
OPTIM = OptimConfig(lr=1e-3)
MUP = replace(OPTIM, matrix_lr=4e-3, matrix_weight_decay=0.4)
# FLM-101B's LayerNorm, gelu, biases, xPos and multipliers, with kv heads that tensor ranks share.
FLM = dict(
    family="flm", norm="layernorm", activation="gelu", biases="all", position="xpos", input_mult=1.5, logit_mult=0.5
)  # fmt: skip
# Half-grown: new heads inside old groups, channels, neurons, a block, and rows of the vocabulary that pad.
PADDED = dict(vocab_size=320, vocab_tokens=MODEL.vocab_size)
GROWN = dict(
    growth=GrowthMask(
        mask=0.375, anneal_steps=8, hidden_size=48, ffn_hidden_size=64, num_heads=4, num_kv_heads=2, new_layers=(1,)
    ),
)  # fmt: skip
SEED = 7
SCRIPT = Path(__file__).with_name("layout_faults.py")

# layout, or layout:variant+variant; see Case. In `make test`: every axis alone, every pair, every variant, and where a
# combination stands in float64 not also in fp32. FULL is the rest.
WORLD2 = """
dp2 tp2 ring2 ulysses2 pp2 pp2.gpipe pp2.vpp2 tp2.nosp dp2.nozero
tp2:tied pp2:tied pp2.vpp2:tied dp2:rows3 pp2:uneven
ring2:zigzag ring2:gather ulysses2:zigzag
tp2:full ring2:full pp2:full ring2:selective
dp2:bf16 tp2:bf16 ring2:bf16 pp2:bf16 tp2:amp
dp2:flm tp2:flm pp2:flm+tied tp2:flm+full tp2:flm+bf16
dp2:mup tp2:mup pp2:flm+tied+mup
dp2:grown tp2:grown tp2.nosp:grown+full ring2:grown pp2:grown
dp2:weights ring2:weights+gather pp2:weights dp2:pairs tp2:pairs ring2:pairs
dp2:pairs+lora+frozen tp2:pairs+lora+frozen ring2:pairs+lora pp2:pairs+lora+frozen
pp2.vpp2:pairs+fp64
tp2:flm+grown tp2:zero pp2:tied+zero
dp2:lora tp2:lora tp2.nosp:lora ring2:lora pp2:lora tp2:flm+lora+full
pp2:frozen pp2.vpp2:frozen dp2:frozen tp2:lora+fp64 ring2:lora+fp64
dp2:fp64 tp2:fp64 pp2:fp64 ring2:selective+fp64 ring2:zigzag+fp64 ulysses2:gather+fp64
dp2.nozero:flm+fp64 tp2.nosp:flm+fp64 ring2:flm+fp64 tp2:grown+fp64 pp2:flm+tied+grown+fp64 tp2:flm+zero+fp64
"""
WORLD4 = """
dp2.tp2 dp2.ring2 dp2.ulysses2 dp2.pp2
tp2.ulysses2 tp2.pp2 tp2.pp2.vpp2
ring2.ulysses2 ring2.pp2 ring2.pp2.vpp2 ulysses2.pp2 ulysses2.pp2.vpp2
tp4 tp4.nosp:tied tp2.pp2.nosp:tied dp2.pp2.nozero:tied ring4:zigzag tp2.ring2:bf16 dp2.pp2:bf16
tp2.pp2:lora+selective tp4:lora tp2.pp2:lora+fp64
tp2.pp2:pairs+lora+frozen tp2.ring2:pairs tp4:grown tp4:tied+zero
tp2.ring2:fp64 dp2.pp2.vpp2:fp64 tp4:flm+fp64 ring2.ulysses2:gather+fp64 tp2.pp2:flm+grown+selective+fp64
"""
# Of these the first update is recorded: every axis, and what a site's place in its whole tensor depends on.
RECORDED = """
dp2 tp2 ring2 ulysses2 pp2 pp2.vpp2 tp2.nosp tp2:full ring2:zigzag ring2:gather ring2:selective pp2:flm+tied
tp2:grown tp2:lora dp2:pairs tp2:flm+grown tp2:fp64 tp2.pp2 tp2.pp2:lora+selective tp4
"""
FULL = """
pp2.gpipe:uneven ulysses2:gather ulysses2:bf16 ulysses2:grown tp2.nosp:flm ring2:flm ring2:flm+zigzag dp2:mup+bf16
tp2:grown+bf16 tp2:lora+bf16 tp2:weights tp2:flm+zero pp2:flm+tied+grown dp2.pp2.vpp2 tp2.ring2 ring2.ulysses2:gather
tp4:flm tp2.pp2:flm+selective tp2.pp2:flm+grown+selective
dp2.pp2.gpipe tp2.pp2.gpipe ring2.pp2.gpipe ulysses2.pp2.gpipe
dp4 dp4.nozero:rows3 ring4 ring4:gather ring4:gather+bf16 ulysses4 pp4 pp4.gpipe pp4.vpp2 tp4:full tp4:bf16
tp2.pp2.vpp2:tied ring2.pp2:zigzag tp2.ring2:zigzag ulysses2.pp2:gather dp2.tp2.nosp.nozero:rows3
ring2.ulysses2:zigzag+full tp2.ulysses2:bf16
ring3 pp3 dp3:rows3 ring3.ulysses2 tp2.ring3:gather tp2.pp3 dp3.tp2:rows3
"""
FULL8 = """
dp2.tp2.pp2 dp2.tp2.ring2 dp2.tp2.ulysses2 dp2.tp2.pp2.vpp2 dp2.ring2.ulysses2 dp2.ring2.pp2 dp2.ring2.pp2.vpp2
dp2.ulysses2.pp2 dp2.ulysses2.pp2.vpp2 tp2.ring2.ulysses2 tp2.ring2.pp2 tp2.ring2.pp2.vpp2 tp2.ulysses2.pp2
tp2.ulysses2.pp2.vpp2 ring2.ulysses2.pp2 ring2.ulysses2.pp2.vpp2 tp2.ring2.pp2.gpipe dp2.tp2.pp2.gpipe.nosp.nozero:tied
dp8:rows3 tp8 ring8 ring8:zigzag ulysses8 pp8 ring4.ulysses2 ring2.ulysses4 tp4.pp2 tp4.ring2 tp4.ulysses2 dp4.tp2
dp2.pp4 tp2.ring2.pp2.vpp2:tied dp2.ring2.ulysses2:gather tp2.ring2.pp2:zigzag+full dp2.tp2.ring2:bf16
tp2.ring2.pp2:bf16 tp2.ring2.pp2:grown dp2.tp2.pp2:flm+grown
dp2.tp2.ring2:fp64 dp2.tp2.pp2:flm+fp64 ring2.ulysses2.pp2:fp64 tp2.ring2.pp2:grown+fp64 tp8:flm+tied+fp64
"""


@dataclass(frozen=True)
class Case:
    """``text`` says it all. Variants: tied embeddings; rows3 (3 rows, which dp 2 does not share evenly; else 4); uneven
    (stages of 3 and 1 layers); zigzag and gather (documents kept apart, of lengths that fit a zigzag or not); full and
    selective recompute; flm (another family's operators); mup (matrix-like parameters have their own rate and decay);
    grown (in the middle of growth by masks); zero (norms that count some channels only, as growth without masks leaves
    them); weights (token losses with weights); pairs (preference pairs); lora (adapters with dropout on every linear,
    of several ranks and alphas, rank-stabilised); frozen (embedding and first blocks); a precision (fp64: every number
    within 1e-12 of PyTorch's float64 on one device)."""

    text: str

    @property
    def words(self) -> set[str]:
        return set(self.text.partition(":")[2].split("+")) - {""}

    @property
    def batch(self) -> str:
        return "".join(sorted(self.words & {"rows3", "zigzag", "gather", "weights", "pairs"})) or "plain"

    @property
    def precision(self) -> str:
        return "".join(self.words & {"bf16", "amp", "fp64"}) or "fp32"

    @property
    def layout(self) -> Layout:
        layout = parse_layout(self.text.partition(":")[0])
        return replace(layout, stage_layers=[3, 1]) if "uneven" in self.words else layout

    @property
    def model(self) -> ModelConfig:
        """Two layers, or as many as there are stages; four where two stages are uneven."""
        layers = 4 if self.layout.stage_layers else max(2, self.layout.stages)
        changes: dict[str, Any] = {"num_layers": layers, "tied_embeddings": "tied" in self.words}
        changes |= FLM if "flm" in self.words else {}
        changes |= {**PADDED, **GROWN} if "grown" in self.words else {}
        changes |= {**PADDED, "norm_divisor": 48.0} if "zero" in self.words else {}
        return replace(MODEL, **changes)

    @property
    def optim(self) -> OptimConfig:
        return MUP if "mup" in self.words else OPTIM

    @property
    def lora(self) -> LoraConfig | None:
        targets = [name for name in TARGETS if name != "gate" or "flm" not in self.words]
        if "lora" not in self.words:
            return None
        ranks, alphas = {"v": 2, "layers.1.ffn.*": 5}, {"o": 2.0, "layers.0.attn.q": 6.0}
        return LoraConfig(
            rank=3, alpha=4.5, dropout=0.2, targets=targets, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=True
        )

    @property
    def reference(self) -> tuple[ModelConfig, str, OptimConfig, frozenset[str]]:
        """Cases with the same one are held against the same float64 run."""
        return self.model, self.batch, self.optim, frozenset(self.words & {"lora", "frozen"})

    @property
    def initial(self) -> dict[str, np.ndarray]:
        adapters = {} if self.lora is None else lora_table(self.model, self.lora)
        lora = self.lora or LoraConfig()
        return init_weights(self.model, SEED, "strong") | {
            name: init_adapter(name, self.model, lora, SEED, scheme="strong") for name in adapters
        }

    def task(self, optim: OptimConfig, batch: str) -> Task:
        layout = self.layout
        return Task(
            name=self.text,
            model=self.model,
            layout=layout,
            batch=batch,
            seed=SEED,
            precision=self.precision,
            recompute="".join(self.words & {"full", "selective"}) or "none",
            # Two micro-batches a rank, four where the pipeline is alone; a second update where one can go wrong by
            # what data-parallel ranks tell each other, and for every axis alone.
            micro_batch=1 if (layout.dp > 1 or layout.pp == layout.world) and "pairs" not in self.words else 2,
            steps=2 if layout.dp > 1 or (layout.world == 2 and not self.words) else 1,
            optim=optim,
            preference=PreferenceConfig(beta=0.02, label_smoothing=0.1) if "pairs" in self.words else None,
            lora=self.lora,
            freeze=["embed.weight", "layers.0.*", "layers.1.ffn.*"] if "frozen" in self.words else [],
            record=self.text in RECORDED.split(),
        )


def cases(text: str) -> list[Any]:
    return [Case(word) for word in text.split()]


def world_of(case: Case) -> int:
    return case.layout.world


@cache
def make_batch(kind: str) -> Batch:
    """4 rows of 61 tokens (64 where documents must fit a zigzag over 4), with unequal numbers of targets a row."""
    rows, length = (3 if kind == "rows3" else 4), (64 if "zigzag" in kind else 61)
    random = np.random.default_rng(3)
    ids = random.integers(0, MODEL.vocab_size, (rows, length)).astype(np.int32)
    targets = shift_labels(ids)
    for row in range(rows):
        targets[row, 5 : 5 + 7 * row] = -100
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    weights = random.uniform(0.1, 3.0, ids.shape).astype(np.float32) if "weights" in kind else None
    if kind == "pairs":
        # About the log-probabilities of so many tokens, so that margins are neither tiny nor saturated.
        counted = (targets != -100).sum(1)
        return Batch(ids, targets, positions, reference=-6.0 * counted + random.normal(0.0, 3.0, rows))
    if "zigzag" not in kind and "gather" not in kind:
        return Batch(ids, targets, positions, weights=weights)
    doc_ids = np.zeros_like(ids)
    for row in range(rows):
        # Each row is cut elsewhere; multiples of 16 fit the 2 * 8 chunks of a ring of 8.
        for start in (16 * (1 + row % 3),) if "zigzag" in kind else (11 + row, 40):
            doc_ids[row, start:] += 1
            positions[row, start:] = np.arange(length - start)
    return Batch(ids, targets, positions, doc_ids, weights)


# Goldens under layouts: (name, folder of the model, io, loss, gradients).
GOLDEN = {
    "gqa": ("telechat2_gqa", "telechat2_gqa", "loss_mean", "grads_fp32table"),
    "mha": ("telechat2_mha", "telechat2_mha", "loss_masked", "grads_fp32table_masked_loss"),
    "longer": ("telechat2_ntk", "telechat2_ntk/base_half_training_step2", "loss_mean", None),
}
GOLDEN_LAYOUTS = {2: ("tp2", "ring2", "pp2"), 4: ("tp2.ring2", "ulysses2.pp2"), 8: ("tp2.ring2.pp2", "dp2.tp4")}


@dataclass
class Golden:
    """A released model, opened as the commands open it."""

    name: str
    folder: Path
    source: Any = field(init=False)
    io: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        weights, place, _, _ = GOLDEN[self.name]
        self.folder.mkdir(parents=True)
        self.source = golden_source(f"{weights}/weights.safetensors", f"{place}/config.json", str(self.folder))
        self.io = golden_arrays(f"{place}/io.safetensors")

    def task(self, layout: str, batch: str) -> Task:
        return Task(
            name=f"golden {self.name} {layout}",
            model=self.source.config,
            layout=parse_layout(layout),
            batch=batch,
            weights=str(self.folder),
            logits=True,
        )


class Launches:
    """Everything that was run for this file, each launch and each reference once and when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._launched: dict[tuple[str, int, bool], dict[str, tuple[Task, Outcome]]] = {}
        self._exact: dict[tuple[Any, ...], tuple[Outcome, OptimConfig]] = {}
        self._single: dict[tuple[Any, ...], Outcome] = {}
        self._goldens: dict[str, Golden] = {}
        self._recorded: dict[tuple[Any, ...], Record] = {}

    def record(self, backend: str, world: int, name: str) -> Record:
        """What a task recorded."""
        number = list(self.launched(backend, world, False)).index(name)
        return open_record(step_folder(self.folder / f"{backend}-{world}" / str(number), 1))

    def record_of_one(self, backend: str, case: Case) -> Record:
        """The record of one device, all rows in one micro-batch, nothing computed again."""
        key = backend, case.precision, *case.reference
        if key not in self._recorded:
            task = case.task(self.exact(case)[1], self.batch(case.batch))
            task = replace(task, layout=Layout(), micro_batch=4, recompute="none", steps=1, record=True)
            folder = self.folder / f"{backend}-one-{len(self._recorded)}"
            run_alone(backend, task, folder)
            self._recorded[key] = open_record(step_folder(folder, 1))
        return self._recorded[key]

    def report(self, backend: str, case: Case, launched: dict[str, tuple[Task, Outcome]], name: str) -> LayoutReport:
        assert name in launched, "its launch ended before; see the first failing test"
        task, outcome = launched[name]
        return judge_layout(backend, task, outcome, self.references(backend, case))

    def references(self, backend: str, case: Case) -> References:
        exact, optim = self.exact(case)
        task = case.task(optim, self.batch(case.batch))
        key = (backend, case.precision, task.steps, *case.reference)
        if key not in self._single:
            self._single[key] = one_device(backend, task)
        return References(self._single[key], exact, case.initial)

    def exact(self, case: Case) -> tuple[Outcome, OptimConfig]:
        task = case.task(case.optim, self.batch(case.batch))
        key = (task.steps, *case.reference)
        if key not in self._exact:
            optim = smooth_optim(case.optim, one_device("pt", replace(task, steps=0), "fp64"))
            self._exact[key] = one_device("pt", replace(task, optim=optim), "fp64"), optim
        return self._exact[key]

    def batch(self, kind: str) -> str:
        path = self.folder / f"batch-{kind}.safetensors"
        return str(path) if path.exists() else write_batch(path, make_batch(kind))

    def golden(self, name: str) -> Golden:
        if name not in self._goldens:
            self._goldens[name] = Golden(name, self.folder / f"golden-{name}")
            write_batch(
                self.folder / f"batch-golden-{name}.safetensors", golden_batch(self._goldens[name].io, GOLDEN[name][2])
            )
        return self._goldens[name]

    def launched(self, backend: str, world: int, full: bool) -> dict[str, tuple[Task, Outcome]]:
        """Task and outcome by name of all that this backend does with so many processes.

        A rank that fails ends the launch: the tasks before stand, the others are not there.
        """
        key = backend, world, full
        if key not in self._launched:
            tasks = list(self._tasks(world, full))
            folder = self.folder / f"{backend}-{world}{'-full' if full else ''}"
            code = launch_tasks(backend, tasks, folder, script=SCRIPT, timeout=900, collective_timeout=120)
            done = [len(list((folder / str(i)).glob("rank-*.json"))) == world for i in range(len(tasks))]
            print(f"{backend}, {world} processes: code {code}, {sum(done)} of {len(tasks)} tasks; see {folder}/logs")
            self._launched[key] = {
                task.name: (task, collect(folder / str(i), world)) for i, task in enumerate(tasks) if done[i]
            }
        return self._launched[key]

    def _tasks(self, world: int, full: bool) -> Iterator[Task]:
        texts = (FULL + FULL8) if full else (WORLD2 + WORLD4)
        for case in cases(texts):
            if world_of(case) == world:
                yield case.task(self.exact(case)[1], self.batch(case.batch))
        if full == (world == 8):
            for name in GOLDEN:
                self.golden(name)
                for layout in GOLDEN_LAYOUTS.get(world, ()):
                    batch = str(self.folder / f"batch-golden-{name}.safetensors")
                    yield self.golden(name).task(layout, batch)
        if world == 2 and not full:
            for name, (layout, _, _) in FAULTS.items():
                yield replace(Case(layout).task(self.exact(Case(layout))[1], self.batch("plain")), name=name)


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    pytest.importorskip("mindspore")
    pytest.importorskip("torch")
    return Launches(tmp_path_factory.mktemp("layouts"))


def broken(report: LayoutReport) -> list[str]:
    return [f"{b.what}: {b.value:.2e}, limit {b.limit:.2e} ({b.source})" for b in report.bounds if not b.holds]


@pytest.mark.parametrize("case", cases(WORLD2 + WORLD4), ids=lambda case: case.text)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_equals_one_device(launches: Launches, backend: str, case: Case) -> None:
    check(launches, backend, case, launches.launched(backend, world_of(case), False))


@pytest.mark.parametrize("case", cases(RECORDED), ids=lambda case: case.text)
@pytest.mark.parametrize("backend", BACKENDS)
def test_record_of_a_layout_equals_that_of_one_device(launches: Launches, backend: str, case: Case) -> None:
    """Activations, their gradients, gradients, weights and moments, from which the layout is undone."""
    one, many = launches.record_of_one(backend, case), launches.record(backend, world_of(case), case.text)
    assert one.header.digests == many.header.digests and many.header.layout == case.layout.name
    assert many.quantities.keys() == one.quantities.keys()
    kinds = {key.partition(":")[0] for key in one.quantities}
    assert kinds == set(KINDS)
    worst = max(apart(one, many).items(), key=lambda item: item[1])
    assert worst[1] <= (1e-12 if case.precision == "fp64" else 1e-5), worst


@pytest.mark.parametrize("name", [name for name, (layout, _, _) in FAULTS.items() if layout in RECORDED.split()])
@pytest.mark.parametrize("backend", BACKENDS)
def test_record_of_a_planted_fault_differs(launches: Launches, backend: str, name: str) -> None:
    one = launches.record_of_one(backend, Case(FAULTS[name][0]))
    assert max(apart(one, launches.record(backend, 2, name)).values()) > 1e-3


@pytest.mark.parametrize("case", [c for c in cases(WORLD2 + WORLD4) if "pairs" in c.words], ids=lambda case: case.text)
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probabilities_of_rows(launches: Launches, backend: str, case: Case) -> None:
    """What the reference of preference training is made of: gathered from ranks in the order of the rows."""
    _, outcome = launches.launched(backend, world_of(case), False)[case.text]
    exact = launches.exact(case)[0].log_probs
    assert len(exact) == 4
    np.testing.assert_allclose(outcome.log_probs, exact, rtol=1e-12 if case.precision == "fp64" else 1e-6)


@pytest.mark.full
@pytest.mark.parametrize("case", cases(FULL + FULL8), ids=lambda case: case.text)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_equals_one_device_in_full(launches: Launches, backend: str, case: Case) -> None:
    check(launches, backend, case, launches.launched(backend, world_of(case), True))


def check(launches: Launches, backend: str, case: Case, launched: dict[str, tuple[Task, Outcome]]) -> None:
    report = launches.report(backend, case, launched, case.text)
    assert broken(report) == []
    # The numbers that are promised, and not only those that core.parity.layouts chose to judge.
    outcome, single = launched[case.text][1], launches.references(backend, case).single
    assert sorted(outcome.gradients) == sorted(single.gradients)
    if case.precision == "fp32":
        assert max(report.errors["loss"]) <= 1e-6
        assert max(max(g.apart, g.error) for g in report.gradients) <= 1e-5
    if case.precision == "fp64":
        scalars = [error for both in report.errors.values() for error in both]
        tensors = [max(t.apart, t.error) for t in (*report.gradients, *report.weights)]
        assert max(scalars + tensors) <= 1e-12
    judged = {b.what for b in report.bounds}
    assert "ranks with more or fewer live graphs" in judged
    uncounted = case.words & {"full", "selective", "lora", "frozen"}
    assert ("messages unlike the formula" in judged) is not (uncounted != set())


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_planted_fault_is_caught(launches: Launches, backend: str, name: str) -> None:
    layout, _, bound = FAULTS[name]
    launched = launches.launched(backend, 2, False)
    report = launches.report(backend, Case(layout), launched, name)
    names = [b.what for b in report.bounds if not b.holds]
    assert any(re.match(bound, what) for what in names), names
    # It is the fault: the same layout without it, in the same launch, breaks no bound.
    assert broken(launches.report(backend, Case(layout), launched, layout)) == []


@pytest.mark.parametrize("golden", GOLDEN)
@pytest.mark.parametrize("layout", [*GOLDEN_LAYOUTS[2], *GOLDEN_LAYOUTS[4]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_released_numbers(launches: Launches, backend: str, layout: str, golden: str) -> None:
    check_golden(launches, backend, layout, golden, False)


@pytest.mark.full
@pytest.mark.parametrize("golden", GOLDEN)
@pytest.mark.parametrize("layout", GOLDEN_LAYOUTS[8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_released_numbers_in_full(launches: Launches, backend: str, layout: str, golden: str) -> None:
    check_golden(launches, backend, layout, golden, True)


def check_golden(launches: Launches, backend: str, layout: str, name: str, full: bool) -> None:
    """As tests/parity/test_goldens.py, with its limits."""
    _, outcome = launches.launched(backend, parse_layout(layout).world, full)[f"golden {name} {layout}"]
    golden = launches.golden(name)
    folder, _, loss, file = GOLDEN[name]
    assert outcome.problems == []
    assert outcome.logits is not None
    assert relative_frobenius(outcome.logits, golden.io["fp64.logits"]) <= LOGITS
    truth = float(golden.io[f"fp64.{loss}"])
    assert abs(outcome.losses[0] - truth) <= LOSS * abs(truth)
    if file is not None:
        compared = compare_tensors(
            golden.source.export(outcome.gradients), golden_arrays(f"{folder}/{file}.safetensors")
        )
        assert compared.same_names
        assert compared.worst() <= GRADIENT, compared.rows[0]


def test_everything_promised_is_tried() -> None:
    """Every axis alone and every pair of axes in what `make test` runs, and four triples in the full matrix."""
    axes = ("dp", "tp", "ring", "ulysses", "pp", "vpp")

    def held(text: str) -> list[frozenset[str]]:
        found = []
        for case in cases(text):
            parts = {part.rstrip("0123456789") for part in case.text.partition(":")[0].split(".")}
            found.append(frozenset((parts - {"pp"} if "vpp" in parts else parts) & set(axes)))
        return found

    tried = held(WORLD2 + WORLD4)
    singles = {frozenset({a}) for a in axes}
    pairs = {a | b for a in singles for b in singles if len(a | b) == 2 and a | b != {"pp", "vpp"}}
    assert singles | pairs <= set(tried)
    assert len({t for t in held(FULL8) if len(t) == 3}) >= 4
