"""tele bench parallel without a clock: turns and records of a rank, the arithmetic on canned records, the tables."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from telechat_twins.core.bench import parallel as bench_parallel
from telechat_twins.core.bench.parallel import (
    LayoutTrial,
    RankRecord,
    differences,
    idle_share,
    on_the_wire,
    stage_seconds,
    states_of,
    summarise,
)
from telechat_twins.core.bench.probes import outside_a_launch
from telechat_twins.core.bench.worker import bench_config
from telechat_twins.core.cli import main
from telechat_twins.core.commands import bench
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.params import count_parameters
from telechat_twins.core.parallel.schedule import bubble, simulate

OPTIONS = {"model": "telechat2-tiny", "seq_len": 32, "micro_batch": 1, "micro_batches": 4, "precision": "fp32"}
SINGLE = {"seconds": [[0.1, 0.1], [0.2, 0.2]], "loss": 7.5}


def config_of(text, **options):
    return bench_config({**OPTIONS, **options, "layout": text})


def timeline(text, forward, backward, start=100.0):
    """What pipeline ranks would record if actions took exactly these times: (start, end, waited inside) by rank."""
    layout = config_of(text).parallel
    spans = []
    for actions in simulate(layout.schedule, layout.pp, layout.virtual, OPTIONS["micro_batches"], forward, backward):
        busy = sum(span.end - span.start for span in actions)
        spans.append((start, start + actions[-1].end, actions[-1].end - busy))
    return spans


def canned(text, **changes):
    """Records of all ranks of a layout on which everything is as it should be."""
    config = config_of(text)
    layout, micro_batches = config.parallel, OPTIONS["micro_batches"] // config.parallel.dp
    shape = (layout.schedule, layout.pp, layout.virtual, micro_batches)
    whole = simulate(*shape, 0.001, 0.002)
    records = []
    for rank in range(layout.world):
        actions = whole[layout.coord(rank).pp]
        busy = sum(span.end - span.start for span in actions)
        end = actions[-1].end
        record = RankRecord(
            seconds=[[0.2, 0.2 + rank], [0.4, 0.4]],
            spans=[(5.0, 5.0 + end, end - busy)] * 4,
            forwards=[(9.0, 9.0 + 0.001 * layout.virtual * micro_batches + 0.5, 0.5)] * 2,
            sent=[(*key, *row) for key, row in bench_parallel.traffic_of(config, rank).items()],
            states=states_of(config, rank),
            peak=2,
            loss=7.5,
        )
        records.append(RankRecord(**{**asdict(record), **changes}))
    return records


@pytest.mark.parametrize("text", ["pp2", "pp2.gpipe", "pp4", "pp2.vpp2"])
def test_bubble_of_an_ideal_pipeline_is_the_simulated_one(text):
    layout = config_of(text).parallel
    forward = [1.0 + 0.25 * stage for stage in range(layout.stages)]
    backward = [2.5 - 0.25 * stage for stage in range(layout.stages)]
    exact = bubble(layout.schedule, layout.pp, layout.virtual, OPTIONS["micro_batches"], forward, backward)
    assert idle_share(layout, timeline(text, forward, backward)) == pytest.approx(exact, rel=1e-12)
    # What a rank waits for after its own last action counts: without it, the waiting inside is less.
    inside = [(start, end, waited) for start, end, waited in timeline(text, forward, backward)]
    assert sum(w for *_, w in inside) / sum(end - start for start, end, _ in inside) < exact - 0.01


def test_every_pipeline_ends_with_its_own_ranks():
    layout = config_of("dp2.pp2").parallel  # pipelines: ranks 0 and 2, ranks 1 and 3
    spans = [(0.0, 8.0, 1.0), (0.0, 100.0, 0.0), (0.0, 6.0, 1.0), (0.0, 100.0, 0.0)]
    assert idle_share(layout, spans) == pytest.approx((1 + 1 + 2) / (8 + 8 + 100 + 100))


def test_stage_seconds_are_those_of_the_stages():
    config = config_of("pp2")
    spans = timeline("pp2", [1.0, 3.0], [2.0, 5.0])
    records = [
        RankRecord(spans=[spans[0]] * 3, forwards=[(0.0, 4 * 1.0 + 0.7, 0.7)]),
        RankRecord(spans=[spans[1]] * 3, forwards=[(0.0, 4 * 3.0 + 2.0, 2.0)]),
    ]
    forward, backward = stage_seconds(config, records)
    assert forward == pytest.approx([1.0, 3.0]) and backward == pytest.approx([2.0, 5.0])


def test_chunks_of_a_rank_share_its_time_by_their_weights():
    config = config_of("pp2.vpp2")  # one block a stage, the last with the head: 2048 x 128
    records = [RankRecord(spans=[(0.0, 8.0, 0.0)], forwards=[(0.0, 4.0, 0.0)])] * 2
    forward, backward = stage_seconds(config, records)
    assert forward[0] == forward[2] == 0.5 and forward[3] > 2 * forward[1]
    assert forward[1] + forward[3] == pytest.approx(1.0) and backward == pytest.approx(forward)


@pytest.mark.parametrize("text", ["tp2", "pp2", "ring2", "ulysses2", "dp2", "dp2.nozero", "dp2.tp2", "pp2.vpp2", "tp4"])
def test_what_was_counted_is_the_formula(text):
    row = summarise(OPTIONS, text, canned(text), SINGLE)
    assert row["traffic"]["differs"] == [] and row["traffic"]["counted"] == row["traffic"]["formula"]
    assert min(row["traffic"]["counted"]) > 0 and row["states"]["held"] == row["states"]["formula"]


def test_one_message_too_many_is_seen():
    records = canned("tp2")
    op, group, calls, size = records[1].sent[0]
    records[1].sent[0] = (op, group, calls + 1, size + 4)
    records[0].sent.append(("broadcast", "tp", 1, 8))
    found = summarise(OPTIONS, "tp2", records, SINGLE)["traffic"]["differs"]
    assert len(found) == 2 and found[0].startswith("rank 0, broadcast over tp: counted 1 calls, 8 bytes; formula 0")
    assert found[1].startswith(f"rank 1, {op} over {group}: counted {calls + 1:g} calls, {size + 4:,} bytes; formula")


def test_a_message_that_was_not_sent_is_seen():
    assert differences([{}], [{("send", "forward_out"): [2, 64]}]) == [
        "rank 0, send over forward_out: counted 0 calls, 0 bytes; formula 2 calls, 64 bytes"
    ]


def test_on_the_wire():
    config = config_of("dp2.tp4")
    traffic = {("all_reduce", "replicas"): [1, 100], ("all_gather", "tp"): [3, 10], ("all_reduce", "kv"): [1, 50]}
    # All-reduce over 2: 2 * 1/2 of what was given; all-gather over 4: given on three times; kv heads over 4/2 ranks.
    assert on_the_wire(config.model, config.parallel, traffic) == 100 + 30 + 50


def test_optimizer_states():
    whole = 12 * count_parameters(config_of("single").model)
    assert states_of(config_of("single"), 0) == whole
    assert states_of(config_of("dp2.nozero"), 1) == whole
    halves = [states_of(config_of("dp2"), rank) for rank in range(2)]
    assert halves[0] == halves[1] and whole / 2 <= halves[0] <= whole / 2 + 12 * 4  # padding: one element a bucket
    assert states_of(config_of("dp2", precision="fp64"), 0) == 2 * halves[0]
    assert sum(states_of(config_of("pp2"), rank) for rank in range(2)) == whole


def test_a_ring_is_balanced_and_one_in_order_is_not():
    row = summarise(OPTIONS, "ring4", canned("ring4"), SINGLE)["ring"]
    assert sum(row["pairs"]) == 32 * 33 / 2 and row["heaviest"] == pytest.approx(1.0)
    assert row["heaviest_in_order"] == pytest.approx((8 * 9 / 2 + 3 * 64) / (32 * 33 / 8))
    assert summarise(OPTIONS, "ulysses2", canned("ulysses2"), SINGLE)["ring"] is None


def test_a_step_ends_when_it_has_on_every_rank():
    row = summarise(OPTIONS, "tp2", canned("tp2"), SINGLE)
    assert row["seconds"] == [[0.2, 1.2], [0.4, 0.4]]
    assert row["ratios"] == pytest.approx([7.0, 2.0])  # medians 0.7 over 0.1 and 0.4 over 0.2


class FakeTrainer:
    """A stepper on one process that sends three messages a step and waits a quarter of each pipeline run."""

    rank, world = 0, 1

    def __init__(self, config, traffic=None):
        self.config, self.traffic, self.calls = config, traffic if traffic is not None else {}, []
        self.pipeline = SimpleNamespace(run=self._run, waited=0.0, peak=0)
        self.optimizer = SimpleNamespace(masters=[SimpleNamespace(nbytes=40), SimpleNamespace(nbytes=2)])

    def _run(self, pieces, backward=True):
        self.pipeline.waited, self.pipeline.peak = 0.25, 3
        return 7.5

    def share(self, global_batch):
        return 0, global_batch

    def gradients(self, batch, num_targets, loss_scale, **options):
        self.calls.append((len(batch.input_ids), num_targets, options))
        if len(self.calls) == 1:
            self.traffic["all_gather", "replicas"] = [1, 64]  # of the new weights, once
        for key in (("all_reduce", "tp"), ("all_reduce", "tp"), ("send", "forward_out"), ("agree", "world")):
            row = self.traffic.setdefault(key, [0, 0])
            row[0] += 1
            row[1] += 8
        return self.pipeline.run(batch, **options)

    def grad_norm(self, loss_scale):
        return 1.0

    def update(self, lr, grad_scale):
        pass

    def agree(self, values, op):
        self.calls.append("agree")
        return values

    def implementation(self):
        return {"backend": "Fake 1.0", "device": "cpu"}


class Traffic(dict):
    def reset(self):
        self.clear()


def test_a_trial_counts_one_step_and_keeps_spans():
    config, traffic = config_of("pp2"), Traffic({("left", "over"): [1, 1]})
    trial = LayoutTrial(FakeTrainer(config, traffic), config, traffic)
    trial.warm_up(2)
    record = trial.record
    assert record.sent == [("all_reduce", "tp", 2.0, 16.0), ("send", "forward_out", 1.0, 8.0)]
    assert (record.loss, record.seconds, record.spans, record.states) == (7.5, [], [], 3 * 42)
    trial.turn(3)
    assert [len(turn) for turn in record.seconds] == [3] and len(record.spans) == 3 and record.peak == 3
    assert all(end >= start and waited == 0.25 for start, end, waited in record.spans)
    # One forward alone, on the rows of this rank; what it sends is not in the count.
    assert len(record.forwards) == 1 and trial.trainer.calls[-1] == (4, 128, {"backward": False})
    assert len(record.sent) == 2


def test_no_forward_alone_without_a_pipeline():
    config = config_of("tp2")
    trial = LayoutTrial(FakeTrainer(config), config, Traffic())
    trial.turn(2)
    assert trial.record.forwards == [] and len(trial.record.spans) == 2


def test_turns_change_their_order_and_all_meet_after_each(capsys):
    log = []

    class Noted:
        def __init__(self, name):
            self.name, self.record = name, RankRecord()

        def warm_up(self, count):
            log.append((self.name, "warm", count))

        def turn(self, count):
            log.append((self.name, count))
            self.record.seconds.append([0.25] * count)

    class Single:
        def steps(self, count):
            log.append(("single", count))
            return {"seconds": [0.5] * count, "loss": 7.0}

    def meet():
        log.append("barrier")

    trials = {name: Noted(name) for name in ("tp2", "pp2")}
    found = bench_parallel.take_turns(trials, Single(), meet, 5, 2)
    turns = [entry for entry in log if entry != "barrier"]
    warm = [("single", 3), ("tp2", "warm", 2), ("pp2", "warm", 2)]
    assert turns == warm + [
        *(("single", 2), ("tp2", 2), ("pp2", 2)),
        *(("pp2", 2), ("tp2", 2), ("single", 2)),
        *(("single", 1), ("tp2", 1), ("pp2", 1)),
    ]
    assert log[1::2] == ["barrier"] * 12
    assert found["single"] == {"seconds": [[0.5, 0.5], [0.5, 0.5], [0.5]], "loss": 7.0}
    assert found["layouts"]["pp2"]["seconds"] == [[0.25, 0.25], [0.25, 0.25], [0.25]]
    assert "round 2 of 3, ms a step: tp2 250, pp2 250; one process alone 500" in capsys.readouterr().out
    # Another rank: nobody beside it, nothing said, but the same meetings. Probes of a calibration come in every round.
    log.clear()
    probes = SimpleNamespace(turn=lambda: log.append("probes"))
    assert bench_parallel.take_turns({"tp2": Noted("tp2")}, None, meet, 1, 1, probes)["single"]["seconds"] == []
    assert log.count("probes") == 1
    assert log.count("barrier") == 4 and capsys.readouterr().out == ""


def test_a_rank_from_plan_to_record(tmp_path, monkeypatch):
    """The worker on one process: its record, read back, makes a row whose messages are not the formula's."""
    traffic, started = Traffic(), []

    class Beside:
        def __init__(self, name, options, env):
            started.append((name, options, env))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            started.append("ended")

        def steps(self, count):
            return {"seconds": [0.1] * count, "loss": 7.5}

    modules = {
        "train": SimpleNamespace(Trainer=lambda config: FakeTrainer(config, traffic)),
        "collectives": SimpleNamespace(TRAFFIC=traffic),
    }
    monkeypatch.setattr(bench_parallel.backends, "load", lambda backend, module: modules[module])
    monkeypatch.setattr(bench_parallel, "Worker", Beside)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr("sys.argv", ["bench_parallel.py", "pt", str(tmp_path)])
    plan = {"options": OPTIONS, "layouts": ["single"], "steps": 3, "block": 2, "threads": None}
    bench_parallel.plan_path(tmp_path).write_text(json.dumps(plan))
    assert bench_parallel.main() == 0
    found = json.loads(bench_parallel.rank_path(tmp_path, 0).read_text())
    assert found["implementation"] == {"backend": "Fake 1.0", "device": "cpu"}
    assert started[0][:2] == ("pt", OPTIONS) and started[1] == "ended"
    row = summarise(OPTIONS, "single", [RankRecord(**found["layouts"]["single"])], found["single"])
    assert [len(turn) for turn in row["seconds"]] == [2, 1] and row["loss_difference"] == 0.0
    assert row["states"] == {"held": [126], "formula": [12 * count_parameters(config_of("single").model)]}
    assert [line.partition(":")[0] for line in row["traffic"]["differs"]] == [
        "rank 0, all_reduce over tp",
        "rank 0, send over forward_out",
    ]


