"""Checks of the C++ attention operators on numpy arrays against their float64 definitions: blocks, rings, pages."""

# ruff: noqa: B023  (a definition is evaluated by ``judged`` before its loop goes on)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from telechat_twins.core.model.visibility import causal_ranges
from telechat_twins.kernels import reference
from telechat_twins.kernels.cpu import ops
from tests.support.cpu_kernel_limits import F32, UNIT, UNITS, Finding, judged

ATTENTION = (  # B, S, T, H, K, D
    (1, 1, 1, 1, 1, 2),
    (1, 1, 70, 4, 2, 64),
    (2, 3, 9, 4, 1, 6),
    (1, 8, 8, 2, 2, 16),
    (2, 67, 67, 4, 2, 64),
    (1, 130, 200, 2, 2, 40),
    (1, 64, 64, 8, 2, 128),
    (1, 199, 199, 3, 1, 17),
    (1, 290, 545, 2, 1, 33),  # several passes of queries and of keys, each with a rest
    (1, 40, 1100, 4, 1, 16),  # sums of dq over parts of the keys
)


def attention(rng: np.random.Generator, dtype: np.dtype = F32, spread: float = 1.0) -> Iterator[Finding]:
    for B, S, T, H, K, D in ATTENTION:
        for kind_of in ("causal", "documents", "holes"):
            shapes = (B, H, S, D), (B, T, K, D), (B, T, K + 1, D), (B, S, H, D)
            q, k, v, grad = ((spread if i < 2 else 1.0) * rng.normal(size=s) for i, s in enumerate(shapes))
            q, k, v, grad = (a.astype(dtype) for a in (q, k, v, grad))
            q, v = q.transpose(0, 2, 1, 3), v[:, :, 1:]
            docs = np.sort(rng.integers(0, 4, (B, T)), 1)
            ranges = causal_ranges(S, T, None if kind_of == "causal" else docs).ranges
            if kind_of == "holes":  # queries that see nothing, an empty range that begins late, and all keys
                ranges = np.array(np.broadcast_to(ranges, (B, S, 2)))
                ranges[:, ::3] = 0
                ranges[:, 1::5] = T
                ranges[:, 2::7] = (0, T)
            visible = reference.visible_keys(ranges, T)

            def define(kind: type, which: int) -> Any:
                a = [x.astype(kind) for x in (q, k, v, grad)]
                out, lse = reference.attention(*a[:3], visible)
                if which < 2:
                    return (out, np.where(np.isfinite(lse), lse, 0.0))[which]
                return reference.attention_backward(a[3], *a[:3], visible, out, lse)[which - 2]

            name = f"{(B, S, T, H, K, D)} {kind_of} {dtype}"
            out, lse = ops.attention(q, k, v, ranges)
            seen = visible.any(-1)[:, None]
            assert (np.isfinite(lse) == np.broadcast_to(seen, lse.shape)).all(), f"{name}: -inf where keys are seen"
            seen_rows = np.broadcast_to(seen, lse.shape)
            yield judged(f"attention {name}", out, lambda kind: define(kind, 0), dtype)
            yield judged(f"log_sum_exp {name}", np.where(seen, lse, 0.0), lambda kind: define(kind, 1))
            for i, d in enumerate(ops.attention_backward(grad, q, k, v, ranges, out, lse)):
                if spread == 1.0:
                    yield judged(f"attention d{'qkv'[i]} {name}", d, lambda kind, i=i: define(kind, i + 2), dtype)
                    continue
                # A score of size s is known to u * s, and so is the logarithm of every probability. Softmax is nearly
                # one-hot here: gradients are differences of large terms, so the terms are the measure.
                error = np.linalg.norm(d - define(np.float64, i + 2)) / (np.linalg.norm(grad) * (1, 1, 1 / spread)[i])
                yield (
                    f"attention d{'qkv'[i]} {name}",
                    float(error / spread),
                    UNITS * UNIT[F32] * float(abs(lse[seen_rows]).max(initial=0.0)),
                )


def stray_nan(rng: np.random.Generator) -> Iterator[Finding]:
    """NaN in the gradients of some queries stays out of dq of those whose blocks use their memory afterwards."""
    S, D = 256, 16
    ranges = causal_ranges(S, S, None).ranges
    q, k, v, grad = (rng.normal(size=(1, S, 1, D)).astype(F32) for _ in range(4))
    out, lse = ops.attention(q, k, v, ranges)
    good = ops.attention_backward(grad, q, k, v, ranges, out, lse)[0]
    others = np.ones(S, bool)
    others[216:224] = False
    spoilt = np.where(others[None, :, None, None], grad, np.float32(np.nan))
    dq = ops.attention_backward(spoilt, q, k, v, ranges, out, lse)[0]
    yield "attention dq after a NaN", float((dq[:, others] != good[:, others]).sum()), 0.0


