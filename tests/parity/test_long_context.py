"""Prompts many times longer than the trained length, in pieces: the logits of one uncached pass, in linear memory.

The positions looked at are spread over the prompt, needles that a wrong page, table or mask anywhere before them would
move. Against the uncached float32 pass of the same backend, whose rotary angles are the same, the limit is twice that
of tests/parity/test_goldens.py, for two sides that round; float64 angles are further away (float32 knows an angle of
4500 to 2e-4), and so is either side from the float64 pass, in which it may be no further than the other.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.core.backends import load
from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.inference.generation import generate
from telechat_twins.core.inference.pages import pool_size
from telechat_twins.core.inference.sampling import sampling_config
from telechat_twins.core.model.batch import IGNORE, Batch
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.model.init import init_tensor
from telechat_twins.core.parity.bounds import relative_frobenius
from tests.parity.test_goldens import LOGITS
from tests.support.engine_support import Feed
from tests.support.frameworks import BACKENDS

LENGTH = 4500  # of a model trained for 256: the rotary base has grown 63 times, attention logits by half
NEEDLES = (255, 256, 257, 511, 512, 1023, 1500, 2048, 3001, 4095, 4096, LENGTH - 1)
PIECE = 512


def config() -> ModelConfig:
    return load_model_config("telechat2-tiny")


def weights(name: str) -> np.ndarray:
    return init_tensor(name, config(), 3, scheme="strong")


def prompt() -> list[int]:
    return np.random.default_rng(0).integers(0, config().vocab_size, LENGTH).tolist()


@cache
def uncached(backend: str, precision: str) -> np.ndarray:
    """Logits at the needles of one pass over everything."""
    row = np.asarray([prompt()], np.int32)
    batch = Batch(row, np.full_like(row, IGNORE), np.arange(LENGTH, dtype=np.int32)[None])
    return load(backend, "forward").run(config(), weights, batch, precision, False)["logits"][0][list(NEEDLES)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_needles_are_those_of_one_uncached_pass(backend: str) -> None:
    pytest.importorskip("torch")
    judge, plain = uncached("pt", "fp64"), uncached(backend, "fp32")
    runner = load(backend, "generate").Runner(config(), weights, pool_size(LENGTH) + 9)
    fed, ids, rows, at = Feed(runner, LENGTH), prompt(), [], 0
    for needle in NEEDLES:
        while at <= needle:
            size = min(PIECE, needle + 1 - at)
            row = fed.extend(ids[at : at + size])
            at += size
        rows.append(row)
    found = np.stack(rows)
    assert relative_frobenius(found, plain) <= 2 * LOGITS
    assert relative_frobenius(found, judge) <= 1.1 * relative_frobenius(plain, judge) < 5e-5
    assert (np.stack(rows).argmax(-1) == plain.argmax(-1)).all()


def test_a_page_taken_for_another_is_seen() -> None:
    """A planted fault, early in the prompt, far from the needle after it."""
    pytest.importorskip("torch")
    runner = load("pt", "generate").Runner(config(), weights, pool_size(LENGTH))
    fed, ids = Feed(runner, LENGTH), prompt()
    for at in range(0, 1024, PIECE):
        fed.extend(ids[at : at + PIECE])
    fed.table[3] = fed.table[40]
    row = fed.extend(ids[1024:1501])
    assert relative_frobenius(row, uncached("pt", "fp32")[NEEDLES.index(1500)]) > 100 * LOGITS


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_engine_reads_it_in_pieces_and_again_from_its_pages(backend: str) -> None:
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    runner = load(backend, "generate").Runner(config(), weights, pool_size(LENGTH + 4))
    engine = Engine(runner, limits=EngineLimits(step_tokens=PIECE))
    made = [generate(engine, prompt()[: LENGTH - 4], sampling_config(), 4).tokens for _ in range(2)]
    assert made[0] == made[1]
    first = uncached("pt", "fp64")[NEEDLES.index(4096)]
    planned = generate(engine, prompt()[:4097], sampling_config(), LENGTH - 4097).tokens
    assert planned[0] == int(first.argmax())


MEMORY = """
import resource, sys
import numpy as np
from telechat_twins.core import backends
from telechat_twins.core.config import load_model_config
from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.model.init import init_tensor
from telechat_twins.core.inference.pages import pool_size
from telechat_twins.core.inference.requests import Request

config = load_model_config("telechat2-tiny")
make = backends.load(sys.argv[1], "generate").Runner
runner = make(config, lambda name: init_tensor(name, config, 3), pool_size(int(sys.argv[2]) + 2))
engine = Engine(runner, limits=EngineLimits(step_tokens=512))

def prompt(length):
    engine.submit(Request(prompt_ids=(7,) * length, max_new_tokens=2))
    while engine.busy:
        engine.step()

prompt(600)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prompt(int(sys.argv[2]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_grows_with_the_length(backend: str) -> None:
    """12,000 tokens: keys and values are 25 MB, one layer's square of scores would be 2.3 GB."""
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", MEMORY, backend, "12000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100