def test_the_single_process_does_not_think_it_is_a_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MS_ROLE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    env = outside_a_launch(None)
    assert not {"RANK", "WORLD_SIZE", "MS_ROLE", "OMP_NUM_THREADS"} & env.keys() and "PATH" in env
    assert outside_a_launch("3")["OMP_NUM_THREADS"] == "3"


def arguments(*argv):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(["parallel", "--seq-len", "32", "--micro-batch", "1", *argv])


@pytest.fixture
def launched(monkeypatch):
    """Launches answered with canned records; the launches asked for."""
    asked = []

    def answer(name, world, options, layouts, steps, block, calibrate):
        asked.append((name, world, tuple(layouts), steps, block))
        by_rank = {text: canned(text) for text in layouts}
        return [
            {
                "single": SINGLE if rank == 0 else {"seconds": [], "loss": 0.0},
                "layouts": {text: asdict(records[rank]) for text, records in by_rank.items()},
                "implementation": {"backend": name, "device": "cpu"},
            }
            for rank in range(world)
        ]

    monkeypatch.setattr(bench, "_launched", answer)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return asked


def test_launches_and_tables(launched, capsys, tmp_path):
    out = tmp_path / "bench.json"
    words = ("--layouts", "ring2,dp2.tp2", "pp2", "cp2", "--backends", "pt", "ms", "--steps", "4", "--out", str(out))
    assert bench.run(arguments(*words)) == 0
    # A launch a backend and number of processes; cp2 is ring2 again.
    expected = [(2, ("ring2", "pp2"), 4, 2), (4, ("dp2.tp2",), 4, 2)]
    assert launched == [(name, *launch) for name in ("pt", "ms") for launch in expected]
    shown = capsys.readouterr().out
    head, _, rest = shown.partition("\n\n")
    assert "4 x 1 x 32 tokens a step" in head and "2 cores of" in head and "up to 4 processes" in head
    assert "not of a cluster" in rest and "4 processes have to take turns on 2 cores" in rest
    assert "Threads: all cores for the single process" in rest
    lines = [line for line in rest.splitlines() if line.startswith(("| PyTorch", "| MindSpore", "| ring2"))]
    assert [line.split(" | ")[:2] for line in lines[:6]] == [
        [f"| {title}", text] for title in ("PyTorch", "MindSpore") for text in ("ring2", "dp2.tp2", "pp2")
    ]
    assert "| 2 | 400.0 ms | 200.0 to 1200.0 | 4.50 (2.00 to 7.00) |" in lines[0] and "| yes |" in lines[0]
    assert "0.200 | 0.200 | 1.0 + 2.0, 1.0 + 2.0 | 2 2 |" in lines[6]
    assert lines[8] == "| ring2 | 264 264 | 1.000 | 1.485 |"
    assert "disagree" not in shown
    result = json.loads(out.read_text())
    assert [row["layout"] for row in result["rows"][:3]] == ["ring2", "dp2.tp2", "pp2"]
    assert result["rows"][0]["traffic"]["detail"][0]["shift ring"][0] == 4 * 4 * 4  # 3R - 2 a layer and micro-batch


