"""Worker process of one framework for ``tele bench kernels``: times its implementations of an operator in alternation.

python -m telechat_twins.kernels.bench.process pt '{"precision": "fp32", "compile": false}'
{"operator": "rms_norm", "size": "mini", "calls": 5}
"""

from __future__ import annotations

import json
import sys

from telechat_twins.core.bench.cases import SIZES
from telechat_twins.core.bench.worker import Handle, answer_orders
from telechat_twins.core.types import JsonObject
from telechat_twins.kernels.bench.contestant import Bench, Timer


def handle_orders(bench: Bench) -> Handle:
    """Handler of orders {"operator", "size", "calls"}; answers in the form of core.bench.kernels.summarise."""
    yardsticks = {"copy": bench.copy(), "read": bench.read(), "matmul": bench.matmul()}
    ready: JsonObject = {}

    def handle(order: JsonObject) -> JsonObject:
        case = (order["operator"], order["size"])
        if ready.get("case") != case:
            ready.clear()  # frees the tensors before the next ones are allocated
            contestants = bench.contestants(order["operator"], SIZES[order["size"]])
            calls = {("", what): call for what, (call, _) in yardsticks.items()}
            for name, contestant in contestants.items():
                for what in ("forward", "backward", "both"):
                    if getattr(contestant, what) is not None:
                        calls[name, what] = getattr(contestant, what)
            ready.update(case=case, contestants=contestants, timer=Timer(bench, calls))
        found = ready["timer"].turn(order["calls"])
        answer = {}
        for name, contestant in ready["contestants"].items():
            answer[name] = {"implementation": contestant.implementation, "forward": found[name, "forward"]}
            if contestant.backward is not None:
                pairs = zip(found[name, "forward"], found[name, "backward"], strict=True)
                answer[name] |= {"backward": found[name, "backward"], "both": [a + b for a, b in pairs]}
            if contestant.both is not None:
                answer[name]["both"] = found[name, "both"]
        return {
            **{what: [work / s for s in found["", what]] for what, (_, work) in yardsticks.items()},
            "contestants": answer,
        }

    return handle


def open_bench(name: str, options: JsonObject) -> Bench:
    """The benchmarks of backend ``name``."""
    if name == "pt":
        from telechat_twins.kernels.bench.pytorch import TorchBench

        return TorchBench(options)
    from telechat_twins.kernels.bench.mindspore import MindSporeBench
    from telechat_twins.kernels.mindspore import settings as mindspore_settings  # noqa: F401  (first, as in a run)

    return MindSporeBench(options)


def main(argv: list[str]) -> int:
    def prepare() -> tuple[JsonObject, Handle]:
        bench = open_bench(argv[0], json.loads(argv[1]))
        return bench.about(), handle_orders(bench)

    return answer_orders(prepare)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
