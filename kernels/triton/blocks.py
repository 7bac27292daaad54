"""Tile sizes as a pure function of operator, dtype, sizes and target, with the memory that the tiles occupy.

On a GPU, tiles have about 16 elements per thread: 16-byte loads, no register spilling. On Ascend, a vector core works
in a unified buffer of 192 KiB, and the largest tiles are chosen that fit by a conservative count: a tile that is loaded
or stored counts twice (double buffering), a float32 intermediate once. The interpreter's tiles are small, so that small
test inputs exercise every loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

UNIFIED_BUFFER = 192 * 1024  # bytes per vector core of Atlas A2 (Ascend 910B)
TILE_BUDGET = UNIFIED_BUFFER - 8 * 1024  # bytes; the rest holds row vectors, scalars and compiler temporaries


class Target(NamedTuple):
    """``kind``: "gpu", "ascend" or "interpreter"; ``cores``: multiprocessors or vector cores; ``matrix_cores``:
    multiprocessors or cube cores (Ascend has two vector cores per cube core)."""

    kind: str
    cores: int
    matrix_cores: int


INTERPRETER = Target("interpreter", 3, 3)
ASCEND_910B3 = Target("ascend", 40, 20)
H200 = Target("gpu", 132, 132)


class Tiles(NamedTuple):
    """``constants``: the kernel's compile-time arguments; ``max_programs``: bound of the grid (0: one program per
    tile); ``buffer``: counted bytes in Ascend's unified buffer."""

    constants: Mapping[str, int | str]
    warps: int
    stages: int
    max_programs: int
    buffer: int


def choose(operator: str, itemsize: int, sizes: Mapping[str, int], target: Target) -> Tiles:
    """The tiles of ``operator`` (a key of RULES) for inputs of ``itemsize`` bytes per element.

    ``sizes``: the sizes on which the tiles depend: E channels, D head dim, H heads, C columns. Raises ValueError for an
    unknown operator, AssertionError when the smallest tiles do not fit.
    """
    if operator not in RULES:
        raise ValueError(f"operator: got {operator!r}, needs one of {', '.join(RULES)}")
    tiles = RULES[operator](itemsize, sizes, target)
    if target.kind == "ascend":
        assert tiles.buffer <= TILE_BUDGET, f"{operator} {tiles}: exceeds {TILE_BUDGET} bytes of the unified buffer"
    return tiles


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def tile_bytes(elements: int, moved: int, work: int) -> int:
    """Bytes of tiles of ``elements``: ``moved`` bytes per element loaded or stored, twice; ``work`` float32 tiles."""
    return elements * (2 * moved + 4 * work)


def _halvings(most: int, least: int) -> Iterator[int]:
    size = most
    while size >= least:
        yield size
        size //= 2


