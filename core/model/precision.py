"""Dtypes of each ``precision`` mode by role, as names that both frameworks accept.

Norm statistics, softmax, loss and rotary tables are in ``stat`` in every mode; masters and optimizer state are float32,
in fp64 float64.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """``weight``: dtype of the weights the model holds; ``compute``: operands of matrix products;
    ``residual``: the stream between blocks; ``stat``: statistics, softmax and loss; ``master``: what AdamW updates."""

    weight: str
    compute: str
    residual: str
    stat: str = "float32"
    master: str = "float32"


PRECISION = {
    "fp32": Precision("float32", "float32", "float32"),
    "bf16": Precision("bfloat16", "bfloat16", "bfloat16"),  # O2
    "amp": Precision("float32", "bfloat16", "float32"),  # O1
    "fp16": Precision("float16", "float16", "float16"),
    "fp64": Precision("float64", "float64", "float64", "float64", "float64"),  # the judge of the others
}
