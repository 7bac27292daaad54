"""Low-rank adapters in generation, in both backends: against PEFT's own logits, against merged weights, and several in
one batch against each alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from safetensors.numpy import load_file

from telechat_twins.convert.adapter import MergedSource
from telechat_twins.convert.hf.peft import open_peft
from telechat_twins.convert.source import ModelSource
from telechat_twins.core.backends import load
from telechat_twins.core.checkpoint.adapter import Adapter
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.adapters import Pair, pair_reader, used_adapters
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.requests import Request
from telechat_twins.core.inference.runner import Runner
from telechat_twins.core.model.quantize import quantizing
from telechat_twins.core.parity.bounds import relative_frobenius
from telechat_twins.kernels.cpu.decoding import DecoderProgram
from tests.parity.test_decoding_in_one_call import LIMITS
from tests.support.adapters import golden_model, modules, random_adapter
from tests.support.engine_support import Feed, feed, finish, tokens_of
from tests.support.frameworks import BACKENDS, GOLDENS

PEFT = GOLDENS / "peft"
PAGES, LENGTH = 24, 12
# PEFT's logits, of size 10, are float64 on float32 rotary tables, as transformers makes them: in float64 ours are
# within 1e-6 of them. In float32 a sum of the model rounds by as much, relatively.
PEFT_BOUND = 1e-5
# Relative: W x + s B A x against (W + s B A) x, of which each is rounded on the way.
MERGED_BOUND = 1e-6


def runner(backend: str, source: ModelSource, adapters: Sequence[Adapter], precision: str = "fp32", **more) -> Runner:
    pairs = [pair_reader(adapter) for adapter in adapters]
    get = more.pop("get", source.tensor)
    return load(backend, "generate").Runner(source.config, get, PAGES, precision, page_size=4, adapters=pairs)


def logits(made: Runner, ids: Sequence[int], adapter: int) -> np.ndarray:
    """Logits [S, V] of a sequence, half of it as a prompt and half token by token."""
    sequence = Feed(made, len(ids), adapter=adapter)
    return np.stack([sequence.extend(piece) for piece in ([*ids[:6]], *([token] for token in ids[6:]))])


def golden_ids() -> list[int]:
    return load_file(PEFT / "logits.safetensors")["input_ids"][0].tolist()


@pytest.mark.parametrize("case", ["plain", "patterns", "written"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_peft_computes_the_same(backend: str, case: str) -> None:
    source = golden_model("teleflm")
    adapter = open_peft(PEFT / case, source.config)
    expected = load_file(PEFT / "logits.safetensors")[case][5:]
    exact = logits(runner(backend, source, [adapter], "fp64"), golden_ids(), 1)
    assert np.abs(exact - expected).max() < PEFT_BOUND
    assert relative_frobenius(logits(runner(backend, source, [adapter]), golden_ids(), 1), expected) < PEFT_BOUND
    assert np.abs(logits(runner(backend, source, []), golden_ids(), 0) - expected).max() > 1.0


@pytest.mark.parametrize("case", ["telechat2_gqa", "telechat52b_like", "flm101b_like"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_merged_is_unmerged(backend: str, case: str) -> None:
    source = golden_model(case)
    chosen = modules(source.config, rank=3, alpha=1.5)
    adapter = random_adapter(source, chosen | modules(source.config, ("q", "down"), rank=5, alpha=2.0))
    ids = [token % source.config.vocab_size for token in golden_ids()]
    apart = logits(runner(backend, source, [adapter]), ids, 1)
    together = logits(runner(backend, MergedSource(source, adapter), []), ids, 0)
    assert relative_frobenius(apart, together) < MERGED_BOUND
    # bfloat16 rounds everything; the same adapter is still recognised.
    rough = logits(runner(backend, source, [adapter], "bf16"), ids, 1)
    base = logits(runner(backend, source, [], "bf16"), ids, 0)
    assert relative_frobenius(rough, together) < 0.1 < relative_frobenius(base, together)


def _batch(backend: str, get: Callable[[str], np.ndarray] | None = None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Logits of five sequences through three adapters and the base: in one batch, and each alone."""
    source = golden_model("telechat2_gqa")
    chosen = (("q", "k", "v", "o"), ("gate", "up", "down"), ("q", "v", "down"))
    adapters = [random_adapter(source, modules(source.config, t, n + 1), n) for n, t in enumerate(chosen)]
    more = {} if get is None else {"get": get}
    rng = np.random.default_rng(1)
    numbers = [2, 0, 1, 3, 1]
    prompts = [rng.integers(4, 150, size).tolist() for size in (1, 1, 5, 3, 6)]
    made = runner(backend, source, adapters, **more)
    alone = []
    for number, prompt in zip(numbers, prompts, strict=True):
        sequence = Feed(made, 8, adapter=number)
        alone.append(np.stack([sequence.extend(prompt), sequence.extend([7])]))
    sequences = [Feed(made, 8, adapter=number) for number in numbers]
    for place, sequence in enumerate(sequences):
        sequence.table = np.arange(1 + 2 * place, 3 + 2 * place, dtype=np.int32)
    first, second = feed(sequences, prompts), feed(sequences, [[7]] * len(sequences))
    return [np.stack(pair) for pair in zip(first, second, strict=True)], alone


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_in_one_batch_are_each_alone(backend: str, int8: bool) -> None:
    source = golden_model("telechat2_gqa")
    together, alone = _batch(backend, quantizing(source.config, source.tensor) if int8 else None)
    for found, expected in zip(together, alone, strict=True):
        assert np.abs(found - expected).max() < 2e-5  # logits of 20, summed in another order
    assert min(np.abs(alone[i] - alone[j])[1].max() for i in range(5) for j in range(i)) > 0.1


