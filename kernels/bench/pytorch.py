"""PyTorch benchmarks of ``tele bench kernels``: a run's operator, the composite form, eager autograd, torch.compile.

"eager" is the operator as model code usually writes it, differentiated by PyTorch; on a GPU, "native" is PyTorch's
fused operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from telechat_twins.core.bench.cases import Size
from telechat_twins.core.model.visibility import Block, KeyRanges, causal_ranges
from telechat_twins.core.types import JsonObject
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.bench.contestant import Call, Contestant, host_seconds
from telechat_twins.kernels.bench.eager import repeat_kv, rotate_half
from telechat_twins.kernels.pytorch import composite as torch_composite
from telechat_twins.kernels.pytorch import cpu as torch_cpu
from telechat_twins.kernels.pytorch import native as torch_native
from telechat_twins.kernels.pytorch import ops as pytorch

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = 1e-5
LISTED = {"add_rms_norm": "rms_norm"}  # benchmarked operator -> its name in the table of choices
PRIMITIVE = {"rope": "rope_qk", "embedding": "embedding_backward", "cross_entropy": "cross_entropy_forward"}

Inputs: TypeAlias = list[Tensor]  # for attention the last one is the KeyRanges
Output: TypeAlias = Tensor | tuple[Tensor, ...]


class TorchBench:
    """The benchmarks of PyTorch (kernels.bench.contestant.Bench)."""

    def __init__(self, options: JsonObject) -> None:
        self.dtype = DTYPES.get(options["precision"], torch.float32)
        self.device = torch.device(pytorch.default_device())
        self.compile = options["compile"]
        torch.manual_seed(0)

    def about(self) -> JsonObject:
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type
        return {"version": f"PyTorch {torch.__version__}", "device": name, "threads": torch.get_num_threads()}

    def copy(self) -> tuple[Call, float]:
        count = (1 << 31 if self.device.type == "cuda" else 1 << 27) // self.dtype.itemsize
        source = torch.zeros(count, device=self.device, dtype=self.dtype)
        target = torch.ones_like(source)
        return lambda: target.copy_(source), 2.0 * source.nbytes

    def read(self) -> tuple[Call, float]:
        array = torch.ones(1 << 26, device=self.device)
        return lambda: array.sum(), float(array.nbytes)

    def matmul(self) -> tuple[Call, float]:
        n = 8192 if self.device.type == "cuda" else 1536
        a, b = self._random(n, n), self._random(n, n)
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out), 2.0 * n**3

    def seconds(self, call: Call, count: int) -> float:
        if self.device.type != "cuda":
            return host_seconds(call, count)
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        started.record()
        for _ in range(count):
            call()
        ended.record()
        torch.cuda.synchronize()
        return started.elapsed_time(ended) / 1e3

    def contestants(self, operator: str, size: Size) -> dict[str, Contestant]:
        """Implementations by name; "run" is that of a run on this device, if other than the composite form."""
        inputs = self._inputs(operator, size)
        implementation = pytorch.choices()[LISTED.get(operator, operator)].implementation
        package = pytorch.serving(LISTED.get(operator, operator), inputs[0])
        contestants = {}
        if package is torch_native or (operator == "attention" and package is torch_cpu):
            contestants["run"] = self._differentiated(implementation, _native(operator), inputs)
        elif package is not torch_composite and hasattr(package, PRIMITIVE.get(operator, operator)):
            contestants["run"] = self._primitive(implementation, package, operator, inputs)
        if self.device.type == "cuda" and package is not torch_native and operator in _NATIVE:
            contestants["native"] = self._differentiated("PyTorch's own", _native(operator), inputs)
        contestants["composite"] = self._primitive("composite", torch_composite, operator, inputs)
        if operator == "adamw":
            contestants["eager"] = Contestant("torch.optim.AdamW, foreach", _foreach_adamw(inputs))
            return contestants
        contestants["eager"] = self._differentiated("eager", _EAGER[operator], inputs)
        if self.compile:
            contestants["compile"] = self._differentiated("torch.compile", torch.compile(_EAGER[operator]), inputs)
        return contestants

    def _random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def _inputs(self, operator: str, size: Size) -> Inputs:
        N, E, H, K, D = size.tokens, size.hidden, size.heads, size.kv_heads, size.head_dim
        wide = torch_composite.wide(self.dtype)
        if operator == "linear":
            return [self._random(N, E), self._random(size.ffn, E), self._random(size.ffn)]
        if operator == "embedding":
            return [self._random(size.vocab, E), torch.randint(size.vocab, (N,), device=self.device)]
        if operator == "rms_norm":
            return [self._random(N, E), self._random(E)]
        if operator == "add_rms_norm":
            return [self._random(N, E), self._random(N, E), self._random(E)]
        if operator == "layer_norm":
            return [self._random(N, E), self._random(E), self._random(E)]
        if operator == "rope":
            angle = torch.rand((1, N, 1, D // 2), device=self.device, dtype=wide)
            return [self._random(1, N, H, D), self._random(1, N, K, D), angle.cos(), angle.sin()]
        if operator in ("swiglu", "gelu"):
            return [self._random(N, size.ffn) for _ in range(2 if operator == "swiglu" else 1)]
        if operator == "attention":
            ranges = causal_ranges(N, N)
            qkv = [self._random(1, N, heads, D) for heads in (H, K, K)]
            return [*qkv, ranges._replace(ranges=torch.from_numpy(ranges.ranges).to(self.device))]
        if operator == "merge_blocks":
            out = [self._random(1, N, H, D, dtype=wide) for _ in range(2)]
            return [out[0], self._random(1, H, N, dtype=wide), out[1], self._random(1, H, N, dtype=wide)]
        if operator == "cross_entropy":
            return [self._random(N, size.vocab), torch.randint(size.vocab, (N,), device=self.device)]
        vectors = [self._random(size.parameters, dtype=wide) for _ in range(3)]
        return [*vectors, vectors[2].square()]

    def _primitive(self, title: str, package: ModuleType, operator: str, inputs: Inputs) -> Contestant:
        """The functions of ``package``, without autograd."""
        with torch.no_grad():
            forward, backward = _calls(package, operator, inputs)
        return Contestant(title, torch.no_grad()(forward), None if backward is None else torch.no_grad()(backward))

    def _differentiated(self, title: str, function: Callable[..., Output], inputs: Inputs) -> Contestant:
        """A function differentiated by PyTorch, with repeated backward passes over one retained graph."""
        leaves = [
            x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() and at < 3 else x
            for at, x in enumerate(inputs)
        ]
        if function in (_EAGER["rope"],):
            leaves[2] = inputs[2]
        wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        out = function(*leaves)
        outs = list(out) if isinstance(out, tuple) else [out]
        if function is _EAGER["merge_blocks"]:
            return Contestant(title, torch.no_grad()(lambda: function(*inputs)))
        grads = [torch.ones_like(o) for o in outs]
        return Contestant(
            title,
            lambda: function(*leaves),
            lambda: torch.autograd.grad(outs, wanted, grads, retain_graph=True, allow_unused=True),
        )


def _calls(package: ModuleType, operator: str, inputs: Inputs) -> tuple[Call, Call | None]:
    """Forward and backward calls of an operator, with all their inputs made beforehand."""
    p, x = package, inputs[0]
    if operator == "linear":
        _, weight, bias = inputs
        grad = torch.ones((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
        whole = (True, True, True)
        return lambda: p.linear(x, weight, bias), lambda: p.linear_backward(grad, x, weight, whole)
    if operator == "embedding":
        ids, rows = inputs[1], x.shape[0]
        grad = torch.ones((len(ids), x.shape[1]), dtype=x.dtype, device=x.device)
        forward = getattr(p, "embedding", torch_cpu.embedding)
        return lambda: forward(x, ids), lambda: p.embedding_backward(grad, ids, rows)
    if operator == "rms_norm":
        weight, grad = inputs[1], torch.ones_like(x)
        rstd = p.rms_norm(x, weight, EPS, x.dtype)[1]
        return lambda: p.rms_norm(x, weight, EPS, x.dtype), lambda: p.rms_norm_backward(grad, x, weight, rstd)
    if operator == "add_rms_norm":
        _, residual, weight = inputs
        grad, more = torch.ones_like(x), torch.ones_like(x)
        _, stream, rstd = p.add_rms_norm(x, residual, weight, EPS, x.dtype)
        return (
            lambda: p.add_rms_norm(x, residual, weight, EPS, x.dtype),
            lambda: p.add_rms_norm_backward(grad, more, stream, weight, rstd),
        )
    if operator == "layer_norm":
        _, weight, bias = inputs
        grad = torch.ones_like(x)
        _, mean, rstd = p.layer_norm(x, weight, bias, EPS, x.dtype)
        return (
            lambda: p.layer_norm(x, weight, bias, EPS, x.dtype),
            lambda: p.layer_norm_backward(grad, x, weight, mean, rstd),
        )
    if operator == "rope":
        _, k, cos, sin = inputs
        back = -sin
        return lambda: p.rope_qk(x, k, cos, sin), lambda: p.rope_qk(x, k, cos, back)
    if operator == "swiglu":
        up, grad = inputs[1], torch.ones_like(x)
        return lambda: p.swiglu(x, up), lambda: p.swiglu_backward(grad, x, up)
    if operator == "gelu":
        grad = torch.ones_like(x)
        return lambda: p.gelu(x), lambda: p.gelu_backward(grad, x)
    if operator == "attention":
        _, k, v, ranges = inputs
        placed = _host(ranges) if p.__name__.endswith(".npu") else ranges  # CANN reads the ranges on the host
        grad = torch.ones_like(x)
        out, lse = p.attention(x, k, v, placed)
        return (
            lambda: p.attention(x, k, v, placed),
            lambda: p.attention_backward(grad, x, k, v, placed, out, lse),
        )
    if operator == "merge_blocks":
        return lambda: p.merge_blocks(*inputs), None
    if operator == "cross_entropy":
        targets, columns = inputs[1], x.shape[1]
        logits = x.clone()  # overwritten by their gradient
        lse = p.cross_entropy_forward(x, targets, 0, columns)[0]
        return (
            lambda: p.cross_entropy_forward(x, targets, 0, columns),
            lambda: p.cross_entropy_backward(logits, targets, 0, columns, lse, 1.0),
        )
    master, grad, m, v = inputs
    return lambda: p.adamw(master, grad, m, v, AdamWStep(10, 1e-6, 0.9, 0.95, 1e-8, 0.1)), None


def _host(ranges: KeyRanges) -> KeyRanges:
    placed: Tensor = ranges.ranges
    return ranges._replace(ranges=placed.cpu().numpy())


def _foreach_adamw(inputs: Sequence[Tensor]) -> Call:
    parameter = torch.nn.Parameter(inputs[0].clone())
    parameter.grad = inputs[1]
    optimizer = torch.optim.AdamW([parameter], 1e-6, (0.9, 0.95), 1e-8, 0.1, foreach=True)
    return optimizer.step


def _eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    values = x.float() if x.dtype != torch.float64 else x
    return (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def _eager_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    stream = residual + x
    return _eager_rms_norm(stream, weight), stream


def _eager_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS) * weight + bias


def _eager_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (torch.cat((table, table), -1).to(q.dtype) for table in (cos, sin))
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def _eager_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x.pow(3))))


def _eager_attention(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges) -> Tensor:
    S, times = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), repeat_kv(k.transpose(1, 2), times), repeat_kv(v.transpose(1, 2), times)
    later = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    scores = (torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf)
    return torch.matmul(F.softmax(scores, -1, dtype=torch.float32).to(q.dtype), v).transpose(1, 2)


def _eager_merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    joint = torch.logaddexp(lse, more_lse)
    first, second = (torch.exp(part - joint).transpose(1, 2)[..., None] for part in (lse, more_lse))
    return out * first + more * second, joint


_EAGER: dict[str, Callable[..., Output]] = {
    "linear": F.linear,
    "embedding": lambda table, ids: F.embedding(ids, table),
    "rms_norm": _eager_rms_norm,
    "add_rms_norm": _eager_add_rms_norm,
    "layer_norm": _eager_layer_norm,
    "rope": _eager_rope,
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "gelu": _eager_gelu,
    "attention": _eager_attention,
    "merge_blocks": _eager_merge,
    "cross_entropy": torch_native.cross_entropy,
}
_NATIVE = ("rms_norm", "layer_norm", "gelu", "attention", "linear", "embedding")


def _native(operator: str) -> Callable[..., Output]:
    """PyTorch's fused operator, called as in kernels/pytorch/ops.py."""
    return {
        "rms_norm": lambda x, weight: torch_native.rms_norm(x, weight, EPS, x.dtype),
        "add_rms_norm": lambda x, r, weight: (torch_native.rms_norm(x + r, weight, EPS, x.dtype), x + r),
        "layer_norm": lambda x, weight, bias: torch_native.layer_norm(x, weight, bias, EPS, x.dtype),
        "gelu": torch_native.gelu,
        "attention": lambda q, k, v, _: torch_native.attention(q, k, v, [Block(0, q.shape[1], k.shape[1], None)]),
        "cross_entropy": torch_native.cross_entropy,
    }.get(operator, _EAGER.get(operator))  # type: ignore[return-value]
