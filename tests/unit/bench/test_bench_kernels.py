"""tele bench kernels: the work that is counted, shares of the limit, the table, and turns with a stand-in framework."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from telechat_twins.core.bench import kernels as bench_kernels
from telechat_twins.core.bench.cases import OPERATORS, SIZES, OperatorCost, Size, work
from telechat_twins.core.bench.kernels import kernels_to_markdown, summarise
from telechat_twins.core.commands import bench
from telechat_twins.core.config import KERNEL_OPERATORS
from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject
from telechat_twins.kernels.bench.contestant import Contestant, Timer
from telechat_twins.kernels.bench.process import handle_orders

SMALL = Size(tokens=4, hidden=8, ffn=16, vocab=32, heads=2, kv_heads=1, head_dim=4, parameters=100)


def test_bytes_and_products_counted_by_hand() -> None:
    assert work("rms_norm", SMALL, 2) == {
        "forward": OperatorCost(4 * 8 * 2, 4 * 8 * 2),  # x in, out
        "backward": OperatorCost(2 * 4 * 8 * 2, 4 * 8 * 2),  # x and grad in, dx out
        "both": OperatorCost(3 * 4 * 8 * 2, 2 * 4 * 8 * 2),
    }
    assert work("swiglu", SMALL, 4)["backward"] == OperatorCost(3 * 4 * 16 * 4, 2 * 4 * 16 * 4)
    assert work("cross_entropy", SMALL, 4)["backward"].bytes == 2 * 4 * 32 * 4
    assert work("adamw", SMALL, 2)["forward"].bytes == 7 * 4 * 100  # master, m, v in and out, the gradient in
    assert work("linear", SMALL, 4)["forward"] == OperatorCost(4 * (4 * 8 + 8 * 16), 4 * 4 * 16, 2 * 4 * 8 * 16)
    # Two products over half of a square of 4 positions, 2 heads of 4; half of that again for the five of the backward.
    assert work("attention", SMALL, 4)["forward"].flops == 2 * 2 * 4 * 4 / 2 * 2 * 4
    assert work("attention", SMALL, 4)["both"].flops == 3.5 * work("attention", SMALL, 4)["forward"].flops


def test_every_operator_that_can_be_chosen_is_measured() -> None:
    assert set(KERNEL_OPERATORS) <= set(OPERATORS)
    assert all(work(operator, size, 4) for operator in OPERATORS for size in SIZES.values())


def turn(fused: float, composite: float, slower: float = 1.0) -> JsonObject:
    return {
        "copy": [1e9 / slower],
        "read": [0.5e9 / slower],
        "matmul": [1e12],
        "contestants": {
            "run": {"implementation": "torch", "forward": [fused], "backward": [2 * fused], "both": [3 * fused]},
            "composite": {"implementation": "composite", "forward": [composite], "both": [4 * composite]},
        },
    }


def test_shares_and_paired_ratios() -> None:
    limits = {
        "forward": OperatorCost(0.5e6, 0.5e6, 1e6),
        "backward": OperatorCost(1.5e6, 0.5e6),
        "both": OperatorCost(2e6, 1e6, 1e6),
    }
    # The machine slows down from turn to turn; the ratios do not, nor do the shares.
    rows = summarise("pt", "rms_norm", "mini", limits, [turn(2e-3, 4e-3), turn(4e-3, 8e-3, slower=2)])
    found = {(row["direction"], row["contestant"]): row for row in rows}
    assert found["forward", "run"]["times_composite"]["median"] == 0.5
    assert found["forward", "run"]["share"] == pytest.approx(1e-3 / 2e-3)
    assert found["forward", "run"]["bound"] == "copy"
    assert found["backward", "run"]["bound"] == "read" and found["backward", "run"]["share"] == pytest.approx(3 / 4)
    assert found["both", "run"]["times_composite"]["median"] == pytest.approx(0.375)
    assert ("backward", "composite") not in found and "times_composite" not in found["backward", "run"]
    (row,) = summarise("pt", "x", "mini", {"forward": OperatorCost(1e3, 0, 1e9)}, [turn(2e-3, 1e-3)])[:1]
    assert row["bound"] == "matmul" and row["share"] == pytest.approx(0.5)


class Orders:
    """Stands for a worker process."""

    seen: list[tuple[str, str, str, int]] = []

    def __init__(self, name: str, options: JsonObject, module: str) -> None:
        assert module == "telechat_twins.kernels.bench.process" and options == {"precision": "bf16", "compile": False}
        self.name, self.implementation = name, {"version": f"{name} 1", "device": "CPU", "threads": 1}

    def __enter__(self) -> Orders:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, order: JsonObject) -> JsonObject:
        Orders.seen.append((self.name, order["operator"], order["size"], order["calls"]))
        return turn(1e-3, 2e-3)


def test_frameworks_take_turns_operator_by_operator(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_kernels, "Worker", Orders)
    Orders.seen = []
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    out = tmp_path / "kernels.json"
    words = ["kernels", "--operators", "rope", "--sizes", "mini", "--steps", "3", "--block", "2", "--precision", "bf16"]
    assert bench.run(parser.parse_args([*words, "--out", str(out)])) == 0
    assert [(name, calls) for name, _, _, calls in Orders.seen] == [("ms", 2), ("pt", 2), ("pt", 1), ("ms", 1)]
    result = json.loads(out.read_text())
    assert {row["backend"] for row in result["rows"]} == {"ms", "pt"}
    shown = capsys.readouterr().out
    assert shown.strip() == kernels_to_markdown(result)
    assert "| rope | forward | PyTorch | torch | 1.000 ms | copy 1.0 GB/s | 262 % | 0.50 |" in shown
    with pytest.raises(UserError, match="--backends eager: is available for `tele bench step` only"):
        bench.run(parser.parse_args([*words, "--backends", "eager"]))


class FakeBench:
    """Time that passes by itself: a call takes as long as it says."""

    def __init__(self) -> None:
        self.clock, self.order = 0.0, []

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.clock += seconds
            self.order.append(name)

        return run

    def about(self) -> JsonObject:
        return {}

    def copy(self) -> tuple[Callable[[], None], float]:
        return self.call("copy", 0.5), 1e9

    def read(self) -> tuple[Callable[[], None], float]:
        return self.call("read", 0.25), 1e9

    def matmul(self) -> tuple[Callable[[], None], float]:
        return self.call("matmul", 0.25), 1e9

    def seconds(self, call: Callable[[], None], count: int) -> float:
        started = self.clock
        for _ in range(count):
            call()
        return self.clock - started

    def contestants(self, operator: str, size: Size) -> dict[str, Contestant]:
        run = Contestant("fast", self.call("forward", 0.1), self.call("backward", 0.2))
        return {"run": run, "composite": Contestant("slow", self.call("plain", 0.3), both=self.call("whole", 0.9))}


def test_one_process_times_its_implementations_in_turns() -> None:
    side = FakeBench()
    handle = handle_orders(side)
    order = {"operator": "rope", "size": "tiny", "calls": 2}
    handle(order)
    side.order.clear()
    answer = handle(order)  # warm by now
    assert side.order == ["copy", "read", "matmul", "forward", "backward", "plain", "whole"] * 2
    assert answer["copy"] == pytest.approx([2e9] * 2) and answer["matmul"] == pytest.approx([4e9] * 2)
    assert answer["contestants"]["run"]["both"] == pytest.approx([0.3] * 2)
    assert answer["contestants"]["composite"]["both"] == pytest.approx([0.9] * 2)
    assert "backward" not in answer["contestants"]["composite"]


def test_short_calls_are_timed_several_at_a_time() -> None:
    side = FakeBench()
    timer = Timer(side, {("a", "forward"): side.call("a", 1e-4), ("b", "forward"): side.call("b", 1.0)})
    assert timer.counts == {("a", "forward"): 100, ("b", "forward"): 1}
    side.order.clear()
    assert timer.turn(1)["a", "forward"] == pytest.approx([1e-4])
    assert side.order == ["a"] * 200 + ["b"]  # the short one as often before, to warm up


def test_without_a_device_the_gpu_check_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    from telechat_twins.kernels.bench import gpu_check, shape_3b

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", "unused.json"]) == 2
    assert "nothing was run on device" in capsys.readouterr().err
    config = shape_3b.step_config(18, 8192, "none")
    whole = shape_3b.quick_weights("layers.0.attn.q.weight", config.model, 1)
    part = shape_3b.quick_weights("layers.0.attn.q.weight", config.model, 1, (slice(0, 2), slice(3, 9)))
    assert whole.shape == (3072, 3072) and part.shape == (2, 6)
    assert abs(float(whole.std()) / config.model.init_std - 1) < 0.01


@pytest.mark.parametrize("backend", ["ms", "pt"])
def test_the_steps_of_a_device_check_run_after_one_another(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    from telechat_twins.core.bench.worker import bench_config
    from telechat_twins.kernels.bench import shape_3b

    options = {"model": "telechat2-tiny", "seq_len": 16, "micro_batch": 1, "micro_batches": 1, "precision": "bf16"}
    drawn: list[str] = []
    quick = shape_3b.quick_weights

    def noted(name: str, *rest: Any, **more: Any) -> Any:
        drawn.append(name)
        return quick(name, *rest, **more)

    monkeypatch.setattr(shape_3b, "quick_weights", noted)
    rows = shape_3b.measure_beside(bench_config(options), 2, backend)
    assert drawn.count("embed.weight") == 2  # of the twin, and as the base of the adapters
    assert [row["name"] for row in rows] == ["all weights", "adapters (LoRA)", "transformers"][: len(rows)]
    assert len(rows) == {"ms": 2, "pt": 3}[backend]
    assert all(len(row["seconds"]) == 2 and row["loss"] > 0 for row in rows if "missing" not in row)
    table = shape_3b.peers_to_markdown(rows)
    assert table.count(" ms | ") == sum("missing" not in row for row in rows) >= 2
    assert ("not measured: the transformers library is not installed" in table) == ("missing" in rows[-1])


def test_without_a_device_every_line_of_the_npu_check_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from telechat_twins.kernels.bench import npu_check

    monkeypatch.setattr(npu_check, "ascends", lambda: 0)
    assert npu_check.main(["--out", str(tmp_path / "unused.json")]) == 2
    said = capsys.readouterr()
    assert [line.split(" | ")[1] for line in said.out.splitlines()[2:]] == ["not run on device |"] * len(
        npu_check.names()
    )
    assert "no Ascend found" in said.err and not list(tmp_path.iterdir())
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    for arguments in npu_check.tables("telechat2-tiny", 16, 2).values():
        assert parser.parse_args(arguments).backends == ["ms", "pt"]
