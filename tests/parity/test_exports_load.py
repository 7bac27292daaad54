"""Exported folders loaded with weights by an installed transformers: nothing missing, nothing left over, its logits.

TeleChat3 goes as it is; TeleChat2, Tele-FLM and TeleChat-52B as the Llama that computes the same (``--llama``). The
judge is the golden, float64; transformers computes in float32. ``make matrix`` runs this where transformers is.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from telechat_twins.convert.copy import to_hf
from telechat_twins.convert.llama import LlamaSource
from telechat_twins.convert.source import PlainSource, open_model
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.batch import Batch, shift_labels
from telechat_twins.core.parity.bounds import relative_frobenius
from tests.parity.test_goldens import LOGITS
from tests.support.frameworks import BACKENDS, GOLDENS, golden_source

CASES = {"telechat3": False, "teleflm": True, "telechat2_gqa": True, "telechat2_mha": True, "telechat52b_like": True}
needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")


def exported(case: str, folder: Path) -> np.ndarray:
    """The golden as a folder of transformers' Llama; returns the golden's ids."""
    source = golden_source(f"{case}/weights.safetensors", f"{case}/config.json")
    source.record, source.assets = None, ()  # as if trained here
    to_hf(LlamaSource(PlainSource(source)) if CASES[case] else source, folder)
    return load_file(GOLDENS / case / "io.safetensors")["input_ids"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_llama_computes_what_the_model_does(backend: str, case: str, tmp_path: Path) -> None:
    """By this project's own reader, without transformers."""
    from telechat_twins.core.backends import load

    ids = exported(case, tmp_path / "x").astype(np.int32)
    source = open_model(tmp_path / "x")
    places = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    found = load(backend, "forward").run(source.config, source.tensor, Batch(ids, shift_labels(ids), places), "fp64")
    truth = load_file(GOLDENS / case / "io.safetensors")["fp64.logits"]
    # Folded factors that are no powers of two (1.7, 1.4) are rounded once into float32 weights.
    assert relative_frobenius(found["logits"], truth) <= (2e-7 if case != "telechat3" else 1e-12)


@needs_transformers
@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_goldens_logits(case: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = exported(case, tmp_path / "x")
    model, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "x", torch_dtype=torch.float32, output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits.numpy()
    assert relative_frobenius(logits, load_file(GOLDENS / case / "io.safetensors")["fp64.logits"]) <= LOGITS


def test_what_no_llama_computes_is_refused() -> None:
    source = golden_source("flm101b_like/weights.safetensors", "flm101b_like/config.json")
    with pytest.raises(UserError, match="model.norm: layernorm has no place in a Llama; leave --llama out"):
        LlamaSource(source)
