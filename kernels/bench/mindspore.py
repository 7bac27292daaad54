"""MindSpore benchmarks of ``tele bench kernels``: a run's operators, and their composite form.

The composite form is differentiated by MindSpore, which repeats its forward pass with every backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TypeAlias

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from mindspore import ops as mops

from telechat_twins.core.bench.cases import Size
from telechat_twins.core.model.visibility import Block, causal_blocks, causal_ranges
from telechat_twins.core.types import JsonObject
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.bench.contestant import Call, Contestant, host_seconds
from telechat_twins.kernels.cpu.engine import usual_threads
from telechat_twins.kernels.mindspore import composite as composite
from telechat_twins.kernels.mindspore import ops as kernels
from telechat_twins.kernels.mindspore.private import executor

DTYPES = {"fp32": ms.float32, "bf16": ms.bfloat16, "fp16": ms.float16}
EPS = 1e-5
LISTED = {"add_rms_norm": "rms_norm"}  # benchmarked operator -> its name in the table of choices
PRIMITIVE = {"rope": "rope_qk", "cross_entropy": "cross_entropy_forward"}

Inputs: TypeAlias = list[Tensor]
Output: TypeAlias = Tensor | tuple[Tensor, ...] | None


class MindSporeBench:
    """The benchmarks of MindSpore (kernels.bench.contestant.Bench)."""

    def __init__(self, options: JsonObject) -> None:
        self.dtype = DTYPES.get(options["precision"], ms.float32)
        self.random = np.random.default_rng(0)

    def about(self) -> JsonObject:
        device = str(ms.get_context("device_target"))
        return {"version": f"MindSpore {ms.__version__}", "device": device, "threads": usual_threads()}

    def copy(self) -> tuple[Call, float]:
        source, target = Tensor(np.zeros(1 << 25, np.float32)), Parameter(Tensor(np.ones(1 << 25, np.float32)))
        module = kernels.serving("adamw")
        if module is not None and hasattr(module, "accumulate"):
            return lambda: module.accumulate(target, source, 0, False), 2.0 * source.nbytes
        return lambda: mops.assign(target, source), 2.0 * source.nbytes

    def read(self) -> tuple[Call, float]:
        array = Tensor(np.ones(1 << 26, np.float32))
        module = kernels.serving("adamw")
        if module is not None and hasattr(module, "square_sum"):
            return lambda: module.square_sum(array), float(array.nbytes)
        return lambda: mops.ReduceSum()(array), float(array.nbytes)

    def matmul(self) -> tuple[Call, float]:
        n = 1536
        a, b = self._random(n, n), self._random(n, n)
        return lambda: mops.MatMul()(composite.operand(a, self.dtype), composite.operand(b, self.dtype)), 2.0 * n**3

    def seconds(self, call: Call, count: int) -> float:
        return host_seconds(call, count, _wait)

    def contestants(self, operator: str, size: Size) -> dict[str, Contestant]:
        """Implementations by name; "run" is that of a run on this device, if other than the composite form."""
        inputs = self._inputs(operator, size)
        listed = LISTED.get(operator, operator)
        module = kernels.serving(listed, self.dtype)
        contestants = {}
        title = kernels.choices()[listed].implementation
        if operator == "linear":
            if module is not None:
                contestants["run"] = self._differentiated(
                    title, lambda x, w, b: kernels.linear(x, w, b, self.dtype), inputs
                )
        elif module is not None and hasattr(module, PRIMITIVE.get(operator, operator)):
            contestants["run"] = Contestant(title, *_calls(module, operator, inputs, size))
        plain = self._plain(operator, size)
        if plain is not None:
            contestants["composite"] = self._differentiated("composite", plain, inputs)
        return contestants

    def _random(self, *shape: int, dtype: ms.Type | None = None) -> Tensor:
        return Tensor(self.random.standard_normal(shape, np.float32)).astype(dtype or self.dtype)

    def _ids(self, size: Size) -> Tensor:
        return Tensor(self.random.integers(0, size.vocab, size.tokens).astype(np.int32))

    def _inputs(self, operator: str, size: Size) -> Inputs:
        N, E, H, K, D = size.tokens, size.hidden, size.heads, size.kv_heads, size.head_dim
        if operator == "linear":
            return [self._random(N, E), self._random(size.ffn, E), self._random(size.ffn)]
        if operator == "embedding":
            return [self._random(size.vocab, E), self._ids(size)]
        if operator in ("rms_norm", "add_rms_norm", "layer_norm"):
            streams = 2 if operator == "add_rms_norm" else 1
            return [
                *(self._random(N, E) for _ in range(streams)),
                *(self._random(E) for _ in range(1 + (operator == "layer_norm"))),
            ]
        if operator == "rope":
            angle = self.random.random((1, N, 1, D // 2), np.float32)
            return [self._random(1, N, H, D), self._random(1, N, K, D), Tensor(np.cos(angle)), Tensor(np.sin(angle))]
        if operator in ("swiglu", "gelu"):
            return [self._random(N, size.ffn) for _ in range(2 if operator == "swiglu" else 1)]
        if operator == "attention":
            return [self._random(1, N, heads, D) for heads in (H, K, K)]
        if operator == "merge_blocks":
            shapes = ((1, N, H, D), (1, H, N), (1, N, H, D), (1, H, N))
            return [self._random(*shape, dtype=ms.float32) for shape in shapes]
        if operator == "cross_entropy":
            return [self._random(N, size.vocab), self._ids(size)]
        vectors = [self._random(size.parameters, dtype=ms.float32) for _ in range(3)]
        return [Parameter(x) for x in (*vectors, vectors[2] * vectors[2])]

    def _plain(self, operator: str, size: Size) -> Callable[..., Output] | None:
        """The composite form as a function of ``_inputs``, or None."""
        dtype, N = self.dtype, size.tokens
        blocks = [] if operator != "attention" else _masked(N)
        table: dict[str, Callable[..., Output]] = {
            "linear": lambda x, w, b: composite.linear(x, w, b, dtype),
            "embedding": composite.embedding,
            "rms_norm": lambda x, w: composite.rms_norm(x, w, EPS, ms.float32, dtype),
            "add_rms_norm": lambda x, r, w: composite.rms_norm(r + x, w, EPS, ms.float32, dtype),
            "rope": lambda q, k, cos, sin: (composite.rope(q, cos, sin), composite.rope(k, cos, sin)),
            "swiglu": lambda g, u: composite.swiglu(g, u, ms.float32),
            "attention": lambda q, k, v: composite.attention(q, k, v, blocks),
            "cross_entropy": composite.cross_entropy,
            "merge_blocks": lambda out, lse, more, more_lse: composite.merge_blocks(
                mops.transpose(out, (0, 2, 1, 3)),
                lse[..., None],
                mops.transpose(more, (0, 2, 1, 3)),
                more_lse[..., None],
            ),
            "adamw": _plain_adamw,
        }
        return table.get(operator)

    def _differentiated(self, title: str, function: Callable[..., Output], inputs: Inputs) -> Contestant:
        if function is _plain_adamw or len(inputs) == 4 and inputs[1].ndim == 3:  # AdamW; merge_blocks: forward only
            return Contestant(title, lambda: function(*inputs))
        wanted = tuple(at for at, x in enumerate(inputs) if at < 3 and x.ndim != 4 or at < 2 or len(inputs) == 3)
        wanted = tuple(at for at in wanted if inputs[at].dtype not in (ms.int32, ms.int64))

        def total(*arguments: Tensor) -> Tensor:
            out = function(*arguments)
            assert out is not None  # only AdamW returns None
            return sum(x.sum() for x in out) if isinstance(out, tuple) else out.sum()

        both = ms.value_and_grad(total, wanted)
        return Contestant(title, lambda: function(*inputs), both=lambda: both(*inputs))


def _calls(module: ModuleType, operator: str, inputs: Inputs, size: Size) -> tuple[Call, Call | None]:
    """Forward and backward calls of a fused operator, with all their inputs made beforehand."""
    m, x = module, inputs[0]
    if operator == "embedding":
        ids = inputs[1]
        grad = m.embedding(x, ids)
        return lambda: m.embedding(x, ids), lambda: m.embedding_backward(grad, ids, size.vocab)
    if operator == "rms_norm":
        weight = inputs[1]
        grad, rstd = m.rms_norm(x, weight, EPS, x.dtype)
        return lambda: m.rms_norm(x, weight, EPS, x.dtype), lambda: m.rms_norm_backward(grad, x, weight, rstd)
    if operator == "add_rms_norm":
        _, residual, weight = inputs
        grad, stream, rstd = m.add_rms_norm(x, residual, weight, EPS, x.dtype)
        return (
            lambda: m.add_rms_norm(x, residual, weight, EPS, x.dtype),
            lambda: m.add_rms_norm_backward(grad, grad, stream, weight, rstd),
        )
    if operator == "layer_norm":
        _, weight, bias = inputs
        grad, mean, rstd = m.layer_norm(x, weight, bias, EPS, x.dtype)
        return (
            lambda: m.layer_norm(x, weight, bias, EPS, x.dtype),
            lambda: m.layer_norm_backward(grad, x, weight, mean, rstd),
        )
    if operator == "rope":
        return lambda: m.rope_qk(*inputs), lambda: m.rope_qk_backward(*inputs)
    if operator == "swiglu":
        up = inputs[1]
        grad = m.swiglu(x, up)
        return lambda: m.swiglu(x, up), lambda: m.swiglu_backward(grad, x, up)
    if operator == "gelu":
        grad = m.gelu(x)
        return lambda: m.gelu(x), lambda: m.gelu_backward(grad, x)
    if operator == "attention":
        _, k, v = inputs
        ranges = m.device_ranges(causal_ranges(size.tokens, size.tokens))
        out, lse = m.attention(x, k, v, ranges)
        return lambda: m.attention(x, k, v, ranges), lambda: m.attention_backward(out, x, k, v, ranges, out, lse)
    if operator == "merge_blocks":
        return lambda: m.merge_blocks(*inputs), None
    if operator == "cross_entropy":
        targets, columns = inputs[1], size.vocab
        logits, factor = x.copy(), Tensor(np.ones(1, np.float32))  # logits: overwritten by their gradient
        lse = m.cross_entropy_forward(x, targets, 0, columns)[0]
        return (
            lambda: m.cross_entropy_forward(x, targets, 0, columns),
            lambda: m.cross_entropy_backward(logits, targets, 0, columns, lse, factor),
        )
    master, grad, first, second = inputs
    return lambda: m.adamw(master, grad, first, second, AdamWStep(10, 1e-6, 0.9, 0.95, 1e-8, 0.1)), None


def _wait() -> None:
    """Wait for all launched operators; MindSpore's CPU device has no public function for it."""
    if executor is not None:
        executor.sync()
    else:
        ms.runtime.synchronize()


def _masked(num_tokens: int) -> list[Block]:
    return [
        block._replace(visible=None if block.visible is None else composite.hidden_keys(block.visible))
        for block in causal_blocks(num_tokens, num_tokens)
    ]


def _plain_adamw(master: Parameter, grad: Parameter, m: Parameter, v: Parameter) -> None:
    """Update number 10 of AdamW in MindSpore's primitive operators."""
    mops.assign(m, 0.9 * m + 0.1 * grad)
    mops.assign(v, 0.95 * v + 0.05 * grad * grad)
    root = mops.sqrt(v / (1 - 0.95**10)) + 1e-8
    mops.assign(master, master * (1 - 1e-7) - (1e-6 / (1 - 0.9**10)) * m / root)
