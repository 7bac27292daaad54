"""The catalogue of planted faults, by name. Importing this enters all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from tests.mutation import loss_faults, model_faults, rank_faults, run_faults
from tests.mutation.fault import CATALOGUE, KINDS, Fault

__all__ = ["FAULTS", "KINDS", "in_layout", "named"]

MODULES = (loss_faults, model_faults, rank_faults, run_faults)  # importing them enters their faults
FAULTS = CATALOGUE
# Layouts of two processes in which every operator of the model is the same as in one.
LAYOUTS = ("dp2", "pp2")
_AT = " @ "


def in_layout(faults: Iterable[Fault], layout: str) -> Iterator[Fault]:
    """Those of ``faults`` that are in the model's arithmetic in one process, once more in a layout of LAYOUTS."""
    for fault in faults:
        if fault.plant.__module__ == model_faults.__name__ and fault.check.startswith("layout single"):
            check = fault.check.replace("single", layout, 1)
            yield replace(fault, name=f"{fault.name}{_AT}{layout}", check=check)


def named(name: str) -> Fault | None:
    """The fault of that name, which may be one of ``in_layout``."""
    base, _, layout = name.partition(_AT)
    fault = FAULTS.get(base)
    return fault if fault is None or not layout else next(in_layout([fault], layout), None)
