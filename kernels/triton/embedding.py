"""Embedding lookup and its gradient; each row of the gradient is summed by one program, in the order of the tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from telechat_twins.kernels.triton.launch import INTEGERS, check, launch, rows_of, tiles_for


@triton.jit
def gather_sum(grad_ptr, order_ptr, begin_ptr, out_ptr, V, E, grad_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out [V, E]: out[v] = sum of the rows order[begin[v] : begin[v + 1]] of grad."""
    blocks = tl.cdiv(E, BLOCK)
    for task in range(tl.program_id(0), V * blocks, tl.num_programs(0)):
        v = task // blocks
        columns = task % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = columns < E
        begin = tl.load(begin_ptr + v)
        end = tl.load(begin_ptr + v + 1)
        sums = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(begin, end, ROWS):
            turns = start + tl.arange(0, ROWS)
            there = turns < end
            rows = tl.load(order_ptr + turns, mask=there, other=0).to(tl.int64)
            at = rows[:, None] * grad_stride + columns[None, :]
            sums += tl.load(grad_ptr + at, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        tl.store(out_ptr + tl.cast(v, tl.int64) * E + columns, tl.sum(sums, 0), mask=inside)


def embedding(table: Tensor, ids: Tensor) -> Tensor:
    """table [V, E], ids [...] of int32 or int64 -> [..., E], by PyTorch's gather, a single pass."""
    check("table", table, (None, None))
    check("ids", ids, dtypes=INTEGERS, beside=table)
    return table.index_select(0, ids.reshape(-1)).view(*ids.shape, table.shape[1])


def embedding_backward(grad: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    """grad [..., E] summed by ids [...] into float32 [vocab_size, E].

    Deterministic: tokens are sorted by id, stably, and one program sums a row. Ids outside the table are ignored, so a
    rank with a shard of it can pass ids relative to its first row. Raises TypeError or ValueError naming the wrong
    argument.
    """
    check("grad", grad)
    if grad.ndim == 0 or grad.shape[-1] == 0:
        raise ValueError(f"grad: got shape {tuple(grad.shape)}, needs at least one channel on its last axis")
    check("ids", ids, grad.shape[:-1], INTEGERS, beside=grad)
    if vocab_size < 1:
        raise ValueError(f"vocab_size: got {vocab_size}, needs 1 or more")
    rows = rows_of(grad)
    N, E = rows.shape
    out = torch.empty((vocab_size, E), dtype=torch.float32, device=grad.device)
    if N == 0:
        return out.zero_()
    in_order, order = torch.sort(ids.reshape(-1), stable=True)
    edges = torch.arange(vocab_size + 1, dtype=in_order.dtype, device=grad.device)
    begin = torch.searchsorted(in_order, edges, out_int32=True)
    tiles = tiles_for("embedding", grad, E=E)
    arguments = {
        "grad_ptr": rows,
        "order_ptr": order,
        "begin_ptr": begin,
        "out_ptr": out,
        "V": vocab_size,
        "E": E,
        "grad_stride": rows.stride(0),
    }
    launch(gather_sum, vocab_size * triton.cdiv(E, tiles.constants["BLOCK"]), tiles, arguments)
    return out
