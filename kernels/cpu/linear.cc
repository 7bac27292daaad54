// Matrix products of bfloat16 operands with float32 sums: by AMX tiles where the processor has them and the system
// grants their state, by AVX512-BF16 dot products, or widened to float32.
//
// Both operands are packed in pairs along k, which is what either instruction multiplies: w once per call, rows of a by
// blocks. Sums over k run in one order, by kDepth pairs, whatever the threads: the bits do not depend on their number.
#include "tiles.h"
#include "types.h"

namespace {

constexpr int64_t kRows = W == 16 ? 12 : 4;  // rows of x per register tile, times two vectors of outputs
constexpr int64_t kDepth = 256;   // pairs per pass: a strip of w (32 KiB with AVX-512) stays in L1
constexpr int64_t kBlock = 192;   // rows per pass, half of it for long k, so that they stay in L2
constexpr int64_t kTileBlock = 384;  // by tiles, which read w as often as there are blocks: L2 holds 2 MiB beside them
constexpr int64_t kWidth = 2 * W;  // outputs of a strip
constexpr int64_t kFewColumns = 768;  // for up to so many, tiles take rows of x where they are: a copy would not pay

// A buffer of pairs kept between calls: page faults on fresh memory cost as much as the packing.
struct Buffer {
  uint32_t *room(size_t size) {
    if (held.size() < size) {
      decltype(held)().swap(held);  // its numbers are of the call before, and would be copied
      held.resize(size);
    }
    return reinterpret_cast<uint32_t *>(held.data());
  }
  Floats held;
};
thread_local Buffer packed_w, packed_a;

// A matrix of bfloat16 whose element (i, p) is data[i * row + p * column]; p runs along k.
struct Operand {
  const uint16_t *data;
  int64_t row, column, k;

  uint32_t pair(int64_t i, int64_t p) const {
    const uint16_t *at = data + i * row + 2 * p * column;
    return at[0] | (2 * p + 1 < k ? uint32_t(at[column]) << 16 : 0);
  }
};

// to [W, W] (rows to_row apart) = the pairs [from, from + W) of rows [first, first + W), all of which exist, with the
// pairs in rows (``down``) or the matrix's rows in rows. Bits are only moved: a NaN stays what it is.
inline void pack_block(const Operand &x, int64_t first, int64_t from, bool down, uint32_t *to, int64_t to_row) {
  if (x.column == 1) {  // pairs lie together in memory; rows are W of them
    const uint16_t *at = x.data + first * x.row + 2 * from;
    if (down && x.row % 2 == 0) {
      transpose_block(reinterpret_cast<const float *>(at), x.row / 2, reinterpret_cast<float *>(to), to_row);
      return;
    }
    alignas(64) uint32_t square[W * W];
    uint32_t *rows = down ? square : to;
    const int64_t stride = down ? W : to_row;
    for (int64_t i = 0; i < W; i++) std::memcpy(rows + i * stride, at + i * x.row, W * sizeof(uint32_t));
    if (down) transpose_block(reinterpret_cast<float *>(square), W, reinterpret_cast<float *>(to), to_row);
    return;
  }
  // Elements of different rows lie together: two steps of k are woven into W pairs.
  alignas(64) uint32_t square[W * W];
  uint32_t *pairs = down ? to : square;
  const int64_t stride = down ? to_row : W;
  for (int64_t p = 0; p < W; p++) {
    const uint16_t *low = x.data + first * x.row + 2 * (from + p) * x.column;
    vh a, b;
    std::memcpy(&a, low, sizeof a), std::memcpy(&b, low + x.column, sizeof b);
    const vu woven = __builtin_convertvector(a, vu) | __builtin_convertvector(b, vu) << 16;
    std::memcpy(pairs + p * stride, &woven, sizeof woven);
  }
  if (!down) transpose_block(reinterpret_cast<float *>(square), W, reinterpret_cast<float *>(to), to_row);
}

// Pairs [from, from + pairs) of the ``count`` rows from ``first`` on, of ``rows`` places for them; what does not exist
// is zero. down: to [pairs, rows], else [rows, pairs], its rows to_row apart.
void pack(const Operand &x, int64_t first, int64_t count, int64_t rows, int64_t from, int64_t pairs, bool down,
          uint32_t *to, int64_t to_row) {
  const int64_t whole = x.k / 2 / W * W;  // pairs in whole blocks
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t p = 0; p < pairs; p += W) {
      uint32_t *block = down ? to + p * to_row + i : to + i * to_row + p;
      if (i + W <= count && from + p + W <= whole) {
        pack_block(x, first + i, from + p, down, block, to_row);
        continue;
      }
      for (int64_t r = 0; r < std::min<int64_t>(W, rows - i); r++)
        for (int64_t c = 0; c < std::min<int64_t>(W, pairs - p); c++)
          block[down ? c * to_row + r : r * to_row + c] =
            i + r < count && 2 * (from + p + c) < x.k ? x.pair(first + i + r, from + p + c) : 0;
    }
}

