"""Steps of few tokens as one call of the C++ operators, against the same steps operator by operator, in both twins.

MindSpore's operators are the kernels of the call, so its bits are the same. PyTorch computes norms, rotations and
activations itself: float32 logits may differ by what the golden tests allow either (2e-6 of their norm), 16 bits by a
few roundings, and in 8 bits a rounding of a row may fall to the other side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from telechat_twins.core import backends
from telechat_twins.core.inference.runner import Step
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.model.growth_mask import GrowthMask
from telechat_twins.core.model.init import init_tensor
from telechat_twins.core.model.quantize import quantizing
from telechat_twins.core.parity.bounds import relative_frobenius
from telechat_twins.kernels.cpu import build
from telechat_twins.kernels.cpu.program import Program
from tests.parity.test_paged_attention import step_of
from tests.support.frameworks import BACKENDS

pytestmark = pytest.mark.skipif(
    build.compiler() is None, reason="no C++ compiler; operators are called one by one then"
)

LIMITS = {"fp32": 2e-6, "bf16": 0.02, "fp16": 0.003}
EIGHT_BITS = 0.02
SIZE, PAGES = 16, 40


def tiny(**fields: Any) -> ModelConfig:
    return dataclasses.replace(load_model_config("telechat2-tiny"), **fields)


MODELS: dict[str, Callable[[], ModelConfig]] = {
    "telechat2": tiny,
    "padded vocabulary, tied": lambda: tiny(tied_embeddings=True, vocab_tokens=tiny().vocab_size - 5),
    "teleflm": lambda: load_model_config("teleflm-tiny"),
    "flm": lambda: load_model_config("flm-tiny"),
    "telechat3": lambda: load_model_config("telechat3-tiny"),
}


def runner_of(backend: str, config: ModelConfig, precision: str, quantize: bool = False, **options: Any) -> Any:
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])

    def get(name: str) -> np.ndarray:
        return init_tensor(name, config, 1)

    source = quantizing(config, get) if quantize else get
    return backends.load(backend, "generate").Runner(config, source, PAGES, precision, SIZE, **options)


def steps_of(config: ModelConfig) -> list[Step]:
    """A prompt, decoding of one sequence, of several with unequal lengths, a piece of a prompt beside them, and a long
    one, whose products are of many rows."""
    shapes = (((20, 20),), ((1, 21),), ((1, 3), (1, 40), (1, 17)), ((1, 33), (1, 2), (7, 19)), ((1, 9), (90, 100)))
    found = []
    for seed, sequences in enumerate(shapes):
        step, pages = step_of(SIZE, sequences, seed)
        assert pages <= PAGES
        ids = np.random.default_rng(seed).integers(0, config.vocab_size, len(step.ids)).astype(np.int32)
        found.append(dataclasses.replace(step, ids=ids, scaling_lengths=step.positions + 1))
    return found


def both(runner: Any, steps: list[Step]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Logits of the steps in one call each, and operator by operator. Both write the same rows of the pages."""
    program, whole, single = runner.program, [], []
    for step in (step for step in steps if program.takes(step)):
        runner.program = program
        whole.append(runner.run(step))
        runner.program = None
        single.append(runner.run(step))
    runner.program = program
    return whole, single


def assert_near(backend: str, whole: list[np.ndarray], single: list[np.ndarray], limit: float) -> None:
    for one, other in zip(whole, single, strict=True):
        assert one.dtype == np.float32 and one.shape == other.shape
        if backend == "ms":
            np.testing.assert_array_equal(one, other)
        else:
            real = other > -1e9  # a padded vocabulary's logits are as low as a dtype allows
            np.testing.assert_array_equal(real, one > -1e9)
            assert relative_frobenius(one[real], other[real]) < limit


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_call_equals_operators(backend: str, precision: str, model: str) -> None:
    config = MODELS[model]()
    runner = runner_of(backend, config, precision)
    assert runner.program is not None
    assert_near(backend, *both(runner, steps_of(config)), LIMITS[precision])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_call_of_int8(backend: str, precision: str) -> None:
    config = tiny()
    runner = runner_of(backend, config, precision, quantize=True)
    long, _ = step_of(SIZE, ((1, 9), (50, 50)), 4)  # int8 serves any number of rows
    long = dataclasses.replace(long, ids=np.arange(51, dtype=np.int32), scaling_lengths=long.positions + 1)
    assert runner.program.takes(long)
    assert_near(backend, *both(runner, [*steps_of(config), long]), EIGHT_BITS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fault_is_seen(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of one block exchanged; a bias left out."""
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    generate = backends.load(backend, "generate")
    real = generate.held_weight
    other = {"layers.1.attn.k.weight": "layers.1.attn.v.weight", "layers.0.ffn.down.bias": "layers.0.ffn_norm.weight"}
    for name, wrong in other.items():
        monkeypatch.setattr(
            generate, "held_weight", lambda model, n, name=name, wrong=wrong: real(model, wrong if n == name else n)
        )
        runner = runner_of(backend, tiny(), "fp32")
        whole, single = both(runner, steps_of(tiny()))
        assert all(relative_frobenius(one, two) > 1e-3 for one, two in zip(whole, single, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_left_to_operators(backend: str) -> None:
    """Many tokens whose logits are wanted; other dtypes; growth masks. Many tokens alone are one call, too."""
    program = runner_of(backend, tiny(), "fp32").program
    many = step_of(SIZE, ((33, 33),), 0)[0]
    assert program.takes(steps_of(tiny())[0]) and program.takes(many)
    many = dataclasses.replace(many, wanted=np.arange(33, dtype=np.int32))
    with pytest.raises(ValueError, match="33 tokens, 33 of them wanted"):
        program.run(many, ())
    now = tiny()
    sizes = {name: getattr(now, name) for name in ("hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads")}
    growing = tiny(growth=GrowthMask(mask=0.5, anneal_steps=10, new_layers=(now.num_layers - 1,), **sizes))
    for config, precision in ((tiny(), "fp64"), (tiny(), "amp"), (growing, "fp32")):
        assert runner_of(backend, config, precision).program is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_and_pages_stay_where_they_are(backend: str) -> None:
    """A step operator by operator reads and writes them too; what the program refers to must not move."""
    config = tiny()
    runner = runner_of(backend, config, "bf16")
    decode, prompt = steps_of(config)[1], step_of(SIZE, ((40, 40),), 1)[0]
    prompt = dataclasses.replace(prompt, scaling_lengths=prompt.positions + 1, wanted=np.arange(40, dtype=np.int32))
    first = runner.run(prompt)
    runner.run(decode)
    np.testing.assert_array_equal(runner.run(prompt), first)
    held = [memory for matrix in runner.program.matrices.values() for memory in matrix if memory is not None]
    for memory in (*held, *(memory for pair in runner.program.pages for memory in pair)):
        assert memory.address == memory.owner.data_ptr()


def test_a_program_checks_its_kernels() -> None:
    program = Program(build.load_plain())
    x = program.view("float32")
    with pytest.raises(KeyError, match="no kernel is named 'sine'"):
        program.add("sine", [x], [x], [])
    for inputs, scalars in (([x, x], []), ([x + 1], []), ([x], [0])):
        with pytest.raises(ValueError, match="gelu"):
            program.add("gelu", inputs, [x], scalars)
