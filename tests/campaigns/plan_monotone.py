"""Monotony of the planner: on random machines, models and questions, more bandwidth, memory, speed or devices never
makes the best plan of `tele plan --search` worse, neither for training nor for serving.

`python -m tests.campaigns.plan_monotone --draws 500 --seed 1`: prints every violation with its draw, and exits with 1
if there is one.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.planner.machine import Figure, LinkSpec, Machine, load_machine, machine_names
from telechat_twins.core.planner.search import best, serving
from telechat_twins.core.planner.search.question import Question
from telechat_twins.core.planner.search.serving import Serving

SLACK = 1e-9  # of sums in another order
Change = Callable[[Machine], Machine]


class Violation(NamedTuple):
    """A ``change`` for the better of draw ``number`` that made ``what`` worse: ``before`` and ``after``."""

    number: int
    change: str
    what: str
    before: float
    after: float


def scaled(figure: Figure, factor: float) -> Figure:
    """``figure`` times ``factor``."""
    return dataclasses.replace(figure, value=figure.value * factor)


def faster_link(link: LinkSpec, factor: float) -> LinkSpec:
    """``link`` with ``factor`` times the bandwidth; measured times are divided by it."""
    measured = [
        dataclasses.replace(
            one,
            bandwidth=one.bandwidth * factor,
            latency=one.latency / factor,
            microseconds=[us / factor for us in one.microseconds],
        )
        for one in link.measured
    ]
    return dataclasses.replace(link, bandwidth=scaled(link.bandwidth, factor), measured=measured)


def changes(factor: float) -> dict[str, Change]:
    """Changes for the better, by name."""

    def with_figure(name: str, by: float) -> Change:
        return lambda machine: dataclasses.replace(machine, **{name: scaled(getattr(machine, name), by)})

    def with_link(name: str) -> Change:
        return lambda machine: dataclasses.replace(machine, **{name: faster_link(getattr(machine, name), factor)})

    def lower_latency(machine: Machine) -> Machine:
        link = machine.cluster
        return dataclasses.replace(
            machine, cluster=dataclasses.replace(link, latency=scaled(link.latency, 1.0 / factor))
        )

    return {
        "node bandwidth": with_link("node"),
        "cluster bandwidth": with_link("cluster"),
        "cluster latency": lower_latency,
        "memory bandwidth": with_figure("memory_bandwidth", factor),
        "memory": with_figure("memory", factor),
        "peak": with_figure("peak_bf16", factor),
        "stragglers": with_figure("scaling", 1.0 / factor),
    }


def drawn_machine(dice: random.Random) -> Machine:
    """A bundled machine whose figures are between a tenth and ten times their value."""
    machine = load_machine(dice.choice(machine_names()))

    def near(figure: Figure) -> Figure:
        return scaled(figure, 10 ** dice.uniform(-1.0, 1.0))

    def link(old: LinkSpec) -> LinkSpec:
        return dataclasses.replace(
            faster_link(old, 10 ** dice.uniform(-1.0, 1.0)), latency=near(old.latency), efficiency=old.efficiency
        )

    names = ("peak_bf16", "memory", "memory_bandwidth", "scaling")
    figures = {name: near(getattr(machine, name)) for name in names}
    efficiency = dataclasses.replace(
        machine.efficiency,
        tile=machine.efficiency.tile * 10 ** dice.uniform(-1.0, 0.5),
        overlap=dice.choice((0.0, dice.random(), 1.0)),
    )
    nodes = dice.choice((1, 2, 3, 4, 5, 6, 8, 16))
    return dataclasses.replace(
        machine,
        **figures,
        node=link(machine.node),
        cluster=link(machine.cluster),
        efficiency=efficiency,
        devices_per_node=nodes,
    )


def drawn_model(dice: random.Random) -> ModelConfig:
    """A model of another shape than any that is published."""
    heads = dice.choice((3, 4, 6, 8, 12, 16, 28, 32, 64))
    kv_heads = dice.choice([n for n in range(1, heads + 1) if heads % n == 0])
    hidden = heads * dice.choice((32, 64, 128))
    model = load_model_config("telechat2-7b")
    return dataclasses.replace(
        model,
        num_heads=heads,
        num_kv_heads=kv_heads,
        hidden_size=hidden,
        head_dim=hidden // heads,
        ffn_hidden_size=int(hidden * dice.choice((1.5, 2.75, 4))) // 64 * 64,
        num_layers=dice.randint(1, 40),
        vocab_size=dice.choice((1000, 32000, 131072)),
        tied_embeddings=dice.random() < 0.3,
    )


def drawn(number: int, seed: int) -> tuple[Question, Serving, float]:
    """Draw ``number``: a question of training, one of serving, and the factor of the changes."""
    dice = random.Random(f"{seed} {number}")
    machine, model = drawn_machine(dice), drawn_model(dice)
    devices, seq_len = dice.randint(1, 48), dice.choice((128, 1024, 4096, 32768))
    memory = None if dice.random() < 0.5 else machine.memory.value * dice.uniform(0.2, 1.0)
    question = Question(
        model, machine, devices, seq_len, dice.randint(1, 96), memory_gib=memory, most_samples=dice.randint(1, 8), top=1
    )
    target, quantize = dice.choice(("latency", "throughput")), dice.choice(("none", "int8"))
    answers = dice.choice((1, 100, 2000))
    return (
        question,
        Serving(model, machine, devices, dice.choice((1, 64, 3000)), answers, target, quantize, memory, 1),
        dice.choice((1.001, 1.1, 1.7, 10.0)),
    )


def training_seconds(question: Question) -> float:
    """Of the best plan; infinite if none fits."""
    plans = best.search(question).plans
    return plans[0].time.seconds if plans else float("inf")


def serving_cost(question: Serving) -> float:
    """Seconds of a request or, for the throughput, of a token; infinite if none fits."""
    plans = serving.search(question)
    if not plans:
        return float("inf")
    return plans[0].latency if question.target == "latency" else 1.0 / plans[0].throughput


def violations(number: int, seed: int) -> Iterator[Violation]:
    """Those of one draw."""
    train, serve, factor = drawn(number, seed)
    kinds: list[tuple[str, Question | Serving, Callable[..., float]]] = [
        ("a step", train, training_seconds),
        (f"serving for {serve.target}", serve, serving_cost),
    ]
    for what, question, cost in kinds:
        before = cost(question)
        tried = {
            name: dataclasses.replace(question, machine=change(question.machine))
            for name, change in changes(factor).items()
        }
        if question.memory_gib is not None:
            tried["memory"] = dataclasses.replace(question, memory_gib=question.memory_gib * factor)
        for more in (1, question.devices):
            tried[f"{more} devices more"] = dataclasses.replace(question, devices=question.devices + more)
        for name, better in tried.items():
            after = cost(better)
            if after > before * (1.0 + SLACK):
                yield Violation(number, name, what, before, after)


def main() -> int:
    """Try the draws, and print what is violated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    count = 0
    for number in range(args.first, args.first + args.draws):
        if number % 50 == 0:
            print(f"draw {number}", file=sys.stderr, flush=True)
        try:
            for found in violations(number, args.seed):
                count += 1
                print(
                    f"draw {found.number}: {found.change} makes {found.what} worse: {found.before:.9g} s, then "
                    f"{found.after:.9g} s",
                    flush=True,
                )
        except UserError as error:
            print(f"draw {number}: {error}", flush=True)
            count += 1
    print(f"{args.draws} draws, {count} violations")
    return 1 if count else 0


if __name__ == "__main__":
    raise SystemExit(main())