def _everyone(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Every adapter of the step added to every token."""
    package = {"ms": "telechat_ms", "pt": "pt_reference"}[backend]
    monkeypatch.setattr(
        f"telechat_twins.{package}.adapters.used_adapters",
        lambda owners: [(number, None) for number, _ in used_adapters(owners)],
    )


def _first_of_the_step(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Sequences of a step taken in the order of their adapters' numbers."""
    monkeypatch.setattr(
        "telechat_twins.core.inference.runner.Step.owners",
        property(lambda step: np.repeat(np.sort(step.adapters), np.diff(step.starts))),
    )


@pytest.mark.parametrize("fault", [_everyone, _first_of_the_step])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_another_adapter_are_found(
    backend: str, fault: Callable[[pytest.MonkeyPatch, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch, backend)
    together, alone = _batch(backend)
    assert max(np.abs(found - expected).max() for found, expected in zip(together, alone, strict=True)) > 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_one_adapter_is_one_call(backend: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens and many, of the base and of each adapter, against the same step operator by operator: in MindSpore,
    whose operators are the same kernels, bit for bit."""
    source = golden_model("telechat2_gqa")
    targets = (("q", "k", "v", "o", "gate", "up", "down"), ("q", "down"))
    adapters = [random_adapter(source, modules(source.config, t, n + 2), n) for n, t in enumerate(targets)]
    more = {"get": quantizing(source.config, source.tensor)} if precision == "int8" else {"precision": precision}
    made = runner(backend, source, adapters, **more)
    program, ids = made.program, np.random.default_rng(3).integers(4, 150, 40).tolist()
    assert program is not None

    def told(adapter: int, on: Runner = made) -> np.ndarray:
        sequence = Feed(on, 44, adapter=adapter)
        return np.stack([sequence.extend(piece) for piece in (ids, [7], ids[:3])])

    calls: list[int] = []
    run = DecoderProgram.run
    monkeypatch.setattr(DecoderProgram, "run", lambda self, *given: calls.append(1) or run(self, *given))
    for adapter in range(3):
        made.program, calls[:] = program, []
        at_once = told(adapter)
        assert len(calls) == 3
        made.program = None
        apart = told(adapter)
        if backend == "ms":
            np.testing.assert_array_equal(at_once, apart)
        else:
            # bfloat16's rounding is the model's: one route may not be much farther from float64 than the other.
            wide = told(adapter, runner(backend, source, adapters, "fp64")) if precision == "bf16" else apart
            bound = 1.5 * relative_frobenius(apart, wide) if precision == "bf16" else LIMITS["fp32"]
            assert relative_frobenius(at_once, wide) < bound
    mixed = [Feed(made, 8, adapter=number) for number in (1, 2)]
    made.program, calls[:] = program, []
    mixed[1].table = np.arange(3, 5, dtype=np.int32)
    feed(mixed, [[5], [6]])
    assert not calls


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missed_scale_and_halves_of_key_value_are_found(backend: str) -> None:
    source = golden_model("teleflm")
    adapter = open_peft(PEFT / "plain", source.config)
    expected = load_file(PEFT / "logits.safetensors")["plain"][5:]
    read = pair_reader(adapter)

    def unscaled(linear: str) -> Pair | None:
        pair = read(linear)
        return None if pair is None else Pair(pair.a, pair.b / np.float32(adapter.modules[linear].scale))

    def swapped(linear: str) -> Pair | None:
        parts = {"k": "v", "v": "k"}
        return read(linear[:-1] + parts.get(linear[-1], linear[-1]))

    for fault in (unscaled, swapped):
        made = load(backend, "generate").Runner(
            source.config, source.tensor, PAGES, "fp32", page_size=4, adapters=[fault]
        )
        assert np.abs(logits(made, golden_ids(), 1) - expected).max() > 1e-2


def test_cached_pages_belong_to_one_adapter() -> None:
    """A prompt that was read through one adapter is no help to another: its keys and values are other ones."""
    source = golden_model("telechat2_gqa")
    adapters = [random_adapter(source, modules(source.config), seed) for seed in (1, 2)]
    prompt = tuple(range(10, 26))

    def answers(reuse: bool) -> tuple[list[list[int]], list[int]]:
        pairs = [pair_reader(adapter) for adapter in adapters]
        made = load("pt", "generate").Runner(source.config, source.tensor, 40, "fp32", page_size=4, adapters=pairs)
        engine = Engine(made, reuse=reuse, adapters=2)
        told, cached = [], []
        for number in (0, 1, 2, 1, 0):
            place = engine.submit(Request(prompt_ids=prompt, max_new_tokens=6, adapter=number))
            events = finish(engine)[place]
            told.append(tokens_of(events))
            cached.append(events[-1].usage.cached)
        with pytest.raises(UserError, match="there is no adapter 3"):
            engine.submit(Request(prompt_ids=prompt, max_new_tokens=6, adapter=3))
        return told, cached

    (plain, none), (again, cached) = answers(False), answers(True)
    assert plain == again and len(set(map(tuple, plain))) == 3
    assert none == [0] * 5 and cached[:3] == [0, 0, 0] and min(cached[3:]) >= 12