def _warps(elements: int, most: int = 16) -> int:
    return min(most, max(1, power_of_two(elements // (32 * 16))))


def _norm(moved: int, vectors: int, work: int, sums: int, itemsize: int, E: int, target: Target) -> Tiles:
    """Row tiles: ``moved`` in the inputs' dtype, ``vectors`` of parameters, ``work`` float32 intermediates, ``sums``
    of parameter gradients kept over rows."""
    whole = power_of_two(E)
    if target.kind == "interpreter":
        fits = whole <= 64
        return Tiles({"ROWS": 2, "BLOCK": whole if fits else 32, "WHOLE": int(fits)}, 1, 1, target.cores, 0)
    if target.kind == "gpu":
        largest = 8192 if sums else 16384
        fits = whole <= largest
        block = whole if fits else 4096
        rows = max(1, min(16, 2048 // block)) if fits else 1
        warps = max(_warps(rows * block), 4)
        programs = target.cores * max(1, 16 // warps) if sums else 0
        # A backward prefetches the next rows into shared memory, of which two programs get 100 KiB each.
        ahead = next((n for n in (2, 1) if n * rows * block * (moved - 1) * itemsize <= 100 * 1024), 0) if sums else 0
        return Tiles({"ROWS": rows, "BLOCK": block, "WHOLE": int(fits)}, warps, 1 + ahead, programs, 0)

    def count(rows: int, block: int) -> int:
        return tile_bytes(rows * block, moved * itemsize, work + sums) + tile_bytes(block, 4 * vectors, 0)

    whole = max(whole, 64)
    for block in _halvings(whole, 64):
        if count(1, block) <= TILE_BUDGET or block == 64:
            break
    rows = 1
    while block == whole and rows < 16 and count(2 * rows, block) <= TILE_BUDGET:
        rows *= 2
    constants = {"ROWS": rows, "BLOCK": block, "WHOLE": int(block == whole)}
    return Tiles(constants, 1, 1, target.cores, count(rows, block))


def _norm_forward(itemsize: int, sizes: Mapping[str, int], target: Target) -> Tiles:
    # moved: x, out (and residual, stream); float32: the sum, its square, the result
    return _norm(4 if sizes.get("residual") else 2, 3, 3, 0, itemsize, sizes["E"], target)


def _norm_backward(itemsize: int, sizes: Mapping[str, int], target: Target) -> Tiles:
    # moved: grad, x, dx (and the stream's gradient); float32: grad, g, n, dx; sums: dweight, dbias
    return _norm(4 if sizes.get("residual") else 3, 2, 4, 2, itemsize, sizes["E"], target)


def _norm_weight(itemsize: int, sizes: Mapping[str, int], target: Target) -> Tiles:
    """The weight's gradient where a row does not fit in a tile: blocks of columns, 8 rows at a time."""
    rows, block = (2, 32) if target.kind == "interpreter" else (8, 512)
    buffer = tile_bytes(rows * block, 2 * itemsize, 5) + tile_bytes(block, 4, 2) if target.kind == "ascend" else 0
    return Tiles({"ROWS": rows, "BLOCK": block}, 8, 1, 0, buffer)


def _rope(itemsize: int, sizes: Mapping[str, int], target: Target) -> Tiles:
    half = power_of_two(sizes["D"] // 2)
    heads = power_of_two(sizes["H"])
    if target.kind == "interpreter":
        return Tiles({"HEADS": 2, "HALF": half}, 1, 1, target.cores, 0)
    if target.kind == "gpu":
        heads = min(heads, max(1, 4096 // half))
        return Tiles({"HEADS": heads, "HALF": half}, _warps(2 * heads * half, 8), 1, 0, 0)

    def count(heads: int) -> int:
        return tile_bytes(heads * half, 4 * itemsize, 4) + tile_bytes(half, 16, 4)  # a, b in and out; tables, scales

    heads = next(h for h in _halvings(heads, 1) if count(h) <= TILE_BUDGET or h == 1)
    return Tiles({"HEADS": heads, "HALF": half}, 1, 1, target.cores, count(heads))


def _elementwise(moved: int, fixed: int, work: int, itemsize: int, target: Target, most: int) -> Tiles:
    """``moved`` tiles in the inputs' dtype and ``fixed`` further bytes per element."""
    if target.kind == "interpreter":
        return Tiles({"BLOCK": 32}, 1, 1, target.cores, 0)
    if target.kind == "gpu":
        return Tiles({"BLOCK": most}, _warps(most, 8), 1, 0, 0)
    for block in _halvings(16384, 256):
        buffer = tile_bytes(block, moved * itemsize + fixed, work)
        if buffer <= TILE_BUDGET:
            break
    return Tiles({"BLOCK": block}, 1, 1, target.cores, buffer)


def _pointwise(itemsize: int, sizes: Mapping[str, int], target: Target) -> Tiles:
    return _elementwise(5, 0, 5, itemsize, target, 2048)  # swiglu's backward, the widest: three in, two out


def _adamw(itemsize: int, sizes: Mapping[str, int], target: Target) -> Tiles:
    return _elementwise(2, 24, 5, itemsize, target, 1024)  # grad and copy; master, m, v in and out


def _cross_entropy_forward(itemsize: int, sizes: Mapping[str, int], target: Target) -> Tiles:
    tiles = _elementwise(1, 0, 4, itemsize, target, 4096)
    block = min(int(tiles.constants["BLOCK"]), max(64, power_of_two(sizes["C"])))
    stages = 3 if target.kind == "gpu" else 1  # software pipelining over the blocks of a row
    return tiles._replace(constants={"BLOCK": block}, warps=_warps(block, 8), stages=stages)


def _cross_entropy_backward(itemsize: int, sizes: Mapping[str, int], target: Target) -> Tiles:
    tiles = _elementwise(2, 0, 4, itemsize, target, 4096)
    block = min(int(tiles.constants["BLOCK"]), max(64, power_of_two(sizes["C"])))
    return tiles._replace(constants={"BLOCK": block}, warps=_warps(block, 8))


def _embedding(itemsize: int, sizes: Mapping[str, int], target: Target) -> Tiles:
    if target.kind == "interpreter":
        return Tiles({"ROWS": 2, "BLOCK": 32}, 1, 1, target.cores, 0)
    block = min(1024, max(64, power_of_two(sizes["E"])))
    if target.kind == "gpu":
        return Tiles({"ROWS": 4, "BLOCK": block}, _warps(4 * block, 8), 1, 0, 0)
    return Tiles({"ROWS": 8, "BLOCK": block}, 1, 1, target.cores, tile_bytes(8 * block, itemsize, 2) + 4 * block)


def _matrix(
    target: Target, D: int, itemsize: int, gpu: tuple[int, int, int, int], tiles: tuple[int, int, int]
) -> Tiles:
    """Tiles of an attention kernel. ``gpu``: BLOCK_M, BLOCK_N, warps, stages at head dim 128 and 2-byte elements.

    ``tiles``, for Ascend: the numbers of score tiles in float32, score tiles in the inputs' dtype, and [BLOCK, D]
    accumulators in float32. Operands of matrix products are in the cube core's buffers, not in the unified buffer.
    """
    width = max(16, power_of_two(D))
    if target.kind == "interpreter":
        return Tiles({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_D": width, "PRECISION": "ieee"}, 1, 1, target.cores, 0)
    if target.kind == "gpu":
        m, n, warps, stages = gpu
        if itemsize == 4 or width > 128:
            m, n, stages = min(m, 64), min(n, 64), 2 if itemsize == 2 else 1
        if itemsize == 4:
            m, n = (32, 32) if width > 128 else (m, 32)
        return Tiles({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": width, "PRECISION": "tf32x3"}, warps, stages, 0, 0)
    wide, narrow, sums = tiles
    for m, n in ((128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (16, 32), (16, 16)):
        scores = m * n * (4 * wide + itemsize * narrow)
        buffer = scores + max(m, n) * width * 4 * sums + max(m, n) * 4 * 16  # plus 16 row vectors
        if buffer <= TILE_BUDGET:
            break
    constants: dict[str, int | str] = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": width, "PRECISION": "ieee"}
    return Tiles(constants, 1, 1, target.matrix_cores, buffer)


def _attention_forward(itemsize: int, sizes: Mapping[str, int], target: Target) -> Tiles:
    # float32: scores, probabilities; rounded: probabilities; accumulators: output, the added product, the result
    return _matrix(target, sizes["D"], itemsize, (128, 64, 8, 3), (2, 1, 3))


def _attention_dq(itemsize: int, sizes: Mapping[str, int], target: Target) -> Tiles:
    return _matrix(target, sizes["D"], itemsize, (128, 64, 8, 3), (3, 1, 3))


def _attention_dkdv(itemsize: int, sizes: Mapping[str, int], target: Target) -> Tiles:
    return _matrix(target, sizes["D"], itemsize, (64, 128, 8, 2), (3, 2, 5))


def _attention_rows(itemsize: int, sizes: Mapping[str, int], target: Target) -> Tiles:
    """Row kernels (delta, merge): rows of one head, two tiles in and one out, at most float32."""
    width = max(16, power_of_two(sizes["D"]))
    if target.kind == "interpreter":
        return Tiles({"ROWS": 16, "BLOCK_D": width}, 1, 1, target.cores, 0)
    if target.kind == "gpu":
        rows = max(1, 4096 // width)
        return Tiles({"ROWS": rows, "BLOCK_D": width}, 8, 1, 0, 0)
    for rows in _halvings(128, 8):
        buffer = tile_bytes(rows * width, 12, 3) + rows * 4 * 16
        if buffer <= TILE_BUDGET:
            break
    return Tiles({"ROWS": rows, "BLOCK_D": width}, 1, 1, target.cores, buffer)


RULES = {
    "norm_forward": _norm_forward,
    "norm_backward": _norm_backward,
    "norm_weight": _norm_weight,
    "rope": _rope,
    "pointwise": _pointwise,
    "attention_forward": _attention_forward,
    "attention_dq": _attention_dq,
    "attention_dkdv": _attention_dkdv,
    "attention_rows": _attention_rows,
    "cross_entropy_forward": _cross_entropy_forward,
    "cross_entropy_backward": _cross_entropy_backward,
    "embedding": _embedding,
    "adamw": _adamw,
}