def test_messages_unlike_the_formula_are_told_and_end_with_1(launched, capsys, monkeypatch):
    real = bench._launched

    def lossy(*arguments):
        found = real(*arguments)
        found[1]["layouts"]["tp2"]["sent"].pop()
        return found

    monkeypatch.setattr(bench, "_launched", lossy)
    assert bench.run(arguments("--layouts", "tp2", "--backends", "pt")) == 1
    shown = capsys.readouterr().out
    assert "| NO |" in shown and "- PyTorch tp2: rank 1, " in shown and "counted 0 calls" in shown


def test_no_bubble_is_claimed_where_the_host_does_not_see_it(launched, capsys, monkeypatch):
    real = bench._launched

    def on_device(*arguments):
        found = real(*arguments)
        found[0]["implementation"]["device"] = "Ascend"
        return found

    monkeypatch.setattr(bench, "_launched", on_device)
    assert bench.run(arguments("--layouts", "pp2", "--backends", "ms")) == 0
    assert "| MindSpore | pp2 | only on CPUs | 0.200 | - | - | 2 2 |" in capsys.readouterr().out


def test_enough_cores_and_given_threads_are_said_too(launched, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert bench.run(arguments("--layouts", "single", "--backends", "pt")) == 0
    shown = capsys.readouterr().out
    assert "take turns" not in shown.partition("| backend")[0] and "Threads: 1 a process (OMP_NUM_THREADS)" in shown
    assert "| PyTorch | single | 1 |" in shown and "bubble" not in shown and "| ring |" not in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layouts", "tpp2"], "layout 'tpp2': unknown part 'tpp2'; did you mean 'tp2'"),
        (["--layouts", "tp2,pp2", "tp3"], "--layouts tp3: parallel.tp: 3 does not divide model.num_heads 4"),
        (["--layouts", "pp8"], "--layouts pp8: parallel.pp: 8 stages are more than model.num_layers 4"),
        (["--layouts", "dp3"], "--layouts dp3: --micro-batches must be a multiple of dp 3, found 4; give 6"),
        (["--layouts", "pp2.vpp2", "--micro-batches", "3"], "--layouts pp2.vpp2: .* multiple of pp 2"),
        (["--layouts", ","], "--layouts: must name at least one layout"),
        (["--micro-batches", "0"], "--micro-batches: must be at least 1"),
    ],
)
def test_mistakes_are_told_before_anything_is_launched(launched, argv, message):
    with pytest.raises(UserError, match=message):
        bench.run(arguments(*argv))
    assert launched == []