// ``rows`` rows from ``first`` on in pairs of tiles, for each [pairs / 16][kTilePair][16]; what does not exist is zero.
void pack_tiles(const Operand &x, int64_t first, int64_t rows, int64_t pairs, uint32_t *to) {
  constexpr int64_t kSteps = 16;  // pairs of a tile
  for (int64_t i = 0; i < rows; i += kTilePair, to += kTilePair * pairs)
    for (int64_t p = 0; p < pairs; p += kSteps)
      pack(x, first + i, std::min(kTilePair, rows - i), kTilePair, p, kSteps, false, to + p * kTilePair, kSteps);
}

// sum + low(pair) * w[., 0] + high(pair) * w[., 1] per lane; ``pair`` holds two bfloat16 of x.
inline vf dot_pairs(vf sum, uint32_t pair, const uint32_t *w) {
#if defined(__AVX512BF16__)
  __m512bh a = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
  __m512bh b = (__m512bh)_mm512_loadu_si512(w);
  return (vf)_mm512_dpbf16_ps((__m512)sum, a, b);
#else
  vu both;
  std::memcpy(&both, w, sizeof both);
  const uint32_t low = pair << 16, high = pair & 0xffff0000u;
  float first, second;
  std::memcpy(&first, &low, 4), std::memcpy(&second, &high, 4);
  sum += (vf)(both << 16) * splat(first);
  return sum + (vf)(both & 0xffff0000u) * splat(second);
#endif
}

// c [ROWS, kWidth] (+)= x [ROWS, pairs] w [pairs, kWidth].
template <int ROWS>
void block(const uint32_t *x, int64_t x_row, const uint32_t *w, int64_t pairs, float *c, bool add) {
  vf sum[ROWS][2];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) sum[i][j] = add ? load(c + i * kWidth + j * W) : splat(0.0f);
  for (int64_t p = 0; p < pairs; p++, w += kWidth)
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
      const uint32_t pair = x[i * x_row + p];
      sum[i][0] = dot_pairs(sum[i][0], pair, w), sum[i][1] = dot_pairs(sum[i][1], pair, w + W);
    }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) store(c + i * kWidth + j * W, sum[i][j]);
}

// Rows of the left operand for products in tiles: whole pairs of tiles lie in the matrix itself where it has that form,
// ``direct`` of them; those after them are packed, for each pair of tiles [pairs / 16][kTilePair][16].
struct Left {
  const uint32_t *matrix, *packed;
  int64_t row, direct, pairs;

  TileRows from(int64_t i, int64_t pair) const {
    if (i < direct) return {matrix + i * row + pair, row, 16};
    return {packed + (i - direct) * pairs + pair * kTilePair, 16, 16 * kTilePair};
  }
};

// c [rows, kWidth] = x w [pairs, kWidth]; rows are a multiple of two tiles'. ``done`` is called with the first of every
// 32 rows that are complete, one product late: its vectors then work beside the tiles.
template <typename Done>
void strip_in_tiles(const Left &x, const uint32_t *w, int64_t rows, float *c, const Done &done) {
  const int64_t panels = rows / kTilePair, share = (32 + panels - 1) / panels;  // lines of a step of the next depth
  for (int64_t from = 0; from < x.pairs; from += kDepth)
    for (int64_t i = 0; i < rows; i += kTilePair) {
      const int64_t depth = std::min(kDepth, x.pairs - from);
      const uint32_t *panel = w + from * kWidth, *ahead = panel + depth * (kWidth + i / kTilePair * share);
      multiply_tiles(x.from(i, from), panel, depth, c + i * kWidth, from > 0, ahead, share);
      if (i > 0 && from + kDepth >= x.pairs) done(i - kTilePair);
    }
  done(rows - kTilePair);
}

// c [rows, kWidth] = x [rows, pairs] w [pairs, kWidth].
void strip(const uint32_t *x, int64_t x_row, const uint32_t *w, int64_t rows, int64_t pairs, float *c) {
  for (int64_t from = 0; from < pairs; from += kDepth) {
    const int64_t depth = std::min(kDepth, pairs - from);
    const uint32_t *strip = w + from * kWidth;
    // The last rows are not taken one by one: two sums are fewer than a dot product takes cycles.
    int64_t i = 0;
    const auto take = [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      for (; i + kCount <= rows; i += kCount)
        block<kCount>(x + i * x_row + from, x_row, strip, depth, c + i * kWidth, from > 0);
    };
    take(std::integral_constant<int, kRows>{});
    if constexpr (kRows > 8) take(std::integral_constant<int, 8>{});
    if constexpr (kRows > 4) take(std::integral_constant<int, 4>{});
    take(std::integral_constant<int, 2>{});
    take(std::integral_constant<int, 1>{});
  }
}

}  // namespace