def ring(rng: np.random.Generator) -> Iterator[Finding]:
    """Two blocks of keys merged, and their backward from the final output and log-sum-exp."""
    for B, S, T, H, K, D in ATTENTION[1:]:
        q, k, v, grad = (
            rng.normal(size=s).astype(np.float32) for s in ((B, S, H, D), (B, T, K, D), (B, T, K, D), (B, S, H, D))
        )
        cut = T // 2
        whole = np.broadcast_to(np.array([0, T], np.int32), (1, S, 2))
        whole = np.array(whole)
        whole[:, 0] = 0  # one query that no block shows anything to
        parts = [np.clip(whole - first, 0, last - first).astype(np.int32) for first, last in ((0, cut), (cut, T))]
        first = ops.attention(q, k[:, :cut], v[:, :cut], parts[0], out_f32=True)
        second = ops.attention(q, k[:, cut:], v[:, cut:], parts[1], out_f32=True)
        out, lse = ops.merge_blocks(*first, *second)
        delta = ops.attention_delta(grad, out)
        pieces = [
            ops.attention_backward(grad, q, k[:, s], v[:, s], r, out, lse, delta=delta, out_f32=True)
            for s, r in zip((slice(0, cut), slice(cut, T)), parts, strict=True)
        ]
        visible = reference.visible_keys(whole, T)

        def define(kind: type, which: int) -> Any:
            a = [x.astype(kind) for x in (q, k, v, grad)]
            out, lse = reference.attention(*a[:3], visible)
            if which < 2:
                return (out, np.where(np.isfinite(lse), lse, 0.0))[which]
            return reference.attention_backward(a[3], *a[:3], visible, out, lse)[which - 2]

        name = f"{(B, S, T, H, K, D)}"
        yield judged(f"merged {name}", out, lambda kind: define(kind, 0))
        yield judged(f"merged lse {name}", np.where(np.isfinite(lse), lse, 0.0), lambda kind: define(kind, 1))
        gradients = pieces[0][0] + pieces[1][0], *(np.concatenate(d, 1) for d in list(zip(*pieces, strict=True))[1:])
        for i, d in enumerate(gradients):
            yield judged(f"ring d{'qkv'[i]} {name}", d, lambda kind, i=i: define(kind, i + 2))


PAGED = (  # page size, H, K, D, and (new tokens, keys) of each sequence, single tokens first
    (4, 1, 1, 2, ((1, 1),)),
    (16, 4, 2, 64, ((1, 70), (1, 16), (1, 1), (33, 33), (5, 90))),
    (16, 8, 2, 64, ((1, 1500), (1, 512), (1, 513), (70, 1100))),
    (1, 4, 1, 6, ((1, 9), (3, 9))),
    (3, 3, 1, 17, ((1, 40), (2, 2), (67, 199))),
    (128, 16, 2, 128, ((1, 300), (130, 200))),
)


def pages(rng: np.random.Generator, dtype: np.dtype = F32) -> Iterator[Finding]:
    """Attention over pages in a mixed order, of keys and values that the call itself completes."""
    for size, H, K, D, sequences in PAGED:
        N, M = sum(n for n, _ in sequences), max(-(-length // size) for _, length in sequences)
        used = [-(-length // size) for _, length in sequences]
        order = rng.permutation(np.arange(1, sum(used) + 3)).astype(np.int32)  # two pages are nobody's
        tables = np.zeros((len(sequences), M), np.int32)
        for row, count in enumerate(used):
            tables[row, :count] = order[sum(used[:row]) : sum(used[: row + 1])]
        starts = np.cumsum([0, *(n for n, _ in sequences)]).astype(np.int32)
        lengths = np.array([length for _, length in sequences], np.int32)
        places = np.concatenate([np.arange(length - n, length) for n, length in sequences])
        owner = np.repeat(np.arange(len(sequences)), np.diff(starts))
        slots = (tables[owner, places // size] * size + places % size).astype(np.int32)
        q, k, v = (rng.normal(size=s).astype(dtype) for s in ((1, H, N, D), (1, N, K, D), (1, N, K + 1, D)))
        q, v = q.transpose(0, 2, 1, 3), v[:, :, 1:]  # as they come out of views: not contiguous
        kept = [rng.normal(size=(len(order) + 1, size, K, D)).astype(dtype) for _ in "kv"]
        for room in kept:
            room[0] = np.nan  # nobody reads the blank page here
            room[order[-2:]] = np.nan
        given = (slots, starts, lengths, tables)

        def define(kind: type) -> Any:
            return reference.paged_attention(*(x.astype(kind) for x in (q, k, v, *kept)), *given)

        name = f"{(size, H, K, D)} {dtype}"
        held = [room.copy() for room in kept]
        singles = sum(n == 1 for n, _ in sequences)
        got = ops.paged_attention(q, k, v, *held, *given, singles)
        yield judged(f"paged {name}", got, define, dtype)
        for room, before, new in zip(held, kept, (k, v), strict=True):
            expected = before.copy()
            expected.reshape(-1, K, D)[slots] = new[0]
            np.testing.assert_array_equal(room.view(np.uint8), expected.view(np.uint8))
            alone = before.copy()
            ops.store_rows(alone, new[0], slots.astype(np.int64))
            np.testing.assert_array_equal(alone.view(np.uint8), expected.view(np.uint8))
        # A sequence's bits are its own, also when its last token comes alone.
        for row, (n, _) in enumerate(sequences):
            mine = slice(starts[row], starts[row + 1])
            x = (a[:, mine] for a in (q, k, v))
            alone = np.array([0, n], np.int32), lengths[row : row + 1], tables[row : row + 1]
            again = ops.paged_attention(*x, *held, slots[mine], *alone, int(n == 1))
            np.testing.assert_array_equal(again.view(np.uint8), got[:, mine].view(np.uint8))