def test_a_mistake_is_one_line_and_code_2(capsys):
    assert main(["bench", "parallel", "--layouts", "tp3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tele: --layouts tp3: parallel.tp: 3") and error.count("\n") == 1


@pytest.mark.parametrize("code", [0, 130])
def test_a_launch_reads_what_ranks_wrote_or_passes_its_code_on(monkeypatch, tmp_path, code):
    folder = tmp_path / "work"
    folder.mkdir()

    def launch(name, words, nproc, log_dir, script):
        plan = json.loads(bench_parallel.plan_path(folder).read_text())
        assert (name, words, nproc) == ("pt", ["pt", str(folder)], 2) and script.endswith("core/bench/parallel.py")
        assert plan["layouts"] == ["tp2", "pp2"] and (plan["steps"], plan["block"]) == (3, 1)
        for rank in range(2):
            bench_parallel.rank_path(folder, rank).write_text(json.dumps({"rank": rank}))
        return code

    monkeypatch.setattr("telechat_twins.core.launch.launcher.launch", launch)
    monkeypatch.setattr(bench.tempfile, "mkdtemp", lambda prefix: str(folder))
    if code:
        with pytest.raises(SystemExit) as stop:
            bench._launched("pt", 2, OPTIONS, ["tp2", "pp2"], 3, 1)
        assert stop.value.code == code and folder.exists()  # its logs say why
    else:
        assert bench._launched("pt", 2, OPTIONS, ["tp2", "pp2"], 3, 1) == [{"rank": 0}, {"rank": 1}]
        assert not folder.exists()