// in: a [m, k] or, with scalar[0], [k, m]; w [n, k] or, with scalar[1], [k, n]; both bfloat16; out: [m, n] in the dtype
// of the output, sums in float32
KERNEL(matmul_bf16, 2, 1, 2) {
  const bool turn_a = scalar[0] != 0, turn_w = scalar[1] != 0;
  const int64_t m = in[0].shape[turn_a ? 1 : 0], k = in[0].shape[turn_a ? 0 : 1], n = in[1].shape[turn_w ? 1 : 0];
  const Operand a{in[0].as<uint16_t>(), turn_a ? 1 : k, turn_a ? m : 1, k};
  const Operand b{in[1].as<uint16_t>(), turn_w ? 1 : k, turn_w ? n : 1, k};
  const bool tiles = has_tiles(), direct = !turn_a && k % 32 == 0 && n <= kFewColumns;
  const int64_t pairs = std::max<int64_t>(1, (k + 31) / 32) * 16;  // whole tiles
  const int64_t height = (tiles ? kTileBlock : kBlock) / (pairs <= 1024 ? 1 : 2);
  const int64_t strips = (n + kWidth - 1) / kWidth, blocks = (m + height - 1) / height;
  // The strips [first, last), in the order of memory.
  const auto pack_strips = [&](int64_t first, int64_t last, uint32_t *to) {
    const int64_t some = turn_w ? 16 : pairs;
    for (int64_t p = 0; p < pairs; p += some)
      for (int64_t s = first; s < last; s++)
        pack(b, s * kWidth, std::min(kWidth, n - s * kWidth), kWidth, p, some, true,
             to + ((s - first) * pairs + p) * kWidth, kWidth);
  };
  // With one block of rows a strip is used once: it is packed on its way through the caches, not before in memory.
  const bool once = blocks == 1;
  uint32_t *w = once ? nullptr : packed_w.room(strips * kWidth * pairs);
  if (!once)
    parallel(strips, 4, [&](int64_t first, int64_t last, int) {
      pack_strips(first, last, w + first * kWidth * pairs);
    });
  const bool by_rows = !once && blocks >= threads_for(blocks * strips, 1);
  const int64_t x_row = pairs + 16;  // rows a power of two apart would share few sets of the cache
  // Rows [top, bottom) of the strips [begin, end).
  const auto part = [&](int64_t top, int64_t bottom, int64_t begin, int64_t end) {
    uint32_t *x = packed_a.room(height * x_row), *own = once ? packed_w.room(kWidth * pairs) : nullptr;
    alignas(64) float sums[std::max(kBlock, kTileBlock) * kWidth];
    const Tiles configured(tiles);
    for (int64_t from = top; from < bottom; from += height) {
      const int64_t rows = std::min(height, bottom - from);
      const int64_t whole = direct ? rows / kTilePair * kTilePair : 0;
      const Left left{reinterpret_cast<const uint32_t *>(a.data + from * a.row), x, k / 2, whole, pairs};
      if (tiles)
        pack_tiles(a, from + whole, rows - whole, pairs, x);
      else
        pack(a, from, rows, rows, 0, pairs, false, x, x_row);
      for (int64_t s = begin; s < end; s++) {
        if (once) pack_strips(s, s + 1, own);
        const uint32_t *panel = once ? own : w + s * kWidth * pairs;
        const int64_t columns = std::min(kWidth, n - s * kWidth);
        const auto write = [&](int64_t first, int64_t last) {
          with_type(out[0].dtype, [&](auto *t) {
            auto *o = out[0].as<std::remove_pointer_t<decltype(t)>>() + from * n + s * kWidth;
            for (int64_t r = first; r < last; r++)
              for (int64_t j = 0; j < columns; j += W)
                put(o + r * n + j, load(sums + r * kWidth + j), static_cast<int>(std::min<int64_t>(W, columns - j)));
          });
        };
        if (tiles) {
          strip_in_tiles(left, panel, (rows + kTilePair - 1) / kTilePair * kTilePair, sums,
                         [&](int64_t i) { write(i, std::min(rows, i + kTilePair)); });
        } else {
          strip(x, x_row, panel, rows, pairs, sums);
          write(0, rows);
        }
      }
    }
  };
  if (by_rows) {
    const int64_t some = tiles ? 2 * kTilePair : kBlock / 4;  // rows
    parallel_guided((m + some - 1) / some, 1, [&](int64_t first, int64_t last) {
      part(first * some, std::min(m, last * some), 0, strips);
    });
  } else {
    const int64_t grain = once ? std::max<int64_t>(1, strips / (2 * threads_for(strips, 1))) : 1;  // each piece packs a
    parallel(strips, grain, [&](int64_t first, int64_t last, int) { part(0, m, first, last); });
  }
}
