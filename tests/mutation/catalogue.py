"""The catalogue of planted faults, by name. Importing this enters all of them."""

from __future__ import annotations

from tests.mutation import loss_faults, model_faults, rank_faults, run_faults
from tests.mutation.fault import CATALOGUE, KINDS

__all__ = ["FAULTS", "KINDS"]

MODULES = (loss_faults, model_faults, rank_faults, run_faults)  # importing them enters their faults
FAULTS = CATALOGUE
